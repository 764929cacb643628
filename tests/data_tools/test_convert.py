"""Layouts: each is detected and said aloud; what is written and read again is the same set, or what was lost is named."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import resource
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.atomic_files import write_text
from data_tools.convert import WRITERS, convert
from data_tools.errors import BrushworkError, DataError
from data_tools.layouts.caption_files import clean_line
from data_tools.records import Caption, ImageRecord
from data_tools.scan import scan_folder
from data_tools.thinking_rules import think_by_rules
from tests.data_tools.opened_here import open_here
from tests.data_tools.pictures import save

LOSSLESS = ("sidecars", "kohya", "onetrainer", "metadata", "webdataset", "parquet", "zip")


def said(record: ImageRecord):
    """All of a record but where it lies."""
    mask = hashlib.sha256(record.mask.read_bytes()).hexdigest() if record.mask else None
    return record.content_hash, frozenset(record.captions), mask, record.licence, record.repeats, record.split



@pytest.fixture(autouse=True)
def opened_here(monkeypatch):
    open_here(monkeypatch)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        save(root / f"{i}.png", seed=i)
    Image.new("L", (48, 32), 200).save(root / "mask-of.png")
    return root


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=40).map(clean_line).filter(lambda t: t and len(t) < 200)
CAPTION = st.builds(lambda text, language, source: Caption(text, language, "plain", source), TEXT, st.sampled_from(["en", "zh"]), st.sampled_from(["person", "model", "file_name"]))
NAME = st.sampled_from(["a", "A", "b c", "v1.2_fox", "x-masklabel", "猫", "10_b", "q" * 130, "b_mask", "…"])
RECORD = st.tuples(
    st.integers(0, 5), NAME, st.lists(CAPTION, max_size=3, unique_by=lambda c: c.text), st.booleans(), st.sampled_from([None, "cc0-1.0", "own"]), st.integers(1, 12), st.sampled_from(["train", "train", "held_out", "regularisation"])
)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=st.lists(RECORD, min_size=1, max_size=7))
@pytest.mark.parametrize("to", WRITERS)
def test_what_is_written_and_read_again_is_the_same_set(pictures, tmp_path_factory, to, drawn):
    root = tmp_path_factory.mktemp("set")
    records = []
    for number, (which, name, captions, masked, licence, repeats, split) in enumerate(drawn):
        path = root / "in" / str(number) / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes((pictures / f"{which}.png").read_bytes())
        if to == "kohya" and not captions:
            captions = [Caption("something", "en")]
        records.append(ImageRecord(path, 48, 32, hashlib.sha256(path.read_bytes()).hexdigest(), tuple(captions), pictures / "mask-of.png" if masked else None, licence, "sidecars", repeats, split))
    result = convert(records, root / "out", to)
    back = scan_folder(result.open_at, workers=1)
    assert result.pictures == len(records) == len(back.records) and back.left_out == []
    if to in LOSSLESS:
        assert result.lost == () and Counter(map(said, back.records)) == Counter(map(said, records))
    else:
        assert Counter(r.content_hash for r in back.records) == Counter(r.content_hash for r in records)
        changed = Counter(map(said, records)) - Counter(map(said, back.records))
        assert bool(result.lost) or not changed


def test_a_thinking_record_lies_beside_its_picture_and_comes_back(folder, tmp_path):
    thought = json.dumps(think_by_rules("a red fox on a wooden bench").to_json(), ensure_ascii=False)
    (folder / "000.png.thinking.json").write_text(thought, encoding="utf-8")
    first = scan_folder(folder, workers=1).records
    assert [c.kind for c in first[0].captions] == ["plain", "thinking"] and first[0].caption == "brndx, a shape number 0, on paper"
    for to in ("sidecars", "metadata", "webdataset"):
        back = scan_folder(convert(first, tmp_path / to, to).open_at, workers=1).records
        assert Counter(map(said, back)) == Counter(map(said, first)), to


def test_pictures_are_copied_byte_for_byte_and_the_source_is_not_touched(folder, tmp_path):
    before = {p: p.read_bytes() for p in folder.rglob("*")}
    records = scan_folder(folder, workers=1).records
    convert(records, tmp_path / "out", "sidecars")
    assert {p: p.read_bytes() for p in folder.rglob("*")} == before
    assert (tmp_path / "out" / "002.png").read_bytes() == (folder / "002.png").read_bytes()


@pytest.mark.parametrize("to", ["sidecars", "webdataset", "parquet", "zip"])
def test_a_full_disk_is_named_by_what_was_to_be_written_and_nothing_stays(folder, tmp_path, to):
    records = scan_folder(folder, workers=1).records
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(BrushworkError, match="cannot write: .*large") as full:
            convert(records, tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.exit_code == 1 and full.value.where == str(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_place_that_cannot_be_written_is_named_as_the_user_named_it(folder, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: refuse(path) if path.name.endswith(".partial") else None)
    with pytest.raises(DataError, match="cannot write: Permission denied") as refusal:
        convert(scan_folder(folder, workers=1).records, tmp_path / "out", "sidecars")
    assert refusal.value.where == str(tmp_path / "out")


def test_a_file_that_the_disk_does_not_take_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError) as full:
            write_text(tmp_path / "report.html", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.filename == str(tmp_path / "report.html") and not list(tmp_path.iterdir())


def test_a_target_that_is_not_empty_is_refused_and_a_failure_leaves_nothing(folder, tmp_path):
    records = scan_folder(folder, workers=1).records
    with pytest.raises(DataError, match="not an empty folder"):
        convert(records, folder, "sidecars")
    (folder / "004.png").unlink()
    with pytest.raises(DataError, match="cannot write"):
        convert(records, tmp_path / "out", "metadata")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(DataError, match="unknown layout"):
        convert(records, tmp_path / "out", "nothing")


def captions_of(source: Path, **options):
    report = scan_folder(source, workers=1, **options)
    return report, {r.path.stem.split("-")[-1]: (r.caption, r.repeats, r.split) for r in report.records}


def test_kohya_folders(tmp_path):
    save(tmp_path / "10_brndx style" / "a.png", seed=1)
    (tmp_path / "10_brndx style" / "a.txt").write_text("own words")
    save(tmp_path / "3_brndx_logo" / "b.png", seed=2)
    save(tmp_path / "loose" / "c.png", seed=3)
    report, found = captions_of(tmp_path)
    assert report.layout == "kohya"
    assert found == {"a": ("own words", 10, "train"), "b": ("brndx logo", 3, "train"), "c": (None, 1, "train")}
    assert any("are not named <repeats>_<name>" in text for text in report.warnings)


def test_kohya_toml(tmp_path):
    save(tmp_path / "img" / "a.png", seed=1)
    (tmp_path / "img" / "a.txt").write_text("a fox")
    save(tmp_path / "img" / "b.png", seed=2)
    save(tmp_path / "reg" / "c.png", seed=3)
    (tmp_path / "set.toml").write_text(
        "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'img'\nnum_repeats = 4\nclass_tokens = 'brndx'\ncaption_prefix = 'in brndx style,'\n"
        "[[datasets.subsets]]\nimage_dir = 'reg'\nis_reg = true\n"
    )
    report, found = captions_of(tmp_path / "set.toml")
    assert report.layout == "kohya-toml" and any("shuffle_caption" in text for text in report.warnings)
    assert found == {"a": ("in brndx style, a fox", 4, "train"), "b": ("in brndx style, brndx", 4, "train"), "c": (None, 1, "regularisation")}


def test_metadata_rows_outrank_caption_files_and_both_are_said(tmp_path):
    for i, name in enumerate("abc"):
        save(tmp_path / "images" / f"{name}.png", seed=i)
    (tmp_path / "images" / "a.txt").write_text("from the file")
    (tmp_path / "images" / "c.txt").write_text("only here")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/a.png", "text": "from the row"}\n{"file_name": "images/b.png", "text": ["one", "two"], "license": "cc0"}\n')
    report, found = captions_of(tmp_path)
    assert report.layout == "metadata" and {k: v[0] for k, v in found.items()} == {"a": "from the row", "b": "one", "c": "only here"}
    assert any("the row is used" in w for r in report.records for w in r.warnings) and any("no row" in text for text in report.warnings)
    assert any("precedence" in text for text in report.notes)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_metadata_in_other_forms_keeps_texts_as_texts(tmp_path, suffix):
    names = ["001.png", "NA.png"]
    for i, name in enumerate(names):
        save(tmp_path / name, seed=i)
    if suffix == "csv":
        with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([["file_name", "text"], ["001.png", "None, and\na line"], ["NA.png", "NA"]])
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"file_name": names, "text": ["None, and a line", "NA"]}), tmp_path / "metadata.parquet")
    _, found = captions_of(tmp_path)
    assert {k: v[0] for k, v in found.items()} == {"001": "None, and a line", "NA": "NA"}


def test_an_index_with_paths_from_another_root(tmp_path):
    save(tmp_path / "pool" / "a.png")
    index = tmp_path / "lists" / "train.jsonl"
    index.parent.mkdir()
    index.write_text(json.dumps({"image_path": "a.png", "captions": ["one", "two"], "repeats": 3}))
    report, found = captions_of(index, image_root=tmp_path / "pool")
    assert report.layout == "index" and found == {"a": ("one", 3, "train")} and len(report.records[0].captions) == 2


def test_masks_are_not_pictures_and_a_black_one_is_refused(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.jpg", seed=ord(name))
    Image.new("L", (48, 32), 255).save(tmp_path / "a-masklabel.png")
    Image.new("L", (24, 16), 255).save(tmp_path / "b_mask.png")
    Image.new("L", (48, 32), 0).save(tmp_path / "c-masklabel.png")
    Image.new("L", (48, 32), 99).save(tmp_path / "d-condlabel.png")
    report = scan_folder(tmp_path, workers=1)
    masks = {r.path.stem: r.mask.name if r.mask else None for r in report.records}
    assert masks == {"a": "a-masklabel.png", "b": "b_mask.png", "d": None}
    assert [(i.path.name, i.code) for i in report.left_out] == [("c.jpg", "empty_mask")]
    assert any("the mask is 24 x 16" in w for r in report.records for w in r.warnings)


def test_onetrainer_concepts(tmp_path):
    save(tmp_path / "one" / "a_red_fox.png", seed=1)
    save(tmp_path / "two" / "b.png", seed=2)
    save(tmp_path / "off" / "c.png", seed=3)
    concepts = [
        {"path": "one", "balancing": 5.0, "text": {"prompt_source": "filename"}}, {"path": "two", "type": "VALIDATION"}, {"path": "off", "enabled": False},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    report, found = captions_of(tmp_path / "concepts.json")
    assert report.layout == "onetrainer" and found == {"a_red_fox": ("a red fox", 5, "train"), "b": (None, 1, "held_out")}
    assert any("is not enabled" in note for note in report.notes)


def test_tencent_csv_with_paths_from_where_the_tool_ran(tmp_path):
    save(tmp_path / "porcelain" / "images" / "0.png")
    (tmp_path / "porcelain" / "csvfile").mkdir()
    (tmp_path / "porcelain" / "csvfile" / "image_text.csv").write_text("img_path,text_zh\n./dataset/porcelain/images/0.png,青花瓷风格，一只狐狸\n", encoding="utf-8")
    _, found = captions_of(tmp_path / "porcelain" / "csvfile" / "image_text.csv")
    assert found == {"0": ("青花瓷风格，一只狐狸", 1, "train")}


def test_an_arrow_index_uses_the_rows_it_names_as_often_as_it_names_them(folder, tmp_path):
    records = scan_folder(folder, workers=1).records
    result = convert(records, tmp_path / "out", "tencent-arrow")
    index = json.loads(result.open_at.read_text())
    assert index["cum_length"] == [5] and index["indices"] == [0, 1, 2, 3, 4]
    index["indices"] = [1, 3, 3, 9]
    result.open_at.write_text(json.dumps(index))
    report = scan_folder(result.open_at, workers=1)
    assert sorted((r.content_hash, r.repeats) for r in report.records) == sorted([(records[1].content_hash, 1), (records[3].content_hash, 2)])
    assert [item.code for item in report.left_out] == ["missing"]


def test_a_saved_dataset_and_its_splits(folder, tmp_path):
    import datasets

    paths = sorted(str(p) for p in folder.glob("*.png"))
    rows = {"image": paths[:3], "text": ["one", "two", ""]}
    train = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    held = datasets.Dataset.from_dict({"image": paths[3:4], "text": ["held"]}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": train, "validation": held}).save_to_disk(str(tmp_path / "saved"))
    report = scan_folder(tmp_path / "saved", workers=1)
    assert report.layout == "datasets"
    assert sorted((r.caption or "", r.split) for r in report.records) == [("", "train"), ("held", "held_out"), ("one", "train"), ("two", "train")]
    assert {r.content_hash for r in report.records} == {hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths[:4]}


def test_a_written_imagefolder_loads_with_the_datasets_library(folder, tmp_path):
    import datasets

    convert(scan_folder(folder, workers=1).records, tmp_path / "out", "metadata")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["text"]) == [f"brndx, a shape number {i}, on paper" for i in range(5)] and loaded[0]["image"].size


def test_both_sidecar_suffixes_and_their_precedence(tmp_path):
    save(tmp_path / "a.png")
    for name, text in {"a.txt": "first", "a.caption": "second", "a.png.txt": "third", "a.zh.txt": "第四"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (record,) = scan_folder(tmp_path, workers=1).records
    assert record.caption == "first" and [(c.text, c.language) for c in record.captions] == [("first", "en"), ("第四", "zh")]
    assert any("differ" in text for text in record.warnings)


def test_a_caption_without_a_picture_and_a_shared_stem_are_said(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("both")
    (tmp_path / "lonely.txt").write_text("nobody")
    report = scan_folder(tmp_path, workers=1)
    assert [r.caption for r in report.records] == ["both", "both"] and all("shares its caption file" in r.warnings[0] for r in report.records)
    assert any("lonely.txt" in text for text in report.warnings)


