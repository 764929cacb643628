"""Captioning: written at once, resumed after a stop, never over a person's words; the endpoint's faults are survived."""

from __future__ import annotations

import errno
import json
import threading

import pytest
from PIL import Image

from data_tools.atomic_files import whole_file
from data_tools.caption_prompts import caption_prompt, thinking_prompt
from data_tools.captioners import CAPTIONERS, Answer, captioner
from data_tools.captioners.endpoint import EndpointCaptioner
from data_tools.captioners.file_name import words_of_name
from data_tools.captions import caption_pictures, with_trigger
from data_tools.errors import BadInput, BrushworkError, DataError
from data_tools.scan import scan_folder
from data_tools.thinking import read_record, thinking_path
from tests.data_tools.opened_here import open_here
from tests.data_tools.pictures import draw, save
from tests.data_tools.stand_in import completion, picture_of, serving

PROMPT = caption_prompt("style", "en")


@pytest.fixture(autouse=True)
def opened_here(monkeypatch):
    open_here(monkeypatch)


@pytest.fixture
def bare(tmp_path):
    root = tmp_path / "bare"
    for i in range(6):
        save(root / f"shape_{i}.png", 60 + i, 48, seed=i)
    return root


def records(root):
    return scan_folder(root, workers=1).records


def endpoint(url, **options):
    return EndpointCaptioner(url, "m", **{"first_wait": 0.0, "seconds": 60.0} | options)


def texts(root):
    return {path.name: path.read_text(encoding="utf-8").strip() for path in root.glob("*.txt")}


def by_width(number, body):
    return completion(f"The image shows a shape {picture_of(body).width} wide.")


def test_each_picture_gets_its_own_caption_cleaned_and_known_as_a_models(bare):
    with serving(by_width) as (url, server):
        report = caption_pictures(records(bare), endpoint(url), PROMPT, trigger="brndx")
    assert texts(bare) == {f"shape_{i}.txt": f"brndx, A shape {60 + i} wide." for i in range(6)}
    assert len(report.written) == 6 and report.failed == [] and report.kept == []
    assert (report.tokens_in, report.tokens_out) == (4200, 120) and report.cost(1.0, 10.0) == pytest.approx(0.0054)
    assert report.rate > 0 and server.most_busy <= 4
    found = records(bare)
    assert {c.source for r in found for c in r.captions} == {"model"}
    assert "style" in server.requests[0]["messages"][0]["content"] and server.requests[0]["model"] == "m"


def test_requests_go_out_several_at_a_time(bare):
    together = threading.Barrier(3)

    def replies(number, body):
        if number < 3:
            together.wait(60)
        return completion("Three answers that had to wait for each other.")

    with serving(replies) as (url, server):
        caption_pictures(records(bare)[:3], endpoint(url, concurrency=3), PROMPT)
    assert server.most_busy == 3 and len(texts(bare)) == 3


