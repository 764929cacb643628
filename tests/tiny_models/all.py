"""Every registered family's tiny pipeline: the batteries run over this table, so a new family adds one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class TinyModel:
    """module: in tests.tiny_models.  options: of its `build`.  live_options: of the pipeline's call."""

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    live_options: dict[str, Any] = field(default_factory=dict)

    def load_module(self) -> Any:
        return import_module(f"tests.tiny_models.{self.module}")

    def build(self, seed: int = 0) -> Any:
        """A fresh pipeline; equal seeds give equal weights."""
        return self.load_module().build(seed, **self.options)

    @property
    def picture(self) -> tuple[int, int]:
        """(height, width) in pixels that this pipeline draws quickly."""
        return self.load_module().PICTURE

    @property
    def live(self) -> dict[str, Any]:
        """What the pipeline's own call needs beside prompt and size to draw without guidance, as training predicts."""
        return getattr(self.load_module(), "LIVE", {"guidance_scale": 1.0}) | self.live_options

    def after_load(self, pipeline: Any) -> Any:
        """What a tiny pipeline must be told again after loading, since pipelines do not save it."""
        return getattr(self.load_module(), "after_load", lambda loaded: loaded)(pipeline)


TINY: dict[str, TinyModel] = {
    "hunyuan_dit": TinyModel("hunyuan_dit"),
    "hunyuan_image_2": TinyModel("hunyuan_image_2"),
    "flux_dev": TinyModel("flux"),
    "flux_schnell": TinyModel("flux", {"guidance": False}, {"max_sequence_length": 256}),
    "flux2_dev": TinyModel("flux2", {"dev": True}),
    "flux2_klein": TinyModel("flux2"),
    "sd3": TinyModel("sd3"),
    "sana": TinyModel("sana"),
    "pixart_sigma": TinyModel("pixart_sigma"),
    "lumina2": TinyModel("lumina2"),
    "qwen_image": TinyModel("qwen_image"),
    "z_image": TinyModel("z_image"),
    "chroma": TinyModel("chroma"),
    "auraflow": TinyModel("auraflow"),
    "cogview4": TinyModel("cogview4"),
    "hidream": TinyModel("hidream"),
    "hunyuan_video": TinyModel("hunyuan_video"),
    "hunyuan_video_15": TinyModel("hunyuan_video_15"),
}
