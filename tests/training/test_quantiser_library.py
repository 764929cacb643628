"""The library of quantised layers and 8-bit optimizers works without torch's compiler."""

from __future__ import annotations

import json
import subprocess
import sys

STEPS = """
import json, sys
from pathlib import Path
import torch
from finetune.training.preloading import late_imports
with late_imports(Path(".")):
    pass
from finetune.training.optimizers import build_optimizer
from finetune.training.quantiser_library import load_bitsandbytes
from finetune.training.placement_nf4 import expand_nf4, quantise_nf4
library = load_bitsandbytes()
weight = torch.nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128))
before = weight.detach().clone()
for name in ("adamw8bit", "lion8bit"):
    optimizer = build_optimizer(name, [weight], 1e-2, 0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
packed, state = library.functional.quantize_4bit(before, compress_statistics=True, quant_type="nf4")
expanded = expand_nf4(packed, state, torch.empty(64, 128))
moved, error = float((before - weight).min()), float((expanded - before).abs().max())
print(json.dumps([moved, error, [name for name in ("torch._dynamo.convert_frame", "torch._inductor") if name in sys.modules]]))
"""


def test_8_bit_optimizers_and_quantised_weights_load_no_compiler() -> None:
    output = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True).stdout
    moved, error, compiler = json.loads(output.splitlines()[-1])
    assert moved > 0.015 and error < 0.2, "two steps of a hundredth each, and 16 levels"
    assert compiler == []
