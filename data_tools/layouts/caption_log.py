"""What models wrote: a log beside the pictures, so that a model's caption is told from a person's.

`.brushwork/captions.jsonl` in a picture folder has one line per caption file that a model wrote. A caption file whose
text is still what the log says is a model's; once somebody edits it, it is a person's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

LOG_FOLDER = ".brushwork"
LOG_NAME = "captions.jsonl"


def log_path(folder: Path) -> Path:
    """Where the log of one picture folder lives."""
    return folder / LOG_FOLDER / LOG_NAME


def read_log(folder: Path) -> list[dict]:
    """The log's entries in order; lines that are cut or broken (a stop in mid-write) are passed over."""
    try:
        lines = log_path(folder).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def model_written_captions(folder: Path) -> dict[str, tuple[str, str]]:
    """Caption file name -> (the text that was last written into it, its source: "model" or "file_name")."""
    if not os.path.isdir(folder / LOG_FOLDER):
        return {}
    found: dict[str, tuple[str, str]] = {}
    for entry in read_log(folder):
        if isinstance(entry.get("file"), str) and isinstance(entry.get("text"), str):
            before = found.get(entry["file"], ("", "model"))[1]
            source = before if entry.get("by") == "edit" else "file_name" if entry.get("by") == "file-name" else "model"
            found[entry["file"]] = entry["text"], source
    return found


def append_to_log(folder: Path, entry: dict) -> None:
    """Add one entry as one line, in one write."""
    path = log_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8", "surrogatepass")
    with open(path, "ab", buffering=0) as log:
        log.write(line)
