"""Run the real command: in this process where it is quick, in one of its own where the operating system takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.cli import main
from tests.training.small_job import write_pictures

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def brushwork(capfd):
    """Call the command in this process; `capfd` sees what C libraries write as well."""

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return Said(stopped.value.code, said.out, said.err)

    return call


def start(*arguments: str, folder: Path, **environment: str) -> subprocess.Popen:
    """The command in a process of its own, working in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *map(str, arguments)], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def run(*arguments: str, folder: Path, **environment: str) -> Said:
    """As `start`, to its end."""
    process = start(*arguments, folder=folder, **environment)
    out, err = process.communicate(timeout=900)
    return Said(process.returncode, out, err)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A random pipeline of the smallest size."""
    from tests.tiny_models import hunyuan_dit

    folder = tmp_path_factory.mktemp("base") / "tiny"
    hunyuan_dit.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))
