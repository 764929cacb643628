"""Every way a command can end has its exit code, its one line, and its JSON object."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_tools.errors import BadInput, BrushworkError
from finetune.cli import output
from finetune.errors import Interrupted, RecipeError


def ends_with(error: BaseException, *, as_json: bool, capsys) -> tuple[int, str, str]:
    def fail():
        raise error

    code = output.run(fail, json=as_json)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(("error", "code"), [
    (BrushworkError("it failed"), 1), (BadInput("it is wrong"), 2), (Interrupted("stopped"), 130), (Interrupted("stopped", exit_code=143), 143),
    (KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1), (ValueError("a surprise"), 1),
    (RecipeError([BrushworkError("wrong", where="a.toml, line 3, x", fix="mend it")]), 2),
])
def test_exit_codes(error, code, capsys):
    assert ends_with(error, as_json=False, capsys=capsys)[0] == code
    found, out, err = ends_with(error, as_json=True, capsys=capsys)
    assert found == code and err == ""
    assert set(json.loads(out)["error"]) >= {"what", "where", "fix"}


def test_an_error_says_where_what_and_what_to_do(capsys):
    code, out, err = ends_with(BadInput("has no pictures", where="/photos", fix="put some in"), as_json=False, capsys=capsys)
    assert (code, out, err) == (2, "", "error: /photos: has no pictures\nhint: put some in\n")


def test_a_full_disk_is_named_in_one_line(capsys):
    _, _, err = ends_with(OSError(errno.ENOSPC, "No space left on device", "/data/x"), as_json=False, capsys=capsys)
    assert err.startswith("error: /data/x: no space left on device\nhint: free some space")


def test_a_full_disk_inside_a_library_is_no_defect(capsys):
    _, _, err = ends_with(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), as_json=False, capsys=capsys)
    assert err.startswith("error: no space left on device\nhint: free some space")


CUDA_FULL = ("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 11.60 GiB of which 1.31 GiB is free. Including non-PyTorch memory, "
             "this process has 10.2 GiB memory in use. Of the allocated memory 9.8 GiB is allocated by PyTorch, and 210.00 MiB is reserved by PyTorch but unallocated.")


@pytest.mark.parametrize(("error", "what"), [
    (torch.OutOfMemoryError(CUDA_FULL), "the GPU's memory is full: 2.25 GiB more were asked for, 1.31 GiB of 11.60 GiB were free"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "the GPU's memory is full"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU's memory is full"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "this machine's memory is full"),
    (MemoryError(), "this machine's memory is full"),
])
def test_memory_that_runs_out_is_no_defect(error, what, capsys):
    code, out, err = ends_with(error, as_json=False, capsys=capsys)
    assert (code, out) == (1, "") and err.startswith(f"error: {what}\nhint: close ") and "--fit" in err and "--resume" in err
    assert json.loads(ends_with(error, as_json=True, capsys=capsys)[1])["error"]["what"] == what


def test_a_defect_is_one_line_and_its_traceback_goes_to_a_file_without_secrets(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    _, _, err = ends_with(ZeroDivisionError("division with hf_very_secret"), as_json=False, capsys=capsys)
    log = next(tmp_path.glob("brushwork-error-*.log"))
    assert str(log) in err and "Traceback" not in err and "ZeroDivisionError" in err
    assert "Traceback" in log.read_text()
    assert "hf_very_secret" not in err + log.read_text()


def test_json_is_the_only_thing_on_standard_output_whatever_libraries_print(tmp_path):
    program = (
        "import os, sys\nfrom finetune.cli import output\n"
        "def noisy():\n    print('python noise'); os.write(1, b'C noise\\n'); output.emit({'pfad': 'größe'}, [], json=True)\n"
        "with output.clean_standard_output():\n    sys.exit(output.run(noisy, json=True))\n"
    )
    root = str(Path(__file__).parents[2])
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, check=False)
    assert json.loads(found.stdout) == {"pfad": "größe"}
    assert "python noise" in found.stderr and "C noise" in found.stderr and found.returncode == 0


def test_people_get_lines_and_machines_get_an_object(capsys):
    output.emit({"a": Path("x")}, ["line one", "line two"], json=False)
    assert capsys.readouterr().out == "line one\nline two\n"
    output.emit({"a": Path("x")}, ["line one"], json=True)
    assert json.loads(capsys.readouterr().out) == {"a": "x"}


def test_a_name_with_control_characters_does_not_command_the_terminal(capsys):
    output.emit({"a": 1}, ["first\n\x1b]0;title\x07 name\udcff 猫"], json=False)
    assert capsys.readouterr().out == "first\n\\x1b]0;title\\x07 name\\udcff 猫\n"
    _, _, err = ends_with(BadInput("is no picture", where="/photos/new\nline\x1b[31m.png"), as_json=False, capsys=capsys)
    assert err == "error: /photos/new\\nline\\x1b[31m.png: is no picture\n"


def test_a_name_that_is_not_utf_8_stays_whole_in_json():
    program = "from finetune.cli import output\nwith output.clean_standard_output():\n    output.emit({'path': 'a\\udcff'}, [], json=True)\n"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, check=True)
    assert json.loads(found.stdout.decode("utf-8")) == {"path": "a\udcff"}


def test_a_terminal_without_the_characters_gets_escapes():
    program = "from finetune.cli import output\noutput.open_standard_streams()\noutput.emit({}, ['größe 猫'], json=False)\n"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}, check=True)
    assert found.stdout == b"gr\\xf6\\xdfe \\u732b\n"


def test_of_several_processes_one_says_what_is_wrong_with_the_arguments(tmp_path):
    """And they end with its exit code, whichever was the first to find it; one that the launcher ends before it has come so far, by the signal."""
    (tmp_path / "empty").mkdir()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "finetune", "train", str(tmp_path / "empty"), "--base", "mini", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = subprocess.run(launch, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert said.stderr.count("error: ") == 1 and "no usable picture" in said.stderr, said.stderr
    *others, first = re.findall(r"exitcode +: (\S+)", said.stderr)
    assert first == "2" and others in (["2"], ["-15"])


def test_an_error_that_only_one_of_several_processes_has_is_said_by_it(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(output, "SECONDS_TO_BE_ENDED", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert ends_with(BadInput("no such folder"), as_json=False, capsys=capsys) == (2, "", "error: no such folder\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.setattr(output, "SECONDS_TO_BE_ENDED", 900)
    assert "memory is full" in ends_with(BrushworkError("the GPU's memory is full"), as_json=False, capsys=capsys)[2], "a failure does not wait"
