"""Which files are masks and whose: each picture gets its own, and no file is dropped or trained in silence."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from data_tools.layouts.picture_folder import read_picture_folder
from data_tools.quarantine import bring_back, move_aside
from data_tools.records import LeftOut
from tests.data_tools.pictures import save


def found_in(root):
    reading = read_picture_folder(root)
    return {entry.path.relative_to(root).as_posix(): entry for entry in reading.entries}, {left.path.relative_to(root).as_posix(): left for left in reading.left_out}


def mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (48, 32), 255).save(path)
    return path


@pytest.mark.parametrize("name", ["mask", "masks", "Masks", "conditioning", "control"])
def test_pictures_in_a_folder_that_is_called_like_one_for_masks_are_listed(tmp_path, name):
    """Somebody's folder of Venetian masks: before, its pictures were neither trained nor mentioned."""
    save(tmp_path / "costume" / "1.png")
    save(tmp_path / name / "2.png", seed=2)
    entries, left_out = found_in(tmp_path)
    assert set(entries) == {"costume/1.png"}
    assert "rename the folder" in left_out[f"{name}/2.png"].reason and left_out[f"{name}/2.png"].code == "mask_without_picture"


@pytest.mark.parametrize(("place", "is_mask"), [("masks/a.png", True), ("Mask/a.png", True), ("a_mask.png", True), ("a-masklabel.png", True), ("control/a.png", False), ("a-condlabel.png", False)])
def test_a_mask_belongs_to_every_picture_of_its_name(tmp_path, place, is_mask):
    save(tmp_path / "a.jpg")
    save(tmp_path / "a.webp", seed=1)
    mask(tmp_path / place)
    entries, left_out = found_in(tmp_path)
    assert set(entries) == {"a.jpg", "a.webp"} and not left_out
    assert {entry.mask for entry in entries.values()} == {tmp_path / place if is_mask else None}


@pytest.mark.parametrize("place", ["masks/cats/a.png", "cats/masks/a.png"])
def test_masks_may_lie_in_a_tree_of_their_own(tmp_path, place):
    """Before, a folder inside one for masks was trained."""
    save(tmp_path / "cats" / "a.png")
    mask(tmp_path / place)
    save(tmp_path / "masks" / "cats" / "other.png", seed=3)
    entries, left_out = found_in(tmp_path)
    assert set(entries) == {"cats/a.png"} and entries["cats/a.png"].mask == tmp_path / place
    assert set(left_out) == {"masks/cats/other.png"} and "a folder called masks" in left_out["masks/cats/other.png"].reason


def test_a_second_mask_is_no_picture_and_is_mentioned(tmp_path):
    save(tmp_path / "a.jpg")
    mask(tmp_path / "a_mask.jpg")
    mask(tmp_path / "a_mask.png")
    entries, _ = found_in(tmp_path)
    assert set(entries) == {"a.jpg"} and entries["a.jpg"].mask == tmp_path / "a_mask.png"
    assert any("several masks; a_mask.png" in text for text in entries["a.jpg"].warnings)


def test_a_mask_whose_picture_is_gone_is_mentioned(tmp_path):
    save(tmp_path / "a.jpg")
    mask(tmp_path / "gone_mask.png")
    assert any("named like a mask" in text for text in found_in(tmp_path)[0]["gone_mask.png"].warnings)


def test_a_row_of_the_metadata_file_says_that_a_file_is_a_picture(tmp_path):
    save(tmp_path / "mask" / "1.png")
    save(tmp_path / "a.png", seed=1)
    save(tmp_path / "a_mask.png", seed=2)
    rows = [{"file_name": name, "text": "a mask"} for name in ("mask/1.png", "a.png", "a_mask.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    entries, left_out = found_in(tmp_path)
    assert set(entries) == {"mask/1.png", "a.png", "a_mask.png"} and not left_out


def test_a_picture_that_is_moved_aside_takes_its_masks_along(tmp_path):
    """Left behind, they would be taken for pictures."""
    folder, aside = tmp_path / "set", tmp_path / "aside"
    picture = save(folder / "a.jpg")
    masks = [mask(folder / "a_mask.png"), mask(folder / "masks" / "a.png")]
    assert move_aside([LeftOut(picture, "a duplicate")], folder, aside) == [(picture, aside / "a.jpg")]
    assert not any(path.exists() for path in masks) and (aside / "masks" / "a.png").exists()
    bring_back(aside)
    assert all(path.exists() for path in (picture, *masks))
