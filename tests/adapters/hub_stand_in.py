"""A Hub on the loopback interface: the routes that publishing and downloading use, with faults on demand.

It keeps what was committed, so that a second publication and a download see it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import yaml


@dataclass
class Fault:
    """Answer `times` requests whose "METHOD path" matches `pattern` with `status` (0: cut the connection)."""

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """State of the stand-in. files: path -> bytes of the one repository.  log: (method, path, headers, body)."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # sha256 -> content of large files that have arrived
        self.private: bool | None = None
        self.commits: list[list[str]] = []
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, dict[str, str], bytes]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        self.server.hub = self
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()

    def requests(self, pattern: str) -> list[tuple[str, str, dict[str, str], bytes]]:
        return [entry for entry in self.log if re.search(pattern, f"{entry[0]} {entry[1]}")]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    # Each route returns (status, JSON).
    def create(self, body: bytes) -> tuple[int, object]:
        wanted = json.loads(body)
        if self.private is not None:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/me/style"}
        self.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return 200, {"url": f"{self.url}/me/style"}

    def information(self, body: bytes) -> tuple[int, object]:
        if self.private is None:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": name, "size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
                     **({"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}} if name.endswith(".safetensors") else {})}
                    for name, content in self.files.items()]
        return 200, {"id": "me/style", "modelId": "me/style", "sha": self.head, "private": self.private, "siblings": siblings, "tags": []}

    def validate(self, body: bytes) -> tuple[int, object]:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL).group(1)
        data = yaml.safe_load(header)
        problems = [key for key in ("license", "tags", "pipeline_tag") if not data.get(key)]
        if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
            problems.append("license_name")
        return (400 if problems else 200), {"errors": [{"message": f"{key} is missing"} for key in problems], "warnings": []}

    def preupload(self, body: bytes) -> tuple[int, object]:
        files = json.loads(body)["files"]
        return 200, {"files": [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular", "shouldIgnore": False} for file in files]}

    def batch(self, body: bytes) -> tuple[int, object]:
        objects = []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.stored
            actions = {} if known else {"actions": {"upload": {"href": f"{self.url}/storage/{item['oid']}"}, "verify": {"href": f"{self.url}/verify"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        return 200, {"transfer": "basic", "objects": objects}

    def verified(self, body: bytes) -> tuple[int, object]:
        return 200, {}

    def commit(self, body: bytes) -> tuple[int, object]:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != self.head:
            return 412, {"error": "the parent has moved"}
        changed = {}
        for line in lines[1:]:
            value = line["value"]
            changed[value["path"]] = self.stored[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        self.files |= changed
        self.commits.append(sorted(changed))
        return 200, {"commitUrl": f"{self.url}/me/style/commit/{self.head}", "commitOid": self.head, "success": True, "hookOutput": ""}


ROUTES = (
    (r"POST /api/repos/create$", "create"), (r"GET /api/models/me/style(/revision/\w+)?$", "information"), (r"POST /api/validate-yaml$", "validate"),
    (r"POST /api/models/me/style/preupload/main$", "preupload"), (r"POST /me/style\.git/info/lfs/objects/batch$", "batch"),
    (r"POST /verify$", "verified"), (r"POST /api/models/me/style/commit/main$", "commit"),
)


class Requests(BaseHTTPRequestHandler):
    """Answers from the state of `server.hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        hub, body, path = self.server.hub, self._body(), urlsplit(self.path).path
        request = f"{self.command} {path}"
        hub.log.append((self.command, path, dict(self.headers), body))
        fault = hub.fault_for(request)
        if fault is not None:
            return self.close_now() if fault.status == 0 else self.answer(fault.status, {"error": "on demand"}, fault.headers)
        if self.command == "PUT":
            hub.stored[hashlib.sha256(body).hexdigest()] = body
            return self.answer(200, {})
        if self.command in ("GET", "HEAD") and "/resolve/" in path:
            return self.download(path.split("/resolve/")[1].partition("/")[2])
        route = next((name for pattern, name in ROUTES if re.match(pattern, request)), None)
        return self.answer(*getattr(hub, route)(body)) if route else self.answer(404, {"error": f"no {request}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def close_now(self):
        self.close_connection = True
        self.connection.close()

    def download(self, name):
        hub = self.server.hub
        content = hub.files.get(name)
        if content is None:
            return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": hub.head, "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, status, content, headers=None):
        text = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
