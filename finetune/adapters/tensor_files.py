"""safetensors files: a strict header reader, tensors one at a time, and a writer whose bytes depend on the tensors alone.

The header is read with the standard library and checked before a single tensor byte is touched; torch comes in only
when a tensor is asked for. One open descriptor serves the checks and the reads, so that a file which is swapped in
between cannot pass. Format: 8 bytes little-endian header length, JSON header, tensor bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.atomic_files import whole_file
from data_tools.near_names import meant_path
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}
HEADER_KEY = "__metadata__"
KEY_CHARACTERS = re.compile(r"[A-Za-z0-9_.\-]+")
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a file may be. Sizes in bytes; `dimension` is the largest single axis of a tensor."""

    file_bytes: int = 4 << 30
    header_bytes: int = 16 * MEBIBYTE
    metadata_bytes: int = 1 * MEBIBYTE
    keys: int = 50_000
    key_length: int = 512
    axes: int = 5
    dimension: int = 1 << 20


ADAPTER_LIMITS = Limits()
BASE_LIMITS = Limits(file_bytes=1 << 40)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start, end: byte range from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself. metadata: its own key-value text, not to be trusted."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


class TensorFile:
    """An open, checked safetensors file. A context manager."""

    def __init__(self, path: Path | str, limits: Limits = ADAPTER_LIMITS):
        """Raises AdapterError when the file is not a whole, honest safetensors file within `limits`."""
        self.path = Path(path)
        self._descriptor = _open_regular(self.path)
        try:
            size = os.fstat(self._descriptor).st_size
            self.header = _read_header(self._descriptor, size, limits, str(self.path))
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, in memory of its own and in the dtype of the file."""
        import torch

        entry = self.header.entries[key]
        buffer = bytearray(entry.end - entry.start)
        view, offset = memoryview(buffer), entry.start
        while view.nbytes:
            count = os.preadv(self._descriptor, [view[:1 << 30]], offset)
            if not count:
                raise AdapterError(f"the file ends inside {key}", where=str(self.path), fix="download it again")
            view, offset = view[count:], offset + count
        if not buffer:
            return torch.empty(entry.shape, dtype=_torch_dtype(entry.dtype))
        return torch.frombuffer(buffer, dtype=_torch_dtype(entry.dtype)).reshape(entry.shape)


def _torch_dtype(name: str):
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    }[name]


def _open_regular(path: Path) -> int:
    """A descriptor of a plain `.safetensors` file; links are followed only inside the Hub's own cache layout."""
    where = str(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise AdapterError("pickle files can run code when opened and are never read", where=where,
                           fix="ask its author for a .safetensors file")
    if path.suffix != ".safetensors":
        if not os.path.lexists(path):
            raise AdapterError("no such file or folder", where=where, fix=meant_path(path, "give an adapter file, or the `adapter` folder of a run"))
        raise AdapterError(f"not a .safetensors file (the name ends in {path.suffix or 'nothing'!r})", where=where)
    if path.is_symlink():
        target = path.resolve()
        if target.parent.name != "blobs" or target.parent.parent not in path.absolute().parents:
            raise AdapterError("a symbolic link that leads somewhere else", where=where, fix=f"name the file itself: {target}")
        path = target
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise AdapterError("no such file", where=where, fix=meant_path(path, "give an adapter file, or the `adapter` folder of a run")) from None
    except OSError as problem:
        raise AdapterError(f"cannot be opened: {problem.strerror}", where=where) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError("not a regular file", where=where)
    return descriptor


FOREIGN_BEGINNINGS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to", "run `git lfs pull`, or download the file from the Hub"),
    (b"<!DOCTYPE", "a web page, not a tensor file", "the download was answered with a page; log in or check the link"),
    (b"<html", "a web page, not a tensor file", "the download was answered with a page; log in or check the link"),
    (b"PK\x03\x04", "a zip archive or a pickle checkpoint, not a safetensors file", "archives and pickles are never opened"),
    (b"\x1f\x8b", "a gzip archive, not a safetensors file", "archives are never opened"),
    (b"\x80\x02", "a pickle, not a safetensors file", "pickles can run code and are never opened"),
    (b"\x80\x04", "a pickle, not a safetensors file", "pickles can run code and are never opened"),
)


