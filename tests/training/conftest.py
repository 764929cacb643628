from dataclasses import replace
from pathlib import Path

import pytest

from tests.data_tools.opened_here import open_here
from tests.training.small_job import small_recipe, write_pictures


@pytest.fixture(scope="module", autouse=True)
def scans_of_their_own(tmp_path_factory):
    """What a scan remembers of pictures stays out of the user's cache, and no processes are started to open them."""
    with pytest.MonkeyPatch.context() as patch:
        open_here(patch)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "scan cache"))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    from tests.tiny_models import hunyuan_dit

    folder = tmp_path_factory.mktemp("base") / "tiny"
    hunyuan_dit.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def encodings_folder(tmp_path_factory) -> Path:
    """One encoding cache for all runs, so that only the first encodes."""
    return tmp_path_factory.mktemp("encodings")


@pytest.fixture(scope="module")
def unbroken(tiny_base, pictures, encodings_folder, tmp_path_factory):
    """A finished run that others are compared with."""
    from finetune.training.run import train

    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, train(small_recipe(tiny_base, pictures), out, cache_folder=encodings_folder)


@pytest.fixture(scope="module")
def ground(tiny_base, pictures, tmp_path_factory):
    """What a plan of the tiny base stands on, and the recipe."""
    from finetune.training.plan_ground import survey

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("scan")))
        recipe = small_recipe(tiny_base, pictures, training__optimizer="auto")
        found = survey(recipe)
        # As in a process of its own: one that has run other tests weighs what they loaded.
        around = replace(found.surroundings, library_bytes=400 << 20, later_bytes=0)
        yield replace(found, surroundings=around), recipe
