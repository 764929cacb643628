"""What the command says: results on standard output, everything else on standard error; errors as one clear line.

Every verb ends with one `emit(data, lines, json=json)`. With --json the data is the only thing on standard output.
"""

from __future__ import annotations

import contextlib
import io
import json as json_format
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from data_tools import progress
from data_tools.atomic_files import OUT_OF_SPACE
from data_tools.errors import BrushworkError
from data_tools.records import shown_line, shown_text
from finetune import __version__

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and the result only.")]

# How long a process of several waits for the launcher to end it, when all have the same error.
SECONDS_TO_BE_ENDED = 20.0
INTERRUPTED = 130


def command_group(meaning: str) -> typer.Typer:
    """A group of verbs such as `brushwork data ...`, whose help needs no heavy import."""
    return typer.Typer(help=meaning, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                       context_settings={"max_content_width": 110})


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"brushwork {__version__}")
        raise typer.Exit()


def _brushwork(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)] = False) -> None:
    """Options that stand before a verb."""


def add_version(app: typer.Typer) -> None:
    """`brushwork --version`."""
    app.callback(help=app.info.help)(_brushwork)


def progress_for(quiet: bool) -> progress.Progress:
    """Where a verb's rooms report what they do: standard error, or nowhere."""
    return progress.for_terminal(quiet)


def open_standard_streams() -> None:
    """Make the three streams fit for anything. One that was closed (`>&-`, some services) leads nowhere, so that the next file that is opened
    does not get its number; a character that the terminal's encoding lacks is written as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, True)  # worker processes need it as much
            setattr(sys, name, os.fdopen(nowhere, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def emit(data: Mapping[str, Any], lines: Sequence[str], *, json: bool) -> None:
    """The result of a verb: `data` as one JSON object, or `lines` for people. Paths in `data` become text.

    Raises typer.Exit when nobody reads it any more (`| head`)."""
    text = json_format.dumps(data, ensure_ascii=False, default=str) if json else shown_text("\n".join(lines))
    if text:
        stream = _Results.stream or sys.stdout
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            _drop_the_rest(stream)
            raise typer.Exit(1) from None


def _drop_the_rest(stream: TextIO) -> None:
    """What is still buffered must not raise again when the stream is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Results:
    """Where results go while standard output is kept clean; None: standard output."""

    stream: TextIO | None = None


@contextlib.contextmanager
def clean_standard_output() -> Iterator[None]:
    """Send whatever libraries print, in Python or C, to standard error; only `emit` reaches standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    # A file name that is not UTF-8 becomes \udcXX, which is JSON's own escape for it.
    _Results.stream = os.fdopen(os.dup(kept), "w", encoding="utf-8", errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _Results.stream.close()
        _Results.stream = None
        os.dup2(kept, 1)
        os.close(kept)


def run(command: Callable[[], Any], *, json: bool) -> int:
    """Call a parsed or unparsed command; every way it can fail becomes a message and an exit code."""
    try:
        return _outcome(command, json)
    except typer.Exit as stop:
        return stop.exit_code


def _outcome(command: Callable[[], Any], json: bool) -> int:
    try:
        code = command() or 0
        # What typer makes of a Ctrl-C.
        return _interrupted(json) if code == INTERRUPTED else code
    except BrushworkError as error:
        report(error, json=json, alike=error.exit_code != 1)
        return error.exit_code
    except typer.Exit:
        raise
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(json)
    except BrokenPipeError:
        _drop_the_rest(sys.stdout)
        return 1
    except typer.TyperException as error:
        if _asks_for_help(error) and not json:
            if not _is_said_by_another():
                print(error.message, file=sys.stderr)
            return 2
        report(usage_error(error), json=json, alike=True)
        return 2
    except OSError as error:
        report(system_error(error), json=json)
        return 1
    except Exception as error:
        if (lacking := _lacks_memory(error)) is not None:
            report(lacking, json=json)
            return 1
        # Libraries written in Rust wrap what the system says in errors of their own: "... (os error 28)".
        code = re.search(r"\(os error (\d+)\)", str(error))
        report(system_error(OSError(int(code[1]), os.strerror(int(code[1])))) if code else defect(error), json=json)
        return 1


def _interrupted(json: bool) -> int:
    report(BrushworkError("interrupted"), json=json, alike=True)
    return INTERRUPTED


def _is_said_by_another() -> bool:
    """Whether the first process that a launcher started on this machine says what all of them would say. The others wait for it: a
    launcher ends all when one ends. One that nobody ends has an error of its own."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        return ended.wait(SECONDS_TO_BE_ENDED)
    return True


