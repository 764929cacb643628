"""What the three methods share: a step's micro-batches and losses, and how prompts are dealt out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from finetune.randomness import python_random


@dataclass(frozen=True)
class Update:
    """One optimizer step: micro_batches and the losses (B,) of each, as `training.step.optimizer_step` takes them."""

    micro_batches: Sequence[Any]
    losses: Callable[[Any], Tensor]


class Method(Protocol):
    """A way to learn. A step depends on (settings, data, step, parameters) alone, so that a resumed run is the same."""

    def updates(self, step: int) -> Iterator[Update]:
        """The optimizer steps of step `step`."""
        ...

    def numbers(self) -> dict[str, float]:
        """What the last step has to say for the log."""
        ...


def dealt(items: Sequence[Any], count: int, seed: int, purpose: str, step: int) -> list[Any]:
    """`count` items of step `step`: every item once before any comes twice, in an order of each round."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        turn, place = divmod(position, len(items))
        if turn not in orders:
            orders[turn] = list(range(len(items)))
            python_random(seed, purpose, turn).shuffle(orders[turn])
        chosen.append(items[orders[turn][place]])
    return chosen


def portions(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut into pieces of at most `size`."""
    return [items[start:start + size] for start in range(0, len(items), size)]
