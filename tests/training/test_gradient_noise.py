"""The gradient noise scale against gradients whose signal and noise are known."""

import pytest
import torch
from accelerate import Accelerator

from finetune.training.gradient_noise import MicroGradients, NoiseScale, signal_and_noise
from finetune.training.step import optimizer_step


def test_signal_and_noise_come_out_as_they_were_put_in_for_micro_batches_of_any_sizes():
    draw = torch.Generator().manual_seed(0)
    true, spread, sizes = torch.full((30,), 0.2, dtype=torch.float64), 0.7, (2, 5, 9)
    found = []
    for _ in range(4000):
        micro = [true + spread / size**0.5 * torch.randn(30, generator=draw, dtype=torch.float64) for size in sizes]
        whole = sum(size * gradient for size, gradient in zip(sizes, micro, strict=True)) / sum(sizes)
        found.append(signal_and_noise(sum(gradient.square().sum().item() for gradient in micro) / 3, sum(1 / size for size in sizes) / 3, whole.square().sum().item(), sum(sizes)))
    signal, noise = (sum(values) / len(found) for values in zip(*found, strict=True))
    assert signal == pytest.approx(30 * 0.2**2, rel=0.02) and noise == pytest.approx(30 * spread**2, rel=0.02)
    scale = NoiseScale()
    for one in found:
        scale.take(*one)
    assert scale.samples == pytest.approx(spread**2 / 0.2**2, rel=0.3)


def test_a_step_measures_each_micro_batch_by_its_own_gradient():
    weight = torch.nn.Parameter(torch.zeros(2))
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    numbers = optimizer_step(Accelerator(cpu=True), torch.optim.SGD([weight], lr=0.1), [weight], [[0], [1, 2]], lambda points: rows[points] @ weight, 0.0, measure_noise=True)
    # The mean gradients of the micro-batches are (1, 0) and (1, 2), that of the step (1, 4/3).
    assert numbers.signal_and_noise == pytest.approx(signal_and_noise((1 + 5) / 2, (1 + 1 / 2) / 2, 1 + 16 / 9, 3), rel=1e-4)


def test_one_micro_batch_says_nothing_and_a_scale_that_cannot_be_is_not_given():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    micro = MicroGradients([weight], 4)
    micro.note(4)
    assert micro.signal_and_noise(Accelerator(cpu=True), 1.4) is None
    scale = NoiseScale()
    scale.take(-1.0, 2.0)
    assert scale.samples is None
