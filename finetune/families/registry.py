"""Which families there are. One line each; a family's module is imported when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from data_tools.near_names import nearest
from finetune.errors import BaseModelError
from finetune.families.model_index import read_model_index
from finetune.families.protocol import ModelFamily


@dataclass(frozen=True)
class Entry:
    """module: in finetune.families, with the family under `attribute`.  pipelines: classes in `model_index.json`.

    told_by: keys of the transformer's config that tell variants of one pipeline class apart.
    """

    module: str
    pipelines: tuple[str, ...]
    attribute: str = "FAMILY"
    told_by: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Entry] = {
    "hunyuan_dit": Entry("hunyuan_dit", ("HunyuanDiTPipeline",)),
    "hunyuan_image_2": Entry("hunyuan_image_2", ("HunyuanImagePipeline",), told_by={"use_meanflow": False}),
    "flux_dev": Entry("flux", ("FluxPipeline",), "DEV", {"guidance_embeds": True}),
    "flux_schnell": Entry("flux", ("FluxPipeline",), "SCHNELL", {"guidance_embeds": False}),
    "flux2_dev": Entry("flux2", ("Flux2Pipeline",), "DEV"),
    "flux2_klein": Entry("flux2", ("Flux2KleinPipeline",), "KLEIN"),
    "sd3": Entry("sd3", ("StableDiffusion3Pipeline",)),
    "sana": Entry("sana", ("SanaPipeline",)),
    "pixart_sigma": Entry("pixart_sigma", ("PixArtSigmaPipeline",)),
    "lumina2": Entry("lumina2", ("Lumina2Pipeline",)),
    "qwen_image": Entry("qwen_image", ("QwenImagePipeline",)),
    "z_image": Entry("z_image", ("ZImagePipeline",)),
    "chroma": Entry("chroma", ("ChromaPipeline",)),
    "auraflow": Entry("auraflow", ("AuraFlowPipeline",)),
    "cogview4": Entry("cogview4", ("CogView4Pipeline",)),
    "hidream": Entry("hidream", ("HiDreamImagePipeline",)),
    "hunyuan_video": Entry("hunyuan_video", ("HunyuanVideoPipeline",)),
    "hunyuan_video_15": Entry("hunyuan_video_15", ("HunyuanVideo15Pipeline",)),
}

# What looks like a family member and must not be trained: (pipeline class, key of the transformer's config, value) -> why.
REFUSED: dict[tuple[str, str, object], str] = {
    ("HunyuanImagePipeline", "use_meanflow", True):
        "this is the distilled HunyuanImage-2.1, which learned pairs of noise levels: plain training would teach it the wrong target",
}


def names() -> list[str]:
    """Every family's name, in the order of the registry. Imports nothing heavy."""
    return list(FAMILIES)


def family(name: str) -> ModelFamily:
    """The family of this name. Raises BaseModelError with the nearest name for an unknown one."""
    entry = FAMILIES.get(name)
    if entry is None:
        near = nearest(name, FAMILIES)
        raise BaseModelError(f"there is no family called {name}", fix=f"did you mean {near}?" if near else f"known: {', '.join(FAMILIES)}")
    return getattr(import_module(f"finetune.families.{entry.module}"), entry.attribute)


def family_of(folder: Path) -> ModelFamily:
    """The family of a pipeline folder, from its `model_index.json` and, for variants, the transformer's config."""
    return family(family_name(read_model_index(folder)["_class_name"], Path(folder)))


def serving(pipeline_class: str, where: str) -> dict[str, Entry]:
    """The families of a pipeline class, by name. Raises BaseModelError for one that no family serves."""
    found = {name: entry for name, entry in FAMILIES.items() if pipeline_class in entry.pipelines}
    if not found:
        known = sorted({served for entry in FAMILIES.values() for served in entry.pipelines})
        raise BaseModelError(f"the base is a {pipeline_class}, which is not a base that can be trained here", where=where,
                             fix=f"bases of these pipelines can be used: {', '.join(known)}")
    return found


def family_name(pipeline_class: str, folder: Path) -> str:
    """As `family_of`, the name."""
    candidates = serving(pipeline_class, str(folder))
    if not any(entry.told_by for entry in candidates.values()):
        return next(iter(candidates))
    config = _transformer_config(folder)
    for (refused_class, key, value), why in REFUSED.items():
        if pipeline_class == refused_class and config.get(key) == value:
            raise BaseModelError(why, where=str(folder), fix="train the base model; its adapters have the same module names")
    for name, entry in candidates.items():
        if all(config.get(key, value) == value for key, value in entry.told_by.items()):
            return name
    raise BaseModelError(f"this {pipeline_class} is of no known variant", where=str(folder / "transformer" / "config.json"))


def _transformer_config(folder: Path) -> dict[str, Any]:
    path = folder / "transformer" / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"the transformer's configuration cannot be read: {error}", where=str(path)) from None
