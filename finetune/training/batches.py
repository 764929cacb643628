"""Which pictures are in step n: a pure function of (seed, n), so that a resumed run sees what an unbroken one would."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from finetune.randomness import python_random


@dataclass(frozen=True)
class Sample:
    """One use of a picture: its index in the training set, and its number within the optimizer step.

    `index` names every draw made for this use, so that draws do not depend on how the step is cut into micro-batches
    or spread over processes.
    """

    picture: int
    index: int


class BatchOrder:
    """Batches of pictures that share a bucket. Every picture is seen exactly `repeats` times an epoch; batches that
    a bucket cannot fill stay small instead of being dropped.

    Regularisation pictures are mixed among them, in an epoch as many as the others together (what kohya's scripts and the
    DreamBooth paper do, arXiv 2208.12242): of each bucket the same number in every epoch, taken in rotation, so that all
    of them are used equally often however many there are.

    buckets: one hashable a picture.  repeats: how often each picture counts in an epoch.
    regularisation: which pictures are such ones; left out: none.
    """

    def __init__(self, buckets: Sequence[Hashable], repeats: Sequence[int], batch_size: int, accumulation: int, seed: int, regularisation: Sequence[bool] = ()):
        self.members: dict[Hashable, list[int]] = {}
        self.regularisation: dict[Hashable, list[int]] = {}
        for picture, bucket in enumerate(buckets):
            kind = self.regularisation if regularisation and regularisation[picture] else self.members
            self.members.setdefault(bucket, [])
            kind.setdefault(bucket, []).extend([picture] * repeats[picture])
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        own, pool = (sum(map(len, kind.values())) for kind in (self.members, self.regularisation))
        self.quotas = {bucket: max(1, round(own * len(pictures) / pool)) for bucket, pictures in self.regularisation.items()}
        self.batches_per_epoch = sum(-(-(len(pictures) + self.quotas.get(bucket, 0)) // batch_size) for bucket, pictures in self.members.items())
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)

    def _rotated(self, bucket: Hashable, number: int, epoch: int) -> list[int]:
        """The regularisation pictures of one bucket in this epoch: the next ones of an order that is new in every round."""
        pool, quota, result = self.regularisation.get(bucket, []), self.quotas.get(bucket, 0), []
        for position in range(epoch * quota, (epoch + 1) * quota):
            turn, place = divmod(position, len(pool))
            if not result or place == 0:
                order = list(pool)
                python_random(self.seed, "regularisation order", turn, number).shuffle(order)
            result.append(order[place])
        return result

    def _shuffled_epoch(self, epoch: int) -> list[list[int]]:
        batches = []
        for number, (bucket, pictures) in enumerate(self.members.items()):
            shuffled = [*pictures, *self._rotated(bucket, number, epoch)]
            python_random(self.seed, "picture order", epoch, number).shuffle(shuffled)
            batches += [shuffled[start:start + self.batch_size] for start in range(0, len(shuffled), self.batch_size)]
        python_random(self.seed, "batch order", epoch).shuffle(batches)
        return batches

    def micro_batches(self, step: int) -> list[list[Sample]]:
        """The `accumulation` micro-batches of optimizer step `step` (0-based), each of one bucket."""
        result, index = [], 0
        for position in range(step * self.accumulation, (step + 1) * self.accumulation):
            epoch, place = divmod(position, self.batches_per_epoch)
            pictures = self._epoch(epoch)[place]
            result.append([Sample(picture, index + offset) for offset, picture in enumerate(pictures)])
            index += len(pictures)
        return result
