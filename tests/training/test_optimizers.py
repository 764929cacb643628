"""Optimizers by name, and their state without pickle."""

import json

import pytest
import torch
from safetensors.torch import load, save

from finetune.errors import BadInput, RunFolderError
from finetune.training.optimizers import OPTIMIZERS, build_optimizer, choose_optimizer, optimizer_state, restore_optimizer

CPU = torch.device("cpu")
ON_A_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]


def parameters():
    generator = torch.Generator().manual_seed(0)
    # 8-bit optimizers keep tensors below 4,096 elements in 32 bits: one on each side of that.
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 64), (16, 8))]


def take_steps(optimizer, values, first, count):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for value in values:
            value.grad = torch.randn(value.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_restored_state_goes_on_bit_for_bit(name):
    straight = parameters()
    optimizer = build_optimizer(name, straight, 1e-2, 0.01)
    take_steps(optimizer, straight, 0, 7)

    broken = parameters()
    first = build_optimizer(name, broken, 1e-2, 0.01)
    take_steps(first, broken, 0, 4)
    tensors, structure = optimizer_state(first)
    tensors, structure = load(save(tensors)), json.loads(json.dumps(structure))
    second = build_optimizer(name, broken, 1e-2, 0.01)
    restore_optimizer(second, tensors, structure)
    take_steps(second, broken, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True))


@pytest.mark.parametrize("name", [name for name in ON_A_CPU if name != "adamw"])
def test_at_the_same_rate_a_matrix_of_zeros_goes_as_far_as_with_adamw(name):
    """LoRA's B starts there: an optimizer whose steps are relative to a tensor's size would leave it there."""
    moved = {}
    for each in ("adamw", name):
        matrix = torch.nn.Parameter(torch.zeros(80, 64))
        take_steps(build_optimizer(each, [matrix], 1e-4, 0.0), [matrix], 0, 50)
        moved[each] = matrix.detach().square().mean().sqrt().item()
    assert 0.3 < moved[name] / moved["adamw"] < 3


def test_large_parameters_of_the_8_bit_optimizer_have_8_bit_moments():
    values = parameters()
    optimizer = build_optimizer("adamw8bit", values, 1e-2, 0.0)
    take_steps(optimizer, values, 0, 1)
    assert optimizer.state[values[0]]["state1"].dtype == torch.uint8
    assert optimizer.state[values[1]]["state1"].dtype == torch.float32


def test_a_state_of_another_optimizer_is_refused_by_name():
    values = parameters()
    adamw = build_optimizer("adamw", values, 1e-2, 0.0)
    take_steps(adamw, values, 0, 1)
    tensors, structure = optimizer_state(adamw)
    with pytest.raises(RunFolderError, match="does not fit"):
        restore_optimizer(build_optimizer("adamw", values[:1], 1e-2, 0.0), tensors, structure)


def test_auto_takes_fused_adamw_on_a_cpu_and_says_why():
    choice = choose_optimizer("auto", CPU)
    assert choice.name == "adamw" and "CPU" in choice.reason
    assert choose_optimizer("auto", torch.device("cuda")).name == "adamw8bit"
    assert build_optimizer("adamw", parameters(), 1e-3, 0.0).defaults["fused"] is True


def test_a_paged_optimizer_without_a_gpu_is_refused_with_what_to_do():
    with pytest.raises(BadInput) as refusal:
        choose_optimizer("paged_adamw8bit", CPU)
    assert refusal.value.exit_code == 2 and "adamw8bit" in refusal.value.fix
