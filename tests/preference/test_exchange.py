"""Import and export: what goes out comes back, what is strange is named."""

import io
import json
import math

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from data_tools.errors import BadInput, BrushworkError, DataError
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import Judgement
from finetune.preference.exchange.forms import export_judgements, import_judgements
from tests.preference.pictures import colour_folder


@pytest.fixture
def rated(tmp_path):
    folder = colour_folder(tmp_path / "from", prompts=2, per_prompt=4)
    log = folder.log()
    log.append(Judgement("ada", "pair", "p0", "a picture 0", ("c0-0", "c0-1"), choice="c0-1"))
    log.append(Judgement("bo", "pair", "p0", "a picture 0", ("c0-0", "c0-1"), tie=True))
    log.append(Judgement("ada", "pair", "p1", "a picture 1", ("c1-2", "c1-0"), choice="c1-2"))
    return folder


def content(folder, judgement):
    """A judgement by the pictures' bytes, which survive renaming."""
    name = {item: folder.picture(item).read_bytes() for item in judgement.items}
    ranks = dict(zip(judgement.items, judgement.ranking, strict=True)) if judgement.ranking else {}
    return judgement.prompt, judgement.mode, frozenset(name.values()), name.get(judgement.choice), judgement.tie, frozenset((name[item], rank) for item, rank in ranks.items())


def contents(folder, raters=False):
    return {(one.rater if raters else "", content(folder, one)) for one in folder.judgements()}


@pytest.mark.parametrize(("form", "file", "raters"), [("native", "out.jsonl", True), ("pick-a-pic", "out.parquet", True), ("hpd", "out.json", True), ("imagereward", "out.json", True)])
def test_pairs_survive_every_form(rated, tmp_path, form, file, raters):
    path = rated.root / file
    assert export_judgements(rated.root, path, form) == (3, [])
    report = import_judgements(tmp_path / "to", path, form)
    there = CandidateFolder.existing(tmp_path / "to")
    assert report.judgements == 3 and report.left_out == []
    assert contents(there, raters) == contents(rated, raters)
    again = import_judgements(tmp_path / "to", path, form)
    assert (again.judgements, again.already_there) == (0, 3)


@pytest.mark.parametrize("form", ["native", "hpd", "imagereward"])
def test_rankings_survive(tmp_path, form):
    folder = colour_folder(tmp_path / "from", prompts=1)
    folder.log().append(Judgement("ada", "rank", "p0", "a picture 0", ("c0-0", "c0-1", "c0-2", "c0-3"), ranking=(2, 1, 4, 2)))
    folder.log().append(Judgement("bo", "rank", "p0", "a picture 0", ("c0-3", "c0-1", "c0-2", "c0-0"), ranking=(1, 2, 3, 4)))
    export_judgements(folder.root, folder.root / "out", form)
    import_judgements(tmp_path / "to", folder.root / "out", form)
    expected = contents(folder)
    if form != "native":  # the others know only the order, not the gaps of shared places
        expected = {(rater, (*one[:5], frozenset((name, sorted({rank for _, rank in one[5]}).index(rank) + 1) for name, rank in one[5]))) for rater, one in expected}
    assert contents(CandidateFolder.existing(tmp_path / "to")) == expected


def test_what_does_not_fit_a_form_is_listed(rated):
    rated.log().append(Judgement("ada", "score", "p0", "a picture 0", ("c0-0",), axes={"style": 3}))
    for form in ("pick-a-pic", "hpd", "imagereward"):
        written, left_out = export_judgements(rated.root, rated.root / "out", form)
        assert written == 3 and len(left_out) == 1 and "score" in left_out[0][1]


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_published_files_are_read(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(png((ord(name) * 2, 40, 60)))
    (tmp_path / "hpd_train.json").write_text(json.dumps([{"prompt": "x", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]}]))
    (tmp_path / "hpd_test.json").write_text(json.dumps([{"prompt": "x", "image_path": ["a.png", "b.png", "c.png"], "rank": [1.5, 1.5, 3], "raw_annotations": [
        {"rank": [1, 2, 3], "user_hash": "u1"}, {"rank": [2, 1, 3], "user_hash": "u2"}]}]))
    (tmp_path / "imagereward.json").write_text(json.dumps([{"id": "1", "prompt": "x", "generations": ["a.png", "b.png", "c.png", "d.png"], "ranking": [1, 2, 5, 3]}]))
    folder = tmp_path / "to"
    for form, file in (("hpd", "hpd_train.json"), ("hpd", "hpd_test.json"), ("imagereward", "imagereward.json")):
        import_judgements(folder, tmp_path / file, form)
    read = CandidateFolder.existing(folder).judgements()
    assert [one.ranking for one in read] == [None, (1, 2, 3), (2, 1, 3), (1, 2, 4, 3)]
    assert [one.rater for one in read] == ["hpd", "u1", "u2", "imagereward"]
    assert len(CandidateFolder.existing(folder).candidates()) == 4


