from pathlib import Path

import pytest

from tests.training.small_job import write_pictures


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
