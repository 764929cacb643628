"""The report page: complete, the same for the same set, without outside links, harmless whatever captions and names say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_tools.bucket_report import report_buckets
from data_tools.caption_statistics import caption_statistics
from data_tools.duplicates import find_duplicates
from data_tools.report import SetFacts, lost_bands, visible, write_report
from data_tools.buckets import Bucket, place
from data_tools.records import ImageRecord
from data_tools.scan import scan_folder
from data_tools.token_counts import TextLimit, count_tokens, estimate, read_and_cut
from tests.data_tools.pictures import save

HOSTILE = {
    "markup": '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">',
    "attribute": '"><svg onload=document.title=`owned`> \' autofocus onfocus=alert(1)',
    "template": "{{ 7*7 }} {% raw %} ${7*7}",
    "direction": "abc \u202e cba \u2066 x",
    "long": "endless" * 1500,
    "entity": "&lt;b&gt; &#x3c;i>",
}


def facts_of(folder, **options):
    report = scan_folder(folder, workers=2)
    limits = [TextLimit("short", 8, estimate, exact=False)]
    captions = [r.caption for r in report.records if r.caption]
    return SetFacts(folder, report, report_buckets(report.records, resolution=64, multiple=16, most=4), caption_statistics(report.records), find_duplicates(report.records, workers=2), count_tokens(captions, limits), limits, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    for i, (name, text) in enumerate(HOSTILE.items()):
        save(root / f"{name}.png", 90 + 10 * i, 64, seed=i)
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    save(root / "<img src=x onerror=alert(1)>.png", seed=20)
    save(root / "\u202egnp.exe.png", seed=21)
    shutil.copy(root / "markup.png", root / "copy.png")
    (root / "<b>bad.jpg").write_bytes(b"<html>")
    path = root.parent / "page" / "report.html"
    write_report(facts_of(root, trigger="brndx"), path, workers=2)
    return path


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_nothing_from_files_becomes_markup_and_nothing_points_outside(page):
    text = page.read_text(encoding="utf-8")
    tags = Elements(text).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [a for _, attributes in tags for a in attributes if a.startswith("on")]
    links = [attributes.get(name) for _, attributes in tags for name in ("href", "src", "action") if attributes.get(name)]
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert "\u202e" not in text and "\\u202e" in text and "{{ 7*7 }}" in text
    assert "more characters)" in text


def test_the_policy_forbids_everything_but_its_own_style_and_script(page):
    (policy,) = [a["content"] for tag, a in Elements(page.read_text(encoding="utf-8")).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "script-src 'sha256-" in policy and "http" not in policy


def test_every_picture_is_on_the_page_or_listed_as_left_out(page):
    data = json.loads(page.with_suffix(".json").read_text())
    text = page.read_text(encoding="utf-8")
    assert data["found"] == data["usable"] + len(data["left_out"]) == 10
    assert text.count('<figure class="card"') == data["usable"] and "a web page, not a picture" in text
    assert sum(bucket["pictures"] for bucket in data["buckets"]) == data["usable"]
    assert data["duplicates"][0]["kind"] == "exact" and data["tokens"][0]["cut"] > 0
    assert {problem["level"] for problem in data["problems"]} == {"error", "warning", "note"}


def test_the_same_set_gives_the_same_page(folder, tmp_path):
    first, second = (write_report(facts_of(folder), tmp_path / name, workers=2).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_changed_caption_changes_the_set_hash(folder, tmp_path):
    from data_tools.report import set_hash

    before = set_hash(scan_folder(folder, workers=1).records)
    (folder / "000.txt").write_text("other words")
    assert set_hash(scan_folder(folder, workers=1).records) != before


def test_a_real_browser_shows_the_page_and_runs_nothing_from_it(page, tmp_path, chromium):
    command = [*chromium, "--window-size=1200,1400", f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"HOME": str(tmp_path)})
    assert "<title>hostile" in shown.stdout and "owned" not in re.search(r"<title>(.*?)</title>", shown.stdout)[1]
    assert shown.stdout.count('class="card"') == 9
    assert "Content Security Policy" not in shown.stderr and "Uncaught" not in shown.stderr, shown.stderr[-2000:]


def test_the_veil_covers_what_the_bucket_does_not_show():
    record = ImageRecord(Path("a.png"), 200, 100, "0")
    assert lost_bands(record, place((100, 200), Bucket(64, 64))) == [(0.0, 0.0, 50.0, 100.0), (150.0, 0.0, 50.0, 100.0)]
    assert lost_bands(record, place((100, 200), Bucket(64, 128))) == []


def test_hidden_characters_are_shown_and_long_texts_are_cut_with_a_count():
    assert visible("a\u202eb\x00") == "a\\u202eb\\u0000"
    assert visible("x" * 1000, 10) == "x" * 10 + "… (990 more characters)"


def test_what_falls_off_an_encoder_is_found_word_for_word():
    limit = TextLimit("words", 3, lambda text: len(text.split()))
    assert read_and_cut("one two three four five", limit) == ("one two three", "four five")
    assert read_and_cut("one two", limit) == ("one two", "")
    assert estimate("一二三四") == 6 and estimate("a red fox") == 7
    assert [s.cut for s in count_tokens(["a b c d", "a"], [limit])] == [[0]]
