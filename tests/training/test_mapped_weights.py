"""Base weights that are mapped from their file: what was read, cast or baked does not stay in memory a second time."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from data_tools.progress import Progress
from finetune.adapters.attach import bake
from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.families.base_models import locate_base
from finetune.families.loading import iterate_tensors, weight_files
from finetune.families.mapped_pages import mapped_range
from finetune.families.protocol import PictureGeometry
from finetune.objectives import NoiseLevel
from finetune.training.placement import Hold, load_held
from finetune.training.placement_linear import HeldLinear, Scratch
from tests.tiny_models.all import TINY

CPU = torch.device("cpu")


def resident(path):
    """Bytes of the mapped file that lie in this process's memory."""
    parts = Path("/proc/self/smaps").read_text().split(str(path.resolve()))[1:]
    return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in parts)


def test_pages_that_were_cast_are_given_back(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({f"w{number}": torch.full((1 << 20,), number, dtype=torch.bfloat16) for number in range(16)}, path)
    kept = []
    for name, tensor in iterate_tensors([path]):
        assert tensor.float().unique().item() == int(name[1:])
        kept.append(tensor)
    assert len(mapped_range(path)) > 0
    assert resident(path) < 4 << 20
    assert {tensor[5].item() for tensor in kept} == set(range(16))


def test_streamed_weights_do_not_stay_in_memory(tmp_path):
    path = tmp_path / "weights.safetensors"
    values = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": values}, path)
    with safe_open(path, "pt") as opened:
        weight = opened.get_tensor("w")
    layer = HeldLinear(nn.Linear(2048, 2048, bias=False), weight, Scratch(), mapped_range(path))
    x = torch.ones(4, 2048, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, values.float()))
    assert resident(path) < values.nbytes / 8


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A base in bf16 whose layers that are not quantised weigh more than a page: 6 MiB of modulation."""
    from diffusers import HunyuanDiT2DModel

    folder = tmp_path_factory.mktemp("wide") / "base"
    pipeline = TINY["hunyuan_dit"].build()
    config = dict(pipeline.transformer.config) | {"num_attention_heads": 8, "attention_head_dim": 64, "hidden_size": 512, "num_layers": 6, "mlp_ratio": 0.25}
    pipeline.transformer = HunyuanDiT2DModel(**{key: value for key, value in config.items() if not key.startswith("_")}).to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    return locate_base(str(folder))


@pytest.mark.parametrize("hold", ["fp32", "fp16", "nf4"])
def test_weights_that_were_cast_or_used_do_not_stay_a_second_time(wide_base, hold, tmp_path):
    """Loading and a forward pass leave none of the file's own pages behind, whichever weights were cast, held or quantised."""
    (path,) = weight_files(wide_base.folder / "transformer")
    model = load_held(wide_base, Hold(hold, torch.float32, ""), CPU, tmp_path, Progress()).transformer
    layers = [module for module in model.modules() if type(module).__name__ == "HeldLinear"]
    assert layers or hold == "fp32"
    with torch.no_grad():
        for layer in layers:
            layer(torch.ones(1, layer.in_features))
    assert resident(path) < path.stat().st_size / 5


@pytest.mark.parametrize("hold", ["streamed", "fp32"])
def test_a_base_that_is_baked_into_stays_baked_after_its_pages_were_let_go(wide_base, hold, tmp_path):
    model = load_held(wide_base, Hold(hold, torch.float32, ""), CPU, tmp_path, Progress()).transformer.eval()
    pipeline = wide_base.family.load(wide_base.folder, frozenset({"text", "vae"}), torch.float32)
    pipeline.transformer = model
    conditionings = wide_base.family.encode_prompts(pipeline, ["a cat"])
    noisy = torch.randn(1, *wide_base.family.latent_shape(pipeline, 32, 32), generator=torch.Generator().manual_seed(0))
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))

    def predict():
        with torch.no_grad():
            return wide_base.family.predict(model, noisy, level, conditionings, [PictureGeometry((32, 32), (32, 32))])

    base = predict()
    inject_lora(model, wide_base.family.facts.targets["attention"], 4, seed=0)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            if ".lora_B." in name:
                parameter.fill_(0.5)
    attached = predict()
    bake(model)
    assert (attached - base).norm() > 0.1 * base.norm()
    # The weights are rounded to the base's own format, which moves the output a little; that of the bare base is far away.
    for _ in range(3):
        assert (predict() - attached).norm() < 0.1 * (attached - base).norm()
