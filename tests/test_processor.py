"""What is read of a processor is what its system lists, and nothing where the system lists nothing."""

from __future__ import annotations

import pytest
import torch

from finetune import processor
from finetune.training import precision

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f amx_bf16\n"
OLDER = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n"
WINDOWS = "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"


@pytest.mark.parametrize(("said", "bf16", "intel"), [(AMD, True, False), (INTEL, True, True), (OLDER, False, False), (WINDOWS, None, False), ("", None, False)])
def test_instructions_and_maker_are_read_from_the_systems_own_words(monkeypatch: pytest.MonkeyPatch, said: str, bf16: bool | None, intel: bool) -> None:
    monkeypatch.setattr(processor, "description", lambda: said)
    assert (processor.multiplies_bf16(), processor.is_intel()) == (bf16, intel)


@pytest.mark.parametrize(("fast", "said"), [(True, 'training.precision = "bf16"'), (False, "several times slower"), (None, "several times slower")])
def test_a_run_on_a_cpu_takes_float32_and_says_where_bf16_would_be_faster(monkeypatch: pytest.MonkeyPatch, fast: bool | None, said: str) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: fast)
    chosen = precision.choose_precision("auto", torch.device("cpu"))
    assert chosen.name == "fp32" and said in chosen.reason
