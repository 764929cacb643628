"""A diffusers pipeline from a local folder with only the wanted parts in memory; every other component is None."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import BaseModelError
from finetune.families.autoencoder_format import compute_in, format_for
from finetune.families.mapped_pages import mapped_range, release_pages
from finetune.families.model_index import component_slots, part_of, read_model_index
from finetune.families.preloading import import_libraries

# In the names of parameters that adapters bring into a model.
ADAPTER_MARKS = (".lora_", ".hada_", ".lokr_", ".oft_R.")


def component_class(library: str, name: str, folder: Path) -> type:
    """A class of diffusers or transformers. Code that comes with a model is never run."""
    import_libraries(folder)
    import diffusers
    import transformers

    root = library.partition(".")[0]
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(root), name, None)
    if found is None:
        raise BaseModelError(
            f"component class {library}.{name} is not one of diffusers or transformers", where=str(folder),
            fix="models that bring their own code are not loaded; use a diffusers conversion",
        )
    return found


def load_pipeline(folder: Path, parts: frozenset[str], dtype: torch.dtype | None, **overrides: Any) -> Any:
    """The pipeline named by the folder, with `parts` (of text, vae, transformer) in memory in `dtype` (None: the transformer
    as its file has it, mapped, the others in float32).

    overrides: constructor arguments that win over `model_index.json`. Raises BaseModelError for a folder that lacks
    what is asked for.
    """
    folder = Path(folder)
    if parts <= {"transformer"}:
        return ShortPipeline(folder, parts, dtype, overrides)
    index = read_model_index(folder)
    components = {slot: load_component(folder / slot, component_class(library, name, folder), dtype)
                  for slot, (library, name) in component_slots(index).items() if part_of(slot) == "light" or part_of(slot) in parts}
    return _assemble(folder, components | overrides)


def _assemble(folder: Path, components: dict[str, Any]) -> Any:
    """The pipeline of the folder with these components and constructor arguments; None in every other slot."""
    index = read_model_index(folder)
    pipeline_class = component_class("diffusers", index["_class_name"], folder)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    arguments: dict[str, Any] = {
        key: value for key, value in index.items()
        if key in accepted and not isinstance(value, list) and value is not None
    }
    for slot in accepted:
        if slot in index or part_of(slot) is not None:
            arguments.setdefault(slot, None)
    arguments.pop("self", None)
    return pipeline_class(**{**arguments, **components})


class ShortPipeline:
    """The transformer (or nothing) and the light components of a pipeline, which is what a step needs. Asked for anything else, it
    becomes the whole pipeline with what is loaded: its class brings seconds of imports with it."""

    def __init__(self, folder: Path, parts: frozenset[str], dtype: torch.dtype | None, overrides: dict[str, Any]):
        slots = component_slots(read_model_index(folder))
        self._folder, self._overrides, self._whole = folder, overrides, None
        self._held = [slot for slot in slots if part_of(slot) == "light" or part_of(slot) in parts]
        self.transformer = None
        for slot in self._held:
            setattr(self, slot, load_component(folder / slot, component_class(*slots[slot], folder), dtype))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_held" not in self.__dict__:
            raise AttributeError(name)
        if self._whole is None:
            self._whole = _assemble(self._folder, {slot: getattr(self, slot) for slot in self._held} | self._overrides)
        return getattr(self._whole, name)

    def to(self, device: torch.device) -> ShortPipeline:
        """What is loaded, moved; the pipeline itself."""
        for module in (self.transformer, self._whole):
            if module is not None:
                module.to(device)
        return self


def load_component(folder: Path, component: type, dtype: torch.dtype | None) -> Any:
    """One component: tokenizer and scheduler as they are, models frozen, in evaluation mode and in `dtype`."""
    from diffusers import ModelMixin

    if not folder.is_dir():
        raise BaseModelError("the base lacks this component", where=str(folder), fix="download the base again")
    try:
        if issubclass(component, ModelMixin):
            model = load_diffusers_model(folder, component, dtype)
        elif _is_transformers_model(component):
            model = component.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        else:
            return component.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"this component of the base cannot be loaded: {first_line}", where=str(folder)) from None
    return model.eval().requires_grad_(False)


def _is_transformers_model(component: type) -> bool:
    if component.__module__.partition(".")[0] == "diffusers":
        return False  # transformers' models need not be imported to say so
    from transformers import PreTrainedModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is ours to report
    return issubclass(component, PreTrainedModel)


def add_encoders(pipeline: Any, folder: Path, slots: Iterable[str], dtype: torch.dtype) -> None:
    """Load text encoders and their tokenizers into a pipeline that was made without them, onto its transformer's device."""
    index = component_slots(read_model_index(folder))
    device = next(pipeline.transformer.parameters()).device
    for encoder in slots:
        for slot in (encoder, encoder.replace("text_encoder", "tokenizer")):
            component = load_component(folder / slot, component_class(*index[slot], folder), dtype)
            pipeline.register_modules(**{slot: component.to(device) if isinstance(component, nn.Module) else component})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: those of the shard index, or the single one. Variants are left alone."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    if indexes:
        mapping = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(mapping.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise BaseModelError(f"weight files are missing: {', '.join(missing)}", where=str(folder), fix="download the base again")
        return files
    single = sorted(folder.glob("*.safetensors"), key=lambda path: len(path.name))
    if not single:
        raise BaseModelError("there are no safetensors weights here", where=str(folder), fix="download the base again, or convert it to safetensors")
    return single[:1]


def iterate_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of some safetensors files, each mapped from disk, never copied as a whole."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                mapped = mapped_range(path)
                for name in opened.keys():
                    tensor = opened.get_tensor(name)
                    yield name, tensor
                    release_pages(tensor, mapped)  # what was cast need not lie in memory twice
        except SafetensorError as error:
            raise BaseModelError(f"the weights file is damaged: {error}", where=str(path), fix="download the base again") from None


def load_diffusers_model(folder: Path, component: type, dtype: torch.dtype | None) -> nn.Module:
    """A diffusers model whose parameters are filled one tensor at a time, so that file and model never lie in memory
    side by side. Where the file already has `dtype`, or `dtype` is None, parameters stay mapped from disk until they are
    touched."""
    from accelerate import init_empty_weights

    if component.__name__.startswith("Autoencoder"):
        # Autoencoders carry renamed keys from older releases; the library knows them all, and they are small.
        wanted = torch.float32 if dtype is None else dtype
        own = format_for(wanted, component.load_config(folder, local_files_only=True))
        return compute_in(component.from_pretrained(folder, torch_dtype=own, local_files_only=True, use_safetensors=True), wanted)
    config = component.load_config(folder, local_files_only=True)
    with init_empty_weights():
        model = component.from_config(config)
    fill(model, iterate_tensors(weight_files(folder)), dtype, folder)
    return model


def fill(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None, where: Path) -> None:
    """Put tensors into a model built without memory. Raises BaseModelError for missing, misshapen or adapter keys."""
    wanted = {name: value.shape for name, value in model.state_dict(keep_vars=True).items()}
    full_precision = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in tensors:
        if ".base_layer." in name or ".lora_A." in name:
            raise BaseModelError(
                "this base was saved with an adapter attached and cannot be loaded", where=f"{where}: {name}",
                fix="bake the adapter into the base, or detach it, and save again",
            )
        if name not in wanted:
            continue
        if tensor.shape != wanted.pop(name):
            raise BaseModelError(f"{name} has shape {list(tensor.shape)}, not what the configuration says", where=str(where))
        keep = any(part in full_precision for part in name.split("."))
        set_tensor(model, name, tensor, torch.float32 if keep else dtype)
    if wanted:
        raise BaseModelError(f"the weights lack {len(wanted)} tensors, first {next(iter(wanted))}", where=str(where), fix="download the base again")


def set_tensor(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Replace one parameter or buffer, cast if it is floating point; frozen."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model's inputs must have: what `computes_in` says where weights are held in another format than
    products are taken in, else that of its first floating-point parameter that is not an adapter's."""
    if (stated := getattr(model, "computes_in", None)) is not None:
        return stated
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(mark in name for mark in ADAPTER_MARKS):
            return parameter.dtype
    raise BaseModelError("the model has no floating-point parameters")
