"""The lines that load a published adapter without this tool. They stand in the card, and a test runs that very text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SnippetFacts:
    """repo: the Hub repository.  file: its weight file.  base: Hub id or path for from_pretrained.  prompt: an example.
    ranks: module -> rank.  loader: "pipeline" where it has load_lora_weights, "transformer" where only the model can
    load adapters, "peft" where neither can.  call: further arguments of the pipeline's call.
    dora: whether it has magnitudes.  folder: whether it is a PEFT folder, which peft loads whatever the loader is."""

    repo: str
    file: str
    base: str
    prompt: str
    ranks: dict[str, int]
    loader: str
    call: dict[str, Any]
    dora: bool = False
    folder: bool = False


def loading_snippet(facts: SnippetFacts) -> str:
    """Python source that draws one picture with stock diffusers (and peft)."""
    call = "".join(f", {name}={value!r}" for name, value in facts.call.items())
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    start = [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f'pipeline = DiffusionPipeline.from_pretrained({facts.base!r}, torch_dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)',
    ]
    if facts.folder:
        imports.append("from peft import PeftModel")
        load = [f"PeftModel.from_pretrained(pipeline.transformer, {facts.repo!r})"]
    elif facts.loader == "pipeline":
        load = [f"pipeline.load_lora_weights({facts.repo!r}, weight_name={facts.file!r})"]
    elif facts.loader == "transformer":
        load = [f'pipeline.transformer.load_lora_adapter({facts.repo!r}, weight_name={facts.file!r}, prefix="transformer")']
    else:
        imports += ["from huggingface_hub import hf_hub_download", "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict", "from safetensors.torch import load_file"]
        load = [
            f'weights = {{key.removeprefix("transformer."): value for key, value in load_file(hf_hub_download({facts.repo!r}, {facts.file!r})).items()}}',
            'ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in weights.items() if key.endswith(".lora_A.weight")}',
            *_configuration(facts.ranks, ", use_dora=True" if facts.dora else ""),
            "inject_adapter_in_model(config, pipeline.transformer)",
            "set_peft_model_state_dict(pipeline.transformer, weights)",
        ]
    end = [f"pipeline({facts.prompt!r}{call}).images[0].save(\"picture.png\")"]
    return "\n".join([*imports, "", *start, *load, *end]) + "\n"


def _configuration(ranks: dict[str, int], more: str) -> list[str]:
    """The adapter's configuration; ranks are spelled out only where they differ, anchored since peft matches suffixes."""
    if len(set(ranks.values())) == 1:
        return ["rank = max(ranks.values())", f"config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ranks){more})"]
    return ['exact = {f"^{module}$": rank for module, rank in ranks.items()}',
            f"config = LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=exact, alpha_pattern=exact{more})"]
