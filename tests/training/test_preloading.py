"""What a run imports before its first step: what it needs, and not the libraries that others load just in case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.training.preloading import wants_scipy

# One optimizer step on a LoRA, in a process of its own, after the imports of a run.
FIRST_STEP = """
import json, sys
from pathlib import Path
import torch
from finetune.training.preloading import late_imports
with late_imports(Path(".")):
    pass
from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.training.optimizers import build_optimizer
from finetune.training.placement_linear import HeldLinear, Scratch
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
inject_lora(model, "0", 2, seed=0)
optimizer = build_optimizer("adamw", [p for _, p in lora_parameters(model)], 1e-3, 0.0)
model = torch.nn.Sequential(model, HeldLinear(torch.nn.Linear(4, 4), torch.ones(4, 4, dtype=torch.bfloat16), Scratch()))
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
loaded = [name for name in ("bitsandbytes", "scipy", "diffusers", "peft") if name in sys.modules]
from peft.import_utils import is_bnb_available
from finetune.training.plan_phases import quantiser_bytes
print(json.dumps([loaded, is_bnb_available(), quantiser_bytes(), quantiser_bytes()]))
"""


def test_the_first_step_needs_neither_bitsandbytes_nor_scipy() -> None:
    output = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, check=True).stdout
    loaded, quantiser_is_there, weight, once_more = json.loads(output.splitlines()[-1])
    assert loaded == ["diffusers", "peft"]
    assert quantiser_is_there, "peft must find bitsandbytes when a layer is quantised"
    # What a plan adds where it will be needed.
    assert weight > 10 << 20 > once_more


@pytest.mark.parametrize(("config", "wanted"), [({"use_beta_sigmas": True}, True), ({"use_beta_sigmas": False}, False), ({}, False), (None, False)])
def test_scipy_is_kept_for_the_one_sampler_that_takes_it(config: dict | None, wanted: bool, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    assert wants_scipy(tmp_path) is wanted