def report(error: BrushworkError, *, json: bool, alike: bool = False) -> None:
    """Print an error: one object on standard output with --json, else text on standard error. alike: every process of a launch has it,
    since it is in what was typed or comes from the terminal; a failure may be of one process alone."""
    if alike and _is_said_by_another():
        return
    if json:
        emit({"error": _as_data(error)}, [], json=True)
        return
    for problem in getattr(error, "problems", None) or [error]:
        place = f"{problem.where}: " if problem.where else ""
        print("error: " + shown_line(f"{place}{problem.what}"), file=sys.stderr)
        if problem.fix:
            print("hint: " + shown_line(problem.fix), file=sys.stderr)


def _as_data(error: BrushworkError) -> dict[str, Any]:
    data: dict[str, Any] = {"what": error.what, "where": error.where, "fix": error.fix}
    problems = getattr(error, "problems", None)
    if problems:
        data["problems"] = [_as_data(problem) for problem in problems]
        data["where"] = data["where"] or problems[0].where
        data["fix"] = data["fix"] or problems[0].fix
    return data


def _asks_for_help(error: typer.TyperException) -> bool:
    """Whether this is a group without a verb. The class is private to typer, its name has been stable since click 8.2."""
    return type(error).__name__ == "NoArgsIsHelpError"


def usage_error(error: typer.TyperException) -> BrushworkError:
    """A wrong option or argument, in our own form."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "brushwork"
    if _asks_for_help(error):
        return BrushworkError("a verb is missing", where=command, fix=f"one of {', '.join(error.ctx.command.list_commands(error.ctx))}; `{command} --help` says what they do")
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return BrushworkError(" ".join(message.split()).rstrip("."), where=command, fix=f"`{command} --help` shows what it takes")


def system_error(error: OSError) -> BrushworkError:
    """A disk or file error that no room turned into its own."""
    where = str(error.filename) if error.filename else None
    what = error.strerror or str(error)
    fix = "what was complete is still there; try again after making room or giving permission"
    if error.errno in OUT_OF_SPACE:
        fix = "free some space or choose another folder; what was complete is still there"
    return BrushworkError(what[:1].lower() + what[1:], where=where, fix=fix)


def _lacks_memory(error: Exception) -> BrushworkError | None:
    """What an error means that says in torch's words, or Python's, that memory ran out; None for any other."""
    text, kinds = str(error), {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in kinds or "CUDA error: out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
        what = "the GPU's memory is full" + (f": {asked[1]} more were asked for" if asked else "") + (f", {free[2]} of {free[1]} were free" if free else "")
        return BrushworkError(what, fix="close what else uses the GPU; for a run, `brushwork plan` with --fit and its memory shows settings that fit, and --resume goes on from "
                              "the last checkpoint; for pictures, add --offload or ask for a smaller --size")
    if "MemoryError" in kinds or "can't allocate memory" in text or "not enough memory: you tried to allocate" in text:
        return BrushworkError("this machine's memory is full", fix="close other programs; for a run, `brushwork plan` with --fit and its memory shows settings that fit, and --resume "
                              "goes on from the last checkpoint")
    return None


def defect(error: Exception) -> BrushworkError:
    """An exception that nobody expected: its traceback goes to a file, the user gets one line."""
    # Imported here: this is the only use, and every start of the command would pay for them.
    import tempfile
    import time
    import traceback

    text = "".join(traceback.format_exception(error))
    summary = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name):
            text, summary = text.replace(secret, f"${name}"), summary.replace(secret, f"${name}")
    log = Path(tempfile.gettempdir()) / f"brushwork-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        log.write_text(text, encoding="utf-8", errors="backslashreplace")
        fix = f"this is a defect of the program; the details are in {log}"
    except OSError:
        fix = "this is a defect of the program; its details could not be written to the temporary folder"
    return BrushworkError(summary, fix=fix)
