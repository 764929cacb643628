"""A process that decodes pictures, one after another, so that a decoder that hangs or dies takes only this process along.

Started by `worker_pool`. First line in: {"limits": {...}, "task": name, "cache": folder or null}; out comes "ready" when all libraries are
loaded. Then one JSON list a picture: [number, path, mask or null]; out comes [number, result] for each, in order. A result is a JSON object,
with "code" when it is bad.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

from data_tools.images import BadPicture, Limits, decode, open_image, read_bytes
from data_tools.records import shown_name
from data_tools.result_cache import ResultCache


THUMBNAIL_SIDE = 320  # pixels of the longer side


def check(path: str, mask: str | None, limits: Limits, known: ResultCache | None) -> dict:
    """Read, hash and decode one picture (and its mask). Result: hash, width, height, format, mode, warnings; or code, reason."""
    result: dict = {}
    try:
        content = read_bytes(path, limits)
        result["hash"] = hashlib.sha256(content).hexdigest()
        before = known.of_content(result["hash"]) if known and not mask else None
        if before:
            return before
        facts = decode(content, shown_name(path), limits=limits)[1]
        del content
        odd = list(facts.warnings)
        if mask:
            odd += _check_mask(mask, facts.width, facts.height, limits)
    except BadPicture as error:
        return _refused(result, error)
    return result | {"width": facts.width, "height": facts.height, "format": facts.format, "mode": facts.mode, "warnings": odd}


def _refused(result: dict, error: BadPicture) -> dict:
    return result | {"code": error.code, "reason": error.what + (f" ({error.fix})" if error.fix else "")}


def _check_mask(mask: str, width: int, height: int, limits: Limits) -> list[str]:
    try:
        opened = open_image(mask, background="#000000", limits=limits)
    except BadPicture as error:
        return [f"the mask cannot be used: {error.what}"]
    if opened.convert("L").getextrema()[1] == 0:
        raise BadPicture("the mask is black all over: nothing of the picture would be learned", "empty_mask")
    return [] if opened.size == (width, height) else [f"the mask is {opened.width} x {opened.height}, not {width} x {height}; it is resized"]


def fingerprint(path: str, mask: str | None, limits: Limits, known: ResultCache | None) -> dict:
    """Hashes that near duplicates share; see `fingerprints.fingerprint_of`."""
    from data_tools.fingerprints import fingerprint_of

    result: dict = {}
    try:
        content = read_bytes(path, limits)
        result["hash"] = hashlib.sha256(content).hexdigest()
        before = known.of_content(result["hash"]) if known else None
        return before or result | fingerprint_of(decode(content, shown_name(path), limits=limits)[0])
    except BadPicture as error:
        return _refused(result, error)


def thumbnail(path: str, mask: str | None, limits: Limits, known: ResultCache | None) -> dict:
    """A small JPEG for reports. Result: hash, jpeg (base64)."""
    result: dict = {}
    try:
        content = read_bytes(path, limits)
        result["hash"] = hashlib.sha256(content).hexdigest()
        before = known.of_content(result["hash"]) if known else None
        if before:
            return before
        image = decode(content, shown_name(path), limits=limits)[0]
    except BadPicture as error:
        return _refused(result, error)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=80, subsampling=0)
    return result | {"jpeg": base64.b64encode(encoded.getvalue()).decode()}


TASKS = {"check": check, "fingerprint": fingerprint, "thumbnail": thumbnail}


def _limit_memory(limits: Limits) -> None:
    try:
        import resource
    except ImportError:  # not a Unix; the time limit still holds
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = limits.memory_bytes if hard == resource.RLIM_INFINITY else min(hard, limits.memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    settings = json.loads(sys.stdin.buffer.readline())
    if settings["task"] == "fingerprint":
        import data_tools.fingerprints  # noqa: F401 - what cannot be loaded must be known before the first picture
    limits, task = Limits(**settings["limits"]), TASKS[settings["task"]]
    known = ResultCache(settings["task"], limits, Path(settings["cache"])) if settings["cache"] else None
    _limit_memory(limits)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders written in C print to both; the answers must stay clean
    os.dup2(silence, 2)
    answers.write(b'"ready"\n')
    for line in sys.stdin.buffer:
        number, path, mask = json.loads(line)
        answers.write((json.dumps([number, task(path, mask, limits, known)]) + "\n").encode())


if __name__ == "__main__":
    main()
