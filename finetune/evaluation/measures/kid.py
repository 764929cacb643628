"""KID: distance of the distributions of pictures and references, unbiased, so that it can be read for small sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.measures.base_style import standardised


def polynomial_kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(x . y / d + 1) ** 3."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def unbiased_mmd(within: np.ndarray, across: np.ndarray, others: np.ndarray, prompts: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """Squared maximum mean discrepancy from kernel matrices (n, n), (n, m), (m, m).

    prompts: (n,) which prompt each picture is of.  chosen: indices of the n to take, with repeats when resampling. Pictures are compared
    across prompts only: seeds of one prompt are alike, and a resampled prompt meets its own repeat, so that both the number and its
    interval would lie too high.
    """
    chosen = np.arange(len(within)) if chosen is None else chosen
    different = prompts[chosen][:, None] != prompts[chosen][None]
    m = len(others)
    if not different.any() or m < 2:
        return float("nan")
    own = within[np.ix_(chosen, chosen)][different].mean()
    theirs = (others.sum() - np.trace(others)) / (m * (m - 1))
    return float(own + theirs - 2 * across[chosen].mean())


def of_set(evidence: Evidence) -> Callable[[np.ndarray], float]:
    mine, references = standardised(evidence)
    within, across, others = polynomial_kernel(mine, mine), polynomial_kernel(mine, references), polynomial_kernel(references, references)

    prompts = np.array([prompt.prompt_id for prompt in evidence.prompts])
    return lambda chosen: unbiased_mmd(within, across, others, prompts, chosen)


MEASURE = Measure(
    "kid", "kernel distance between all pictures and all references on the base's encoder features (compare equal numbers of pictures only)",
    "Binkowski et al., Demystifying MMD GANs (2018); features of the base in place of Inception's, so not comparable with published KID",
    float("-inf"), float("inf"), "lower", ("references", "judge"), version=2, of_set=of_set)
