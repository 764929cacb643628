"""`brushwork data ...` as a user meets it: JSON with its promised keys, exit codes, nothing but results on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from tests.data_tools.pictures import save


def run(capfd, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["data", *map(str, arguments)])
    out, err = capfd.readouterr()
    return stopped.value.code, out, err


def data(capfd, *arguments) -> dict:
    code, out, _ = run(capfd, *arguments, "--json", "--quiet")
    assert code == 0, out
    return json.loads(out)


def test_scan_counts_and_lists(folder, capfd):
    (folder / "bad.jpg").write_bytes(b"<html>")
    found = data(capfd, "scan", folder)
    assert found["found"] == found["usable"] + len(found["left_out"]) == 6 and found["left_out"][0]["path"].endswith("bad.jpg") and found["left_out"][0]["reason"]
    code, out, err = run(capfd, "scan", folder)
    assert code == 0 and "left out:" in out and "5 usable" in out


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_a_scan_says_once_how_the_folder_was_understood(folder, capfd, options):
    code, out, err = run(capfd, "scan", folder, *options)
    assert code == 0 and (out + err).count("layout: ") == 1


@pytest.mark.parametrize(("arguments", "says"), [
    (("buckets", "--fit", "stretch"), "--fit is 'stretch'"), (("report", "--fit", "stretch", "--out", "x.html"), "--fit is 'stretch'"),
    (("convert", "--to", "nope", "--out", "x"), "unknown layout 'nope'"), (("duplicates", "--sheet", "sheet.txt"), "a contact sheet is a .png or .jpg file"),
])
def test_a_wrong_option_is_refused_before_the_pictures_are_looked_at(folder, capfd, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_tools.scan.scan_folder", lambda *_, **__: pytest.fail("it looked at the pictures"))
    code, out, err = run(capfd, arguments[0], folder, *arguments[1:])
    assert code == 2 and says in err


def test_quarantine_and_back(folder, tmp_path, capfd):
    (folder / "bad.jpg").write_bytes(b"")
    assert len(data(capfd, "scan", folder, "--quarantine", tmp_path / "aside")["moved"]) == 1
    found = data(capfd, "scan", folder, "--bring-back", tmp_path / "aside")
    assert found["restored"] and len(found["left_out"]) == 1


def test_buckets_of_the_embedded_model(folder, tmp_path, capfd):
    found = data(capfd, "buckets", folder, "--base", "mini", "--buckets", "3", "--chart", tmp_path / "chart.svg")
    assert sum(bucket["pictures"] for bucket in found["buckets"]) == 5
    assert all(bucket["width"] % found["multiple"] == 0 and {"width", "height", "pictures", "lost_pixels"} <= bucket.keys() for bucket in found["buckets"])
    assert (tmp_path / "chart.svg").read_text().startswith("<svg xmlns=")


def test_buckets_at_several_resolutions_take_only_pictures_that_are_large_enough(tmp_path, capfd):
    save(tmp_path / "small.png", 80, 80)
    save(tmp_path / "large.png", 300, 300)
    found = data(capfd, "buckets", tmp_path, "--base", "mini", "--resolution", "64", "--resolution", "256")
    assert [(bucket["resolution"], bucket["width"], bucket["pictures"]) for bucket in found["buckets"]] == [(256, 256, 1), (64, 64, 2)]
    code, out, err = run(capfd, "buckets", tmp_path, "--base", "mini", "--resolution", "64", "--resolution", "256")
    assert code == 0 and "1 of 2 pictures are large enough" in out


def test_captions_from_names_edits_and_undo(tmp_path, capfd):
    save(tmp_path / "red_fox.png")
    assert data(capfd, "caption", tmp_path, "--by", "file-name")["written"][0]["caption"] == "red fox"
    assert data(capfd, "caption", tmp_path, "--prepend", "a ", "--dry-run")["changes"][0]["after"] == "a red fox"
    assert (tmp_path / "red_fox.txt").read_text() == "red fox\n"
    data(capfd, "caption", tmp_path, "--prepend", "a ")
    assert (tmp_path / "red_fox.txt").read_text() == "a red fox\n"
    assert len(data(capfd, "caption", tmp_path, "--undo")["restored"]) == 1
    assert (tmp_path / "red_fox.txt").read_text() == "red fox\n"


def test_an_edit_names_the_pictures_whose_captions_it_does_not_reach(tmp_path, capfd):
    for name in ("own", "described", "chinese", "empty"):
        save(tmp_path / f"{name}.png")
    (tmp_path / "own.txt").write_text("a fox\n")
    (tmp_path / "described.json").write_text('{"caption": "a boat"}')
    (tmp_path / "chinese.zh.txt").write_text("一只狐狸\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.json").write_text('{"caption": "a cup"}')
    found = data(capfd, "caption", tmp_path, "--prepend", "brand, ")
    assert [change["after"] for change in found["changes"]] == ["brand, a fox"]
    assert {Path(path).stem for path in found["left"]} == {"described", "chinese", "empty"}
    assert (tmp_path / "empty.txt").read_text() == ""
    _, out, _ = run(capfd, "caption", tmp_path, "--append", ", more")
    assert out.count("left as it is, because its caption is not in a .txt or .caption file of its own") == 3


def test_an_edit_of_a_set_that_a_file_describes_is_taken_back(tmp_path, capfd):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "fox.png")
    (tmp_path / "images" / "fox.txt").write_text("a fox\n")
    (tmp_path / "set.toml").write_text('[general]\ncaption_extension = ".txt"\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n')
    assert data(capfd, "caption", tmp_path / "set.toml", "--prepend", "brand, ")["changes"]
    assert len(data(capfd, "caption", tmp_path / "set.toml", "--undo")["restored"]) == 1
    assert (tmp_path / "images" / "fox.txt").read_text() == "a fox\n"


def test_a_dry_run_shows_no_question_to_a_captioner_that_is_asked_none(tmp_path, capfd):
    save(tmp_path / "red_fox.png")
    shown = data(capfd, "caption", tmp_path, "--by", "file-name", "--dry-run")
    assert shown == {"system": None, "question": None, "pictures": 1, "without_caption": 1}


def test_duplicates_convert_and_report(folder, tmp_path, capfd):
    (folder / "twin.png").write_bytes((folder / "000.png").read_bytes())
    found = data(capfd, "duplicates", folder, "--sheet", tmp_path / "sheet.png")
    assert found["copies"] == 1 and len(found["groups"][0]["pictures"]) == 2 and (tmp_path / "sheet.png").exists()
    written = data(capfd, "convert", folder, "--to", "metadata", "--out", tmp_path / "out")
    assert written["pictures"] == 6 and data(capfd, "scan", tmp_path / "out")["layout"] == "metadata"
    page = data(capfd, "report", folder, "--base", "mini", "--out", tmp_path / "r.html")
    assert page["usable"] == 6 and {t["encoder"] for t in json.loads((tmp_path / "r.json").read_text())["tokens"]}


def test_a_held_out_folder_that_training_has_seen_is_named(folder, tmp_path, capfd):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x.png").write_bytes((folder / "001.png").read_bytes())
    assert data(capfd, "duplicates", folder, "--against", tmp_path / "held")["leaks"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "nowhere"), ("buckets", "nowhere"), ("convert", ".", "--to", "nothing", "--out", "x"), ("caption", "."), ("caption", ".", "--by", "endpoint"), ("caption", ".", "--by", "nobody"),
        ("caption", ".", "--replace", "x"), ("caption", ".", "--undo"), ("buckets", ".", "--fit", "stretch"), ("scan", ".", "--layout", "odd"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capfd):
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capfd, *arguments, "--json", "--quiet")
    assert code == 2 and {"what", "where", "fix"} <= json.loads(out)["error"].keys()
    code, out, err = run(capfd, *arguments, "--quiet")
    assert code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err


HEAVY = ("torch", "torchvision", "transformers", "diffusers", "peft", "accelerate")
WITHOUT = """
import sys
from finetune.cli import main
folder = sys.argv[1]
for arguments in (["scan", folder], ["caption", folder, "--replace", "a=the"], ["buckets", folder], ["duplicates", folder], ["convert", folder, "--to", "metadata", "--out", folder + "-out"],
                  ["report", folder, "--out", folder + ".html"]):
    try:
        main(["data", *arguments, "--json", "--quiet"])
    except SystemExit as stopped:
        print(arguments[0], stopped.code, file=sys.stderr)
