"""Give memory back: pages of a mapped file that were read once, and freed blocks that the allocator keeps.

A tensor read from safetensors is a view of the mapped file. After a cast its pages count as used memory of the
process for as long as the file stays mapped, although nobody looks at them again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

MADV_DONTNEED = 4


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def mapped_range(path: Path) -> range:
    """The addresses at which this process has mapped the file; empty where it has not, or outside Linux."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return range(0)
    ends = [line.split()[0].split("-") for line in lines if line.endswith(f" {path.resolve()}")]
    return range(min(int(first, 16) for first, _ in ends), max(int(last, 16) for _, last in ends)) if ends else range(0)


def release_pages(tensor: Tensor, mapped: range) -> None:
    """Drop the pages of a tensor that lies in `mapped` and was never written to; touched again, they come back from
    the file. A tensor that lies elsewhere is left alone."""
    libc, page = _libc(), mmap.PAGESIZE
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    if libc is None or first not in mapped or end > mapped.stop:
        return
    # Only whole pages: a page at the border also holds a neighbour's values, which may be in use.
    first, end = (first + page - 1) // page * page, end // page * page
    if end > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_DONTNEED)


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps it otherwise. Does nothing where there is no malloc_trim."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
