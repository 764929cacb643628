"""Thinking tokens join the text states of prompts only, survive their file bit for bit, and are missed when missing."""

import pytest
import torch

from finetune.adapters.adapter_file import AdapterFile, read_adapter, write_adapter
from finetune.errors import AdapterError, BadInput
from finetune.families.protocol import Conditioning, TextStream
from finetune.thinking.tokens import (
    FILE_NAME, EncodingsWithTokens, ThinkingTokens, conditionings_with_tokens, initial_tokens, read_tokens, tokens_of, write_tokens,
)

FIXED = TextStream("t5", "t5_mask", "last_slots")
FREE = TextStream("text", "mask", "append", ("ids",))


def fixed(real=3, slots=8, width=4):
    return Conditioning({"clip": torch.ones(2, 4), "t5": torch.arange(slots * width).float().view(slots, width),
                         "t5_mask": (torch.arange(slots) < real).long()})


def free(real=3, width=4):
    return Conditioning({"text": torch.ones(real, width), "mask": torch.ones(real, dtype=torch.bool), "ids": torch.arange(real)[:, None].float()})


def test_tokens_take_the_last_slots_where_the_text_length_is_fixed():
    tokens = ThinkingTokens(torch.full((2, 4), 9.0), FIXED)
    before, joined = fixed(), tokens.joined_to(fixed())
    assert torch.equal(joined.tensors["t5"][:6], before.tensors["t5"][:6])
    assert torch.equal(joined.tensors["t5"][6:], tokens.states)
    assert joined.tensors["t5_mask"].tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    assert torch.equal(joined.tensors["clip"], before.tensors["clip"])


def test_tokens_lengthen_the_text_where_its_length_is_free():
    joined = ThinkingTokens(torch.full((2, 4), 9.0), FREE).joined_to(free())
    assert joined.tensors["text"].shape == (5, 4) and joined.tensors["mask"].all() and joined.tensors["mask"].dtype == torch.bool
    assert joined.tensors["ids"].tolist() == [[0], [1], [2], [2], [2]]


def test_gradients_reach_the_tokens_through_a_half_precision_text():
    tokens = ThinkingTokens(torch.nn.Parameter(torch.ones(2, 4)), FREE)
    half = Conditioning({**free().tensors, "text": torch.ones(3, 4, dtype=torch.bfloat16)})
    tokens.joined_to(half).tensors["text"].float().sum().backward()
    assert torch.equal(tokens.states.grad, torch.ones(2, 4))


def test_a_text_that_fills_its_slots_is_named_not_overwritten():
    with pytest.raises(BadInput, match="takes 7 of 8 slots; 2 must be free"):
        ThinkingTokens(torch.ones(2, 4), FIXED).joined_to(fixed(real=7))


def test_the_first_values_are_near_the_real_states_and_follow_from_the_seed():
    first, again, other = (initial_tokens(4, FIXED, [fixed()], seed) for seed in (1, 1, 2))
    assert torch.equal(first.states, again.states) and not torch.equal(first.states, other.states)
    real = fixed().tensors["t5"][:3]
    assert (first.states - real.mean(0)).abs().max() < 0.2 * real.std()


@pytest.mark.parametrize("count, stream, said", [(4, None, "takes no thinking tokens"), (0, FIXED, "0 thinking tokens"), (65, FIXED, "65"), (6, FIXED, "must be free")])
def test_tokens_that_cannot_be_are_refused_before_training(count, stream, said):
    with pytest.raises(BadInput, match=said):
        initial_tokens(count, stream, [fixed()], 0)


class Encoded:
    answer = 42

    def conditioning(self, prompt):
        return fixed()


