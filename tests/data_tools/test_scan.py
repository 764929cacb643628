"""Scanning: every picture is accounted for, a decoder that hangs or dies harms nothing, unchanged pictures are not decoded again."""

from __future__ import annotations

import io
import os
import threading
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import worker_pool
from data_tools.images import Limits
from data_tools.quarantine import bring_back, move_aside
from data_tools.result_cache import ResultCache
from data_tools.scan import require_usable, scan_folder
from data_tools.errors import DataError
from tests.data_tools.pictures import save


def large_picture(path):
    """A PNG of sixty million pixels in a few hundred kilobytes; 180 MB of memory when it is decoded."""
    Image.new("RGB", (8_000, 7_500)).save(path, compress_level=1)


@pytest.fixture(scope="module")
def endless():
    """A progressive JPEG of sixty million pixels whose last scan comes three thousand times: minutes to decode on any machine."""
    whole = io.BytesIO()
    Image.new("L", (8_000, 7_500), 128).save(whole, "JPEG", progressive=True)
    content, end = whole.getvalue(), b"\xff\xd9"
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:].removesuffix(end) * 3000 + end


def age(folder):
    """Set file times into the past: files of the last two seconds are never taken from the cache."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))


def test_captions_sizes_and_hashes_are_those_of_the_files(folder, scan):
    import hashlib

    report = scan(folder)
    assert report.layout == "sidecars" and report.found == 5
    third = report.records[3]
    assert (third.width, third.height, third.size) == (64, 48, (48, 64))
    assert third.content_hash == hashlib.sha256(third.path.read_bytes()).hexdigest()
    assert third.caption == "brndx, a shape number 3, on paper" and third.captions[0].source == "person"


def test_a_picture_that_takes_too_long_is_named_and_the_others_are_used(folder, scan, endless):
    (folder / "slow.jpg").write_bytes(endless)
    report = scan(folder, limits=Limits(seconds=3), use_cache=False)
    assert [(item.path.name, item.code) for item in report.left_out] == [("slow.jpg", "timeout")]
    assert report.found == 6 and len(report.records) == 5


def test_a_decoder_that_dies_costs_only_the_picture_it_was_at(folder, endless):
    (folder / "slow.jpg").write_bytes(endless)
    names = [*(f"{i:03d}.png" for i in range(5)), "slow.jpg"]
    jobs = [(str(folder / name), None) for name in [names[5], *names[:5]]]
    killed = []

    def kill_once():
        give_up = time.monotonic() + 300
        while not killed and time.monotonic() < give_up:
            for child in psutil.Process().children():
                # The libraries take 40 MB, the picture 120 more as soon as it is read.
                if "decode_worker" in " ".join(child.cmdline()) and child.memory_info().rss > 120 * 2**20:
                    child.kill()
                    killed.append(child.pid)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_once)
    killer.start()
    results = dict(worker_pool.run(jobs, "check", workers=1, limits=Limits(seconds=300)))
    killer.join()
    assert killed and results[0]["code"] == "decoder_crash"
    assert all("code" not in results[i] for i in range(1, 6))


@pytest.mark.parametrize("source", ["raise ImportError('libjpeg.so.62: cannot open shared object file')", "import os; os._exit(9)"])
def test_processes_that_cannot_start_are_one_error_and_no_fault_of_the_pictures(folder, scan, tmp_path, monkeypatch, source):
    (tmp_path / "broken" / "PIL").mkdir(parents=True)
    (tmp_path / "broken" / "PIL" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    with pytest.raises(DataError) as raised:
        scan(folder, use_cache=False)
    assert "cannot start: " + ("ImportError: libjpeg.so.62: cannot open" if "raise" in source else "they end without a word") in raised.value.what and raised.value.fix


def test_memory_is_limited(folder, scan):
    large_picture(folder / "large.png")
    report = scan(folder, limits=Limits(memory_bytes=500 * 2**20), use_cache=False)
    assert [item.code for item in report.left_out] == ["too_much_memory"] and len(report.records) == 5


def test_an_unchanged_folder_is_not_decoded_again_and_a_changed_picture_is(folder, scan):
    age(folder)
    time.sleep(2.1)  # the change time of the files must be older than the cache trusts
    first, second = scan(folder), scan(folder)
    assert (first.reused, second.reused) == (0, 5) and second.records == first.records
    save(folder / "000.png", 99, 77, seed=50)
    third = scan(folder)
    assert third.reused == 4 and third.records[0].size == (77, 99)


def test_a_moved_picture_is_known_by_its_content(folder, own_cache):
    time.sleep(2.1)
    scan_folder(folder, workers=1)
    known = ResultCache("check", Limits())
    import hashlib

    assert known.of_content(hashlib.sha256((folder / "001.png").read_bytes()).hexdigest())["width"] == 48
    assert known.of_content("0" * 64) is None


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\x00" + bytes(90)])
def test_a_broken_cache_costs_time_only(folder, scan, own_cache, content):
    (own_cache / "pictures.sqlite").write_bytes(content)
    assert len(scan(folder).records) == 5


def test_the_result_does_not_depend_on_the_number_of_workers(folder):
    (folder / "bad.jpg").write_bytes(b"<html>")
    one, three = (scan_folder(folder, workers=n, use_cache=False) for n in (1, 3))
    assert one == three


def test_an_empty_folder_has_nothing_and_training_is_told_so(tmp_path, scan):
    report = scan(tmp_path)
    assert report.found == 0
    with pytest.raises(DataError, match="no usable picture"):
        require_usable(report, tmp_path)


def test_nothing_under_the_picture_folder_is_changed_by_a_scan(folder, scan):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}
    scan(folder)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")} == before


def test_what_is_left_out_goes_to_the_quarantine_with_its_caption_and_comes_back(folder, scan, tmp_path):
    (folder / "sub").mkdir()
    (folder / "sub" / "bad.jpg").write_bytes(b"<html>")
    (folder / "sub" / "bad.txt").write_text("a caption")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    moved = move_aside(scan(folder).left_out, folder, tmp_path / "aside")
    assert [to.relative_to(tmp_path / "aside").as_posix() for _, to in moved] == ["sub/bad.jpg"]
    assert (tmp_path / "aside" / "sub" / "bad.txt").read_text() == "a caption" and scan(folder).left_out == []
    assert len(bring_back(tmp_path / "aside")) == 2
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_quarantine_inside_the_folder_is_refused(folder, scan):
    with pytest.raises(DataError, match="must not lie inside"):
        move_aside(scan(folder).left_out, folder, folder / "aside")


NAMES = st.text(st.characters(blacklist_characters="/\x00.", blacklist_categories=("Cs",)), min_size=1, max_size=12)
CONTENTS = st.sampled_from([b"", b"<html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", "good", "caption", "metadata", "folder"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(files=st.dictionaries(NAMES, st.tuples(CONTENTS, st.sampled_from([".png", ".JPG", ".txt", ".jsonl", ""])), max_size=8))
def test_every_picture_file_is_counted_once(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("any")
    pictures = set()
    for name, (content, suffix) in files.items():
        path = root / f"{name}{suffix}"
        if len(os.fsencode(path.name)) > 250 or path.exists():
            continue
        if content == "folder":
            path.mkdir()
        elif content == "good":
            save(path.with_name(path.name + ".png"))
            path = path.with_name(path.name + ".png")
        else:
            path.write_bytes(content if isinstance(content, bytes) else b'{"file_name": "x.png"}')
        if path.is_file() and path.suffix.lower() in (".png", ".jpg"):
            pictures.add(path)
    report = scan_folder(root, workers=1, use_cache=False)
    seen = [record.path for record in report.records] + [item.path for item in report.left_out]
    assert len(seen) == len(set(seen)) == report.found
    assert pictures <= set(seen)
    assert set(seen) | set(report.other_files) >= {p for p in root.iterdir() if p.is_file() and p.suffix not in (".txt", ".jsonl") and not p.name.startswith(".")}
