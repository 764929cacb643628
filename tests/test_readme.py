"""Every command that the README, CONTRIBUTING and the recipes show exists, with the options that are shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import _command
from finetune.recipe_shelf import find_recipe, shelf
from tests.benchmarks.reliability import TESTS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")


def shown_commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)]
    parts = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [part for part in parts if part.startswith("brushwork ")] + [recipe.header["command"] for recipe in shelf()]


@pytest.mark.parametrize("shown", shown_commands())
def test_a_shown_command_is_understood(shown):
    command, arguments = _command(), shlex.split(shown)[1:]
    while getattr(command, "commands", None):
        name = arguments.pop(0)
        assert name in command.commands, shown
        command = command.commands[name]
    context = command.make_context("brushwork", arguments, resilient_parsing=False)
    if context.params.get("recipe"):
        assert find_recipe(context.params["recipe"]).exists()


def test_there_are_commands_in_the_readme():
    assert len(shown_commands()) >= 10


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_or_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    named = [name for name in re.findall(r"`((?:finetune|data_tools|tests|recipes|examples)/[\w./]+)`", text)]
    assert linked + named
    assert [name for name in linked + named if not (ROOT / name).exists()] == []


def test_the_tree_in_the_readme_names_rooms_that_exist():
    tree = re.search(r"## The house\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        path = name if not line.startswith(" ") else folder + name
        assert (ROOT / path).exists(), path
    rooms = {path.name for path in (ROOT / "finetune").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {name for name in rooms if f"  {name}/" not in tree} == set()


def test_the_number_of_broken_recipes_in_the_readme_is_true():
    from tests.recipe.test_broken_recipes import BROKEN

    assert f"| {len(BROKEN)}/{len(BROKEN)} |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_bare_loop_runs(tmp_path):
    found = subprocess.run([sys.executable, str(ROOT / "examples" / "bare_loop.py"), "--steps", "2", "--out", str(tmp_path / "bare")],
                           cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr[-2000:]
    assert list(tmp_path.rglob("*.safetensors"))


@pytest.mark.thorough
@pytest.mark.parametrize(("promise", "tried"), [
    ("passed over, and said so", "torn, zeroed, overgrown or missing checkpoint files"), ("every broken recipe", "broken recipes"),
    ("bad pictures, captions, rows", "bad pictures, captions, rows, archives and layouts"), ("hostile adapter file", "broken, lying or hostile adapter files"),
    ("faults of servers", "faults of servers (Hub, caption endpoint)"), ("one line, nothing lost", "bad input to the command"),
])
def test_the_counts_of_what_was_tried_are_those_of_the_tests(promise, tried):
    row = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|") and promise in line)
    listed = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-qq", *TESTS[tried]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    count = sum(int(number) for number in re.findall(r"^\S+\.py: (\d+)$", listed, re.MULTILINE))
    assert f"| {count}/{count} |" in row
