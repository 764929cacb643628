"""The peak that a run reports is its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from finetune.training import memory
from finetune.training.memory import peak_memory_bytes

CPU = torch.device("cpu")
# Starts a program while it holds a GiB itself.
LARGE_PARENT = """
import subprocess, sys
held = bytearray(b"1") * (1 << 30)
sys.stdout.write(subprocess.run([sys.executable, "-c", "import torch; from finetune.training.memory import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"],
                                capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts what the starting program had")
def test_what_the_starting_program_holds_is_not_counted() -> None:
    found = int(subprocess.run([sys.executable, "-c", LARGE_PARENT], capture_output=True, text=True, check=True).stdout)
    assert 50 << 20 < found < 900 << 20


def test_memory_that_was_given_back_counts() -> None:
    before = peak_memory_bytes(CPU)
    torch.ones(before // 4 + (64 << 18))  # more than all that is there
    assert peak_memory_bytes(CPU) >= before + (64 << 20)


def test_where_there_is_no_such_file_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    there = peak_memory_bytes(CPU)

    def absent(self: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", absent)
    assert peak_memory_bytes(CPU) >= there
    kib = peak_memory_bytes(CPU)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert abs(peak_memory_bytes(CPU) * 1024 - kib) < 64 << 20
