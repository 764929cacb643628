"""What a run imports before its first step: what it needs, and not the libraries that others load just in case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.families.preloading import wants_scipy
from tests.tiny_models.all import TINY

# One optimizer step on a LoRA, in a process of its own, after the imports of a run.
FIRST_STEP = """
import json, sys
from pathlib import Path
import torch
from finetune.families.preloading import late_imports
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
loaded = [name for name in ("bitsandbytes", "scipy", "transformers.modeling_utils", "torch.distributed.tensor", "sympy.core", "torch._dynamo.convert_frame", "diffusers", "peft") if name in sys.modules]
from peft.import_utils import is_bnb_available
from finetune.training.plan_phases import quantiser_bytes
print(json.dumps([loaded, is_bnb_available(), quantiser_bytes(), quantiser_bytes()]))
"""


# Afterwards in the same process: what was left out comes when it is used, and what peft took the names of is the real thing.
LATER = """
import json, sys
from pathlib import Path
import torch
from finetune.families.preloading import late_imports
with late_imports(Path(".")):
    pass
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
optimizer.zero_grad()
from peft.tuners import tuners_utils
model = torch.nn.Linear(2, 2)
before = isinstance(model, tuners_utils.PreTrainedModel)
from transformers import BertConfig, BertModel, PreTrainedModel
bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8))
import torch._dynamo
compiler = [torch._dynamo.config.cache_size_limit > 0, hasattr(torch._dynamo, "OptimizedModule"), "eval_frame" in vars(sys.modules["torch._dynamo"])]
optimizer.zero_grad()
from diffusers import AutoencoderKL, BitsAndBytesConfig, FluxPipeline
from diffusers.quantizers.bitsandbytes import replace_with_bnb_linear
quantised = replace_with_bnb_linear(torch.nn.Sequential(torch.nn.Linear(64, 64)), modules_to_not_convert=[], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
assert type(quantised[0]).__name__ == "Linear4bit"
print(json.dumps([before, isinstance(bert, tuners_utils.PreTrainedModel), isinstance(model, tuners_utils.PreTrainedModel), *compiler]))
"""


RECOMPUTED = """
import json, sys
from pathlib import Path
import torch
from finetune.families.preloading import late_imports
with late_imports(Path(".")):
    pass
from finetune.families.checkpointing import checkpoint_blocks
block = torch.nn.Linear(4, 4).train()
checkpoint_blocks([block], 1)
block(torch.ones(1, 4)).sum().backward()
print(json.dumps([block.weight.grad is not None, [name for name in ("torch._dynamo.convert_frame", "torch._inductor", "sympy.core") if name in sys.modules]]))
"""


def test_checkpointed_blocks_need_no_compiler() -> None:
    output = subprocess.run([sys.executable, "-c", RECOMPUTED], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == [True, []]


# Text and picture encoders in a pipeline, as encoding loads them: neither the compiler nor what divides models comes along.
ENCODING = """
import json, sys
from pathlib import Path
import torch
from finetune.families.sd3 import FAMILY
pipeline = FAMILY.load(Path(sys.argv[1]), frozenset({"text"}), torch.float32)
FAMILY.encode_prompts(pipeline, ["a disc"])
pictures = FAMILY.load(Path(sys.argv[1]), frozenset({"vae"}), torch.float32)
FAMILY.encode_images(pictures, torch.zeros(1, 3, 64, 64))
print(json.dumps([name for name in ("torch._dynamo.convert_frame", "torch.distributed.tensor", "torch.onnx", "torch._inductor", "sympy.core", "transformers.modeling_utils") if name in sys.modules]))
"""


def test_encoding_needs_neither_the_compiler_nor_what_divides_models(tmp_path: Path) -> None:
    TINY["sd3"].build().save_pretrained(tmp_path)
    output = subprocess.run([sys.executable, "-c", ENCODING, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == ["transformers.modeling_utils"]


def test_what_is_left_out_comes_when_it_is_used() -> None:
    output = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == [False, True, False, True, True, True]


def test_the_first_step_needs_neither_bitsandbytes_nor_scipy() -> None:
    output = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, check=True).stdout
    loaded, quantiser_is_there, weight, once_more = json.loads(output.splitlines()[-1])
    assert loaded == ["diffusers", "peft"]
    assert quantiser_is_there, "peft must find bitsandbytes when a layer is quantised"
    # What a plan adds where it will be needed.
    assert weight > 1 << 20 > once_more


@pytest.mark.parametrize(("config", "wanted"), [({"use_beta_sigmas": True}, True), ({"use_beta_sigmas": False}, False), ({}, False), (None, False)])
def test_scipy_is_kept_for_the_one_sampler_that_takes_it(config: dict | None, wanted: bool, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    assert wants_scipy(tmp_path) is wanted


# A base whose sampler needs scipy, after one whose sampler does not.
TWO_BASES = """
import json, sys
from pathlib import Path
from finetune.families.loading import component_class, load_component
plain, beta = Path(sys.argv[1]), Path(sys.argv[2])
sampler = component_class("diffusers", "FlowMatchEulerDiscreteScheduler", plain)
load_component(plain / "scheduler", sampler, None)
before = "scipy.stats" in sys.modules
component_class("diffusers", "FlowMatchEulerDiscreteScheduler", beta)
scheduler = load_component(beta / "scheduler", sampler, None)
scheduler.set_timesteps(5)
print(json.dumps([before, len(scheduler.sigmas)]))
"""


def test_scipy_comes_with_the_first_base_whose_sampler_needs_it(tmp_path: Path) -> None:
    for name, settings in (("plain", {}), ("beta", {"use_beta_sigmas": True})):
        (tmp_path / name / "scheduler").mkdir(parents=True)
        (tmp_path / name / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"} | settings, indent=2))
    output = subprocess.run([sys.executable, "-c", TWO_BASES, str(tmp_path / "plain"), str(tmp_path / "beta")], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == [False, 6]
