"""Ways to caption pictures, one file each; the only place of the data tools that may load torch, and only when used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import BadInput
from data_tools.model_places import require_model
from data_tools.near_names import nearest


@dataclass(frozen=True)
class Request:
    """One picture to describe.

    number: the caller's own index.  system, prompt: what the model is told.  attempt: 0, then 1, 2 ... after an answer
    that could not be used; part of the seed.  schema: JSON Schema the answer should follow, or None for plain words.
    """

    number: int
    path: Path
    system: str
    prompt: str
    attempt: int = 0
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said. cut: it ran into its token limit.  problem: why there is no text, or "".

    tokens_in, tokens_out: as the model counted them, 0 where unknown.  seconds: time spent on this picture.
    """

    text: str
    cut: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    problem: str = ""


class Captioner(Protocol):
    """Answers requests, each exactly once, in any order; pulls them as it needs them.

    name: the way ("endpoint").  model: which one; "" where there is none.  follows_prompts: whether it obeys instructions.
    """

    name: str
    model: str
    follows_prompts: bool

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]: ...


BATCHED = ("vision-language", "florence-2", "blip-2")  # models on this machine that take several pictures at once
CAPTIONERS = ("file-name", "endpoint", *BATCHED, "wd-tagger")


def check_captioner(name: str, *, model: str | None = None, url: str | None = None) -> None:
    """Raises BadInput for what `captioner` would refuse, as far as names tell: a way that does not exist, a missing model or address,
    a model that is not there. Imports nothing heavy, so that it can go before the pictures are looked at."""
    if name not in CAPTIONERS:
        near = nearest(name, CAPTIONERS)
        raise BadInput(f"unknown captioner {name!r}", fix=f"did you mean {near}?" if near else f"one of {', '.join(CAPTIONERS)}")
    if name == "file-name":
        return
    if not model:
        raise BadInput(f"the captioner {name} needs a model", fix="pass --model: a folder, a Hub identifier, or the name the endpoint knows")
    if name == "endpoint" and not url:
        raise BadInput("the captioner endpoint needs an address", fix="pass --url, such as http://localhost:8000/v1")
    if name != "endpoint":
        tags = name == "wd-tagger"
        require_model(model, "give a folder with model.onnx and selected_tags.csv, or a Hub identifier" if tags else "give a folder or Hub identifier of such a model",
                      where=f"--model {model}", file="selected_tags.csv" if tags else "config.json")


def captioner(name: str, *, model: str | None = None, url: str | None = None, **settings: Any) -> Captioner:
    """Make a captioner by name; its libraries are imported only now. Raises BadInput for a missing model, address or library."""
    check_captioner(name, model=model, url=url)
    if name == "file-name":
        from data_tools.captioners.file_name import FileNameCaptioner

        return FileNameCaptioner()
    if name == "endpoint":
        from data_tools.captioners.endpoint import EndpointCaptioner

        return EndpointCaptioner(url, model, **settings)
    if name == "wd-tagger":
        from data_tools.captioners.wd_tagger import WdTagger

        return WdTagger(model, **settings)
    from data_tools.captioners import transformers_models

    return transformers_models.load(name, model, **settings)


def each_picture(requests: Iterable[Request], background: str = "#ffffff") -> Iterator[tuple[Request, Any, str]]:
    """(request, opened picture or None, why it could not be opened)."""
    from data_tools.images import BadPicture, open_image

    for request in requests:
        try:
            yield request, open_image(request.path, background=background), ""
        except BadPicture as error:
            yield request, None, error.what
