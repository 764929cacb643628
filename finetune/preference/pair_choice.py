"""Which pairs to show: those whose answer teaches most, given what was answered already.

The value of a comparison is the expected gain in information about the strengths, log(1 + p (1 - p) v) / 2, with p the
expected answer and v the variance of the difference (D-optimal design for Bradley-Terry; Glickman and Jensen 2005).
Without answers this is a balanced, connected design; with answers it asks where the outcome is still open.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from finetune.preference.bradley_terry import posterior
from finetune.preference.pairs import Pair
from finetune.randomness import python_random

# In one prompt every pair is weighed up to here; with more pictures a random subset of the pairs is.
MOST_PAIRS_WEIGHED = 2000


class _Prompt:
    """The belief about one prompt's pictures while pairs are being chosen."""

    def __init__(self, items: Sequence[str], pairs: Iterable[Pair], asked: set[frozenset[str]], order):
        belief = posterior(items, pairs)
        self.items, self.mean, self.covariance = belief.items, belief.mean, belief.covariance
        free = [pair for pair in itertools.combinations(range(len(items)), 2) if frozenset((items[pair[0]], items[pair[1]])) not in asked]
        order.shuffle(free)
        self.left = np.array(free[:MOST_PAIRS_WEIGHED], dtype=int).reshape(-1, 2)

    def best(self) -> tuple[float, int]:
        """(information in nats, row in `left`) of the most informative free pair."""
        one, other = self.left[:, 0], self.left[:, 1]
        spread = self.covariance[one, one] + self.covariance[other, other] - 2 * self.covariance[one, other]
        expected = 1 / (1 + np.exp(-(self.mean[one] - self.mean[other])))
        gain = 0.5 * np.log1p(expected * (1 - expected) * spread)
        row = int(gain.argmax())
        return float(gain[row]), row

    def take(self, row: int) -> tuple[str, str]:
        """Remove that pair and count it as answered in the covariance (the answer itself is unknown yet)."""
        one, other = self.left[row]
        self.left = np.delete(self.left, row, axis=0)
        difference = self.covariance[:, one] - self.covariance[:, other]
        expected = 1 / (1 + np.exp(-(self.mean[one] - self.mean[other])))
        information = expected * (1 - expected)
        spread = difference[one] - difference[other]
        self.covariance = self.covariance - np.outer(difference, difference) * information / (1 + information * spread)
        return self.items[one], self.items[other]


def informative_pairs(groups: Mapping[str, Sequence[str]], pairs: Iterable[Pair], count: int, *, seed: int, asked: Iterable[frozenset[str]] = ()) -> list[tuple[str, tuple[str, str]]]:
    """Up to `count` new (prompt id, (item, item)), the most informative first; never one of `asked`.

    groups: prompt id -> candidate ids.  pairs: what is known (ties included).  seed: order among equals.
    """
    asked = set(asked)
    known: dict[str, list[Pair]] = {}
    for pair in pairs:
        known.setdefault(pair.prompt_id, []).append(pair)
    order = python_random(seed, "choice of pairs", len(asked))
    prompts = list(groups)
    order.shuffle(prompts)
    beliefs, queue = {}, []
    for place, prompt_id in enumerate(prompts):
        belief = _Prompt(list(groups[prompt_id]), known.get(prompt_id, ()), asked, order)
        if len(belief.left):
            beliefs[prompt_id] = belief
            queue.append((-belief.best()[0], place, prompt_id))
    heapq.heapify(queue)
    chosen = []
    while queue and len(chosen) < count:
        _, place, prompt_id = heapq.heappop(queue)
        belief = beliefs[prompt_id]
        chosen.append((prompt_id, belief.take(belief.best()[1])))
        if len(belief.left):
            heapq.heappush(queue, (-belief.best()[0], place, prompt_id))
    return chosen


def balanced_sets(groups: Mapping[str, Sequence[str]], size: int, count: int, *, seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """Up to `count` sets of `size` pictures of one prompt to be ranked; each picture as often as the others of its prompt."""
    order = python_random(seed, "choice of sets")
    rounds: list[list[tuple[str, tuple[str, ...]]]] = []
    for prompt_id, items in groups.items():
        seen: set[frozenset[str]] = set()
        for turn in range(max(1, len(items) - 1)):
            shuffled = list(items)
            order.shuffle(shuffled)
            for start in range(0, len(shuffled) - size + 1, size):
                chosen = tuple(shuffled[start:start + size])
                if frozenset(chosen) not in seen:
                    seen.add(frozenset(chosen))
                    rounds.extend([] for _ in range(turn + 1 - len(rounds)))
                    rounds[turn].append((prompt_id, chosen))
    for one in rounds:
        order.shuffle(one)
    return [entry for one in rounds for entry in one][:count]
