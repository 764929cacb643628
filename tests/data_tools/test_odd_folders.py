"""What a folder may hold beside pictures and captions: pipes, sockets, links in a circle, names that are no text."""

from __future__ import annotations

import os
import socket

import pytest

from data_tools.images import Limits
from data_tools.records import shown_name
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
