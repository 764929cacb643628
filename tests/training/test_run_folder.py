"""What a run leaves on disk, and who may write there."""

import json
import os
import signal
import subprocess
import sys

import pytest

from finetune.errors import RunFolderError
from finetune.training.run_folder import RunFolder

HOLDER = "import sys, time\nfrom finetune.training.run_folder import RunFolder\nrun = RunFolder(sys.argv[1])\nrun.claim()\nprint('held', flush=True)\ntime.sleep(600)\n"


def hold(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_one_folder_is_refused_with_the_first_one_named(tmp_path):
    holder = hold(tmp_path / "run")
    try:
        with pytest.raises(RunFolderError, match=f"process {holder.pid}"):
            RunFolder(tmp_path / "run").claim()
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_left_by_a_killed_process_does_not_block(tmp_path):
    holder = hold(tmp_path / "run")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    run = RunFolder(tmp_path / "run")
    run.claim()
    assert str(os.getpid()) in (tmp_path / "run" / "lock").read_text()
    run.release()


@pytest.mark.parametrize("there_before", [False, True])
def test_a_run_that_was_refused_before_it_began_leaves_no_folder_that_it_made(tmp_path, there_before):
    run = RunFolder(tmp_path / "run")
    if there_before:
        run.path.mkdir()
    run.claim()
    run.release()
    assert run.path.exists() == there_before
    run.claim()
    run.append_log({"step": 1, "loss": 0.5})
    run.release()
    assert run.read_log()


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError) as refusal:
        RunFolder(tmp_path / "file" / "run").claim()
    assert "--out" in refusal.value.fix and refusal.value.exit_code == 2


def test_a_torn_last_log_line_is_left_out_and_steps_to_be_taken_again_are_cut(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(1, 6):
        run.append_log({"step": step, "loss": 0.5})
    with open(run.log, "a") as log:
        log.write('{"step": 6, "lo')
    assert [row["step"] for row in run.read_log()] == [1, 2, 3, 4, 5]
    run.cut_log(3)
    run.append_log({"step": 4, "loss": 0.4})
    assert [row["step"] for row in run.read_log()] == [1, 2, 3, 4]


def test_a_step_that_was_left_out_is_logged_as_json_that_everyone_reads(tmp_path):
    run = RunFolder(tmp_path)
    run.append_log({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "applied": False, "seconds": 0.5})
    run.cut_log(1)
    wanted = {"step": 1, "loss": None, "grad_norm": None, "applied": False, "seconds": 0.5}
    assert [json.loads(line, parse_constant=pytest.fail) for line in run.log.read_text().splitlines()] == run.read_log() == [wanted]
