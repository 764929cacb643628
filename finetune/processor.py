"""What the processor can do, from what the system says of it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

FAST_BF16 = ("avx512_bf16", "amx_bf16")


@cache
def description() -> str:
    """The kernel's own words (Linux), else those of Python; "" where neither has any."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()


def multiplies_bf16() -> bool | None:
    """Whether it has instructions for products in bf16; None where the system does not list its instructions."""
    said = description()
    return any(flag in said for flag in FAST_BF16) if "flags" in said else None


def is_intel() -> bool:
    return "GenuineIntel" in description()
