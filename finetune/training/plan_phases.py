"""What surrounds the steps: the libraries' own size, encoding, drawing samples, the proof."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.families.autoencoder_format import format_for
from finetune.families.loading import component_class
from finetune.families.mapped_pages import trim_heap
from finetune.families.model_index import component_slots, part_of, read_model_index
from finetune.families.targets import resolve_targets
from finetune.recipe import Recipe
from finetune.training.placement import QUANTISED, Hold
from finetune.training.plan_kept import configurations, kept
from finetune.training.plan_tracing import trace
from finetune.training.quantiser_library import load_bitsandbytes

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel

META = torch.device("meta")
# Threads, buffers of the product library and what a run keeps of its data, beyond the imports; measured.
WORKING_BYTES = 48 << 20
# What the models of transformers and the pipelines weigh, which a training run imports when it encodes or draws, and keeps: 26 to 31 MiB, measured.
LATER_BYTES, MODELS = 32 << 20, "transformers.modeling_utils"
LATER = "encoding libraries"
# Convolutions rearrange their inputs on the way.
CONVOLUTION_WORKSPACE = 1.25
FILE_DTYPES = {"F32": 4.0, "BF16": 2.0, "F16": 2.0, "F64": 8.0}


@dataclass(frozen=True)
class Surroundings:
    """library_bytes: of this process with everything imported that training imports, later_bytes: what encoding and drawing import
    beyond that, where they did not yet (both 0 on a GPU).  file_bytes: of a number in the
    transformer's file.  text_parameters, vae_parameters: counts.  encode_bytes, decode_bytes: activations of the autoencoder.
    vae_overflows: whether it computes in float32 where all else does in fp16."""

    library_bytes: int
    file_bytes: float
    text_parameters: int
    vae_parameters: int
    encode_bytes: float
    decode_bytes: float
    live_parameters: int = 0
    live_layers: tuple[tuple[int, ...], ...] = ()
    later_bytes: int = 0
    vae_overflows: bool = True

    def vae_bytes(self, compute: torch.dtype) -> float:
        """Of a number of the autoencoder that draws beside a transformer which computes so."""
        return float(format_for(compute, {"force_upcast": self.vae_overflows}).itemsize)

    def phases(self, loaded: dict[str, float], text_bytes: float, vae_bytes: float, encoded: bool) -> dict[str, dict[str, float]]:
        """Bytes of every phase but training and proof, by part. loaded: transformer, adapter, and the libraries with what the
        way it is held loads.  text_bytes, vae_bytes: of a number there."""
        libraries = {"libraries": self.library_bytes, LATER: self.later_bytes}
        found = {"drawing samples": libraries | loaded | {"autoencoder": self.vae_parameters * vae_bytes, "decoding": self.decode_bytes * vae_bytes / 4}}
        if not encoded:
            found["encoding captions"] = libraries | {"text encoders": self.text_parameters * text_bytes}
            found["encoding pictures"] = libraries | {"autoencoder": self.vae_parameters * 4, "encoding": self.encode_bytes}
        return found


def surroundings(base: BaseModel, sizes: list[tuple[int, int]], device: torch.device, kept_in: Path | None = None) -> Surroundings:
    """Read from configurations; kept_in: as `plan_kept.kept` has it. In a run that finds them kept, no encoder's class is loaded."""
    largest = max(sizes, key=lambda size: size[0] * size[1])
    # Before the encoders' classes are looked at, which are some of what comes later.
    weight, later = (_library_bytes(), 0 if MODELS in sys.modules else LATER_BYTES) if device.type == "cpu" else (0, 0)
    found = kept(kept_in, Surroundings, (configurations(base.folder), largest), lambda: _of_components(base, largest))
    return replace(found, library_bytes=weight, later_bytes=later, file_bytes=_file_bytes(base.folder / "transformer"))


