"""A process that meets many sizes does not grow with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from finetune.shape_caches import BOUNDS, bound_shape_caches

# Convolutions of as many sizes as there are, after the imports of whoever loads a base. Prints what they grew the process by.
MANY_SIZES = """
import sys
from pathlib import Path
import torch
from finetune.families.preloading import import_libraries
import_libraries(Path("."))

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

torch.set_num_threads(1)
layer, pixels = torch.nn.Conv2d(32, 32, 3).requires_grad_(False), torch.randn(1, 32, 40, 260)
before = layer(pixels) is not None and resident()
for width in range(20, 260):
    layer(pixels[..., :width].contiguous())
print(resident() - before)
"""


def grown_mib(**environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if name not in BOUNDS}
    return json.loads(subprocess.run([sys.executable, "-c", MANY_SIZES], env=clean | environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_that_meets_many_sizes_stays_as_large_as_it_was() -> None:
    bounded, kept = grown_mib(), grown_mib(**dict.fromkeys(BOUNDS, "1024"))
    assert bounded < kept / 2
    assert kept > 60, "the libraries bound their caches themselves now: this is no longer needed"


def test_a_bound_of_the_users_stays_and_one_that_crashes_torch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = BOUNDS
    for given, taken in {"64": "64", "0": BOUNDS[first], "": BOUNDS[first], "many": BOUNDS[first]}.items():
        monkeypatch.setenv(first, given)
        monkeypatch.delenv(second, raising=False)
        bound_shape_caches()
        assert (os.environ[first], os.environ[second]) == (taken, BOUNDS[second])
