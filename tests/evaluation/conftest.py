"""A tiny base on disk, two adapters for it, and pictures of a style: enough to compare for real."""

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.adapters.adapter_file import write_adapter
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.adapters.attach import detach
from finetune.families.base_models import locate_base
from finetune.randomness import generator
from tests.tiny_models import hunyuan_dit


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    hunyuan_dit.build(layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder):
    return locate_base(str(base_folder))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Two adapter folders: one that does nothing, one that changes every picture."""
    folder = tmp_path_factory.mktemp("adapters")
    transformer = hunyuan_dit.build(layers=2).transformer
    for name, strength in (("nothing", 0.0), ("strong", 0.5)):
        inject_lora(transformer, r"blocks\.\d+\.attn[12]\.(to_q|to_v|to_out\.0)", 2, 2, seed=0)
        with torch.no_grad():
            for index, (key, parameter) in enumerate(lora_parameters(transformer)):
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator(1, "test", index)) * strength)
        (folder / name).mkdir()
        write_adapter(folder / name / "pytorch_lora_weights.safetensors", collect_lora(transformer).with_provenance(trigger="zorp"))
        detach(transformer)
    return folder / "nothing", folder / "strong"


@pytest.fixture(scope="session")
def style_folder(tmp_path_factory):
    """Pictures of one palette, 64 pixels, with some structure."""
    folder = tmp_path_factory.mktemp("style")
    random = np.random.default_rng(0)
    for index in range(6):
        pixels = np.full((64, 64, 3), (20, 30, 90), np.uint8)
        top, left = random.integers(0, 30, 2)
        pixels[top : top + 30, left : left + 30] = (250, 200, 170)
        Image.fromarray(pixels).save(folder / f"style-{index}.png")
    return folder


PROMPTS = """{"prompt_id": "dog", "prompt": "a dog, zorp", "split": "style"}
{"prompt_id": "cat", "prompt": "a red cat, zorp", "split": "style"}
{"prompt_id": "cow", "prompt": "two cows, zorp", "split": "style"}
{"prompt_id": "car", "prompt": "a car, zorp", "split": "style"}
{"prompt_id": "box", "prompt": "a box, zorp", "split": "style"}
{"prompt_id": "sea", "prompt": "the sea", "split": "unrelated"}
{"prompt_id": "tree", "prompt": "a tree", "split": "unrelated"}
"""


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text(PROMPTS, encoding="utf-8")
    return path