FAULTS = {
    "429 with Retry-After": (429, {"Retry-After": "0.01"}, b'{"error": {"message": "slow down"}}'),
    "429 with a date": (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""),
    "500": (500, {}, b"<html>oops</html>"), "502": (502, {}, b""), "503": (503, {}, b"busy"), "504": (504, {}, b""), "408": (408, {}, b""),
    "not JSON": (200, {}, b"hello"), "half JSON": (200, {}, b'{"choices": [{"mess'), "no choices": (200, {}, b'{"choices": []}'), "null": (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    "a list": (200, {}, b"[]"), "an error with 200": (200, {}, b'{"error": "no"}'), "deep": (200, {}, b"[" * 100_000),
    "half an answer": "half", "reset": "reset", "hang": "hang", "drip": "drip",
}
ENDLESS = ("hang", "drip")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_costs_no_picture(bare, fault):
    with serving(lambda number, body: FAULTS[fault] if number in (0, 2) else by_width(number, body)) as (url, server):
        report = caption_pictures(records(bare)[:2], endpoint(url, concurrency=1, **({"seconds": 0.5, "tries": 20} if fault in ENDLESS else {})), PROMPT)
    # Where only the clock ends a request, a busy machine may end a good one too, which is then asked for once more.
    assert len(report.written) == 2 and report.failed == [] and (len(server.requests) == 4 or fault in ENDLESS and len(server.requests) > 4)


def test_waits_double_and_obey_the_server(bare):
    waits = []
    answers = {0: (500, {}, b""), 1: (500, {}, b""), 2: (429, {"Retry-After": "7"}, b"")}
    with serving(lambda number, body: answers.get(number) or by_width(number, body)) as (url, _):
        caption_pictures(records(bare)[:1], endpoint(url, first_wait=1.0, sleep=waits.append), PROMPT)
    assert 1 <= waits[0] <= 1.25 and 2 <= waits[1] <= 2.5 and 7 <= waits[2] <= 8.75


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_for_good_stops_at_once_with_the_servers_words(bare, status):
    with serving(lambda number, body: (status, {}, b'{"error": {"message": "no such model"}}')) as (url, server):
        with pytest.raises(BrushworkError, match="no such model"):
            caption_pictures(records(bare), endpoint(url, concurrency=1), PROMPT)
    assert len(server.requests) == 1


def test_an_endpoint_that_keeps_failing_stops_the_run_and_a_second_run_does_only_the_rest(bare):
    with serving(lambda number, body: by_width(number, body) if number < 2 else (500, {}, b"")) as (url, server):
        with pytest.raises(BrushworkError, match="keeps failing"):
            caption_pictures(records(bare), endpoint(url, concurrency=1, tries=2), PROMPT)
    done = texts(bare)
    assert len(done) == 2 and len(server.requests) == 2 + 4 * 2
    with serving(by_width) as (url, server):
        report = caption_pictures(records(bare), endpoint(url), PROMPT)
    assert len(server.requests) == 4 and len(report.kept) == 2 and len(texts(bare)) == 6 and done.items() <= texts(bare).items()


def test_a_stop_in_the_middle_keeps_what_was_written(bare):
    class Stopping:
        name, model, follows_prompts = "stopping", "m", True

        def answers(self, requests):
            for number, request in enumerate(requests):
                if number == 3:
                    raise KeyboardInterrupt
                yield request, Answer(f"A fine picture number {number}.")

    with pytest.raises(KeyboardInterrupt):
        caption_pictures(records(bare), Stopping(), PROMPT)
    assert len(texts(bare)) == 3


def test_a_persons_caption_is_kept_unless_all_is_said(bare):
    (bare / "shape_0.txt").write_text("my own words")
    with serving(by_width) as (url, _):
        caption_pictures(records(bare), endpoint(url), PROMPT)
        caption_pictures(records(bare), endpoint(url), caption_prompt("everything", "en"), overwrite="model")
        assert texts(bare)["shape_0.txt"] == "my own words"
        report = caption_pictures(records(bare), endpoint(url), PROMPT, overwrite="all")
        assert texts(bare)["shape_0.txt"].startswith("A shape") and len(report.kept) < 6


def test_a_models_caption_that_somebody_edits_becomes_a_persons(bare):
    with serving(by_width) as (url, _):
        caption_pictures(records(bare), endpoint(url), PROMPT)
        (bare / "shape_1.txt").write_text("corrected by hand")
        caption_pictures(records(bare), endpoint(url), caption_prompt("everything", "en"), overwrite="model")
    assert texts(bare)["shape_1.txt"] == "corrected by hand"
    assert [c.source for r in records(bare) if r.path.stem == "shape_1" for c in r.captions] == ["person"]


def test_a_refusal_is_asked_again_in_plain_words_and_then_listed(bare):
    with serving(lambda number, body: completion("I'm sorry, I can't help with that.")) as (url, server):
        report = caption_pictures(records(bare)[:1], endpoint(url), PROMPT)
    assert [item.reason for item in report.failed] == ["a refusal"] and texts(bare) == {} and len(server.requests) == 3
    assert server.requests[1]["messages"][-1]["content"][1]["text"] != server.requests[0]["messages"][-1]["content"][1]["text"]


def test_a_caption_cut_by_its_limit_ends_with_a_whole_sentence(bare):
    with serving(lambda number, body: completion("A fox sits here. It looks to the", finish="length")) as (url, _):
        caption_pictures(records(bare)[:1], endpoint(url), PROMPT)
    assert texts(bare) == {"shape_0.txt": "A fox sits here."}


def test_what_leaves_the_machine_is_small_and_without_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Secret Camera"
    draw(3000, 1500).save(tmp_path / "a.jpg", exif=exif)
    with serving(by_width) as (url, server):
        caption_pictures(records(tmp_path), endpoint(url), PROMPT)
    sent = picture_of(server.requests[0])
    assert sent.size == (1024, 512) and not sent.getexif() and b"Secret" not in str(server.requests[0]).encode()


def test_the_key_goes_into_the_header_and_nowhere_else(bare, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(lambda number, body: by_width(number, body) if number else (500, {}, b"")) as (url, server):
        caption_pictures(records(bare), endpoint(url), PROMPT)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert all("sk-very-secret" not in path.read_text(errors="replace") for path in bare.rglob("*") if path.suffix in (".txt", ".jsonl"))


THOUGHT = {
    "elements": [{"id": "e1", "name": "fox", "count": 1, "attributes": ["red"]}, {"id": "e2", "name": "bench", "count": 1, "attributes": []}], "relations": [{"a": "e1", "relation": "on", "b": "e2"}],
    "composition": "centred", "environment": "park", "lighting": "", "palette": ["red"], "style": ["flat"], "text": [], "details": [], "enhanced": "A red fox sits on a bench in a park.",
}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_thinking_records_are_written_beside_the_picture_and_read_back(bare, language):
    answer = THOUGHT | ({"enhanced": "一只红色的狐狸坐在公园的长椅上。"} if language == "zh" else {})
    with serving(lambda number, body: completion("```json\n" + json.dumps(answer, ensure_ascii=False) + "\n```")) as (url, server):
        caption_pictures(records(bare), endpoint(url), thinking_prompt(language))
    assert server.requests[0]["response_format"]["type"] == "json_schema"
    record = read_record(thinking_path(bare / "shape_0.png"))
    assert record.language == language and record.enhanced == answer["enhanced"] and [e.name for e in record.elements] == ["fox", "bench"] and record.trace and record.backend == "endpoint"
    assert [c.kind for c in records(bare)[0].captions] == ["thinking"] and texts(bare) == {}


def test_a_server_without_schemas_is_asked_in_words_and_plain_answers_are_taken_apart(bare):
    def replies(number, body):
        return (400, {}, b'{"error": "response_format"}') if "response_format" in body else completion("A red fox sits on a wooden bench.")

    with serving(replies) as (url, _):
        report = caption_pictures(records(bare)[:2], endpoint(url, concurrency=1), thinking_prompt("en"))
    assert report.failed == []
    record = read_record(thinking_path(bare / "shape_0.png"))
    assert record.backend == "endpoint+rules" and "fox" in [element.name for element in record.elements]


def test_an_invalid_thinking_answer_is_listed_and_writes_nothing(bare):
    broken = THOUGHT | {"relations": [{"a": "e1", "relation": "on", "b": "nobody"}]}
    with serving(lambda number, body: completion(json.dumps(broken))) as (url, _):
        report = caption_pictures(records(bare)[:1], endpoint(url), thinking_prompt("en"))
    assert "nobody" in report.failed[0].reason and not list(bare.glob("*.thinking.json"))


def test_a_second_language_lies_beside_the_first(bare):
    with serving(lambda number, body: completion("纸上的一个形状。" if "图" in body["messages"][0]["content"] else "A shape on paper.")) as (url, _):
        caption_pictures(records(bare), endpoint(url), PROMPT)
        caption_pictures(records(bare), endpoint(url), caption_prompt("style", "zh"), beside=True)
    found = records(bare)[0]
    assert found.caption == "A shape on paper." and [(c.text, c.language) for c in found.captions][1] == ("纸上的一个形状。", "zh")


def test_pictures_that_share_a_stem_get_captions_of_their_own(tmp_path):
    save(tmp_path / "a.png", 60, 48, seed=1)
    save(tmp_path / "a.jpg", 80, 48, seed=2)
    with serving(by_width) as (url, _):
        caption_pictures(records(tmp_path), endpoint(url), PROMPT)
    assert {r.path.name: r.caption for r in records(tmp_path)} == {"a.png": "A shape 60 wide.", "a.jpg": "A shape 80 wide."}


def test_file_names_become_captions_and_names_without_words_are_listed(tmp_path):
    for name in ("red_fox-on.bench_02.png", "IMG_20240101_123456.png", "RedHouse.png"):
        save(tmp_path / name, seed=len(name))
    report = caption_pictures(records(tmp_path), captioner("file-name"), PROMPT)
    assert texts(tmp_path) == {"red_fox-on.bench_02.txt": "red fox on bench", "RedHouse.txt": "Red House"}
    assert [item.path.name for item in report.failed] == ["IMG_20240101_123456.png"]
    assert {c.source for r in records(tmp_path) for c in r.captions} == {"file_name"}
    assert words_of_name("红狐狸_3") == "红狐狸"


@pytest.mark.parametrize(
    ("text", "trigger", "placement", "wanted"),
    [
        ("a fox", "brndx", "prefix", "brndx, a fox"), ("a fox", "brndx", "suffix", "a fox, brndx"), ("a fox", "brndx", "{caption} in {trigger} style", "a fox in brndx style"),
        ("BRNDX fox", "brndx", "prefix", "BRNDX fox"), ("一只狐狸", "brndx", "prefix", "brndx，一只狐狸"), ("a fox", None, "prefix", "a fox"), ("", "brndx", "prefix", "brndx"), ("a {trigger} fox", "x", "prefix", "x, a {trigger} fox"),
    ],
)
def test_the_trigger_goes_where_it_is_wanted(text, trigger, placement, wanted):
    got = with_trigger(text, trigger, placement)
    assert got == wanted or "{trigger}" in text


def test_captions_are_not_written_where_nobody_would_read_them(bare, tmp_path):
    from data_tools.convert import convert

    packed = records(convert(records(bare), tmp_path / "out", "zip").open_at)
    with pytest.raises(DataError, match="cannot be written into a zip set"):
        caption_pictures(packed, captioner("file-name"), PROMPT)


@pytest.mark.parametrize("name", [*CAPTIONERS[1:], "unknown"])
def test_what_a_captioner_lacks_is_said_before_anything_is_done(name):
    with pytest.raises(BadInput):
        captioner(name)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "file:///etc/passwd", "http://user:secret@host/v1"])
