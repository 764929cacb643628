"""What a measured process notes about itself: when steps ended, in wall and CPU seconds, and the memory at the end of training."""

from __future__ import annotations

import json
import time
from pathlib import Path


class StepClock:
    """started: `time.time()` at which the process was asked for. CPU seconds are of the whole process, all threads."""

    def __init__(self, started: float):
        self._started = started
        self.ends: list[tuple[float, float]] = []
        self.noted: dict[str, float] = {}

    def _now(self) -> tuple[float, float]:
        return time.time() - self._started, time.process_time()

    def step_done(self) -> None:
        self.ends.append(self._now())

    @staticmethod
    def _peak() -> int:
        # Not at the top: what is measured loads its libraries itself.
        import torch

        from finetune.training.memory import peak_memory_bytes

        return peak_memory_bytes(torch.device("cpu"))

    def training_done(self) -> None:
        self.noted["training_peak"] = self._peak()

    def adapter_written(self) -> None:
        self.noted["written_wall"], self.noted["written_cpu"] = self._now()

    def write(self, path: Path) -> None:
        whole_wall, whole_cpu = self._now()
        path.write_text(json.dumps(self.noted | {
            "ends": self.ends, "whole_wall": whole_wall, "whole_cpu": whole_cpu, "peak": self._peak()}))
