"""Captions by any OpenAI-compatible server (vLLM, Ollama, LM Studio, a hosted one): several at once, patient with faults."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx2
from PIL import Image

from data_tools.captioners import Answer, Request
from data_tools.errors import BadInput, BrushworkError
from data_tools.images import BadPicture, open_image

TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_SECONDS = 120.0
LARGEST_ANSWER_BYTES = 4 * 2**20
FAILURES_IN_A_ROW = 4  # pictures that failed all their tries, one after the other, before the run stops


class EndpointCaptioner:
    """url: base such as "http://localhost:8000/v1".  model: the name that the server knows.

    concurrency: requests in flight.  seconds: for one whole answer.  tries: per picture, with waits that double from
    `first_wait` seconds (and what `Retry-After` asks).  longest_side: pixels of what is sent, never the original file.
    key_variable: environment variable with the key; the key goes into the request's header and nowhere else.
    """

    name, follows_prompts = "endpoint", True

    def __init__(
        self, url: str, model: str, *, concurrency: int = 4, seconds: float = 120.0, tries: int = 5, first_wait: float = 1.0, longest_side: int = 1024,
        most_tokens: int = 400, temperature: float = 0.2, key_variable: str = "OPENAI_API_KEY", sleep: Callable[[float], None] = time.sleep,
    ):
        address = httpx2.URL(url) if "://" in url else None
        if address is None or address.scheme not in ("http", "https") or not address.host or address.userinfo:
            raise BadInput(f"{url.rsplit('@', 1)[-1]} is not an address of an endpoint", fix="give its base, such as http://localhost:8000/v1")
        self.url, self.model = url.rstrip("/"), model
        self.concurrency, self.seconds, self.tries, self.first_wait = concurrency, seconds, tries, first_wait
        self.longest_side, self.most_tokens, self.temperature, self.sleep = longest_side, most_tokens, temperature, sleep
        self.is_local = _is_local(address.host)
        key = os.environ.get(key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._schema_understood = True

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Answers as they come. Raises BrushworkError when the server refuses for good, or keeps failing."""
        waiting, source = {}, iter(requests)
        recent: deque[bool] = deque(maxlen=FAILURES_IN_A_ROW)
        with httpx2.Client(timeout=self.seconds, follow_redirects=False) as client, ThreadPoolExecutor(self.concurrency) as threads:
            try:
                while True:
                    while len(waiting) < self.concurrency and (request := next(source, None)) is not None:
                        waiting[threads.submit(self._answer, client, request)] = request
                    if not waiting:
                        return
                    for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                        request, answer = waiting.pop(done), _result(done)
                        recent.append(answer.problem.startswith("no answer"))
                        yield request, answer
                        if len(recent) == FAILURES_IN_A_ROW and all(recent):
                            raise BrushworkError(f"the endpoint keeps failing: {answer.problem}", where=self.url, fix="what was captioned is kept; run the same command again to go on")
            finally:
                for future in waiting:
                    future.cancel()

    def _answer(self, client: httpx2.Client, request: Request) -> Answer:
        started = time.monotonic()
        try:
            picture = encoded_picture(request, self.longest_side)
        except BadPicture as error:
            return Answer("", problem=error.what)
        problem = ""
        for attempt in range(self.tries):
            answer, problem, asked = self._try(client, request, picture)
            if answer is not None:
                return replace(answer, seconds=time.monotonic() - started)
            if attempt < self.tries - 1:
                self.sleep(self._delay(asked, attempt, request))
        return Answer("", seconds=time.monotonic() - started, problem=f"no answer after {self.tries} tries: {problem}")

    def _delay(self, asked: str | None, attempt: int, request: Request) -> float:
        """What the server asks for, else doubling; plus up to a quarter, spread by the picture, so that not all come back at once."""
        try:
            seconds = max(0.0, float(asked or ""))
        except ValueError:
            seconds = self.first_wait * 2.0**attempt
        spread = hashlib.sha256(f"{request.path}|{attempt}".encode("utf-8", "surrogateescape")).digest()[0] / 255
        return min(seconds * (1 + 0.25 * spread), LONGEST_WAIT_SECONDS)

    def _try(self, client: httpx2.Client, request: Request, picture: str) -> tuple[Answer | None, str, str | None]:
        """(answer, problem, Retry-After). Raises BrushworkError when trying again cannot help."""
        try:
            status, headers, content = self._post(client, self._body(request, picture))
            if status == 400 and request.schema and self._schema_understood:
                self._schema_understood = False  # not every server knows response_format; ask in words alone
                status, headers, content = self._post(client, self._body(request, picture))
        except (httpx2.HTTPError, TimeoutError, ValueError) as error:
            return None, f"{type(error).__name__}: {error}"[:200], None
        if status in TRY_AGAIN:
            return None, f"status {status}: {_message(content)}", headers.get("retry-after")
        if status != 200:
            hint = "check the key in the environment" if status in (401, 403) else "check the address and the model's name"
            raise BrushworkError(f"the endpoint answered {status}: {_message(content)}", where=self.url, fix=hint)
        answer = read_answer(content)
        return answer, "" if answer else f"not a chat completion: {content[:100].decode('utf-8', 'replace')!r}", None

    def _body(self, request: Request, picture: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": request.prompt}]
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}], "max_tokens": self.most_tokens * (1 + request.attempt)}
        body |= {"temperature": min(1.0, self.temperature + 0.3 * request.attempt), "seed": request.attempt}
        if request.schema and self._schema_understood:
            body["max_tokens"] = max(1500, body["max_tokens"])
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "thinking", "schema": request.schema, "strict": True}}
        return body

    def _post(self, client: httpx2.Client, body: dict[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        """Read the whole answer within `seconds`; a server that drips one byte a minute is a time-out too."""
        deadline, parts, size = time.monotonic() + self.seconds, [], 0
        with client.stream("POST", self.url + "/chat/completions", json=body, headers=self._headers) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {self.seconds:g} s")
                if size > LARGEST_ANSWER_BYTES:
                    raise ValueError("an answer of more than 4 MiB")
            return response.status_code, response.headers, b"".join(parts)


def _result(future: Future) -> Answer:
    return future.result()


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def encoded_picture(request: Request, longest_side: int) -> str:
    """The picture as a data address: JPEG, scaled down, without EXIF. Raises BadPicture."""
    image = open_image(request.path)
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def read_answer(content: bytes) -> Answer | None:
    """The text of a chat completion, or None when it is none."""
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        text = choice["message"]["content"]
        usage = data.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        return None
    counts = [usage.get(name) if isinstance(usage.get(name), int) else 0 for name in ("prompt_tokens", "completion_tokens")]
    return Answer(text, choice.get("finish_reason") == "length", *counts)


def _message(content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]
