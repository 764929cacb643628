"""What several files of these tests start from: tiny bases on disk, and the server of the rating page."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.tiny_models.all import TINY

ROOT = Path(__file__).parents[2]
SIZE = {"hunyuan_dit": 32, "sd3": 32}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A DDPM and a flow model on disk."""
    folders = {}
    for name in SIZE:
        folders[name] = tmp_path_factory.mktemp(name)
        TINY[name].build().save_pretrained(folders[name])
    return folders


class Server:
    """`brushwork prefer rate` in a process of its own."""

    def __init__(self, folder: Path, *options: str):
        command = [sys.executable, "-m", "finetune", "prefer", "rate", str(folder), "--annotator", "ada", "--no-browser", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"http://(\S+)/\?token=(\S+)", line):
                self.host, self.token = found.groups()
                break
        self.url = f"http://{self.host}/?token={self.token}"

    def request(self, path, body=None, **headers):
        sent = {"x-brushwork-token": self.token, **headers}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.host}{path}", data, {name: value for name, value in sent.items() if value is not None})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def state(self):
        return json.loads(self.request("/api/state")[2])

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait(300)


@pytest.fixture
def serve():
    started = []

    def start(folder, *options):
        started.append(Server(folder, *options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()
        server.process.stdout.close()
        server.process.stderr.close()
