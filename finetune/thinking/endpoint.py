"""Enhance through any OpenAI-compatible endpoint (vLLM, Ollama, LM Studio, a hosted service), with the standard library."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from data_tools.thinking import ThinkingRecord
from finetune.errors import BadInput, BrushworkError
from finetune.thinking.chat import Messages, ask_and_read
from finetune.thinking.enhancers import Question

KEY_VARIABLE = "OPENAI_API_KEY"
TRY_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})
TRIES = 5
LONGEST_WAIT_SECONDS = 60.0
LARGEST_ANSWER_BYTES = 1_000_000


class EndpointEnhancer:
    """url: base such as "http://localhost:8000/v1".  model: the name that the server knows.

    timeout: seconds for one answer.  The key, if the server wants one, comes from the environment variable
    OPENAI_API_KEY and goes nowhere else. Raises BadInput for an address that is not http(s).
    """

    backend = "endpoint"

    def __init__(self, url: str, model: str, *, timeout: float = 120.0, wait: Callable[[float], None] = time.sleep):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https") or not urllib.parse.urlsplit(url).hostname:
            raise BadInput(f"{url} is not an address of an endpoint", fix="give its base, such as http://localhost:8000/v1")
        self.url, self.model, self._timeout, self._wait = url.rstrip("/"), model, timeout, wait

    def __call__(self, question: Question) -> ThinkingRecord:
        return ask_and_read(question, lambda messages: self._ask(messages, question.seed))

    def _ask(self, messages: Messages, seed: int) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0.7, "top_p": 0.9, "max_tokens": 2048, "seed": seed}
        answer = self._post(json.dumps(body).encode())
        try:
            message = json.loads(answer)["choices"][0]["message"]
            return str(message.get("content") or "")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            # A server that answers nonsense is treated like a model that does: the parser finds no prompt in it.
            return ""

    def _post(self, body: bytes) -> bytes:
        problem = "no answer"
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(self._request(body), timeout=self._timeout) as response:
                    return response.read(LARGEST_ANSWER_BYTES)
            except urllib.error.HTTPError as error:
                problem = f"answered {error.code}: {_first_line(error.read(2000))}"
                if error.code not in TRY_AGAIN:
                    break
                delay = _asked_delay(error.headers.get("Retry-After"), attempt)
            except (OSError, ValueError) as error:
                # Connection refused, reset, time-out, half an answer.
                problem = str(getattr(error, "reason", error)) or type(error).__name__
                delay = _asked_delay(None, attempt)
            if attempt < TRIES - 1:
                self._wait(delay)
        raise BrushworkError(f"the endpoint gave no answer: {problem}", where=self.url, fix="is the server running, and does it know this model?")

    def _request(self, body: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY_VARIABLE)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(self.url + "/chat/completions", data=body, headers=headers, method="POST")


def _asked_delay(asked: str | None, attempt: int) -> float:
    """Seconds until the next try: what the server asks for, else doubling from one second."""
    try:
        return min(max(float(asked or ""), 0.0), LONGEST_WAIT_SECONDS)
    except ValueError:
        return min(2.0**attempt, LONGEST_WAIT_SECONDS)


def _first_line(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        data: Any = json.loads(text)
        text = str(data["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200]
