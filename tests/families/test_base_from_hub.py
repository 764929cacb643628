"""A Hub id brings only the files that are needed, and says plainly what is wrong with it. The Hub here is a local server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny_models import hunyuan_dit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from finetune.errors import BaseModelError
from finetune.families.base_models import locate_base
try:
    found = locate_base(sys.argv[1], parts=set(filter(None, sys.argv[2].split(","))))
    print(json.dumps({"revision": found.revision, "family": found.family.facts.name,
                      "files": sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file())}))
except BaseModelError as error:
    print(json.dumps({"what": error.what, "fix": error.fix}))
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers that `huggingface_hub` asks for; `repositories` maps ids to folders."""

    repositories: dict[str, Path] = {}
    served: list[str] = []

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str], send: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def respond(self, send: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        folder = self.repositories.get(name)
        if folder is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"}, send)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if is_api:
            tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": COMMIT} for n in names]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names], "private": False, "gated": False, "disabled": False,
                    "tags": [], "downloads": 0, "likes": 0}
            body = tree if "tree" in parts else info
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, send)
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, send)
        content = file.read_bytes()
        if send:
            self.served.append("/".join(parts[4:]))
        return self.answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, send)

    def do_GET(self) -> None:
        self.respond(send=True)

    def do_HEAD(self) -> None:
        self.respond(send=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    hunyuan_dit.build().save_pretrained(root / "base")
    (root / "base" / "README.md").write_text("a card")
    (root / "base" / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    for name, index in (("other", {"_class_name": "StableDiffusionXLPipeline"}), ("empty", None)):
        (root / name).mkdir()
        (root / name / "README.md").write_text("a card")
        if index:
            (root / name / "model_index.json").write_text(json.dumps(index))
    handler = type("Handler", (Hub,), {"repositories": {f"someone/{name}": root / name for name in ("base", "other", "empty")}, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, handler
    server.shutdown()


def locate(hub, tmp_path, base, parts=""):
    """Run in a process of its own: the library reads its endpoint when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub[0].server_port}", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
                                "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, base, parts], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_only_the_wanted_parts_of_a_hub_id_are_downloaded(hub, tmp_path):
    hub[1].served.clear()
    found = locate(hub, tmp_path, "someone/base", "transformer")
    assert found["family"] == "hunyuan_dit" and found["revision"] == COMMIT
    weights = [name for name in hub[1].served if name.endswith((".safetensors", ".bin"))]
    assert weights == ["transformer/diffusion_pytorch_model.safetensors"]
    assert "README.md" not in found["files"] and "vae/config.json" in found["files"]


@pytest.mark.parametrize(("base", "what"), [
    ("someone/other", "StableDiffusionXLPipeline"), ("someone/empty", "holds no model_index.json"), ("someone/nothing", "neither here nor on the Hub")])
def test_what_is_wrong_with_a_hub_id_is_said_before_weights_come(hub, tmp_path, base, what):
    hub[1].served.clear()
    assert what in locate(hub, tmp_path, base)["what"]
    assert not [name for name in hub[1].served if name.endswith((".safetensors", ".bin"))]
