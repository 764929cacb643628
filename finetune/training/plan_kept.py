"""What a plan traces, kept beside the encodings: the same model, settings, libraries and code need not be traced at every start."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from data_tools.atomic_files import write_text
from finetune.training.encoding_cache import key_of

Found = TypeVar("Found")

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
# Whose code says what a step does and what is counted of it.
TRACED_CODE = ("families/*.py", "adapters/*.py", "training/plan*.py", "training/placement*.py", "training/allocator.py")


def kept(folder: Path | None, kind: type[Found], parts: tuple[object, ...], trace: Callable[[], Found], is_lasting: Callable[[Found], bool] = lambda _: True) -> Found:
    """`trace()`, a dataclass of plain values and tuples of them: read where it is kept, else made and kept.

    folder: of the encodings; None keeps nothing.  parts: what the result depends on beside libraries, machine and code.
    is_lasting: whether a result may be kept. What cannot be read is made again, and what cannot be written is only made.
    """
    if folder is None:
        return trace()
    path = folder / "plans" / f"{key_of(kind.__name__, _ground(), *parts)}.json"
    try:
        return kind(**{name: _with_tuples(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        found = trace()
    if is_lasting(found):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(found)))
        except OSError:
            pass
    return found


def _with_tuples(value: object) -> object:
    """What JSON made of a value, with the tuples that it was made of."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@cache
def _ground() -> list[object]:
    """Libraries, machine and this program's own code."""
    root = Path(__file__).parents[1]
    code = key_of(*(path.read_text(encoding="utf-8") for pattern in TRACED_CODE for path in sorted(root.glob(pattern))))
    return [[version(name) for name in LIBRARIES], platform.python_version(), platform.platform(), code]


def configurations(folder: Path) -> list[str]:
    """Every configuration of a base, as text."""
    return [path.read_text(encoding="utf-8") for path in [folder / "model_index.json", *sorted(folder.glob("*/config.json"))]]
