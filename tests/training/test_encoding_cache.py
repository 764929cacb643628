"""Encodings under the hash of what made them."""

import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import TrainingError
from finetune.training.encoding_cache import EncodingCache, component_fingerprint, default_cache_folder, key_of

texts = st.lists(st.text(max_size=8), max_size=4)


@given(texts, texts)
@settings(deadline=None, max_examples=200)
def test_different_parts_have_different_keys(first, second):
    assert (key_of(*first) == key_of(*second)) == (first == second)


def test_an_entry_is_read_back_by_another_cache_with_its_dtypes(tmp_path):
    entry = {"mean": torch.randn(4, 2, 3), "mask": torch.tensor([True, False]), "half": torch.ones(3, dtype=torch.bfloat16)}
    EncodingCache(tmp_path).put("ab" * 32, entry)
    found = EncodingCache(tmp_path).get("ab" * 32)
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {name: (value.dtype, value.shape) for name, value in entry.items()}
    assert all(torch.equal(found[name], entry[name]) for name in entry)


def test_a_tensor_under_two_names_is_written_under_both_and_stays_the_callers(tmp_path):
    states, cache = torch.ones(2, 3), EncodingCache(tmp_path)
    cache.put("ab" * 32, {"states": states, "negative": states})
    states.zero_()
    for found in (cache.get("ab" * 32), EncodingCache(tmp_path).get("ab" * 32)):
        assert all(torch.equal(found[name], torch.ones(2, 3)) for name in ("states", "negative"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not safetensors", None, "flip"])
def test_a_damaged_entry_is_counted_once_and_can_be_made_again(tmp_path, content):
    key = key_of("x")
    EncodingCache(tmp_path).put(key, {"mean": torch.arange(32.0)})
    cache = EncodingCache(tmp_path)
    path = cache.path(key)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] if content is None else whole[:-1] + b"\x07" if content == "flip" else content)
    assert cache.missing([key, key]) == [key]
    assert cache.get(key) is None and cache.mended == 1
    cache.put(key, {"mean": torch.arange(32.0)})
    assert EncodingCache(tmp_path).get(key)["mean"].equal(torch.arange(32.0))


def test_an_entry_of_another_tool_without_digest_is_not_believed(tmp_path):
    from safetensors.torch import save_file

    cache, key = EncodingCache(tmp_path), key_of("foreign")
    cache.path(key).parent.mkdir(parents=True)
    save_file({"mean": torch.zeros(3)}, cache.path(key))
    assert cache.get(key) is None and cache.mended == 1


def test_two_processes_fill_one_cache_without_damage(tmp_path):
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom finetune.training.encoding_cache import EncodingCache, key_of\n"
        "cache = EncodingCache(Path(sys.argv[1]))\n"
        "for number in range(60): cache.put(key_of(str(number)), {'x': torch.full((50,), float(number))})\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    cache = EncodingCache(tmp_path)
    assert cache.missing(key_of(str(number)) for number in range(60)) == []
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_leaves_only_whole_entries_and_says_what_to_do(tmp_path):
    cache = EncodingCache(tmp_path)
    cache.put(key_of("small"), {"x": torch.zeros(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TrainingError) as failure:
            cache.put(key_of("large"), {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "BRUSHWORK_CACHE" in failure.value.fix
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key_of('small')}.safetensors"]


def test_a_changed_weight_file_changes_the_fingerprint_and_an_unchanged_one_does_not(tmp_path):
    component = tmp_path / "vae"
    component.mkdir()
    (component / "config.json").write_text("{}")
    (component / "weights.safetensors").write_bytes(b"1" * 100)
    first = component_fingerprint([component], tmp_path / "cache")
    assert component_fingerprint([component], tmp_path / "cache") == first
    assert component_fingerprint([component], tmp_path / "another cache") == first
    (component / "weights.safetensors").write_bytes(b"2" * 100)
    assert component_fingerprint([component], tmp_path / "cache") != first


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("BRUSHWORK_CACHE", str(tmp_path))
    assert default_cache_folder() == tmp_path
