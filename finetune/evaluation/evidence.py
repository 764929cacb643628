"""What a measure looks at: pictures by prompt and seed, the base's pictures of the same, the style's, the training set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.evaluation.prompts import EvaluationPrompt

if TYPE_CHECKING:
    from finetune.evaluation.base_judge import BaseJudge

Pixels = np.ndarray  # (H, W, 3) uint8, sRGB


@dataclass(frozen=True)
class NamedPicture:
    """A reference or training picture with its file."""

    path: Path
    pixels: Pixels


@dataclass(frozen=True)
class Evidence:
    """One subject (the base or an adapter) under measure; all sequences of the first block run over its pictures.

    base: the bare base's picture of the same prompt and seed.  references: pictures that have the style.
    training: what the adapter was trained on.  judge: the base model itself, for measures that ask it.
    weights: model name -> folder, for measures that need a downloaded model.
    """

    prompts: Sequence[EvaluationPrompt]
    seeds: Sequence[int]
    pictures: Sequence[Pixels]
    base: Sequence[Pixels]
    references: Sequence[NamedPicture] = ()
    training: Sequence[NamedPicture] = ()
    judge: BaseJudge | None = None
    weights: dict[str, Path] = field(default_factory=dict)
    # Features of references and of the base's pictures are the same for every subject; kept by (what, of whom).
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def at_hand(self) -> frozenset[str]:
        """What measures may need and have here, in the words of `Measure.needs`."""
        given = {"references": self.references, "training": self.training, "judge": self.judge}
        return frozenset({name for name, what in given.items() if what} | {f"weights:{name}" for name in self.weights})

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, done once for all subjects of an evaluation."""
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]

    def reference_pixels(self) -> list[Pixels]:
        return [reference.pixels for reference in self.references]