def _read_header(descriptor: int, size: int, limits: Limits, where: str) -> Header:
    def refuse(what: str, fix: str | None = "the file is damaged or hostile; get it again from its author") -> AdapterError:
        return AdapterError(what, where=where, fix=fix)

    if size > limits.file_bytes:
        raise refuse(f"{size} bytes; an adapter has at most {limits.file_bytes}", "is this a full checkpoint?")
    beginning = os.pread(descriptor, 64, 0)
    # A safetensors file has its JSON from byte 8; the length before it may look like any mark (640 bytes: a pickle's).
    for mark, what, fix in FOREIGN_BEGINNINGS if beginning[8:9] != b"{" else ():
        if beginning.lstrip().startswith(mark):
            raise refuse(what, fix)
    if size < 10:
        raise refuse(f"only {size} bytes: not a safetensors file")
    length = int.from_bytes(beginning[:8], "little")
    if not 2 <= length <= size - 8:
        raise refuse("the header is longer than the file")
    if length > limits.header_bytes:
        raise refuse(f"a header of {length} bytes; at most {limits.header_bytes} are read")
    raw = _json_object(os.pread(descriptor, length, 8), refuse)
    metadata = _metadata(raw.pop(HEADER_KEY, {}), limits, refuse)
    if len(raw) > limits.keys:
        raise refuse(f"{len(raw)} tensors; at most {limits.keys} are read")
    entries = {key: _entry(key, value, 8 + length, limits, refuse) for key, value in raw.items()}
    _check_ranges(entries, 8 + length, size, refuse)
    return Header(entries, metadata)


def _json_object(text: bytes, refuse: Callable[..., AdapterError]) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def not_a_number(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=not_a_number)
    except (ValueError, RecursionError) as problem:
        raise refuse(f"the header is not valid JSON ({str(problem)[:120]})") from None
    if not isinstance(header, dict):
        raise refuse("the header is not a JSON object")
    return header


def _metadata(raw: object, limits: Limits, refuse: Callable[..., AdapterError]) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise refuse("the metadata is not a table of texts")
    try:
        size = len("".join([*raw, *raw.values()]).encode())
    except UnicodeEncodeError:
        raise refuse("the metadata holds half of a character (a lone surrogate)") from None
    if size > limits.metadata_bytes:
        raise refuse(f"more than {limits.metadata_bytes} bytes of metadata")
    return raw


def _entry(key: str, raw: object, body: int, limits: Limits, refuse: Callable[..., AdapterError]) -> Entry:
    shown = ascii(key[:80])
    if len(key) > limits.key_length or not KEY_CHARACTERS.fullmatch(key) or ".." in key:
        raise refuse(f"a tensor name that no adapter has: {shown}")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"{shown}: its description is not dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse(f"{shown}: unknown dtype {ascii(dtype)[:40]}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise refuse(f"{shown}: shape or data_offsets are not lists of whole numbers")
    if len(shape) > limits.axes or any(axis > limits.dimension for axis in shape):
        raise refuse(f"{shown}: a shape that no adapter has")
    if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise refuse(f"{shown}: shape and byte range disagree")
    return Entry(dtype, tuple(shape), body + offsets[0], body + offsets[1])


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_ranges(entries: Mapping[str, Entry], body: int, size: int, refuse: Callable[..., AdapterError]) -> None:
    """The tensors cover the file from the header to its end, without gap or overlap."""
    position = body
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise refuse(f"{key}: its bytes overlap another tensor's or leave a gap")
        position = entry.end
    if position != size:
        raise refuse("the file is cut short" if position > size else "there are bytes after the last tensor")


SAVED_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}


def write_tensors(path: Path | str, shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str],
                  tensor_of: Callable[[str], Tensor], order: Iterable[str] | None = None) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time; equal tensors and metadata give equal bytes.

    shapes: key -> (safetensors dtype, shape).  tensor_of: gives the tensor of a key when its turn comes.
    order: of the tensors in the file; sorted by key when not given.  Raises OSError of the write itself.
    """
    header: dict[str, object] = {HEADER_KEY: dict(sorted(metadata.items()))} if metadata else {}
    position, keys = 0, list(order) if order is not None else sorted(shapes)
    for key in keys:
        dtype, shape = shapes[key]
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as temporary, open(temporary, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            out.write(_bytes_of(tensor_of(key), key, shapes[key]))


def _bytes_of(tensor: Tensor, key: str, expected: tuple[str, tuple[int, ...]]) -> memoryview:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    found = (dtype_name(tensor), tuple(tensor.shape))
    if found != expected:
        raise ValueError(f"{key} was announced as {expected} and came as {found}")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def dtype_name(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype, such as BF16."""
    return SAVED_NAMES[str(tensor.dtype).removeprefix("torch.")]
