"""What a folder may hold beside pictures and captions: pipes, sockets, links in a circle, names that are no text."""

from __future__ import annotations

import os
import socket

import pytest

from data_tools.caption_edits import apply_edits, not_in_files, plan_edits, prepend
from data_tools.caption_prompts import caption_prompt
from data_tools.captioners import captioner
from data_tools.captions import caption_pictures
from data_tools.errors import DataError
from data_tools.images import Limits
from data_tools.quarantine import move_aside
from data_tools.records import LeftOut, shown_name
from tests.data_tools.pictures import encoded, save

LIMITS = Limits(seconds=20)


def test_a_name_that_is_not_text_is_used_and_shown_with_escapes(tmp_path, scan):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(encoded("PNG"))
    (record,) = scan(tmp_path).records
    assert shown_name(record.path.name) == "caf\\udce9.png"


SPECIAL = {
    "pipe": lambda path: os.mkfifo(path),
    "loop": lambda path: os.symlink(path.name, path),
    "dangling link": lambda path: os.symlink("nowhere.png", path),
    "device": lambda path: os.symlink("/dev/zero", path),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_listed_without_being_waited_for(tmp_path, scan, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](tmp_path / "x.png")
    save(tmp_path / "good.png")
    report = scan(tmp_path, limits=LIMITS)
    assert [item.path.name for item in report.left_out] == ["x.png"] and len(report.records) == 1


def test_a_folder_named_like_a_picture_is_walked_into(tmp_path, scan):
    save(tmp_path / "a.png" / "b.png")
    assert [record.path.name for record in scan(tmp_path).records] == ["b.png"]


def test_folders_that_link_in_a_circle_are_read_once_and_said(tmp_path, scan):
    save(tmp_path / "a" / "b.png")
    os.symlink(tmp_path, tmp_path / "a" / "again")
    report = scan(tmp_path)
    assert report.found == 1 and any("not read twice" in text for text in report.warnings)


def test_a_table_of_another_name_beside_pictures_without_captions_is_named(tmp_path, scan):
    save(tmp_path / "one.png")
    (tmp_path / "list.csv").write_text("file_name,text\none.png,a red square\n")
    (warning,) = scan(tmp_path).warnings
    assert warning.startswith("list.csv beside pictures without captions is not read") and "metadata.csv" in warning and "--to sidecars" in warning
    (tmp_path / "one.txt").write_text("a red square")
    assert not scan(tmp_path).warnings, "they may be somebody's notes"
    (tmp_path / "one.txt").unlink()
    (tmp_path / "list.csv").rename(tmp_path / "metadata.csv")
    (record,) = scan(tmp_path).records
    assert record.captions[0].text == "a red square" and not scan(tmp_path).warnings


@pytest.mark.parametrize("name", ["a.TXT", "a.Caption", "a.png.Txt", "a.en.TXT", "a.JSON"])
def test_the_ending_of_a_caption_file_may_be_written_in_any_case(tmp_path, scan, name):
    save(tmp_path / "a.png")
    (tmp_path / name).write_text('{"caption": "a red square"}' if name == "a.JSON" else "a red square")
    report = scan(tmp_path)
    assert report.records[0].caption == "a red square" and not report.warnings and not report.records[0].warnings


def test_names_that_differ_before_the_ending_belong_to_different_pictures(tmp_path, scan):
    for stem in ("a", "A"):
        save(tmp_path / f"{stem}.png")
    (tmp_path / "A.TXT").write_text("a large letter")
    assert {record.path.name: record.caption for record in scan(tmp_path).records} == {"A.png": "a large letter", "a.png": None}


def test_two_caption_files_that_differ_by_the_case_of_their_ending_are_an_error(tmp_path, scan):
    save(tmp_path / "a.png")
    for name in ("a.txt", "a.TXT"):
        (tmp_path / name).write_text(name)
    with pytest.raises(DataError, match="a.TXT and a.txt differ by the case") as refused:
        scan(tmp_path)
    assert refused.value.fix == "keep one of the two"
    (tmp_path / "a.TXT").unlink()
    assert scan(tmp_path).records[0].caption == "a.txt"


def test_a_caption_file_with_a_large_ending_is_edited_rewritten_and_moved_as_it_is(tmp_path, scan):
    save(tmp_path / "set" / "blue_disc.png")
    (tmp_path / "set" / "blue_disc.TXT").write_text("a red square")
    records = scan(tmp_path / "set").records
    apply_edits(plan_edits(records, [prepend("look, ")]), tmp_path / "set")
    assert (tmp_path / "set" / "blue_disc.TXT").read_text() == "look, a red square\n" and not not_in_files(records)
    caption_pictures(scan(tmp_path / "set").records, captioner("file-name"), caption_prompt(), overwrite="all")
    move_aside([LeftOut(tmp_path / "set" / "blue_disc.png", "unwanted", "duplicate")], tmp_path / "set", tmp_path / "aside")
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_file()) == []
    assert (tmp_path / "aside" / "blue_disc.TXT").read_text() == "blue disc\n"
