"""Files whose bytes lie: headers, lengths, pickles, links. Refused before a tensor is read; nothing is executed."""

from __future__ import annotations

import os
import pickle
import resource

import pytest
import torch

from finetune.adapters.adapter_file import read_adapter
from finetune.adapters.tensor_files import TensorFile
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import D, R, pair, raw_header, write

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
A = TO_Q + ".lora_A.weight"


def good(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A fine file, with tensors replaced by full key."""
    return pair(TO_Q, suffix="peft", alpha=None) | changes


BODY = b"\0" * 8


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


REFUSED_BYTES = [
    ("63 a path in a key", raw_header({"../x.lora_A.weight": entry()}, BODY), "name that no adapter has"),
    ("63 a slash", raw_header({"a/b.lora_A.weight": entry()}, BODY), "name that no adapter has"),
    ("63 NUL", raw_header({"a\0.lora_A.weight": entry()}, BODY), "name that no adapter has"),
    ("63 newline", raw_header({"a\n.lora_A.weight": entry()}, BODY), "name that no adapter has"),
    ("63 ten thousand characters", raw_header({"a" * 10_000: entry()}, BODY), "name that no adapter has"),
    ("63 right-to-left override", raw_header({"a\u202e.lora_A.weight": entry()}, BODY), "name that no adapter has"),
    ("65 cut short", raw_header({"a.lora_A.weight": entry()}, BODY[:4]), "cut short"),
    ("66 no bytes", b"", "only 0 bytes"),
    ("67 web page", b"<!DOCTYPE html><html>Access denied</html>", "web page"),
    ("67 web page with space before", b"\n  <html>" + b" " * 40, "web page"),
    ("68 git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs"),
    ("69 header of 2^62 bytes", raw_header(b"{}", length=1 << 62), "longer than the file"),
    ("69 header of 200 MB", raw_header(b"{}", length=200_000_000), "longer than the file"),
    ("71 overlap", raw_header({"a.lora_A.weight": entry(), "b.lora_A.weight": entry(offsets=(4, 12))}, b"\0" * 12), "overlap"),
    ("72 gap", raw_header({"a.lora_A.weight": entry(offsets=(4, 12))}, b"\0" * 12), "gap"),
    ("72 trailing bytes", raw_header({"a.lora_A.weight": entry()}, BODY + b"PK"), "after the last"),
    ("73 shape and bytes disagree", raw_header({"a.lora_A.weight": entry(shape=(3,))}, BODY), "disagree"),
    ("74 overflowing shape", raw_header({"a.lora_A.weight": entry(shape=(2**61, 8))}, BODY), "shape that no adapter has"),
    ("74 an axis beyond any layer", raw_header({"a.lora_A.weight": entry(shape=(2**21,), offsets=(0, 2**23))}, BODY), "shape that no adapter has"),
    ("75 duplicate keys", raw_header(b'{"a.x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a.x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', BODY), "twice"),
    ("76 unknown dtype", raw_header({"a.lora_A.weight": entry("F3")}, BODY), "unknown dtype"),
    ("76 dtype that is no text", raw_header({"a.lora_A.weight": entry([1])}, BODY), "unknown dtype"),
    ("77 metadata that is no text", raw_header({"__metadata__": {"a": 1}, "a.lora_A.weight": entry()}, BODY), "metadata"),
    ("80 pickle under our name", pickle.dumps({"a": 1}) + b"\0" * 20, "pickle"),
    ("83 zip", b"PK\x03\x04" + b"\0" * 60, "zip"),
    ("83 gzip", b"\x1f\x8b" + b"\0" * 60, "gzip"),
    ("97 deep nesting", raw_header(b"[" * 100_000 + b"]" * 100_000), "not valid JSON|not a JSON object"),
    ("97 metadata of 2 MB", raw_header({"__metadata__": {"a": "x" * 2_000_000}, "a.lora_A.weight": entry()}, BODY), "bytes of metadata"),
    ("metadata with half of a character", raw_header({"__metadata__": {"a": "\ud800"}, "a.lora_A.weight": entry()}, BODY), "half of a character"),
    ("header is a list", raw_header([1]), "not a JSON object"),
    ("header is not UTF-8", raw_header(b"\xff\xfe{}"), "not valid JSON"),
    ("NaN in the header", raw_header(b'{"a.x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', BODY), "not valid JSON"),
    ("negative shape", raw_header({"a.lora_A.weight": entry(shape=(-2,))}, BODY), "whole numbers"),
    ("boolean shape", raw_header({"a.lora_A.weight": entry(shape=(True,))}, BODY), "whole numbers"),
    ("a field too many", raw_header({"a.lora_A.weight": entry() | {"x": 1}}, BODY), "description"),
    ("six axes", raw_header({"a.lora_A.weight": entry(shape=(1, 1, 1, 1, 1, 2))}, BODY), "shape that no adapter has"),
]


@pytest.mark.parametrize(("content", "said"), [case[1:] for case in REFUSED_BYTES], ids=[case[0] for case in REFUSED_BYTES])
def test_bytes_that_lie_are_refused_before_any_tensor_is_read(tmp_path, content, said):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=said) as caught:
        read_adapter(path, KEY_MAPS)
    assert "\n" not in caught.value.what and len(caught.value.what) < 300


def test_70_a_header_beyond_the_limit_is_not_parsed(tmp_path):
    path = tmp_path / "adapter.safetensors"
    with open(path, "wb") as out:
        out.write((17 << 20).to_bytes(8, "little"))
        out.truncate(18 << 20)
    with pytest.raises(AdapterError, match="a header of"):
        read_adapter(path, KEY_MAPS)


def test_too_many_tensors_are_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(raw_header({f"k{number}": entry(shape=(0,), offsets=(0, 0)) for number in range(50_001)}))
    with pytest.raises(AdapterError, match="50001 tensors"):
        read_adapter(path, KEY_MAPS)


def test_84_a_sparse_file_of_a_terabyte_is_refused_by_its_size(tmp_path):
    path = tmp_path / "adapter.safetensors"
    with open(path, "wb") as out:
        out.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match="full checkpoint"):
        read_adapter(path, KEY_MAPS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


class Touch:
    """Unpickling this runs code: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "adapter.ckpt", "adapter.safetensors"])
