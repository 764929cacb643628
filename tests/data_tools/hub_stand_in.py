"""A local server that answers what the `datasets` library asks of the Hub, for data sets that are folders here."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving_datasets(repositories: dict[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """`repositories`: id -> folder. Yields the address to give as HF_ENDPOINT."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def respond(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            is_api = parts[0] == "api"
            parts = parts[1:] if is_api else parts
            name, rest = "/".join(parts[1:3]), parts[3:]
            folder = repositories.get(name)
            if name in gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
            if parts[0] != "datasets" or folder is None:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            if is_api:
                return self.answer(200, json.dumps(self.listing(name, folder, files, rest, sent)).encode(), Content_Type="application/json")
            if rest[0] != "resolve" or "/".join(rest[2:]) not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            content = (folder / "/".join(rest[2:])).read_bytes()
            return self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

        def listing(self, name: str, folder: Path, files: list[str], rest: list[str], sent: bytes) -> object:
            entries = [{"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": COMMIT} for file in files]
            entries += [{"type": "directory", "path": path, "oid": COMMIT} for path in sorted({"/".join(file.split("/")[:-1]) for file in files if "/" in file})]
            if rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                return [entry for entry in entries if not below or entry["path"].startswith(f"{below}/")]
            if rest[:1] == ["paths-info"]:
                wanted = json.loads(sent).get("paths") or [] if sent.startswith(b"{") else sent.decode().replace("%2F", "/")
                return [entry for entry in entries if entry["path"] in wanted]
            return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}

        do_GET = do_HEAD = do_POST = respond

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
