"""The `brushwork` command. Each file here holds a group of verbs: it parses, calls one function of a room, prints.

Nothing here imports torch, diffusers or their like before a verb needs them: help and recipe errors must be instant.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from finetune import cycle_collection

# Files with a `register(app)`, in the order in which the help shows them.
VERB_FILES = (
    "quickstart", "train", "plan", "generate", "data", "adapter", "publish", "prefer", "evaluate", "recipe", "doctor",
)

# Libraries that would write to the terminal; a user who wants their messages sets the variable.
QUIET_LIBRARIES = {
    "TYPER_USE_RICH": "0", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
}

# Options whose words reach a text encoder, a caption or a card.
WORDS = frozenset("-p --prompt --negative --trigger --prepend --append --replace --drop --question --subject --title --annotator --set".split())

# How often a thread of torch's OpenMP looks for work before it sleeps. Its library spins a hundred times as long, and where other programs
# hold the cores a spinning thread takes the time of the one it waits for.
SHORT_SPIN = "3000"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code: 0 fine, 1 failed, 2 bad input or usage, 130 interrupted."""
    hears_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if hears_interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until somebody can say it, a Ctrl-C ends the process as it is
    arguments = [_with_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SHORT_SPIN)
    cycle_collection.put_off()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from finetune.cli import output

    output.open_standard_streams()
    if hears_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    json = "--json" in arguments
    with output.clean_standard_output() if json else contextlib.nullcontext():
        code = output.run(lambda: _called(arguments), json=json)
    sys.stdout.flush()
    sys.exit(code)


def _called(arguments: list[str]) -> object:
    _check_words(arguments)
    return _command(arguments[:1])(arguments, prog_name="brushwork", standalone_mode=False)


def _check_words(arguments: list[str]) -> None:
    """Raises BadInput for words that are no text. File names need not be any."""
    from data_tools.errors import BadInput

    for option, value in (*itertools.pairwise(arguments), *(argument.partition("=")[::2] for argument in arguments)):
        if option in WORDS and any("\ud800" <= character <= "\udfff" for character in value):
            raise BadInput("these words are not UTF-8", where=option, fix="type them in a terminal that is set to UTF-8, or put them into a file")


def _with_home(argument: str) -> str:
    """`--out=~/runs` as shells write out `--out ~/runs`: most of them leave it alone inside a word, and a folder called ~ would be made."""
    name, equals, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if name.startswith("--") and equals and (value == "~" or value.startswith("~/")) else argument


def _command(first: Sequence[str] = ()):
    """The tree of verbs: all of them, or only the group that `first` names, since each file costs some start-up time."""
    import typer.main

    from finetune.cli import output

    app = output.command_group("Fine-tune diffusion transformers with LoRA: from a folder of pictures to an adapter that is proven to load.")
    output.add_version(app)
    for name in first if set(first) <= set(VERB_FILES) and first else VERB_FILES:
        importlib.import_module(f"finetune.cli.{name}").register(app)
    return typer.main.get_command(app)
