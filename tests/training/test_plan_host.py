"""Weights that are streamed to a GPU wait in pinned host memory: a plan says how much, and whether the machine has it."""

from dataclasses import replace

import pytest
import torch

from finetune.cli.plan import _lines
from finetune.training import plan as plan_module
from finetune.training.placement import Hold, PinnedMemory
from finetune.training.plan import estimate, fewest_checkpoints
from finetune.training.plan_fit import refusal
from finetune.training.plan_run import _say
from finetune.training.plan_speed import Speed


@pytest.fixture
def on_gpu(ground):
    """The ground of a machine with a GPU, whose speed is known."""
    surveyed, recipe = ground
    return replace(surveyed, device=torch.device("cuda"), costs={}, traces={}, speed=Speed(1e9, 1e9, 1e-9, 1.0), expansions=dict.fromkeys(("streamed", "bf16"), 0.0)), recipe


def planned(on_gpu, hold, free, monkeypatch):
    monkeypatch.setattr(plan_module, "available_bytes", lambda device: free if device.type == "cpu" else 0)
    surveyed, recipe = on_gpu
    return fewest_checkpoints(surveyed, recipe, Hold(hold, torch.bfloat16, ""), 1 << 40)


def test_streamed_weights_are_counted_in_host_memory(on_gpu, monkeypatch):
    made = planned(on_gpu, "streamed", 8 << 30, monkeypatch)
    assert made.host_bytes == PinnedMemory.BLOCK_BYTES and made.host_budget_bytes == 8 << 30 and made.fits
    assert any("1.00 GiB of host memory, pinned for the weights, of 8.00 GiB: fits" in line for line in _lines(made))
    others = planned(on_gpu, "bf16", 0, monkeypatch)
    assert others.host_bytes == 0 and others.fits and not any("host memory" in line for line in _lines(others))
    assert estimate(*on_gpu, Hold("streamed", torch.bfloat16, ""), 0, 1 << 40).as_json()["host_bytes"] == 1 << 30


def test_more_than_the_machine_has_does_not_fit_and_is_said(on_gpu, monkeypatch):
    made, said = planned(on_gpu, "streamed", 1 << 28, monkeypatch), []
    assert made.fits_device and not made.fits and made.as_json()["fits"] is False
    assert any(line.startswith("memory:") and "fits" in line for line in _lines(made)) and any("256 MiB: DOES NOT FIT" in line for line in _lines(made))
    what, way_out = refusal(made)
    assert "1.00 GiB of host memory" in what and "nf4" in way_out
    monkeypatch.setattr("data_tools.progress.Progress.say", lambda self, text: said.append(text))
    from data_tools.progress import Progress

    _say(made, Progress())
    assert [line for line in said if line.startswith("warning")] == ["warning: the plan needs 1.00 GiB of host memory, pinned for the weights, of 256 MiB; base.hold = nf4 or int8 needs none"]
