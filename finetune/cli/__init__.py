"""The `brushwork` command. Each file here holds a group of verbs: it parses, calls one function of a room, prints.

Nothing here imports torch, diffusers or their like before a verb needs them: help and recipe errors must be instant.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

# Files with a `register(app)`, in the order in which the help shows them.
VERB_FILES = (
    "quickstart", "train", "plan", "generate", "data", "adapter", "publish", "prefer", "evaluate", "recipe", "doctor",
)

# Libraries that would write to the terminal; a user who wants their messages sets the variable.
QUIET_LIBRARIES = {
    "TYPER_USE_RICH": "0", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
}

# How often a thread of torch's OpenMP looks for work before it sleeps. Its library spins a hundred times as long, and where other programs
# hold the cores a spinning thread takes the time of the one it waits for.
SHORT_SPIN = "3000"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code: 0 fine, 1 failed, 2 bad input or usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SHORT_SPIN)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from finetune.cli import output

    json = "--json" in arguments
    with output.clean_standard_output() if json else contextlib.nullcontext():
        code = output.run(lambda: _command(arguments[:1])(arguments, prog_name="brushwork", standalone_mode=False), json=json)
    sys.stdout.flush()
    sys.exit(code)


def _command(first: Sequence[str] = ()):
    """The tree of verbs: all of them, or only the group that `first` names, since each file costs some start-up time."""
    import typer.main

    from finetune.cli import output

    app = output.command_group("Fine-tune diffusion transformers with LoRA: from a folder of pictures to an adapter that is proven to load.")
    output.add_version(app)
    for name in first if set(first) <= set(VERB_FILES) and first else VERB_FILES:
        importlib.import_module(f"finetune.cli.{name}").register(app)
    return typer.main.get_command(app)