"""


def test_the_core_works_where_torch_is_not_installed(folder, tmp_path):
    for name in HEAVY:
        (tmp_path / "missing" / name).mkdir(parents=True)
        (tmp_path / "missing" / name / "__init__.py").write_text("raise ModuleNotFoundError('not installed here')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "missing"), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(folder)], env=environment, capture_output=True, text=True, timeout=600)
    assert [line.split()[-1] for line in done.stderr.splitlines()] == ["0"] * 6, done.stderr + done.stdout
    assert (tmp_path / "set.html").exists()


def test_results_never_take_the_place_of_pictures_or_captions(folder, capfd):
    """Each of these wrote over a picture or a caption of the set, or into the set, where the next scan took it for pictures."""
    (folder / "000.txt").write_text("a person's words")
    (folder / "concepts.json").write_text("[]")
    (folder / "inside").mkdir()
    (folder.parent / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for arguments in (
        ("report", folder, "--out", folder / "000.png"), ("report", folder, "--out", folder / "000.txt"), ("report", folder, "--out", folder / "000.html"), ("report", folder, "--out", "."),
        ("report", folder, "--out", folder / "000.thinking.html"), ("report", folder, "--out", folder / "dataset_dict.html"), ("report", folder, "--out", folder / "concepts.html"),
        ("duplicates", folder, "--sheet", folder / "000.png"), ("duplicates", folder, "--sheet", folder.parent / "link" / "sheet.png"), ("buckets", folder, "--chart", folder / "000.png"),
        ("convert", folder, "--to", "sidecars", "--out", folder / "inside"), ("convert", folder, "--to", "zip", "--out", folder / "new"),
    ):
        code, out, err = run(capfd, *arguments, "--quiet")
        assert code == 2 and "hint: " in err and "Traceback" not in err, arguments
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, arguments


def test_a_report_inside_the_picture_folder_is_no_part_of_the_set(folder, capfd):
    """Its pictures are inside the page, and its facts are not read; so it may lie where somebody works, and is written again."""
    known = {key: value for key, value in data(capfd, "scan", folder).items() if key != "reused"}
    for _ in range(2):
        data(capfd, "report", folder, "--out", folder / "dataset-report.html")
        again = {key: value for key, value in data(capfd, "scan", folder).items() if key != "reused"}
        assert again == known and sorted(path.suffix for path in folder.glob("dataset-report.*")) == [".html", ".json"]
