"""One optimizer step over micro-batches."""

import math

import pytest
import torch
from accelerate import Accelerator

from finetune.training.step import optimizer_step
from tests.training.loss_scaling import ScalingAccelerator


class Problem:
    """Least squares on 12 points, so that gradients can be written down."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        self.y = torch.randn(12, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.accelerator = Accelerator(cpu=True)

    def losses(self, points):
        return (self.x[points] @ self.weight - self.y[points]) ** 2

    def step(self, batches, clip=0.0, losses=None):
        return optimizer_step(self.accelerator, self.optimizer, [self.weight], batches, losses or self.losses, clip)


@pytest.mark.parametrize("batches", [[list(range(12))], [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10], [11]], [[number] for number in range(12)]])
def test_any_cut_of_the_same_samples_gives_the_gradient_of_their_mean_loss(batches):
    problem = Problem()
    expected = torch.autograd.grad(problem.losses(list(range(12))).mean(), problem.weight)[0]
    before = problem.weight.detach().clone()
    numbers = problem.step(batches)
    assert torch.allclose((before - problem.weight.detach()) / 0.1, expected, rtol=1e-12)
    assert numbers.applied and numbers.loss == pytest.approx(problem_loss(before))
    assert numbers.grad_norm == pytest.approx(expected.norm().item())


def problem_loss(weight):
    problem = Problem()
    return ((problem.x @ weight - problem.y) ** 2).mean().item()


def test_a_gradient_longer_than_the_clip_is_shortened_to_it():
    problem = Problem()
    before = problem.weight.detach().clone()
    numbers = problem.step([list(range(12))], clip=0.5)
    assert numbers.grad_norm > 0.5
    assert ((before - problem.weight.detach()) / 0.1).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_named(value):
    problem = Problem()
    before = problem.weight.detach().clone()
    numbers = problem.step([[0], [1]], losses=lambda points: problem.losses(points) * (value if points == [1] else 1))
    assert not numbers.applied and numbers.bad == "loss"
    assert torch.equal(before, problem.weight.detach()) and problem.weight.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named():
    problem = Problem()
    before = problem.weight.detach().clone()
    # The loss is 0, its derivative at 0 is infinite.
    numbers = problem.step([[0]], losses=lambda points: (problem.weight[:1] - 1).abs().sqrt())
    assert not numbers.applied and numbers.bad == "gradient"
    assert torch.equal(before, problem.weight.detach())


class ScaledProblem(Problem):
    """The same, with a loss scaler."""

    def __init__(self):
        super().__init__()
        self.x, self.y, self.weight = self.x.float(), self.y.float(), torch.nn.Parameter(torch.ones(5))
        self.accelerator = ScalingAccelerator()
        self.optimizer = self.accelerator.prepare_optimizer(torch.optim.SGD([self.weight], lr=0.1))


def test_scaling_the_loss_changes_neither_the_step_nor_the_norm():
    scaled, plain = ScaledProblem(), Problem()
    for _ in range(3):
        found, expected = (problem.step([[0, 1, 2], [3, 4]], clip=0.5) for problem in (scaled, plain))
        assert found.applied and found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
    assert torch.allclose(scaled.weight.double(), plain.weight, atol=1e-2)


def test_an_overflow_leaves_out_its_step_and_is_bad_only_when_no_scale_helps():
    problem, infinite = ScaledProblem(), lambda points: (problem.weight[:1] - 1).abs().sqrt()
    before, scale = problem.weight.detach().clone(), problem.accelerator.scaler.get_scale()
    numbers = problem.step([[0]], losses=infinite)
    assert not numbers.applied and not numbers.bad
    assert torch.equal(before, problem.weight.detach()) and problem.accelerator.scaler.get_scale() == scale / 2
    while not (numbers := problem.step([[0]], losses=infinite)).bad:
        assert problem.accelerator.scaler.get_scale() >= 1
    assert numbers.bad == "gradient" and not numbers.applied
    assert problem.step([[0, 1]]).applied
