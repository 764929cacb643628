"""What the C library's heap takes while a step allocates and frees: more than what is alive, by a factor of up to three.

Every tensor is asked for aligned to 64 bytes. glibc takes a somewhat larger piece for that and gives the edges to the
next small object, so that the hole which a freed tensor leaves is too small for the next tensor of the same size. How
much this costs follows from the order of a step's allocations and cannot be told from their sum. So the allocator
itself is asked: the traced step is repeated in a process of its own, with tensors that nobody writes to.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

# Allocations and, as a negative number, the place in this list of what is freed.
Events = Sequence[int]
# The heap of a run settles in its first steps: with blocks that are computed again it grows by a third after the second.
REPEATS = 4
PATIENCE_SECONDS = 20

REPLAY = """
import ctypes, json, sys
settings, repeats, events = json.load(sys.stdin)
# Beside every tensor, in bytes: its description and its storage's, autograd's notes on it, a node of the graph, its edges and what
# the interpreter adds. More sizes than these change little: the edges are taken either way.
SMALL = (400, 200, 112, 96, 64, 48, 48, 32)
libc, size, pointer = ctypes.CDLL(None), ctypes.c_size_t, ctypes.c_void_p
class Info(ctypes.Structure):
    _fields_ = [(name, size) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype, libc.malloc.restype = Info, pointer
libc.malloc.argtypes, libc.free.argtypes, libc.posix_memalign.argtypes = [size], [pointer], [ctypes.POINTER(pointer), size, size]
for name, value in settings:
    libc.mallopt(name, value)
def taken():
    info = libc.mallinfo2()
    # The end of the heap is only set aside: nobody has touched it yet.
    return info.arena + info.hblkhd - info.keepcost
def release(pieces):
    for piece in pieces:
        libc.free(piece)
place, before, peak = pointer(), taken(), 0
for _ in range(repeats):
    alive = {}
    for number, event in enumerate(events):
        if event < 0:
            release(alive.pop(-event - 1))
            continue
        libc.posix_memalign(ctypes.byref(place), 64, event)
        alive[number] = [place.value, *map(libc.malloc, SMALL)]
        if event >= 1 << 12:
            peak = max(peak, taken() - before)
    for pieces in alive.values():
        release(pieces)
print(peak)
"""


def heap_growth(events: Events, settings: Sequence[tuple[int, int]]) -> int | None:
    """Bytes by which the heap of a new process grows at most while it goes through `events`.

    settings: of mallopt(3), as the run sets them. None where the C library is not glibc, or does not tell.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = subprocess.run([sys.executable, "-I", "-S", "-c", REPLAY], input=json.dumps([list(settings), REPEATS, list(events)]), text=True,
                               capture_output=True, timeout=PATIENCE_SECONDS, check=True)
        return int(found.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
