"""The command as a whole: help, wrong usage, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from finetune.cli import VERB_FILES, WORDS, _command
from tests.cli.conftest import ROOT, run

HEAVY = {"torch", "transformers", "diffusers", "peft", "datasets", "bitsandbytes", "accelerate", "numpy", "PIL", "pandas", "pyarrow", "huggingface_hub", "scipy", "jinja2"}
GOOD = '[base]\nmodel = "mini"\n'


# What is imported by the end of each of several commands in one process, one command a line.
IMPORTING = """
import sys
from finetune.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:
        print("imported", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
INSTANT = [
    "--help", "--version", "recipe list", "recipe explain training.steps", "recipe check mini/style", "recipe check no/such", "train --help", "train /no/such/folder", "generate --help", "data --help",
    "adapter --help", "publish --help", "prefer --help", "evaluate --help",
]


def test_nothing_heavy_is_imported_on_the_way_to_help_and_recipe_errors():
    said = subprocess.run([sys.executable, "-c", IMPORTING, *INSTANT], capture_output=True, text=True, check=True).stderr
    imported = [set(line.split()) for line in said.splitlines() if line.startswith("imported ")]
    assert {line: found & HEAVY for line, found in zip(INSTANT, imported, strict=True) if found & HEAVY} == {}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_ctrl_c_is_said(options, brushwork, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.scan.read_layout", interrupted)
    said = brushwork("data", "scan", tmp_path, *options)
    assert said.code == 130 and (said.data["error"]["what"] == "interrupted" if options else said.err == "error: interrupted\n")


def test_a_ctrl_c_before_anything_can_be_said_leaves_no_traceback(tmp_path):
    """Here while the command's own modules are imported."""
    slow = tmp_path / "typer.py"
    slow.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    # Whoever starts the tests in the background has them ignore the signal.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program = f"import sys\n{heard}sys.path.insert(0, {str(tmp_path)!r})\nfrom finetune.cli import main\nmain(['recipe', 'list'])\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_help_names_every_verb(brushwork):
    said = brushwork("--help")
    assert said.code == 0
    for name in VERB_FILES:
        assert f"  {name} " in said.out, name


def test_every_verb_takes_json_and_quiet(brushwork):
    from finetune.cli import _command

    def leaves(command, path):
        if getattr(command, "commands", None):
            for name, inner in command.commands.items():
                yield from leaves(inner, (*path, name))
        else:
            yield path, command

    for path, command in leaves(_command(), ()):
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet"} <= options, path
        assert command.help, path


def test_a_program_of_its_own_gives_the_same_answers(tmp_path):
    assert run("--version", folder=tmp_path).out.startswith("brushwork ")
    said = run("recipe", "check", "mini/style", "--set", "training.stepz=1", folder=tmp_path)
    assert said.code == 2 and "did you mean `training.steps`?" in said.err and said.out == ""


@pytest.mark.parametrize("arguments", [["nope"], ["train"], ["train", "x", "--nope"], ["generate"], ["recipe", "nope"], ["recipe", "check"], ["generate", "-p", "x", "--steps", "many"], ["recipe"], []])
def test_wrong_usage_ends_with_two_and_a_hint(arguments, brushwork):
    said = brushwork(*arguments)
    assert said.code == 2 and said.out == ""
    assert "hint: " in said.err or "Usage: " in said.err
    assert "Traceback" not in said.err
    machine = brushwork(*arguments, "--json")
    assert machine.code == 2 and machine.data["error"]["what"] and machine.data["error"]["fix"]


def test_a_misspelt_verb_is_guessed(brushwork):
    assert "'train'" in brushwork("trian").err


def test_a_closed_pipe_is_no_error_message(tmp_path):
    found = subprocess.run(f"{sys.executable} -m finetune recipe explain training | head -1", shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", ["recipe list", "recipe list --json", "recipe check no/such"])
def test_a_closed_stream_is_no_defect(arguments, closed, tmp_path):
    """The messages of one stream never go to the other."""
    found = subprocess.run(["bash", "-c", f"{sys.executable} -m finetune {arguments} {closed}"], capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert found.returncode == (2 if "check" in arguments else 0)
    assert "Traceback" not in found.stderr and (found.stdout == "" or arguments != "recipe check no/such")


@pytest.mark.parametrize("arguments", ["recipe list --json", "recipe check no/such --json", "nope --json", "recipe list", "--help"])
def test_a_reader_that_is_gone_at_once_is_no_error_message(arguments, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(["bash", "-c", f"{sys.executable} -m finetune {arguments} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr
    assert found.returncode == 1


def test_home_is_meant_in_whatever_way_an_option_is_written(tmp_path):
    """Shells leave `~` alone inside a word, so that a folder of that name was made."""
    said = run("recipe", "show", "mini/style", "--set=data.folder=~/pictures", folder=tmp_path, HOME=str(tmp_path / "home"))
    assert f'folder = "{tmp_path}/home/pictures"' in said.out
    said = run("prefer", "summary", "--json", "nowhere", folder=tmp_path, HOME=str(tmp_path / "home"))
    assert said.code == 2
    said = run("train", "mini/style", "--set", "data.folder=.", "--out=~/run", folder=tmp_path, HOME=str(tmp_path / "home"))
    assert said.code == 2 and not (tmp_path / "~").exists() and "home/run" in said.err


def test_recipe_verbs(brushwork, tmp_path):
    assert "mini/style" in brushwork("recipe", "list").out
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    shown = brushwork("recipe", "show", path, "--set", "training.steps=7")
    assert shown.code == 0 and "steps = 7" in shown.out
    path.write_text(shown.out)
    assert brushwork("recipe", "check", path, "--json").data["changed"] == {"base.model": "mini", "training.steps": 7}
    explained = brushwork("recipe", "explain", "adapter", "--json").data["settings"]
    assert {setting["key"] for setting in explained} >= {"adapter.rank", "adapter.alpha"}
    assert "did you mean `adapter.rank`?" in brushwork("recipe", "explain", "adapter.rnak").err


@pytest.mark.skipif(sys.platform != "linux", reason="torch for Linux brings GNU's OpenMP, which says how it was set")
@pytest.mark.parametrize(("own", "spin"), [({}, "'3000'"), ({"GOMP_SPINCOUNT": "77"}, "'77'"), ({"OMP_WAIT_POLICY": "active"}, "'30000000000'")])
def test_waiting_threads_go_to_sleep_soon_unless_the_user_says_otherwise(own, spin):
    """By default they spin so long that on a busy machine a step of two threads takes twenty times its time."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run([sys.executable, "-m", "finetune", "doctor"], env=clean | own | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=False)
    assert f"GOMP_SPINCOUNT = {spin}" in found.stderr


@pytest.mark.parametrize("arguments", [["generate", "-p", "a\udcff", "--base", "mini"], ["train", ".", "--base", "mini", "--trigger=a\udcff"], ["data", "caption", ".", "--append", "\udcff"]])
def test_words_that_are_not_utf_8_are_refused(arguments, brushwork):
    """A tokenizer ends on them with an error of its own; a trigger became the text of an escape."""
    said = brushwork(*arguments)
    assert said.code == 2 and "these words are not UTF-8" in said.err


def options_of(command) -> set[str]:
    return {name for option in command.params for name in option.opts}.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_every_option_whose_words_are_checked_is_one_of_some_verb():
    assert options_of(_command()) >= WORDS
