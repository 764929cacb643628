"""Several processes that want the same encodings make each of them once, also when one of them is killed."""

import os
import signal
import time
import traceback

import pytest
import torch

from data_tools.progress import Progress
from finetune.families.base_models import locate_base
from finetune.recipe_settings import DataSettings
from finetune.training.encode import encode_everything, latent_keys
from finetune.training.encoding_cache import EncodingCache
from finetune.training.encoding_claims import Claims
from finetune.training.training_set import build_training_set
from tests.training.small_job import AtStep, small_recipe, write_pictures

PICTURES = 40


@pytest.fixture(scope="module")
def prepared(tiny_base, tmp_path_factory):
    recipe = small_recipe(tiny_base, write_pictures(tmp_path_factory.mktemp("many"), PICTURES))
    base = locate_base(str(tiny_base))
    return base, build_training_set(recipe, base.family.facts, Progress())


def encoding_child(prepared, folder, workers=0, progress=None):
    """Fork a process that encodes everything and writes how many entries it made; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        base, training_set = prepared
        cache = EncodingCache(folder)
        encode_everything(base, training_set, ["", "a cat"], DataSettings(), cache, torch.device("cpu"), torch.float32, workers, progress or Progress())
        (folder / f"{os.getpid()}.made").write_text(str(cache.made))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def whole_entries(folder):
    cache = EncodingCache(folder)
    keys = [path.stem for path in folder.rglob("*.safetensors")]
    assert cache.missing(keys) == [] and cache.mended == 0
    return keys


def until(condition, seconds=600):
    """Wait for a condition, however slow the machine is."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.01)


class StoppingProgress(AtStep):
    """Claims one more entry after five pictures and stops this process with it, as if it had been caught in the middle of making it."""

    def __init__(self, folder, key):
        super().__init__(5, "encoding pictures")
        self.claims, self.key = Claims(EncodingCache(folder)), key

    def act(self):
        assert list(self.claims.unmade([self.key])) == [self.key]
        os.kill(os.getpid(), signal.SIGSTOP)


def wait_for(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("workers", [0, 1])
def test_three_processes_share_the_work_and_make_nothing_twice(prepared, tmp_path, workers):
    assert wait_for([encoding_child(prepared, tmp_path, workers) for _ in range(3 - workers)]) == [0] * (3 - workers)
    made = [int(path.read_text()) for path in tmp_path.glob("*.made")]
    # Every picture, every caption, the two prompts.
    assert sum(made) == len(whole_entries(tmp_path)) == 2 * PICTURES + 2
    assert not list(tmp_path.rglob("*.claim")) and not list(tmp_path.rglob("*.partial"))


def test_what_a_killed_process_had_claimed_is_made_by_another(prepared, tmp_path):
    base, training_set = prepared
    held = latent_keys(base, training_set.pictures, DataSettings().background, EncodingCache(tmp_path))[PICTURES // 2]
    killed = encoding_child(prepared, tmp_path, progress=StoppingProgress(tmp_path, held))
    assert os.WIFSTOPPED(os.waitpid(killed, os.WUNTRACED)[1])
    assert len(whole_entries(tmp_path)) == 5
    other = encoding_child(prepared, tmp_path)
    # The other makes every picture but the one that the stopped one holds, and waits for that.
    until(lambda: len(list(tmp_path.rglob("*.safetensors"))) == PICTURES - 1)
    assert os.waitpid(other, os.WNOHANG) == (0, 0)
    os.kill(killed, signal.SIGKILL)
    assert wait_for([killed, other]) == [-signal.SIGKILL, 0]
    made = int(next(tmp_path.glob("*.made")).read_text())
    assert len(whole_entries(tmp_path)) == 2 * PICTURES + 2 and made == 2 * PICTURES + 2 - 5
    assert not list(tmp_path.rglob("*.claim"))


def test_a_claim_is_one_processs_and_ends_with_it(tmp_path):
    cache, key = EncodingCache(tmp_path), "ab" * 32
    with Claims(cache) as mine:
        assert list(mine.unmade([key])) == [key]
        with Claims(cache) as others:
            assert list(others.unmade([key])) == []
    with Claims(cache) as others:
        assert list(others.unmade([key])) == [key]
        cache.put(key, {"x": torch.zeros(1)})
        others.made(key)
        assert list(others.unmade([key])) == []