def test_only_the_conditional_branch_gets_tokens():
    tokens = ThinkingTokens(torch.ones(2, 4), FIXED)
    encodings = EncodingsWithTokens(Encoded(), tokens, ["ugly"])
    assert [bool(encodings.conditioning(prompt).tensors["t5_mask"][-1]) for prompt in ("a cat", "", "ugly")] == [True, False, False]
    assert encodings.answer == 42
    drawn = conditionings_with_tokens({"a cat": fixed(), "": fixed(), "ugly": fixed()}, tokens, {"ugly"})
    assert {prompt: bool(found.tensors["t5_mask"][-1]) for prompt, found in drawn.items()} == {"a cat": True, "": False, "ugly": False}
    assert torch.equal(conditionings_with_tokens({"a cat": fixed()}, None, ())["a cat"].tensors["t5"], fixed().tensors["t5"])


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder with tokens in it."""
    tokens = ThinkingTokens(torch.randn(2, 4), FIXED)
    stated = write_tokens(tmp_path, tokens)
    adapter = AdapterFile({"block.lora_A.weight": torch.ones(1, 4), "block.lora_B.weight": torch.ones(4, 1)}).with_provenance(thinking_tokens=stated)
    write_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter)
    return tmp_path, tokens


def test_the_folder_gives_back_the_same_tokens_and_the_lora_is_read_as_ever(folder):
    path, tokens = folder
    adapter = read_adapter(path)
    assert adapter.modules == ["block"]
    found = tokens_of(adapter, path, FIXED)
    assert torch.equal(found.states, tokens.states) and found.stream == FIXED
    assert torch.equal(tokens_of(adapter, path / "pytorch_lora_weights.safetensors", FIXED).states, tokens.states)


def test_an_adapter_trained_without_tokens_has_none(tmp_path):
    assert tokens_of(AdapterFile({}), tmp_path, FIXED) is None


def test_a_missing_a_swapped_and_a_foreign_file_are_refused(folder):
    path, _ = folder
    adapter = read_adapter(path)
    with pytest.raises(AdapterError, match="another model family"):
        tokens_of(adapter, path, FREE)
    write_tokens(path, ThinkingTokens(torch.ones(2, 4), FIXED))
    with pytest.raises(AdapterError, match="belongs to another adapter"):
        tokens_of(adapter, path, FIXED)
    (path / FILE_NAME).unlink()
    with pytest.raises(AdapterError, match="2 thinking tokens, and .* is not beside it"):
        tokens_of(adapter, path, FIXED)


def broken_files():
    from safetensors.torch import save

    good = {"thinking_tokens": '{"v":1,"count":2,"states":"t5","mask":"t5_mask","placement":"last_slots","per_token":[]}'}
    yield "another tensor", save({"x": torch.ones(2, 4)}, good)
    yield "one axis", save({"thinking_tokens": torch.ones(4)}, good)
    yield "not finite", save({"thinking_tokens": torch.full((2, 4), float("nan"))}, good)
    yield "whole numbers", save({"thinking_tokens": torch.ones(2, 4, dtype=torch.int32)}, good)
    yield "not finite in 8 bits", save({"thinking_tokens": torch.full((2, 4), float("nan")).to(torch.float8_e4m3fn)}, good)
    yield "no header", save({"thinking_tokens": torch.ones(2, 4)})
    yield "another count", save({"thinking_tokens": torch.ones(3, 4)}, good)
    yield "unknown place", save({"thinking_tokens": torch.ones(2, 4)}, {"thinking_tokens": good["thinking_tokens"].replace("last_slots", "first")})
    yield "cut off", save({"thinking_tokens": torch.ones(2, 4)}, good)[:-8]
    yield "a pickle", b"\x80\x04\x95" + b"\0" * 100


@pytest.mark.parametrize("content", [content for _, content in broken_files()], ids=[name for name, _ in broken_files()])
def test_broken_token_files_are_refused(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(AdapterError):
        read_tokens(tmp_path)


def test_tokens_of_another_width_are_refused():
    with pytest.raises(AdapterError, match="4 wide, this model's text states 6"):
        ThinkingTokens(torch.ones(2, 4), FIXED).joined_to(fixed(width=6))
