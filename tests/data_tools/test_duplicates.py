"""Duplicates: copies, edits and mirrored copies are grouped, strangers are not, leaks are named; all close hashes are found."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_tools.contact_sheets import write_sheet
from data_tools.duplicates import find_duplicates
from data_tools.errors import DataError
from data_tools.fingerprints import close_pairs, close_vectors
from data_tools.scan import scan_folder
from tests.data_tools.pictures import draw, save


def components(count, edges):
    parent = list(range(count))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in edges:
        parent[max(root(a), root(b))] = min(root(a), root(b))
    return [root(i) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=14)), min_size=1, max_size=60), st.integers(0, 12))
def test_all_pairs_within_a_distance_are_found_and_no_other(bases, changes, distance):
    hashes = [bases[b % len(bases)] ^ sum(1 << bit for bit in bits) for b, bits in changes]
    found = [tuple(pair) for pair in close_pairs(np.array(hashes, dtype=np.uint64), distance).tolist()]
    count = len(hashes)
    wanted = {(i, j) for i in range(count) for j in range(i + 1, count) if bin(hashes[i] ^ hashes[j]).count("1") <= distance}
    assert set(found) <= wanted and len(found) == len(set(found))
    assert {pair for pair in wanted if hashes[pair[0]] != hashes[pair[1]]} <= {p for p in wanted if components(count, found)[p[0]] == components(count, found)[p[1]]}
    assert components(count, found) == components(count, wanted)


def test_close_vectors_are_found_among_many():
    draws = np.random.default_rng(0)
    vectors = draws.standard_normal((1500, 64))
    vectors[1000:1200] = vectors[:200] + 0.05 * draws.standard_normal((200, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert close_vectors(vectors, 0.95).tolist() == [[i, 1000 + i] for i in range(200)]


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    root = tmp_path_factory.mktemp("edited")
    for i in range(8):
        save(root / f"own-{i}.png", 200, 150, seed=i)
    original = draw(200, 150, seed=0)
    original.resize((100, 75)).save(root / "half.png")
    original.save(root / "quality.jpg", quality=30)
    original.convert("L").save(root / "x-grey.png")
    shutil.copy(root / "own-1.png", root / "copy.png")
    ImageOps.mirror(draw(200, 150, seed=2)).save(root / "mirrored.png")
    for i in range(3):
        Image.new("RGB", (64, 64), (i * 40, 10, 10)).save(root / f"flat-{i}.png")
    return scan_folder(root, workers=2, use_cache=False).records


def test_copies_and_edits_are_grouped_and_strangers_are_not(edited):
    report = find_duplicates(edited, workers=2, use_cache=False)
    groups = {group.kind: [member.path.name for member in group.members] for group in report.groups}
    assert groups["near"][0] == "own-0.png" and set(groups["near"]) == {"own-0.png", "half.png", "quality.jpg", "x-grey.png"}
    assert groups["exact"] == ["copy.png", "own-1.png"] and len(report.groups) == 2
    assert {record.path.name for record in report.flat} == {"flat-0.png", "flat-1.png", "flat-2.png"}
    assert {record.path.name for record in report.surplus} == {"half.png", "quality.jpg", "x-grey.png", "own-1.png"}


def test_mirrored_copies_are_found_when_asked(edited):
    report = find_duplicates(edited, mirrored=True, workers=2)
    assert ["mirrored.png", "own-2.png"] in [sorted(m.path.name for m in group.members) for group in report.groups if group.kind == "mirrored"]


def test_a_held_out_picture_that_training_sees_is_named(edited):
    records = [replace(r, split="held_out") if r.path.name in ("half.png", "own-3.png") else r for r in edited]
    (leak,) = find_duplicates(records, workers=2).leaks
    assert "half.png" in {member.path.name for member in leak.members} and leak.keep.path.name == "own-0.png"


def test_pairs_from_embeddings_join_groups(edited):
    names = [r.path.name for r in edited]
    report = find_duplicates(edited, pairs=np.array([[names.index("own-6.png"), names.index("own-5.png")]]), workers=2)
    assert {"own-5.png", "own-6.png"} in [{m.path.name for m in group.members} for group in report.groups]


def test_groups_become_a_contact_sheet(edited, tmp_path):
    report = find_duplicates(edited, workers=2)
    write_sheet(tmp_path / "sheet.png", [[m.path for m in group.members] for group in report.groups])
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 4 * 176 and sheet.height > 2 * 176 and len(sheet.convert("RGB").getcolors(10**7)) > 1000
    with pytest.raises(DataError):
        write_sheet(tmp_path / "sheet.txt", [])


def test_embeddings_of_a_tiny_vision_model_find_the_copy(edited, tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from data_tools.captioners.embeddings import pairs_by_embedding

    CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=6)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(tmp_path)
    paths = [r.path for r in edited]
    pairs = pairs_by_embedding(paths, str(tmp_path), 0.9999)
    names = [{paths[a].name, paths[b].name} for a, b in pairs]
    assert {"copy.png", "own-1.png"} in names
