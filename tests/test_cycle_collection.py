"""The search for cycles is put off while libraries are imported, and goes on as before among what is made afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

# Looks for cycles while libraries come, and afterwards; whether a cycle that is made afterwards is found.
IMPORTING = """
import gc, json, weakref
from pathlib import Path
from finetune import cycle_collection
usual, looks = gc.get_threshold(), []
gc.callbacks.append(lambda phase, told: looks.append(told["generation"]) if phase == "start" else None)
cycle_collection.put_off()
cycle_collection.put_off()
import torch
from finetune.families.preloading import import_libraries
import_libraries(Path("."))
while_importing = len(looks)
class Node: pass
node = Node()
node.itself, seen = node, weakref.ref(node)
del node
for _ in range(30_000):
    made = [[] for _ in range(3)]
kept = [[number] for number in range(100_000)]
print(json.dumps([while_importing, gc.get_threshold() == usual, gc.get_freeze_count() > 300_000, seen() is None, len(looks) > 10]))
cycle_collection.resume()
"""


def test_nothing_is_looked_at_while_libraries_come_and_new_cycles_are_found_afterwards() -> None:
    output = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True).stdout
    while_importing, *rest = json.loads(output.splitlines()[-1])
    assert while_importing <= 1 and rest == [True] * 4


def test_whoever_uses_the_library_keeps_what_they_set() -> None:
    script = "import gc; gc.set_threshold(900, 5, 5)\nfrom pathlib import Path\nfrom finetune.families.preloading import import_libraries\nimport_libraries(Path('.'))\nprint(gc.get_threshold(), gc.get_freeze_count())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")[-2] == "(900, 5, 5) 0"
