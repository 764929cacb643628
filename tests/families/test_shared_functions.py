"""What families share: packing and its inverse, padding and its mask, targets, shifts, checkpointing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import BadInput
from finetune.families import packing, schedules
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.flux import DEV
from finetune.families.flux2 import KLEIN
from finetune.families.hunyuan_dit import FACTS
from finetune.families.image_encoding import count_parameters
from finetune.families.protocol import Conditioning
from finetune.families.targets import keeps_full_precision, resolve_targets
from finetune.families.text_encoding import stack_padded
from finetune.objectives import LossWeighting, TimestepSampling
from tests.tiny_models.all import TINY

SIZES = st.integers(1, 5).map(lambda half: 2 * half)


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 3), channels=st.integers(1, 4), height=SIZES, width=SIZES)
def test_packing_is_undone_exactly(batch, channels, height, width):
    latents = torch.randn(batch, channels, height, width)
    assert torch.equal(packing.unpack(packing.pack(latents), height, width), latents)
    assert torch.equal(packing.unflatten_grid(packing.flatten_grid(latents), height, width), latents)


def test_packing_and_ids_are_the_pipelines_own():
    from diffusers import Flux2KleinPipeline, FluxPipeline

    latents = torch.randn(2, 3, 6, 4)
    assert torch.equal(packing.pack(latents), FluxPipeline._pack_latents(latents, 2, 3, 6, 4))
    assert torch.equal(packing.fold_patches(latents), Flux2KleinPipeline._patchify_latents(latents))
    assert torch.equal(packing.grid_ids(3, 2, 3, "cpu"), FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32))


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padded_rows_are_found_again_under_the_mask(lengths):
    rows = [torch.randn(length, 3) for length in lengths]
    states, mask = stack_padded([Conditioning({"t": row}) for row in rows], "t", "cpu", torch.float32)
    assert states.shape == (len(rows), max(lengths), 3)
    assert all(torch.equal(states[i][mask[i]], row) for i, row in enumerate(rows))
    assert states[~mask].abs().sum() == 0


def test_targets_are_presets_ranges_of_blocks_or_expressions():
    import re

    assert resolve_targets(FACTS, "attention") == FACTS.targets["attention"]
    middle = resolve_targets(FACTS, "attention[10-12]")
    assert [n for n in range(20) if re.fullmatch(middle, f"blocks.{n}.attn1.to_q")] == [10, 11, 12]
    assert resolve_targets(FACTS, r"blocks\.0\..*") == r"blocks\.0\..*"
    with pytest.raises(BadInput, match="ends before"):
        resolve_targets(FACTS, "attention[5-2]")
    with pytest.raises(BadInput, match="neither a preset") as caught:
        resolve_targets(FACTS, "blocks.(")
    assert "attention" in caught.value.fix


def test_a_single_blocks_projection_is_not_the_models_own():
    assert keeps_full_precision(DEV.facts, "proj_out")
    assert not keeps_full_precision(DEV.facts, "single_transformer_blocks.3.proj_out")
    assert keeps_full_precision(FACTS, "time_extra_emb.pooler.q_proj")
    assert keeps_full_precision(KLEIN.facts, "double_stream_modulation_img.linear")


def scheduler(**config):
    return SimpleNamespace(config=config)


def test_dynamic_shift_is_the_makers_line_over_the_tokens():
    dynamic = scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, shift=3.0)
    objective = schedules.scheduler_flow(dynamic, None, LossWeighting(), patch=2)
    assert objective.dynamic_shift(torch.Size((1, 16, 128, 128))) == pytest.approx(math.exp(1.15))
    assert objective.dynamic_shift(torch.Size((1, 16, 64, 64))) == pytest.approx(1.88, abs=0.01)


def test_constant_shift_and_a_given_sampling_are_taken_as_they_are():
    median = torch.tensor([0.5])
    shifted = schedules.scheduler_flow(scheduler(shift=3.0), None, LossWeighting(), patch=2)
    assert shifted.level(median, torch.zeros(1, 4, 8, 8)).sigma.item() == pytest.approx(0.75)
    assert schedules.scheduler_flow(scheduler(flow_shift=3.0, shift=None), None, LossWeighting(), patch=1).sampling.shift == 3.0
    own = schedules.scheduler_flow(scheduler(shift=3.0), TimestepSampling("uniform"), LossWeighting(), patch=2)
    assert own.level(median, torch.zeros(1, 4, 8, 8)).sigma.item() == 0.5


def test_checkpointing_recomputes_that_many_blocks_and_is_undone():
    runs = []

    class Block(torch.nn.Linear):
        def forward(self, x):
            runs.append(self)
            return super().forward(x).tanh()

    blocks = torch.nn.ModuleList(Block(4, 4) for _ in range(3)).train()
    for count, expected in ((0, 3), (2, 5), (99, 6), (0, 3)):
        runs.clear()
        assert checkpoint_blocks(blocks, count) == min(count, 3)
        x = torch.ones(1, 4)
        for block in blocks:
            x = block(x)
        x.sum().backward()
        assert len(runs) == expected
    assert all("forward" not in vars(block) for block in blocks)


def test_counting_parameters_allocates_nothing_not_even_a_table_of_positions():
    small = dict(TINY["sd3"].build().transformer.config)
    # 460 TB of positions.
    assert count_parameters("SD3Transformer2DModel", small | {"pos_embed_max_size": 1_900_000}) == count_parameters("SD3Transformer2DModel", small)
