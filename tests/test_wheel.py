"""The wheel carries what a newcomer needs, and nothing that only developers need."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def test_the_wheel_holds_the_embedded_model_and_its_pictures_with_their_licences(names):
    model = {name for name in names if name.startswith("finetune/mini_base/weights/")}
    assert "finetune/mini_base/weights/model_index.json" in model
    assert {name.split("/")[3] for name in model if name.endswith(".safetensors")} == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert sum(name.startswith("finetune/mini_base/style_folder/") and name.endswith(".png") for name in names) >= 30
    assert sum(name.startswith("finetune/mini_base/held_out/") and name.endswith(".png") for name in names) >= 20
    assert "finetune/mini_base/NOTICE" in names


def test_the_wheel_holds_every_recipe(names):
    recipes = {f"finetune/_recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.toml")}
    assert recipes and recipes <= names


def test_the_wheel_holds_no_tests_examples_or_documents_of_the_repository(names):
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"finetune", "data_tools"}
    assert not [name for name in names if name.endswith((".pyc", ".partial")) or "/__pycache__/" in name]


def test_the_command_and_the_licences_are_part_of_it(names):
    assert [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert len([name for name in names if ".dist-info/licenses/" in name]) == 2