def test_78_to_80_a_pickle_is_never_opened_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(tmp_path / name, KEY_MAPS)
    assert not (tmp_path / "ran").exists()


def test_82_a_folder_with_only_a_pickle_is_refused(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(tmp_path, KEY_MAPS)


def test_81_a_folder_with_several_files_asks_which(tmp_path):
    write(tmp_path, good(), name="one.safetensors")
    write(tmp_path, good(), name="two.safetensors")
    with pytest.raises(AdapterError, match="2 adapter files") as caught:
        read_adapter(tmp_path, KEY_MAPS)
    assert "one.safetensors" in caught.value.fix


def test_85_a_link_that_leads_elsewhere_is_refused_and_the_hubs_cache_is_not(tmp_path):
    real = write(tmp_path, good())
    (tmp_path / "link.safetensors").symlink_to(real)
    with pytest.raises(AdapterError, match="symbolic link"):
        read_adapter(tmp_path / "link.safetensors", KEY_MAPS)
    snapshot = tmp_path / "models--me--style" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--style" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    real.rename(blobs / "0123")
    (snapshot / "adapter.safetensors").symlink_to("../../blobs/0123")
    assert read_adapter(snapshot / "adapter.safetensors", KEY_MAPS).modules


def test_things_that_are_no_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AdapterError, match="not a regular file"):
        read_adapter(tmp_path / "pipe.safetensors", KEY_MAPS)
    with pytest.raises(AdapterError, match="no such file"):
        read_adapter(tmp_path / "nothing.safetensors", KEY_MAPS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="no .safetensors file"):
        read_adapter(tmp_path / "empty", KEY_MAPS)


def test_102_a_file_that_changes_between_check_and_read_is_read_as_it_was_checked(tmp_path):
    path = write(tmp_path, good())
    with TensorFile(path) as opened:
        write(tmp_path, good(**{A: torch.full((R, D), 7.0)}), name="other.safetensors")
        os.replace(tmp_path / "other.safetensors", path)
        assert opened.read(A).equal(good()[A])