def test_unlabelled_rows_of_pick_a_pic_hold_no_judgement(tmp_path):
    rows = [{"caption": "x", "jpg_0": png("red"), "jpg_1": png("blue"), "label_0": label, "label_1": 1 - label, "has_label": has} for label, has in ((1.0, True), (0.5, True), (0.5, False))]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert import_judgements(tmp_path / "to", tmp_path / "p.parquet", "pick-a-pic").judgements == 2
    assert [one.tie for one in CandidateFolder.existing(tmp_path / "to").judgements()] == [False, True]


GOOD = {"prompt": "x", "generations": ["a.png", "b.png"], "ranking": [1, 2]}
STRANGE = [
    ("imagereward", b""), ("imagereward", b"{"), ("imagereward", b"{}"), ("imagereward", b"[]"), ("imagereward", b"[1]"), ("imagereward", b"\xff\xfe\x00"), ("imagereward", b"[" * 200_000),
    ("imagereward", json.dumps([GOOD | {"ranking": [1]}]).encode()), ("imagereward", json.dumps([GOOD | {"ranking": [1, "2"]}]).encode()), ("imagereward", json.dumps([GOOD | {"ranking": [1, math.inf]}]).encode()), ("imagereward", json.dumps([GOOD | {"generations": "a"}]).encode()),
    ("imagereward", json.dumps([GOOD | {"generations": ["a.png", 3]}]).encode()), ("imagereward", json.dumps([GOOD | {"generations": ["/etc/passwd", "../b.png"]}]).encode()),
    ("imagereward", json.dumps([GOOD | {"generations": ["missing.png", "b.png"]}]).encode()), ("imagereward", json.dumps([GOOD | {"generations": ["a.png", "a.png"]}]).encode()),
    ("imagereward", json.dumps([GOOD | {"generations": ["a.png", "broken.png"]}]).encode()), ("imagereward", json.dumps([GOOD | {"generations": ["a.png", "text.txt"]}]).encode()),
    ("hpd", json.dumps([GOOD]).encode()), ("hpd", json.dumps([{"prompt": "x", "file_path": ["a.png", "b.png"], "human_preference": [1, 2]}]).encode()),
    ("hpd", json.dumps([{"prompt": "x", "file_path": ["a.png", "b.png"], "human_preference": [1, "0"]}]).encode()),
    ("hpd", json.dumps([{"prompt": "x", "image_path": ["a.png", "b.png"], "raw_annotations": "x"}]).encode()),
    ("pick-a-pic", b"PAR1 is what it begins with"), ("pick-a-pic", b""), ("native", b"nonsense\n"), ("native", b'{"v": 1, "event": "judgement"}\n'),
    ("native", b'{"v":1,"event":"candidate","id":"a","prompt_id":"p","prompt":"x","path":"../../secret"}\n'),
    ("native", b'{"v":1,"event":"judgement","id":"j","rater":"r","mode":"pair","prompt_id":"p","prompt":"x","items":["u","w"],"choice":"u"}\n'),
]


@pytest.mark.parametrize(("form", "file"), STRANGE)
def test_a_strange_file_is_one_clear_error_and_changes_nothing(tmp_path, form, file):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png((ord(name), 0, 0)))
    (tmp_path / "broken.png").write_bytes(png("red")[:40])
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "file").write_bytes(file)
    with pytest.raises(BrushworkError) as caught:
        import_judgements(tmp_path / "to", tmp_path / "file", form)
    assert caught.value.exit_code == 2 and caught.value.where
    assert CandidateFolder(tmp_path / "to").judgements() == []


def test_one_bad_entry_does_not_cost_the_others(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png((ord(name), 0, 0)))
    (tmp_path / "file").write_text(json.dumps([GOOD, GOOD | {"generations": ["gone.png", "b.png"]}]))
    report = import_judgements(tmp_path / "to", tmp_path / "file", "imagereward")
    assert report.judgements == 1 and report.left_out == [("file, entry 2", "picture 'gone.png' is not in the picture folder")]


def test_unknown_forms_and_empty_folders_are_named(tmp_path):
    with pytest.raises(BadInput, match="excel"):
        import_judgements(tmp_path, tmp_path / "x", "excel")
    colour_folder(tmp_path / "empty")
    with pytest.raises(DataError, match="no judgements"):
        export_judgements(tmp_path / "empty", tmp_path / "x", "native")


@pytest.mark.parametrize("name", ["comparisons.jsonl", "candidates.jsonl", "pictures/out.jsonl", "rating_plan.json"])
def test_an_export_never_takes_the_place_of_the_folders_own_files(rated, name):
    """Written over comparisons.jsonl it made the folder unreadable, and took the skips and undone answers with it."""
    before = {path: path.read_bytes() for path in rated.root.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="belongs to the candidate folder"):
        export_judgements(rated.root, rated.root / name, "native")
    assert {path: path.read_bytes() for path in rated.root.rglob("*") if path.is_file()} == before


def test_judgements_are_not_imported_among_somebodys_pictures(rated, tmp_path):
    export_judgements(rated.root, tmp_path / "out.json", "hpd")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"a picture")
    with pytest.raises(DataError, match="holds other files"):
        import_judgements(tmp_path / "photos", tmp_path / "out.json", "hpd")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["mine.png"]


def test_an_export_onto_a_folder_names_the_folder(rated, tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        export_judgements(rated.root, tmp_path, "hpd")
    assert error.value.filename == str(tmp_path)
