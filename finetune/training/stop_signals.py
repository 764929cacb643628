"""Ctrl-C and SIGTERM finish the step and save; a second one leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class StopRequest:
    """`signal_number` is None until the user asks to stop."""

    signal_number: int | None = None

    def agreed(self, accelerator: Accelerator) -> int | None:
        """`signal_number` as all processes see it: they stop after the same step, since one alone would leave the others waiting
        for it. A collective operation."""
        if accelerator.num_processes == 1:
            return self.signal_number
        asked = torch.tensor(self.signal_number or 0, device=accelerator.device)
        number = int(accelerator.reduce(asked, reduction="max")) or None
        self.signal_number = self.signal_number or number
        return number

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal_number or signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield the request that the handlers set. Outside the main thread signals cannot be caught: it is never set."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def remember(number: int, _frame: object) -> None:
        if request.signal_number is not None:
            raise KeyboardInterrupt
        request.signal_number = number

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