def test_an_address_that_is_none_is_refused_without_repeating_a_secret(url):
    with pytest.raises(BadInput) as caught:
        EndpointCaptioner(url, "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("overwrite", ["never", "model"])
@pytest.mark.parametrize("folder", [".", "10_dog"])
def test_words_that_cannot_be_read_are_not_written_over(tmp_path, folder, overwrite):
    """A person's caption in the encoding of an old computer looked like none, and was replaced."""
    for name, content in (("a", b"a caf\xe9"), ("b", b"a\x00b"), ("c", b" \r\n"), ("d", b"")):
        save(tmp_path / folder / f"red_{name}.png", seed=ord(name))
        (tmp_path / folder / f"red_{name}.txt").write_bytes(content)
    report = caption_pictures(records(tmp_path), captioner("file-name"), PROMPT, overwrite=overwrite)
    assert sorted(path.name for path in report.written) == ["red_c.png", "red_d.png"]
    assert [(left.path.name, "cannot be read" in left.reason) for left in report.failed] == [("red_a.png", True), ("red_b.png", True)]
    assert (tmp_path / folder / "red_a.txt").read_bytes() == b"a caf\xe9"
    caption_pictures(records(tmp_path), captioner("file-name"), PROMPT, overwrite="all")
    assert (tmp_path / folder / "red_a.txt").read_bytes() == b"red a\n"


def test_a_write_that_fails_names_the_file_and_not_its_temporary_one(tmp_path):
    with pytest.raises(OSError) as refused, whole_file(tmp_path / "x.txt") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))
    assert refused.value.filename == str(tmp_path / "x.txt")
