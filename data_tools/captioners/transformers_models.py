"""Captions by models that run here through transformers: Qwen-VL and its like, Florence-2, BLIP-2."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from data_tools.captioners import Answer, Captioner, Request, each_picture
from data_tools.errors import BadInput
from data_tools.pickle_refusal import refuse_pickles

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TOKENS = 300
THINKING_TOKENS = 1500
FLORENCE_TASK = "<MORE_DETAILED_CAPTION>"
HINTS = {"florence-2": "take a version that needs no code of its own, such as florence-community/Florence-2-base"}
LARGEST_PIXELS = 1024 * 1024  # pictures are scaled down to this before a model sees them


def load(name: str, model: str, *, device: str = "auto", batch_size: int = 1, revision: str | None = None) -> Captioner:
    """Load a model by way of captioning. Raises BadInput when it is not there or a library is missing."""
    classes = {"vision-language": VisionLanguageCaptioner, "florence-2": FlorenceCaptioner, "blip-2": Blip2Captioner}
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BadInput(f"the captioner {name} needs {error.name}", fix="pip install brushwork with its usual dependencies") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # which of two equal image processors it takes is nobody's concern
    auto = {"vision-language": "AutoModelForImageTextToText", "florence-2": "Florence2ForConditionalGeneration", "blip-2": "Blip2ForConditionalGeneration"}
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    refuse_pickles(model)
    try:
        processor = load_processor(name, model, revision)
        network = getattr(transformers, auto[name]).from_pretrained(model, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except ImportError as error:
        raise BadInput(f"{model} needs a library that is missing: {' '.join(str(error).split())[:200]}", fix="install what the message names, in the version that fits your torch") from None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise BadInput(f"{model} cannot be loaded: {' '.join(str(error).split())[:200]}", fix=HINTS.get(name, "check the folder or Hub identifier and that it is of this kind")) from None
    return classes[name](network.to(device).eval(), processor, model, batch_size=batch_size)


def load_processor(name: str, model: str, revision: str | None) -> Any:
    """The model's own processor; where it cannot be made because torchvision is not there, one for still pictures."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        return AutoProcessor.from_pretrained(model, revision=revision)
    except (ImportError, ValueError, AttributeError):
        if name != "vision-language" or is_torchvision_available():
            raise
        from data_tools.captioners.picture_chats import PictureChats

        return PictureChats.load(model, revision)


class LocalCaptioner:
    """Batches pictures through one model. network, processor: of transformers.  model: the name that is logged."""

    name, follows_prompts = "", False

    def __init__(self, network: Any, processor: Any, model: str, *, batch_size: int = 1):
        self.network, self.processor, self.model, self.batch_size = network, processor, model, batch_size

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        opened = each_picture(requests)
        while batch := list(islice(opened, self.batch_size)):
            for request, image, problem in batch:
                if image is None:
                    yield request, Answer("", problem=problem)
            usable = [(request, scaled_down(image)) for request, image, _ in batch if image is not None]
            if usable:
                yield from self._batch(usable)

    def _batch(self, usable: list[tuple[Request, Image]]) -> Iterator[tuple[Request, Answer]]:
        started = time.monotonic()
        limit = THINKING_TOKENS if any(request.schema for request, _ in usable) else MOST_TOKENS
        texts, lengths = self._generate([r for r, _ in usable], [i for _, i in usable], limit)
        seconds = (time.monotonic() - started) / len(usable)
        for (request, _), text, length in zip(usable, texts, lengths, strict=True):
            yield request, Answer(text.strip(), cut=length >= limit, tokens_out=length, seconds=seconds)

    def _generate(self, requests: list[Request], images: list[Image], limit: int) -> tuple[list[str], list[int]]:
        raise NotImplementedError

    def _run(self, inputs: Any, requests: list[Request], limit: int, **settings: Any) -> Any:
        """Token ids of the answers. A second attempt samples, with a seed of its own, or it would say the same again."""
        import torch

        attempt = max(request.attempt for request in requests)
        inputs = {name: self._to_device(value) for name, value in inputs.items()}
        sampling = {"do_sample": False} if not attempt else {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(attempt)
            return self.network.generate(**inputs, max_new_tokens=limit, **sampling, **settings)

    def _to_device(self, value: Any) -> Any:
        value = value.to(self.network.device)
        return value.to(self.network.dtype) if value.is_floating_point() else value

    def _lengths(self, tokens: Any) -> list[int]:
        pad = getattr(self.network.generation_config, "pad_token_id", None)
        return [int((row != pad).sum()) if pad is not None else len(row) for row in tokens]


class VisionLanguageCaptioner(LocalCaptioner):
    """Chat models that take pictures: Qwen2.5-VL, Qwen3-VL, SmolVLM, InternVL, Gemma 3, LLaVA."""

    name, follows_prompts = "vision-language", True

    def _generate(self, requests: list[Request], images: list[Image], limit: int) -> tuple[list[str], list[int]]:
        chats = [self._chat(request, image) for request, image in zip(requests, images, strict=True)]
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # answers must follow their prompts directly
        settings = {"padding": True} if len(chats) > 1 else {}
        inputs = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings)
        tokens = self._run(inputs, requests, limit)[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(tokens, skip_special_tokens=True), self._lengths(tokens)

    def _chat(self, request: Request, image: Image) -> list[dict]:
        question = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": request.prompt}]}
        return [{"role": "system", "content": [{"type": "text", "text": request.system}]}, question] if request.system else [question]


class FlorenceCaptioner(LocalCaptioner):
    """Florence-2 describes in its own words: it takes a task and no instructions."""

    name = "florence-2"

    def _generate(self, requests: list[Request], images: list[Image], limit: int) -> tuple[list[str], list[int]]:
        inputs = self.processor(text=[FLORENCE_TASK] * len(images), images=images, return_tensors="pt")
        tokens = self._run(inputs, requests, limit, num_beams=3)[:, 1:]  # the first token only starts the answer
        # A caption needs nothing of the processor's parsing, which would leave the padding of a batch in the text.
        return self.processor.batch_decode(tokens, skip_special_tokens=True), self._lengths(tokens)


class Blip2Captioner(LocalCaptioner):
    """BLIP-2 gives short captions and takes no instructions."""

    name = "blip-2"

    def _generate(self, requests: list[Request], images: list[Image], limit: int) -> tuple[list[str], list[int]]:
        inputs = self.processor(images=images, text=[""] * len(images), return_tensors="pt")
        encodes = self.network.language_model.config.is_encoder_decoder  # then an answer begins with a starting token, else with the question
        tokens = self._run(inputs, requests, limit)[:, 1 if encodes else inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(tokens, skip_special_tokens=True), self._lengths(tokens)


def scaled_down(image: Image) -> Image:
    """The picture with at most `LARGEST_PIXELS` pixels."""
    area = image.width * image.height
    if area > LARGEST_PIXELS:
        scale = (LARGEST_PIXELS / area) ** 0.5
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), reducing_gap=3.0)
    return image
