"""Libraries bring hundreds of thousands of objects that never go. Each search for cycles of objects would look at all of them, and
a run makes several: a third of the time of all tests, and half the life of a child that is forked to be killed."""

import gc


def let_libraries_stay() -> None:
    """Leave what is there now out of every later search; what tests make afterwards is found as ever."""
    gc.collect()
    gc.freeze()
