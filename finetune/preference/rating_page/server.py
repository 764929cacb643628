"""The server of the rating page: hands out questions and pictures under names that tell nothing, takes answers."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from data_tools.errors import BadInput, BrushworkError
from data_tools.images import open_image

from finetune.preference.rating_page.guard import OPEN_PATHS, Guard, allowed_hosts
from finetune.preference.rating_session import Answer, RatingSession

HERE = Path(__file__).parent
LARGEST_BODY = 16_384
AHEAD = 4


class _Pictures:
    """Random names for pictures, made anew in every process: address and bytes tell nothing of model, seed or file."""

    def __init__(self, session: RatingSession):
        self.session = session
        self._name_of: dict[str, str] = {}
        self._item_of: dict[str, str] = {}

    def name(self, item: str) -> str:
        """The name under which this candidate is served."""
        if item not in self._name_of:
            name = secrets.token_hex(12)
            self._name_of[item], self._item_of[name] = name, item
        return self._name_of[item]

    @functools.lru_cache(maxsize=24)
    def content(self, name: str) -> bytes:
        """PNG bytes drawn anew from the pixels, so that no text, EXIF or file name travels along. KeyError: unknown name."""
        image = open_image(self.session.folder.picture(self._item_of[name]))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


class RatingApplication:
    """Routes over one session. The session is used under a lock: requests arrive on several threads."""

    def __init__(self, session: RatingSession, finish: Callable[[], None] = lambda: None):
        self.session, self.finish = session, finish
        self.pictures = _Pictures(session)
        self.lock = threading.Lock()

    def routes(self) -> list[Route]:
        """Every address that answers."""
        files = [Route(path, _static(path)) for path in OPEN_PATHS]
        return [
            Route("/", _static("/page.html")), *files,
            Route("/api/state", self._get_state), Route("/api/pictures/{name}", self._get_picture),
            *(Route(f"/api/{name}", self._posting(action), methods=["POST"]) for name, action in self._actions().items()),
        ]

    def _actions(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        return {
            "answer": lambda body: self.session.answer(_answer(body)),
            "skip": lambda body: self.session.skip(_word(body, "question"), _word(body, "id")),
            "undo": lambda body: self.session.undo(_word(body, "id")),
            "revisit": lambda body: setattr(self.session, "revisiting", True),
            "finish": lambda body: self.finish(),
        }

    def state(self) -> dict[str, Any]:
        """What the page needs to know: the next questions, counts, and figures when all is done."""
        questions = self.session.upcoming(AHEAD)
        shown = [
            {"key": question.key, "prompt": self.session.prompt(question), "pictures": [self.pictures.name(item) for item in self.session.shown(question)]}
            for question in questions
        ]
        return {
            "folder": hashlib.sha256(str(self.session.folder.root.resolve()).encode()).hexdigest()[:12], "annotator": self.session.annotator, "mode": self.session.plan.settings.mode, "criteria": list(self.session.criteria),
            "questions": shown, "progress": self.session.progress(), "summary": None if questions else self.session.summary(),
        }

    def _locked(self, action: Callable[[], Any]) -> Response:
        try:
            with self.lock:
                action()
                return JSONResponse(self.state())
        except BadInput as error:
            return JSONResponse({"error": {"what": error.what, "where": error.where, "fix": error.fix}}, 400)
        except (BrushworkError, OSError) as error:
            return JSONResponse({"error": {"what": f"nothing was saved: {error}", "where": None, "fix": None}}, 503)

    async def _get_state(self, request: Request) -> Response:
        return await run_in_threadpool(self._locked, lambda: None)

    def _posting(self, action: Callable[[dict[str, Any]], Any]):
        async def endpoint(request: Request) -> Response:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    return PlainTextResponse("The request is too large.", 413)
            try:
                parsed = json.loads(body)
            except (ValueError, RecursionError):
                parsed = None
            if not isinstance(parsed, dict):
                return PlainTextResponse("A JSON object is expected.", 400)
            return await run_in_threadpool(self._locked, lambda: action(parsed))

        return endpoint

    async def _get_picture(self, request: Request) -> Response:
        try:
            content = await run_in_threadpool(self.pictures.content, request.path_params["name"])
        except KeyError:
            return PlainTextResponse("No such picture.", 404)
        except BrushworkError as error:
            return PlainTextResponse(error.what, 410)
        return Response(content, media_type="image/png")


def _static(path: str):
    async def endpoint(request: Request) -> Response:
        return FileResponse(HERE / path.lstrip("/"))

    return endpoint


def _word(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not 1 <= len(value) <= 64 or not value.isprintable():
        raise BadInput(f"`{key}` must be text of 1 to 64 characters that can be printed", where="answer")
    return value


def _whole(value: Any, name: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise BadInput(f"`{name}` must be a whole number, 0 or more", where="answer")
    return value


def _answer(body: dict[str, Any]) -> Answer:
    ranking, points = body.get("ranking"), body.get("points")
    if ranking is not None and not isinstance(ranking, list) or points is not None and not isinstance(points, dict):
        raise BadInput("`ranking` must be a list and `points` an object", where="answer")
    return Answer(
        id=_word(body, "id"), question=_word(body, "question"), position=_whole(body.get("position"), "position"), tie=body.get("tie") is True,
        both_bad=body.get("both_bad") is True, ranking=None if ranking is None else tuple(ranking), points=points, ms=_whole(body.get("ms"), "ms"),
    )


@dataclass(frozen=True)
class Address:
    """Where the page is. `url` carries the token: it is for the annotator and belongs in no log."""

    host: str
    port: int
    token: str

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/?token={self.token}"


def listen(host: str, port: int) -> socket.socket:
    """A socket on host:port, or on any free port where that one is taken. Raises BadInput for an unusable address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port, 0):
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, candidate))
            server.listen(64)
            return server
        except OSError as error:
            server.close()
            reason = error.strerror or str(error)
    raise BadInput(f"cannot listen there ({reason})", where=f"{host}:{port}", fix="choose another --host or --port")


def serve(session: RatingSession, host: str, port: int, announce: Callable[[Address], None]) -> None:
    """Serve until the annotator finishes on the page, or Ctrl-C. `announce` is called once the page can be opened.

    host: loopback, or one address of this machine; 0.0.0.0 is refused, because then no Host header can be checked.
    """
    if host in ("0.0.0.0", "::", ""):
        raise BadInput("listening on every address is refused", where="--host", fix="give the one address of this machine that annotators use")
    listener = listen(host, port)
    address = Address(host, listener.getsockname()[1], secrets.token_urlsafe(24))
    server: uvicorn.Server | None = None

    def finish() -> None:
        server.should_exit = True

    application = Starlette(routes=RatingApplication(session, finish).routes())
    guarded = Guard(application, address.token, allowed_hosts(host, address.port))
    server = uvicorn.Server(uvicorn.Config(guarded, log_level="error", access_log=False, server_header=False, date_header=False, lifespan="off", timeout_graceful_shutdown=2))
    announce(address)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
