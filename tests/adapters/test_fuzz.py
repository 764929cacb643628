"""Damaged files by the hundred: our own error or a file that the reference library accepts too; never anything else."""

from __future__ import annotations

import random
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch.testing import assert_close

from data_tools.atomic_files import FILE_MODE
from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.layouts import parse_key
from finetune.adapters.tensor_files import TensorFile
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import D, delta_of, pair, source_delta, write
from tests.adapters.test_arithmetic import adapter


def outcome(path) -> str:
    """Whether our reader takes the file; what it takes, the reference library must take too."""
    try:
        with TensorFile(path):
            pass
    except AdapterError:
        return "refused"
    try:
        with safe_open(path, "pt"):
            return "accepted"
    except SafetensorError as problem:
        raise AssertionError(f"accepted here, refused there: {problem}") from None


def test_truncation_at_every_byte_of_the_beginning_is_refused(tmp_path):
    whole = write(tmp_path, pair("lora_unet_double_blocks_0_img_attn_proj")).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in [*range(200), *range(200, len(whole), 97)]:
        path.write_bytes(whole[:length])
        assert outcome(path) == "refused"


def test_flipped_bits_in_the_header_never_leak_another_exception(tmp_path):
    whole = write(tmp_path, pair("lora_unet_double_blocks_0_img_attn_proj"), {"format": "pt", "note": "x"}).read_bytes()
    length, chance = int.from_bytes(whole[:8], "little") + 8, random.Random(0)
    path, seen = tmp_path / "flipped.safetensors", {"refused": 0, "accepted": 0}
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(length)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        seen[outcome(path)] += 1
        try:
            read_adapter(path, KEY_MAPS)
        except AdapterError as refusal:
            assert "\n" not in refusal.what
    assert seen["refused"] > 100 and seen["accepted"] > 10


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=80))
def test_any_text_as_a_key_is_understood_or_refused(text):
    try:
        parsed = parse_key(text, "file")
    except AdapterError:
        return
    assert parsed.stem and parsed.role


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), alpha=st.floats(0.01, 64), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_rank_and_alpha_of_a_kohya_file_gives_its_delta(tmp_path_factory, rank, alpha, seed, dtype):
    stem = "lora_unet_blocks_3_attn1_Wqkv"
    tensors = pair(stem, 3 * D, D, rank, alpha=alpha, seed=seed)
    tensors = {key: value.to(dtype) if "lora" in key.rpartition(stem)[2] else value for key, value in tensors.items()}
    read = read_adapter(write(tmp_path_factory.mktemp("k"), tensors), KEY_MAPS)
    expected = source_delta(tensors, stem, float(torch.tensor(alpha)) / rank).chunk(3)
    for letter, part in zip("qkv", expected, strict=True):
        assert_close(delta_of(read, f"blocks.3.attn1.to_{letter}"), part, atol=1e-5, rtol=1e-5)


def test_a_written_file_can_be_read_by_others_and_by_the_reference_library(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", adapter())
    assert stat.S_IMODE(path.stat().st_mode) == FILE_MODE
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == {f"transformer.{key}" for key in adapter().tensors}
        assert opened.metadata()["format"] == "pt"


def test_writing_over_a_file_that_is_being_read_leaves_the_reader_whole(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", adapter(seed=1))
    with TensorFile(path) as reading:
        write_adapter(path, adapter(seed=2))
        key = "transformer.a.one.lora_A.weight"
        assert reading.read(key).equal(adapter(seed=1).tensors["a.one.lora_A.weight"])
    assert read_adapter(path).tensors["a.one.lora_A.weight"].equal(adapter(seed=2).tensors["a.one.lora_A.weight"])


@pytest.mark.parametrize("name", ["a.bin", "a.txt", "a"])
def test_an_adapter_is_written_under_its_own_ending(tmp_path, name):
    write_adapter(tmp_path / "a.safetensors", adapter())
    (tmp_path / name).write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / name)
