"""A real HTTP server that answers like an OpenAI-compatible endpoint, with faults on demand."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

from PIL import Image


def completion(text, finish="stop", **usage):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}], "usage": {"prompt_tokens": 700, "completion_tokens": 20} | usage}).encode()


class Endpoint:
    """`replies(number, body)` gives (status, headers, content), "hang", "reset", "drip" or "half" for the n-th request, from 0."""

    def __init__(self, replies):
        self.replies, self.requests, self.headers, self.busy, self.most_busy = replies, [], [], 0, 0
        self.lock, self.released = threading.Lock(), threading.Event()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            self.answer(handler, self.replies(number, body))
        finally:
            with self.lock:
                self.busy -= 1

    def answer(self, handler, reply) -> None:
        if reply == "hang":
            self.released.wait(120)
            return
        if reply == "reset":
            handler.connection.close()
            return
        if reply in ("half", "drip"):
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            while reply == "drip" and not self.released.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()
            return
        status, headers, content = reply
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def serving(replies):
    """Serve on the loopback; yields (address, Endpoint)."""
    endpoint = Endpoint(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                endpoint.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", endpoint
    finally:
        endpoint.released.set()
        server.shutdown()
        server.server_close()


def picture_of(body) -> Image.Image:
    """The picture that a request carries."""
    address = body["messages"][-1]["content"][0]["image_url"]["url"]
    assert address.startswith("data:image/jpeg;base64,")
    return Image.open(BytesIO(base64.b64decode(address.split(",", 1)[1])))


