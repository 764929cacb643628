"""A model that is not there is refused at once; one that a busy Hub may still give is not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_tools.errors import BadInput
from data_tools.model_places import require_model
from data_tools.near_names import nearest_path

ANSWERS = {"someone/gone": (404, "RepoNotFound"), "someone/shut": (403, "GatedRepo"), "someone/bare": (404, "EntryNotFound"), "someone/busy": (503, ""), "someone/short": (404, "RevisionNotFound")}
PROGRAM = """
import sys
from data_tools.errors import BadInput
from data_tools.model_places import require_model
try:
    require_model(sys.argv[1], "give another", revision=sys.argv[2] or None)
    print("passed")
except BadInput as error:
    print(" ".join(str(error).splitlines()))
"""


@pytest.fixture(scope="module")
def hub():
    """A Hub that answers as `ANSWERS` says, and counts how often it is asked."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            name = "/".join(self.path.split("/")[1:3])
            asked.append(name)
            status, code = ANSWERS[name]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def require(endpoint, tmp_path, name, revision=""):
    """In a process of its own: the library reads its endpoint when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, "-c", PROGRAM, name, revision], env=environment, capture_output=True, text=True, timeout=300, check=True).stdout.strip()


@pytest.mark.parametrize(("name", "says"), [
    ("someone/gone", "there is no model called someone/gone, neither here nor on the Hub"),
    ("someone/shut", "asks for its licence to be accepted first"),
    ("someone/bare", "passed"),  # whoever loads it says what else is missing
    ("someone/busy", "passed"),  # whoever loads it tries again
])
def test_the_hub_is_asked_once_and_what_waiting_may_mend_passes(hub, tmp_path, name, says):
    endpoint, asked = hub
    asked.clear()
    assert says in require(endpoint, tmp_path, name)
    assert asked == [name]


def test_without_a_connection_a_model_that_is_not_in_the_cache_is_refused(tmp_path):
    assert "the Hub cannot be asked" in require("http://127.0.0.1:9", tmp_path, "someone/model")
    snapshot = tmp_path / "home" / "hub" / "models--someone--model"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    (snapshot / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (snapshot / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    assert require("http://127.0.0.1:9", tmp_path, "someone/model") == "passed"


def test_without_a_connection_a_revision_in_the_cache_is_enough(tmp_path):
    """A commit that was asked for by its name leaves no branch behind in the cache."""
    commit = "1" * 40
    snapshot = tmp_path / "home" / "hub" / "models--someone--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert require("http://127.0.0.1:9", tmp_path, "someone/model", commit) == "passed"
    assert "the Hub cannot be asked" in require("http://127.0.0.1:9", tmp_path, "someone/model")


def test_without_a_connection_a_cached_model_that_is_known_to_lack_the_file_passes(tmp_path):
    """What loads it went on without that file when it came from the Hub, as it does with a preprocessor that is part of a processor."""
    commit, cached = "1" * 40, tmp_path / "home" / "hub" / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / ".no_exist" / commit).mkdir(parents=True)
    (cached / ".no_exist" / commit / "config.json").touch()
    assert require("http://127.0.0.1:9", tmp_path, "someone/model") == "passed"


def test_a_revision_that_the_model_does_not_have_is_named(hub, tmp_path):
    assert "the model someone/short has no revision v2" in require(hub[0], tmp_path, "someone/short", "v2")


def test_a_folder_is_taken_and_a_misspelt_one_is_named(tmp_path):
    (tmp_path / "qwen").mkdir()
    require_model(str(tmp_path / "qwen"), "give another")
    with pytest.raises(BadInput) as refused:
        require_model(str(tmp_path / "qwne"), "give another")
    assert refused.value.fix == f"did you mean {tmp_path / 'qwen'}?"


def test_the_near_name_is_one_of_the_same_folder(tmp_path):
    for name in ("Prompts.txt", "pictures", ".prompts.txt"):
        (tmp_path / name).write_text("")
    assert nearest_path(tmp_path / "prompt.txt") == tmp_path / "Prompts.txt"
    assert nearest_path(tmp_path / "pictures.txt") == tmp_path / "pictures"
    assert nearest_path(tmp_path / "reward.json") is None and nearest_path(tmp_path / "none" / "prompt.txt") is None


@pytest.mark.parametrize(("missing", "meant"), [
    ("dog.safetensors", None), ("xyz.json", None), ("fur.safetensors", None),
    ("cats.safetensors", "cat.safetensors"), ("cat.safetensor", "cat.safetensors"), ("CAT.SafeTensors", "cat.safetensors"), ("warmht.json", "warmth.json"),
])
def test_files_of_one_kind_are_not_alike_by_that(tmp_path, missing, meant):
    for name in ("cat.safetensors", "warmth.json"):
        (tmp_path / name).touch()
    assert nearest_path(tmp_path / missing) == (tmp_path / meant if meant else None)
