"""No result of a test is left to chance, nor to the settings of whoever runs it: what draws without a seed draws the same,
wherever and in whichever order tests run, and the environment is that of a machine on which nothing was set.

Hypothesis tries the same examples every time too; `pytest --hypothesis-profile exploring` lets it look for new ones.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.libraries_stay import let_libraries_stay

# What torch itself starts with: a test that imports it first draws what others draw.
SEED = 67280421310721

# Libraries read these when they are imported, hence here and not in a fixture. Everything that a test asks is on this machine.
FOREIGN = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "OPENAI_API_KEY",
           "BRUSHWORK_CACHE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")
for name in FOREIGN:
    os.environ.pop(name, None)
    os.environ.pop(name.lower(), None)
# Bits depend on the number of threads, and a process that has used several cannot be forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Neither may the clock decide: a machine may be as slow as it likes.
settings.register_profile("ordinary", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ordinary")


def _seed_everything() -> None:
    """The state that is shared by all of a process. A test begins with the numbers with which its fixtures began: one that
    needs others than theirs must not draw them. A library that nobody has imported yet is left alone: importing torch takes seconds."""
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED % 2**32)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Iterator[None]:
    _seed_everything()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    _seed_everything()
    return (yield)


modules_seen = 0


def _let_new_libraries_stay() -> None:
    """Only where something was imported since."""
    global modules_seen
    if len(sys.modules) != modules_seen:
        modules_seen = len(sys.modules)
        let_libraries_stay()


def pytest_collection_finish() -> None:
    _let_new_libraries_stay()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    result = yield
    _let_new_libraries_stay()
    return result


@pytest.fixture(scope="session", autouse=True)
def caches_of_their_own(tmp_path_factory) -> Iterator[None]:
    """What was scanned or encoded on this machine before is not known, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> list[str]:
    """The command of a Chromium without a window, to which a profile's folder is added."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    tried = subprocess.run([*command, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--dump-dom", "data:text/html,<p>it starts</p>"], capture_output=True, text=True, timeout=600)
    if "it starts" not in tried.stdout:
        pytest.skip(f"the Chromium of this machine does not start: {tried.stderr[-300:]}")
    return command