def _of_components(base: BaseModel, largest: tuple[int, int]) -> Surroundings:
    """Text encoders and autoencoder, built without memory. largest: height and width in pixels."""
    index = read_model_index(base.folder)
    text, vae, live, layers = 0, None, 0, []
    for slot, (library, name) in component_slots(index).items():
        if part_of(slot) == "text" and slot.startswith("text_encoder"):
            encoder = _text_encoder(base.folder / slot, component_class(library, name, base.folder))
            size = sum(parameter.numel() for parameter in encoder.parameters())
            text += size
            if pattern := base.family.facts.trainable_encoders.get(slot):
                live += size
                layers += [tuple(module.weight.shape) for name, module in encoder.named_modules() if re.fullmatch(pattern, name)]
        elif part_of(slot) == "vae":
            vae = _autoencoder(base.folder / slot, component_class(library, name, base.folder))
    encode, decode = _autoencoder_bytes(vae, base, largest)
    overflows = vae is None or format_for(torch.float16, vae.config) != torch.float16
    return Surroundings(0, 0.0, text, sum(parameter.numel() for parameter in vae.parameters()) if vae is not None else 0, encode, decode, live, tuple(layers), vae_overflows=overflows)


def _text_encoder(folder: Path, component: type) -> torch.nn.Module:
    from accelerate import init_empty_weights

    config = component.config_class.from_pretrained(folder)
    with init_empty_weights(include_buffers=True):
        return component(config)


def _autoencoder(folder: Path, component: type) -> Any:
    from accelerate import init_empty_weights

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with init_empty_weights(include_buffers=True):
        return component.from_config(config).requires_grad_(False)


def _autoencoder_bytes(vae: Any, base: BaseModel, size: tuple[int, int]) -> tuple[float, float]:
    """Activations of encoding and of decoding one picture; an autoencoder that cannot be traced counts by its widest layer."""
    if vae is None:
        return 0.0, 0.0
    config = json.loads((base.folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    shape = base.family.shape(config)
    pixels = torch.empty(1, 3, *size, device=META)
    weights = [*vae.parameters(), *vae.buffers()]
    try:
        latents = torch.empty(1, vae.config.latent_channels, size[0] // shape.latent_factor, size[1] // shape.latent_factor, device=META)
        with torch.no_grad():
            encode = trace(lambda: vae.encode(pixels), weights).peak_bytes
            decode = trace(lambda: vae.decode(latents), weights).peak_bytes
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError):
        encode = decode = 3 * 128 * size[0] * size[1] * 4
    return encode * CONVOLUTION_WORKSPACE, decode * CONVOLUTION_WORKSPACE


def _file_bytes(folder: Path) -> float:
    """Bytes of a number in the weights' file; two where no file is here yet."""
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        sizes = {name: entry for name, entry in header.items() if name != "__metadata__"}
        largest = max(sizes.values(), key=lambda entry: entry["data_offsets"][1] - entry["data_offsets"][0])
        return FILE_DTYPES.get(largest["dtype"], 2.0)
    return 2.0


def _library_bytes() -> int:
    """What this process weighs, which has imported the run's libraries, with the run's own code, which a plan alone does not need."""
    import psutil

    importlib.import_module("finetune.training.run")
    return psutil.Process().memory_info().rss + WORKING_BYTES


def quantiser_bytes() -> int:
    """What the library of quantised layers and of 8-bit optimizers adds to this process, by importing it; 0 where it is there."""
    import psutil

    process = psutil.Process()
    # What tracing has freed would take part of it in.
    trim_heap()
    before = process.memory_info().rss
    load_bitsandbytes()
    return max(process.memory_info().rss - before, 0)


def proof_bytes(model: torch.nn.Module, facts: Any, hold: Hold, recipe: Recipe, around: Surroundings) -> float:
    """Baking for the proof makes one layer's weight at a time: the base's, the change and their sum in float32, and the result in the
    format of the base; quantised bases are not baked."""
    from finetune.adapters.lora import match_targets, weight_shapes

    if hold.name in QUANTISED:
        return 0.0
    size = around.file_bytes if hold.storage is None else float(torch.finfo(hold.storage).bits // 8)
    shapes = weight_shapes(model)
    return max(torch.Size(shapes[name]).numel() for name in match_targets(model, resolve_targets(facts, recipe.adapter.targets))) * (3 * 4 + size)
