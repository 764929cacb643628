"""The weights of a base as they lie on disk: one tensor at a time, over any number of shards, without building a model."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.tensor_files import BASE_LIMITS, Entry, TensorFile
from finetune.errors import BaseModelError

if TYPE_CHECKING:
    from torch import Tensor

QUANTISED_MARKS = (".absmax", ".quant_map", ".SCB", ".scale_weight", ".weight_scale")


class BaseWeights:
    """An opened component. A context manager; `files` are its weight files in order of name."""

    def __init__(self, place: Path | str, component: str = "transformer"):
        """place: a pipeline folder (its `component` is taken), a component's folder, or one .safetensors file.

        Raises BaseModelError when there are no weights or an index names a file that is missing.
        """
        self.folder, self.files = _weight_files(Path(place), component)
        self._stack = ExitStack()
        self._of_key: dict[str, TensorFile] = {}
        try:
            self.opened = {path: self._stack.enter_context(TensorFile(path, BASE_LIMITS)) for path in self.files}
        except BaseException:
            self._stack.close()
            raise
        for file in self.opened.values():
            for key in file.header.entries:
                if key in self._of_key:
                    self._stack.close()
                    raise BaseModelError(f"{key} is in two files", where=str(file.path))
                self._of_key[key] = file

    def __enter__(self) -> BaseWeights:
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    def __contains__(self, key: str) -> bool:
        return key in self._of_key

    @property
    def keys(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._of_key)

    def entry(self, key: str) -> Entry:
        """dtype and shape of one tensor."""
        return self._of_key[key].header.entries[key]

    def read(self, key: str) -> Tensor:
        """One tensor."""
        return self._of_key[key].read(key)

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Module name -> shape of its weight, for weights of two or four axes: what `attach.check_fit` takes."""
        suffix = ".weight"
        return {key.removesuffix(suffix): self.entry(key).shape for key in self._of_key if key.endswith(suffix) and len(self.entry(key).shape) in (2, 4)}

    @property
    def quantised(self) -> str | None:
        """The first sign that the weights are held in fewer bits than they were trained in, or None."""
        config = self.folder / "config.json"
        if config.exists() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
            return f"{config.name} has a quantization_config"
        for key in self.keys:
            if any(mark in key for mark in QUANTISED_MARKS):
                return key
            if key.endswith(".weight") and self.entry(key).dtype not in ("F64", "F32", "F16", "BF16"):
                return f"{key} holds {self.entry(key).dtype}"
        return None


def _weight_files(place: Path, component: str) -> tuple[Path, list[Path]]:
    if place.suffix == ".safetensors":
        return place.parent, [place]
    folder = place / component if (place / component).is_dir() else place
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) > 1:
            raise BaseModelError(f"{len(files)} weight files and no index", where=str(folder), fix="name one file, or keep one variant in the folder")
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise BaseModelError(f"no weights: {', '.join(missing) or 'no .safetensors file'}", where=str(folder))
    return folder, files
