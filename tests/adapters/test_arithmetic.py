"""Arithmetic on adapters equals arithmetic on their weight changes; where it cannot, the stated error is the true one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from finetune.adapters import arithmetic
from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.arithmetic import Weighted
from finetune.errors import AdapterError
from tests.adapters.made_files import delta_of


def adapter(rank: int = 4, seed: int = 0, modules=("a.one", "a.two"), outputs: int = 20, inputs: int = 16, **more) -> AdapterFile:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return AdapterFile(tensors, **more)


@settings(max_examples=30, deadline=None)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3), weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_u60_concatenation_is_the_weighted_sum(ranks, weights):
    parts = [Weighted(adapter(rank, seed), weight) for seed, (rank, weight) in enumerate(zip(ranks, weights, strict=False))]
    result = arithmetic.merge(parts)
    for module in result.adapter.modules:
        assert_close(delta_of(result.adapter, module), sum(part.weight * delta_of(part.adapter, module) for part in parts), atol=1e-4, rtol=1e-4)
    assert set(result.adapter.ranks.values()) == {sum(ranks)} and not result.errors


def test_modules_of_one_adapter_only_are_kept():
    result = arithmetic.merge([Weighted(adapter(2, 1, ("x", "y")), 0.5), Weighted(adapter(3, 2, ("y", "z")), 2.0)])
    assert result.adapter.ranks == {"x": 2, "y": 5, "z": 3}
    assert_close(delta_of(result.adapter, "z"), 2.0 * delta_of(adapter(3, 2, ("y", "z")), "z"))


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare"])
def test_the_stated_error_is_the_distance_to_the_exact_result(method):
    parts = [Weighted(adapter(4, 1), 0.7), Weighted(adapter(4, 2), 0.3)]
    small = arithmetic.merge(parts, method, rank=4, seed=3, density=0.5)
    exact = arithmetic.merge(parts, method, rank=16, seed=3, density=0.5)
    for module in small.adapter.modules:
        truth, found = delta_of(exact.adapter, module), delta_of(small.adapter, module)
        assert small.errors[module] == pytest.approx(float((found - truth).norm() / truth.norm()), abs=2e-3)
        assert small.adapter.ranks[module] == 4


def test_linear_is_the_best_sum_at_the_largest_rank_that_came_in():
    parts = [Weighted(adapter(2, 1), 0.7), Weighted(adapter(5, 2), 0.3)]
    result = arithmetic.merge(parts, "linear")
    assert set(result.adapter.ranks.values()) == {5}
    exact = delta_of(arithmetic.merge(parts).adapter, "a.one")
    best = math.sqrt(float(torch.linalg.svdvals(exact)[5:].square().sum())) / float(exact.norm())
    assert result.errors["a.one"] == pytest.approx(best, abs=1e-4)


def test_dare_depends_on_its_seed_alone():
    parts = [Weighted(adapter(4, 1), 0.7), Weighted(adapter(4, 2), 0.3)]
    torch.manual_seed(1)
    first = arithmetic.merge(parts, "dare", rank=8, seed=5).adapter
    torch.manual_seed(2)
    assert all(arithmetic.merge(parts, "dare", rank=8, seed=5).adapter.tensors[key].equal(value) for key, value in first.tensors.items())
    assert not delta_of(arithmetic.merge(parts, "dare", rank=8, seed=6).adapter, "a.one").allclose(delta_of(first, "a.one"))


def test_dare_keeps_the_expected_strength():
    one = adapter(4, 1, outputs=60, inputs=60)
    mean = sum(delta_of(arithmetic.merge([Weighted(one, 1.0)], "dare", rank=60, density=0.5, seed=seed).adapter, "a.one") for seed in range(40)) / 40
    truth = delta_of(one, "a.one")
    assert float((mean - truth).norm() / truth.norm()) < 0.25


def test_ties_keeps_the_largest_entries_and_only_those_that_agree():
    first, second = torch.tensor([[4.0, -3.0, 0.1, 2.0]]), torch.tensor([[2.0, 5.0, 0.2, 2.0]])
    merged = arithmetic.ties(torch.stack([first, second]), torch.ones(2, 1, 1), density=0.75)
    # 0.1 and 0.2 are trimmed; at the second place the sum is positive, so -3 does not take part.
    assert_close(merged, torch.tensor([[6.0, 10.0, 0.0, 4.0]]))


def test_ties_of_one_adapter_at_full_density_is_that_adapter():
    one = adapter(3, 1)
    assert_close(delta_of(arithmetic.merge([Weighted(one, 0.5)], "ties", density=1.0, rank=16).adapter, "a.one"), 0.5 * delta_of(one, "a.one"), atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 8), wanted=st.integers(1, 10))
def test_resizing_is_the_best_that_the_rank_allows_and_never_grows(rank, wanted):
    one = adapter(rank, 3)
    result = arithmetic.resize(one, rank=wanted)
    assert set(result.adapter.ranks.values()) == {min(rank, wanted)}
    spectrum = torch.linalg.svdvals(delta_of(one, "a.one").double())
    best = float((spectrum[wanted:].square().sum() / spectrum.square().sum()).sqrt())
    found = delta_of(result.adapter, "a.one")
    assert float((found - delta_of(one, "a.one")).norm() / delta_of(one, "a.one").norm()) == pytest.approx(best, abs=1e-5)


def test_resizing_by_energy_keeps_that_energy_with_as_few_ranks_as_possible():
    one = adapter(8, 3)
    result = arithmetic.resize(one, energy=0.9)
    for module, rank in result.adapter.ranks.items():
        squares = torch.linalg.svdvals(delta_of(one, module).double()).square()
        assert squares[:rank].sum() / squares.sum() >= 0.9 > squares[: rank - 1].sum() / squares.sum()
        assert result.errors[module] ** 2 <= 0.1 + 1e-9


def test_subtracting_an_adapter_from_itself_leaves_nothing():
    one = adapter(4, 1)
    assert float(delta_of(arithmetic.subtract(one, one).adapter, "a.one").norm()) < 1e-4
    assert arithmetic.norm(arithmetic.subtract(one, adapter(2, 2), 0.5).adapter) > 0


def test_rescaling_is_exact_and_keeps_the_rank():
    one = adapter(4, 1)
    for factor in (2.0, -0.3):
        assert_close(delta_of(arithmetic.rescale(one, factor), "a.one"), factor * delta_of(one, "a.one"))
    with pytest.raises(AdapterError, match="factor"):
        arithmetic.rescale(one, 0.0)


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 100), second=st.integers(0, 100))
def test_the_cosine_is_that_of_the_dense_weight_changes(first, second):
    one, other = adapter(3, first), adapter(5, second)
    found = arithmetic.compare(one, other)
    left, right = (torch.cat([delta_of(each, module).flatten().double() for module in each.modules]) for each in (one, other))
    assert found.cosine == pytest.approx(float(left @ right / left.norm() / right.norm()), abs=1e-5)
    assert found.norms == pytest.approx((float(left.norm()), float(right.norm())), rel=1e-5)


def test_comparing_names_what_only_one_has():
    found = arithmetic.compare(adapter(2, 1, ("x", "y")), adapter(2, 1, ("y", "z")))
    assert (found.left_only, found.right_only, list(found.modules)) == (["x"], ["z"], ["y"])


DORA = adapter(2, 1, ("x",))
DORA = AdapterFile({**DORA.tensors, "x.lora_magnitude_vector": torch.ones(20)})


@pytest.mark.parametrize(("parts", "said"), [
    ([Weighted(adapter(family="flux"), 1.0), Weighted(adapter(family="sd3"), 1.0)], "different models"),
    ([Weighted(adapter(), 1.0), Weighted(adapter(outputs=21), 1.0)], "in one adapter"),
    ([Weighted(DORA, 1.0)], "DoRA"),
    ([Weighted(adapter(), float("nan"))], "not finite"),
    ([], "needs adapters"),
])
def test_what_cannot_be_merged_is_refused(parts, said):
    with pytest.raises(AdapterError, match=said):
        arithmetic.merge(parts)


def test_different_bases_are_merged_with_a_warning():
    result = arithmetic.merge([Weighted(adapter(seed=seed).with_provenance(base_model=f"owner/base-{seed}"), 1.0) for seed in (1, 2)])
    assert any("different bases" in note for note in result.notes)


def test_large_layers_use_a_seeded_approximation_close_to_the_best():
    matrix = torch.randn(1100, 24) @ torch.randn(24, 1100) + 0.01 * torch.randn(1100, 1100)
    a, b, error = arithmetic.low_rank(matrix, 24, seed=1)
    again = arithmetic.low_rank(matrix, 24, seed=1)
    assert again[0].equal(a) and again[1].equal(b)
    assert error == pytest.approx(float((b @ a - matrix).norm() / matrix.norm()), abs=1e-3)
    assert error < 0.01
