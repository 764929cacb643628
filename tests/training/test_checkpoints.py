"""Checkpoints are whole or not there."""

import os
from pathlib import Path

import pytest
import torch

from finetune.training.checkpoints import ADAPTER, OPTIMIZER, STATE, keep_newest, newest_checkpoint, write_checkpoint


def write(parent, step, value=1.0):
    return write_checkpoint(parent, step, {"parameter/a": torch.full((64, 8), value)}, {"note": step}, lambda path: Path(path).write_bytes(b"adapter" * 50))


def truncated(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def zeroed(path, share):
    content = path.read_bytes()
    kept = int(len(content) * share)
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def flipped(path, share):
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * share)] ^= 1
    path.write_bytes(bytes(content))


def overgrown(path, share):
    path.write_bytes(path.read_bytes() + bytes(int(path.stat().st_size * share)))


NAMES = (ADAPTER, OPTIMIZER, STATE)
DAMAGES = [(damage, name, share) for damage in (truncated, zeroed, flipped) for name in NAMES for share in (0.0, 0.05, 0.3, 0.5, 0.8, 0.99)]
DAMAGES += [(overgrown, name, 0.5) for name in NAMES]


@pytest.mark.parametrize("damage, name, share", DAMAGES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_torn_newest_checkpoint_is_passed_over_for_the_newest_whole_one(tmp_path, damage, name, share):
    write(tmp_path, 10, 1.0)
    newest = write(tmp_path, 20, 2.0)
    before = (newest / name).read_bytes()
    damage(newest / name, share)
    # Only the zero bytes at the very end of a file may leave it what it was.
    assert (newest / name).read_bytes() != before
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert checkpoint.step == 10 and checkpoint.tensors["parameter/a"].eq(1.0).all()
    assert [folder.name for folder, _ in passed_over] == ["step-000020"] and passed_over[0][1]


@pytest.mark.parametrize("name", [ADAPTER, OPTIMIZER, STATE])
def test_a_checkpoint_with_a_missing_file_is_passed_over(tmp_path, name):
    write(tmp_path, 10)
    (write(tmp_path, 20) / name).unlink()
    assert newest_checkpoint(tmp_path)[0].step == 10


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path, 7, 3.5)
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert checkpoint.step == 7 and checkpoint.state["note"] == 7 and not passed_over
    assert checkpoint.tensors["parameter/a"].eq(3.5).all()


def test_a_failed_write_leaves_nothing_behind_and_the_older_one_whole(tmp_path):
    write(tmp_path, 10)

    def fail(path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_checkpoint(tmp_path, 20, {"a": torch.zeros(3)}, {}, fail)
    assert sorted(os.listdir(tmp_path)) == ["step-000010"]
    assert newest_checkpoint(tmp_path)[0].step == 10


def test_a_half_written_folder_of_a_killed_process_is_neither_read_nor_kept(tmp_path):
    leftover = tmp_path / ".step-000020.999.partial"
    leftover.mkdir(parents=True)
    (leftover / STATE).write_text("{}")
    assert newest_checkpoint(tmp_path) == (None, [])
    write(tmp_path, 30)
    assert not leftover.exists()


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path):
    truncated(write(tmp_path, 20, 1.0) / STATE, 0.5)
    write(tmp_path, 20, 2.0)
    assert newest_checkpoint(tmp_path)[0].tensors["parameter/a"].eq(2.0).all()


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 1000000):
        write(tmp_path, step)
    keep_newest(tmp_path, 2, 1000000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-1000000"]


def test_the_one_just_written_is_kept_though_a_broken_one_lies_beyond_it(tmp_path):
    """A run that went back behind a broken checkpoint would otherwise lose each new one as soon as it is there."""
    write(tmp_path, 10)
    truncated(write(tmp_path, 30) / STATE, 0.5)
    write(tmp_path, 20)
    keep_newest(tmp_path, 1, 20)
    assert newest_checkpoint(tmp_path)[0].step == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000020", "step-000030"]


def test_no_checkpoints_folder_means_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
