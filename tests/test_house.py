"""Measures of the house: who may import whom, sizes of files and functions, no family's name outside its rooms."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.families import registry
from finetune.recipe import all_keys, load_recipe
from finetune.recipe_shelf import shelf

ROOT = Path(__file__).parents[1]
CODE = sorted(path for package in ("finetune", "data_tools") for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
# Families may be named where they live, and where the embedded model (one of them) is built.
FAMILY_ROOMS = ("finetune/families/", "finetune/mini_base/")
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def test_imports_go_only_downward():
    lint = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]


def test_no_file_is_longer_than_the_wall():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_is_longer_than_a_screen(trees):
    long = {
        f"{relative(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees.items() for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES
    }
    assert long == {}


def test_no_file_has_a_name_that_says_nothing():
    assert [relative(path) for path in CODE if path.stem in VAGUE or path.parent.name in VAGUE] == []


def test_every_file_says_what_it_is_for(trees):
    assert [relative(path) for path, tree in trees.items() if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree)] == []


def test_no_family_is_named_outside_the_rooms_of_families(trees):
    """In code and in the texts that it works with; a docstring may give an example."""
    names = re.compile("|".join(re.escape(part) for name in registry.names() for part in (name, name.replace("_", ""))), re.IGNORECASE)
    found = []
    for path, tree in trees.items():
        if relative(path).startswith(FAMILY_ROOMS):
            continue
        docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings else getattr(node, "id", getattr(node, "attr", ""))
            if isinstance(text, str) and (match := names.search(text)):
                found.append(f"{relative(path)}:{node.lineno} {match[0]}")
    assert found == []


def test_nothing_is_read_by_running_it():
    """No pickle in any form: it runs code when it is loaded."""
    dangerous = re.compile(r"\bimport (pickle|dill|cloudpickle)\b|\btorch\.load\(|weights_only\s*=\s*False|\beval\(|\bexec\(|allow_pickle\s*=\s*True")
    found = [f"{relative(path)}: {match[0]}" for path in CODE for match in dangerous.finditer(path.read_text(encoding="utf-8")) if "model.eval(" not in match[0] and not _is_method(path, match)]
    assert found == []


def test_models_are_loaded_from_safetensors_and_bring_no_code():
    """transformers takes a pickle where there is nothing else, unless it is told not to."""
    loads = re.compile(r"(?:AutoModel\w*|\w+For\w+|getattr\(transformers, [^\n]+?\))\.from_pretrained\(([^\n]*)")
    calls = [(relative(path), match[1]) for path in CODE for match in loads.finditer(path.read_text(encoding="utf-8"))]
    assert len(calls) >= 6
    assert [call for call in calls if "use_safetensors=True" not in call[1] or "trust_remote_code=False" not in call[1]] == []


def _is_method(path: Path, match: re.Match[str]) -> bool:
    """`transformer.eval()` is torch's, not Python's."""
    return path.read_text(encoding="utf-8")[match.start() - 1] == "."


def test_no_path_of_a_machine_and_no_package_host_is_written_down():
    places = re.compile(r"/(?:work|root|home)/\w+|pypi\.org|registry\.npmjs|files\.pythonhosted")
    files = [path for path in ROOT.rglob("*") if path.suffix in {".py", ".toml", ".md"} and not {".git", ".venv", "build", "dist", "runs", "tests"} & set(path.relative_to(ROOT).parts)]
    assert [f"{relative(path)}: {match[0]}" for path in files for match in places.finditer(path.read_text(encoding="utf-8"))] == []


def test_every_recipe_of_the_shelf_loads_and_says_what_it_needs():
    assert len(shelf()) >= 4
    for recipe in shelf():
        loaded = load_recipe(recipe.path)
        assert loaded.base.model
        assert set(recipe.header) == {"needs", "command", "expect"} and recipe.summary.endswith("."), recipe.name
        assert recipe.name in recipe.header["command"], recipe.name


def test_every_setting_is_used_somewhere():
    """A setting that nothing reads is a promise that is not kept: `.section.key`, or `settings.key` of a section by itself."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in CODE if not path.name.startswith("recipe"))
    unused = [key for key in all_keys() if not re.search(rf"\.{re.escape(key)}\b|\b(settings|{key.partition('.')[0]})\.{key.partition('.')[2]}\b", text)]
    assert unused == []
