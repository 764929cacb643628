"""Copies of the trainable parameters: their moving average, and the ones of the best step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class WeightCopy:
    """A copy of `parameters`, in their order, on their devices and in their formats."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def in_place_of(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """Inside, the model works with the copy; afterwards it has its own numbers again, bit for bit."""
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, held in zip(parameters, self.tensors, strict=True):
                parameter.data = held
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data


class WeightAverage(WeightCopy):
    """Exponential moving average of the trainable parameters (Polyak and Juditsky 1992 in the form of Tarvainen and Valpola 2017).

    decay: in [0, 1); the average reaches back over about 1 / (1 - decay) steps. In the first steps it is smaller,
    min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's `ExponentialMovingAverage`: an average that still
    holds the start of a short run would be worth less than the last step.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float):
        super().__init__(parameters)
        self.decay, self.updates = decay, 0

    def update(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Take in the parameters as they are after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            for held, parameter in zip(self.tensors, parameters, strict=True):
                held.lerp_(parameter, 1 - decay)
