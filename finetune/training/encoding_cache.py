"""Latents and text states under the hash of what made them: a changed picture, caption or encoder never meets a stale entry."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from data_tools.atomic_files import whole_file, write_text
from finetune.errors import BadInput, TrainingError

if TYPE_CHECKING:
    import torch

# Raised whenever the meaning of an entry changes, so that entries of older versions are made again.
ENCODING_VERSION = "1"
# Entries up to this many bytes in all stay in memory; beyond it they are read at each use.
MEMORY_BYTES = 1 << 30


def default_cache_folder() -> Path:
    """Where encodings live: $BRUSHWORK_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("BRUSHWORK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brushwork" / "encodings"


def require_writable(folder: Path) -> None:
    """Make the folder of encodings. Raises BadInput where nothing can be kept in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    if reason:
        raise BadInput(f"encodings cannot be kept here: {reason}", where=str(folder), fix="set the environment variable BRUSHWORK_CACHE to a folder that can be written")


def key_of(*parts: object) -> str:
    """A hex SHA-256 over the parts; each part's text is length-prefixed, so that no two lists collide."""
    digest = hashlib.sha256()
    for part in (ENCODING_VERSION, *parts):
        text = part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str)
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def _content_digest(tensors: dict[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EncodingCache:
    """A folder of entries, each a small safetensors file named by its key.

    `made` counts entries written, `mended` those that were damaged and had to be made again.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.made = 0
        self._damaged: set[str] = set()
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._memory_bytes = 0

    @property
    def mended(self) -> int:
        return len(self._damaged)

    @property
    def held_bytes(self) -> int:
        """Of the entries that are in memory."""
        return self._memory_bytes

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The entry, or None when there is none or it is damaged (then it is counted, and stays until `put` replaces it:
        another process may have replaced it already)."""
        if key in self._memory:
            return self._memory[key]
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as entry:
                tensors = {name: entry.get_tensor(name) for name in entry.keys()}
                digest = (entry.metadata() or {}).get("digest")
        except (SafetensorError, OSError, ValueError):
            tensors, digest = {}, None
        if digest is None or digest != _content_digest(tensors):
            self._damaged.add(key)
            return None
        self._remember(key, tensors)
        return tensors

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write an entry whole or not at all. Raises TrainingError when the disk refuses."""
        import torch
        from safetensors.torch import save

        # Copies: one tensor may stand under two names (the empty caption is its own negative), which safetensors refuses to write.
        tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        content = save(tensors, metadata={"digest": _content_digest(tensors)})
        try:
            with whole_file(self.path(key)) as temporary:
                temporary.write_bytes(content)
        except OSError as problem:
            raise TrainingError(
                f"cannot write an encoding: {problem.strerror or problem}", where=str(self.folder),
                fix="free disk space, or set BRUSHWORK_CACHE to another folder; what is encoded already stays usable",
            ) from problem
        self.made += 1
        self._remember(key, tensors)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a usable entry, in their order, without repeats. Reads every entry once."""
        return [key for key in dict.fromkeys(keys) if self.get(key) is None]

    def _remember(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._memory_bytes + size <= MEMORY_BYTES:
            self._memory[key] = tensors
            self._memory_bytes += size


def component_fingerprint(folders: Iterable[Path], cache_folder: Path) -> str:
    """A hash of all files in a model's component folders.

    Hashes of large files are remembered by (path, size, modification time), since hashing gigabytes takes seconds.
    """
    memory_file = Path(cache_folder) / "fingerprints.json"
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        memory = {}
    parts, changed = [], False
    for folder in folders:
        for path in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            status = path.stat()
            name = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
            if not isinstance(memory.get(name), str):
                with open(path, "rb") as content:
                    memory[name] = hashlib.file_digest(content, "sha256").hexdigest()
                changed = True
            parts.append([str(path.relative_to(Path(folder).parent)), memory[name]])
    if changed:
        write_text(memory_file, json.dumps(memory))
    return key_of("component", parts)
