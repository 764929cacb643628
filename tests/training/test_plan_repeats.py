"""Results that are made again from their layout are those that the operation gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.adapters.kinds import AdapterSize
from finetune.families import registry
from finetune.training import plan_repeats
from finetune.training.plan_model import Traced, one_step, step_cost
from finetune.training.plan_repeats import RepeatedResults
from tests.tiny_models.all import TINY

META = torch.device("meta")
# Models that look at values on their way, which the meta device has none of.
BY_FORMULA = ("lumina2", "hunyuan_video_15")


class Repeating(TorchDispatchMode):
    """Answers from layouts, and counts what the operations themselves were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.results, self.asked, self.calls = RepeatedResults(), 0, 0
        self._counted: dict[Any, Any] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls += 1

        def counted(*inner: Any, **named: Any) -> Any:
            self.asked += 1
            return operation(*inner, **named)

        counted._schema = operation._schema  # type: ignore[attr-defined]
        return self.results.of(self._counted.setdefault(operation, counted), args, kwargs or {})


def layout(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.storage_offset(), tensor.untyped_storage().nbytes()


def meta(*size: int, **options: Any) -> Tensor:
    return torch.empty(*size, device=META, **options)


def step_of(name: str) -> tuple[Traced, dict[str, Any]]:
    """A step of a tiny model of the family, no block checkpointed, and its configuration."""
    transformer, family = TINY[name].build().transformer, registry.family(name)
    return Traced(family, type(transformer).__name__, family.facts.targets["attention"], AdapterSize(rank=4), 1, TINY[name].picture, False), dict(transformer.config)


@pytest.mark.parametrize("compute", [
    lambda: meta(3, 4).t() * 2,
    lambda: meta(3, 4) + meta(4),
    lambda: meta(3, 4, dtype=torch.int64) * 2,
    lambda: meta(3, 4, dtype=torch.int64) * 2.0,
    lambda: meta(3, 4, dtype=torch.bool) + True,
    lambda: torch.nn.functional.layer_norm(meta(2, 3, 4).transpose(0, 1), (4,)),
    lambda: torch.cat([meta(2, 3), meta(5, 3)]),
    lambda: torch.nn.functional.pad(meta(2, 3), (1, 2)),
    lambda: meta(6, 4)[1:3].clone(),
    lambda: torch.stack([meta(2, 3)] * 3, 1),
    lambda: meta(2, 3, dtype=torch.bfloat16).float(),
    lambda: torch.view_as_complex(meta(3, 4, 2)) * torch.view_as_complex(meta(4, 2)),
])
def test_the_second_result_has_the_layout_of_the_first(compute: Callable[[], Tensor]) -> None:
    plain = layout(compute())
    with Repeating():
        assert [layout(compute()) for _ in range(3)] == [plain] * 3


def test_an_operation_is_asked_once_for_each_layout_and_each_value() -> None:
    numbers = meta(3, 4, dtype=torch.int64)
    with Repeating() as repeating:
        for _ in range(5):
            assert (numbers * 2).dtype == torch.int64 and (numbers * 2.0).dtype == torch.float32 and (numbers.t() * 2).shape == (4, 3)
    # Five times t(), which is a view, and once each product.
    assert (repeating.calls, repeating.asked) == (20, 5 + 3)


def test_every_result_is_memory_of_its_own_and_every_view_stays_one() -> None:
    with Repeating():
        kept = meta(3, 4)
        views = [kept.view(4, 3) for _ in range(2)] + [torch.ops.aten._unsafe_view(kept, [12]) for _ in range(2)]
        assert {view.untyped_storage()._cdata for view in views} == {kept.untyped_storage()._cdata}
        products = [kept * 2 for _ in range(3)]
        assert len({product.untyped_storage()._cdata for product in [*products, kept]}) == 4


def test_what_is_written_into_is_what_is_returned() -> None:
    with Repeating() as repeating:
        for _ in range(3):
            target = meta(2, 2)
            assert target.add_(meta(2)) is target
    assert (repeating.calls, repeating.asked) == (9, 3), "two sizes of new tensors, and one sum"


def test_what_does_not_fit_is_refused_every_time() -> None:
    with Repeating():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                meta(2, 3) + meta(3, 2)


def test_values_are_never_made_from_a_layout() -> None:
    with Repeating():
        assert [float((torch.tensor([1.0, value]) * 2)[1]) for value in (3.0, 4.0)] == [6.0, 8.0]


@pytest.mark.parametrize("name", [name for name in TINY if name not in BY_FORMULA])
def test_a_step_is_counted_as_without_repeated_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, config = step_of(name)
    both = [wanted, replace(wanted, checkpointed=True)]
    one_step(wanted, config)  # what a family keeps of its first step is there from now on
    repeated = [one_step(each, config) for each in both]
    monkeypatch.setattr(plan_repeats, "_signature", lambda asked: None)
    assert [one_step(each, config) for each in both] == repeated
    assert repeated[0] != repeated[1], "checkpointing is counted"


@pytest.mark.parametrize("name", BY_FORMULA)
def test_two_families_are_planned_by_a_formula(name: str) -> None:
    wanted, config = step_of(name)
    assert not step_cost(wanted.family, wanted.class_name, config, wanted.targets, wanted.adapter, 1, wanted.size, 4).traced
