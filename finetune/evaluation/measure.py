"""What a measure is, and the list of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np

from data_tools.near_names import nearest
from finetune.errors import BadInput
from finetune.evaluation.evidence import Evidence


@dataclass(frozen=True)
class Measure:
    """A number for each picture, or one for a set of pictures.

    source: where the formula comes from.  low, high: its range.  better: "higher", "lower", or "none" where a change
    is neither good nor bad.  needs: of "references", "training", "judge", or "weights:<model>".
    splits: of which prompts it speaks; pictures of other splits have no value (NaN).
    values(evidence) -> (n,) float64 by picture.  of_set(evidence) -> function of picture indices -> one number, for
    measures that only a set has; then `values` is None.
    """

    name: str
    meaning: str
    source: str
    low: float
    high: float
    better: str
    needs: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("style", "holdout")
    version: int = 1
    values: Callable[[Evidence], np.ndarray] | None = None
    of_set: Callable[[Evidence], Callable[[np.ndarray], float]] | None = None

    @property
    def identifier(self) -> str:
        """Name and version of the formula; results of different identifiers are never mixed."""
        return f"{self.name}/{self.version}"

    def applies(self, evidence: Evidence) -> np.ndarray:
        """(n,) bool: which pictures it speaks of."""
        return np.array([prompt.split in self.splits for prompt in evidence.prompts], dtype=bool)

    def missing(self, at_hand: Collection[str]) -> str | None:
        """Why it cannot be taken with what is at hand, in the words of `needs`; None when it can."""
        for need in self.needs:
            if need in at_hand:
                continue
            if need == "references":
                return "no reference pictures of the style were given (--references)"
            if need == "training":
                return "the training pictures were not given (--training)"
            if need == "judge":
                return "the base model is not loaded"
            name = need.removeprefix("weights:")
            return f"the weights of {name} are not on this machine (--weights {name}=FOLDER)"
        return None


# Files of `measures/`, in the order of tables and reports; the first block needs nothing that must be downloaded.
BUILT_IN = (
    "style_gain", "palette", "colour_statistics", "edges", "base_style", "alignment", "structure_kept", "diversity", "drift", "near_copies",
    "colourfulness", "sharpness", "kid",
)
WITH_WEIGHTS = ("clip_text", "clip_image", "dino", "csd", "lpips", "cmmd", "pick_score", "hps", "image_reward")


def load_measure(name: str) -> Measure:
    """The measure of that name. Raises BadInput for an unknown one."""
    if name not in BUILT_IN + WITH_WEIGHTS:
        near = nearest(name, BUILT_IN + WITH_WEIGHTS)
        raise BadInput(f"there is no measure called {name!r}", where="--measures", fix=f"did you mean {near}?" if near else f"one of {', '.join(BUILT_IN + WITH_WEIGHTS)}")
    return importlib.import_module(f"finetune.evaluation.measures.{name}").MEASURE


def choose_measures(names: Iterable[str] | None, at_hand: Collection[str]) -> tuple[list[Measure], dict[str, str]]:
    """Measures to take, and those that cannot be taken with the reason.

    names: asked for by name, then a missing need raises BadInput; None takes all for which everything is at hand, as `Evidence.at_hand`
    says it. Imports nothing heavy.
    """
    chosen, left_out = [], {}
    for name in names if names is not None else BUILT_IN + WITH_WEIGHTS:
        measure = load_measure(name)
        reason = measure.missing(at_hand)
        if reason is None:
            chosen.append(measure)
        elif names is not None:
            raise BadInput(f"{name} cannot be measured: {reason}", where="--measures")
        else:
            left_out[name] = reason
    return chosen, left_out
