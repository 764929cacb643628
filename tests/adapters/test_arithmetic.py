"""Arithmetic on adapters equals arithmetic on their weight changes; where it cannot, the stated error is the true one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from finetune.adapters import arithmetic
from finetune.adapters.adapter_file import AdapterFile, read_adapter, write_adapter
from finetune.adapters.arithmetic import Weighted
from finetune.adapters.text_encoders import joined
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
@example(ranks=[6, 6, 6], weights=[0.5, -1.0, 2.0])
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3), weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_u60_concatenation_is_the_weighted_sum(ranks, weights):
    parts = [Weighted(adapter(rank, seed), weight) for seed, (rank, weight) in enumerate(zip(ranks, weights, strict=False))]
    result = arithmetic.merge(parts)
    for module in result.adapter.modules:
        assert_close(delta_of(result.adapter, module), sum(part.weight * delta_of(part.adapter, module) for part in parts), atol=1e-4, rtol=1e-4)
    # A layer of 16 inputs and 20 outputs has 16 directions.
    assert set(result.adapter.ranks.values()) == {min(sum(ranks), 16)} and not result.errors


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
    # 0.1 and 0.2 are trimmed; at the second place the sum is positive, so -3 does not take part, and 5 stays what it is.
    assert_close(merged, torch.tensor([[6.0, 5.0, 0.0, 4.0]]))


def test_ties_of_adapters_that_never_meet_is_their_sum():
    """Entries that only one adapter has came out twice as strong."""
    first, second = torch.tensor([[4.0, -3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    strengths = torch.tensor([0.5, -2.0]).reshape(2, 1, 1)
    assert_close(arithmetic.ties(torch.stack([first, second]), strengths, density=0.5), 0.5 * first - 2.0 * second)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_adapters_whose_product_is_beyond_all_numbers_are_refused(method):
    one = adapter(3, 1)
    huge = replace(one, tensors={key: value * 1e30 for key, value in one.tensors.items()})
    with pytest.raises(AdapterError, match="too large"):
        arithmetic.merge([Weighted(huge, 1.0), Weighted(one, 1.0)], method)


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


LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


def with_encoders(rank: int = 4, seed: int = 0, slots=("text_encoder",), layer: str = LAYER) -> AdapterFile:
    encoders = {slot: adapter(rank, seed + 100 + number, (layer,)).tensors for number, slot in enumerate(slots)}
    one = adapter(rank, seed)
    return AdapterFile(one.tensors, text_encoders=encoders)


@pytest.mark.parametrize("method", arithmetic.METHODS)
def test_text_encoders_are_merged_as_the_transformer_is(method):
    first, second = with_encoders(4, 1, ("text_encoder", "text_encoder_2")), with_encoders(3, 2)
    result = arithmetic.merge([Weighted(first, 0.5), Weighted(second, -2.0)], method, rank=None if method == "concat" else 5, seed=3, density=0.7)
    as_one = arithmetic.merge([Weighted(joined(first), 0.5), Weighted(joined(second), -2.0)], method, rank=None if method == "concat" else 5, seed=3, density=0.7)
    assert list(result.adapter.text_encoders) == ["text_encoder", "text_encoder_2"] and result.errors == as_one.errors
    assert joined(result.adapter).ranks == {"a.one": 7, "a.two": 7, f"text_encoder.{LAYER}": 7, f"text_encoder_2.{LAYER}": 4} if method == "concat" else result.errors
    exact = 0.5 * delta_of(first.part("text_encoder"), LAYER) - 2.0 * delta_of(second.part("text_encoder"), LAYER)
    distance = float((delta_of(result.adapter.part("text_encoder"), LAYER) - exact).norm() / exact.norm())
    if method in ("concat", "linear", "svd"):
        assert distance == pytest.approx(result.errors.get(f"text_encoder.{LAYER}", 0.0), abs=1e-5)


def test_text_encoders_that_one_adapter_trains_count_with_its_weight():
    result = arithmetic.merge([Weighted(adapter(2, 1), 3.0), Weighted(with_encoders(4, 2), 0.5)])
    assert_close(delta_of(result.adapter.part("text_encoder"), LAYER), 0.5 * delta_of(with_encoders(4, 2).part("text_encoder"), LAYER))
    alone = AdapterFile({}, text_encoders=with_encoders(4, 2).text_encoders)
    assert arithmetic.merge([Weighted(alone, 1.0)]).adapter.tensors == {}


def test_a_text_encoder_is_the_same_whether_a_file_says_text_model_or_not():
    result = arithmetic.merge([Weighted(with_encoders(2, 1), 1.0), Weighted(with_encoders(3, 1, layer=LAYER.removeprefix("text_model.")), 1.0)])
    assert result.adapter.part("text_encoder").ranks == {LAYER: 5}


def test_text_encoders_are_resized_compared_and_rescaled_too():
    one = with_encoders(6, 1)
    small = arithmetic.resize(one, rank=2)
    assert set(joined(small.adapter).ranks.values()) == {2} and f"text_encoder.{LAYER}" in small.errors
    assert arithmetic.compare(one, AdapterFile(one.tensors)).left_only == [f"text_encoder.{LAYER}"]
    assert arithmetic.norm(one) > 1.1 * arithmetic.norm(AdapterFile(one.tensors))
    assert arithmetic.norm(arithmetic.rescale(one, 2.0)) == pytest.approx(2 * arithmetic.norm(one))
    assert arithmetic.norm(arithmetic.subtract(one, one).adapter) < 1e-4


def test_an_adapter_of_text_encoders_alone_is_written_and_read_back(tmp_path):
    alone = AdapterFile({}, text_encoders=with_encoders(4, 2).text_encoders)
    found = read_adapter(write_adapter(tmp_path / "a.safetensors", alone))
    assert not found.tensors and found.part("text_encoder").ranks == {LAYER: 4}


DORA = adapter(2, 1, ("x",))
DORA = AdapterFile({**DORA.tensors, "x.lora_magnitude_vector": torch.ones(20)})


@pytest.mark.parametrize(("parts", "said"), [
    ([Weighted(adapter(family="flux"), 1.0), Weighted(adapter(family="sd3"), 1.0)], "different models"),
    ([Weighted(adapter(), 1.0), Weighted(adapter(outputs=21), 1.0)], "in one adapter"),
    ([Weighted(DORA, 1.0)], "DoRA"),
    ([Weighted(AdapterFile(adapter().tensors, text_encoders={"text_encoder": DORA.tensors}), 1.0)], "DoRA"),
    ([Weighted(with_encoders(), 1.0), Weighted(AdapterFile(adapter().tensors, text_encoders={"text_encoder": adapter(outputs=21, modules=(LAYER,)).tensors}), 1.0)], f"text_encoder.{LAYER} has"),
    ([Weighted(adapter(), float("nan"))], "not finite"),
    ([], "needs adapters"),
])
def test_what_cannot_be_merged_is_refused(parts, said):
    with pytest.raises(AdapterError, match=said):
        arithmetic.merge(parts)


def test_a_dora_is_resized_as_conversion_cuts_it(tmp_path):
    """The lengths of finished rows stay, and what was cut off only turns them, by less than it is of what was added."""
    module = "blocks.0.attn1.to_q"
    plain = adapter(8, 1, (module,))
    base = torch.randn(delta_of(plain, module).shape)
    lengths = (base + 0.1 * delta_of(plain, module)).norm(dim=1)
    one = AdapterFile({**plain.tensors, module + ".lora_magnitude_vector": lengths})
    result = arithmetic.resize(one, rank=3)
    assert result.adapter.ranks == {module: 3} and result.notes == [arithmetic.CUT_DORA]
    assert result.adapter.tensors[module + ".lora_magnitude_vector"].equal(lengths)
    full, cut = (base + 0.1 * delta_of(each, module) for each in (one, result.adapter))
    finished = cut * (lengths / cut.norm(dim=1))[:, None]
    assert 0 < (finished - full).norm() < result.errors[module] * (0.1 * delta_of(one, module)).norm()
    assert arithmetic.resize(one, rank=8).notes == []
    with pytest.raises(AdapterError, match="OFT"):
        arithmetic.resize(AdapterFile({"x.oft_R.weight": torch.zeros(2, 6)}), rank=1)


def test_an_adapter_that_fits_several_families_is_merged_with_one_of_any_of_them():
    parts = [Weighted(adapter(family="flux", alternatives=("sd3", "chroma")), 1.0), Weighted(adapter(family="sd3"), 1.0)]
    assert arithmetic.merge(parts).adapter.family == "sd3"


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
