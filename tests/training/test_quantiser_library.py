"""The library of quantised layers and 8-bit optimizers works without torch's compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import BadInput
from finetune.training import quantiser_library
from finetune.training.quantiser_library import require_kernels
from finetune.training.run import train
from tests.training.small_job import small_recipe

STEPS = """
import json, sys
from pathlib import Path
import torch
from finetune.families.preloading import late_imports
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


CUDA = torch.device("cuda")


def test_a_library_without_functions_for_the_gpu_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(cextension=SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=False)))
    monkeypatch.setattr(quantiser_library, "load_bitsandbytes", lambda: library)
    with pytest.raises(BadInput, match="needed for training.optimizer=adamw8bit and base.hold=nf4\n") as refused:
        require_kernels(CUDA, "adamw8bit", "nf4")
    assert "python -m bitsandbytes" in refused.value.fix
    with pytest.raises(BadInput, match="needed for base.hold=nf4\n"):
        require_kernels(CUDA, "adamw", "nf4")
    require_kernels(CUDA, "adamw", "int8")
    require_kernels(torch.device("cpu"), "adamw8bit", "nf4")
    library.cextension.lib.compiled_with_cuda = True
    require_kernels(CUDA, "adamw8bit", "nf4")


def test_a_run_asks_before_it_encodes(tiny_base, pictures, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.training import preparation

    def refuse(*asked: object) -> None:
        raise BadInput(str(asked))

    monkeypatch.setattr(preparation, "require_kernels", refuse)
    with pytest.raises(BadInput, match="cpu.*'adamw8bit', 'fp32'"):
        train(small_recipe(tiny_base, pictures), tmp_path / "run", cache_folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# What is put in the compiler's place says with which options it was asked.
COMPILED_LATER = """
import sys
import torch
from finetune.training.quantiser_library import compile_later
asked = []
def compiler(model, **options):
    asked.append((model.__name__, options))
    return lambda number: model(number) + 100
torch.compile = compiler
with compile_later():
    @torch.compile
    def plain(number):
        "Doubles."
        return 2 * number
    @torch.compile(dynamic=False)
    def told(number): return 3 * number
    direct = torch.compile(lambda number: number, fullgraph=True)
assert torch.compile is compiler and asked == [] and plain.__doc__ == "Doubles."
assert [plain(1), plain(2), told(1), direct(1)] == [102, 104, 103, 101]
assert asked == [("plain", {}), ("told", {"dynamic": False}), ("<lambda>", {"fullgraph": True})], "each once"
"""


def test_a_function_is_compiled_when_it_is_called() -> None:
    subprocess.run([sys.executable, "-c", COMPILED_LATER], check=True)
