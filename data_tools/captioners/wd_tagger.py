"""Tags by a WD tagger (ONNX): what is in the picture as a list of words, with their probabilities."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.captioners import Answer, Request, each_picture
from data_tools.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FILES = ("model.onnx", "selected_tags.csv")
GENERAL, CHARACTER, RATING = "0", "4", "9"  # categories of selected_tags.csv
# Tags that are faces made of characters; their underscores are not spaces.
EMOTICONS = frozenset("0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split())
# Tags of medium and style: in a style set they belong to the trigger, not into the caption.
STYLE_TAGS = frozenset("sketch lineart monochrome greyscale traditional_media watercolor_(medium) oil_painting_(medium) pixel_art 3d realistic photorealistic flat_color chibi".split())


class WdTagger:
    """model: a folder with model.onnx and selected_tags.csv, or a Hub identifier.

    least, least_character: probabilities from which general and character tags are taken, 0..1.  style: "leave_out" or "keep".
    """

    name, follows_prompts = "wd-tagger", False

    def __init__(self, model: str, *, least: float = 0.35, least_character: float = 0.85, style: str = "leave_out"):
        try:
            import onnxruntime
        except ImportError:
            raise BadInput("the WD tagger needs onnxruntime", fix='pip install "brushwork[tagger]"') from None
        network, tags = _files(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exceptions share no base
            raise BadInput(f"not a usable ONNX model: {' '.join(str(error).split())[:200]}", where=str(network)) from None
        self.model, self.tags = model, _read_tags(tags)
        self.least, self.least_character, self.style = least, least_character, style
        shape = self.session.get_inputs()[0].shape
        self.side = shape[1] if isinstance(shape[1], int) else 448

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        for request, image, problem in each_picture(requests):
            started = time.monotonic()
            tags = self._tags(image) if image is not None else []
            yield request, Answer(", ".join(tags), seconds=time.monotonic() - started, problem=problem or ("" if tags else "no tag is likely enough"))

    def _tags(self, image: Image) -> list[str]:
        name = self.session.get_inputs()[0].name
        chances = self.session.run(None, {name: as_input(image, self.side)})[0][0]
        if len(chances) != len(self.tags):
            raise BadInput(f"the model gives {len(chances)} tags, selected_tags.csv names {len(self.tags)}", where=self.model)
        floor = {GENERAL: self.least, CHARACTER: self.least_character}
        taken = [(float(c), tag) for c, (tag, category) in zip(chances, self.tags, strict=True) if category in floor and c >= floor[category]]
        kept = [tag for _, tag in sorted(taken, key=lambda pair: (-pair[0], pair[1])) if self.style == "keep" or tag not in STYLE_TAGS]
        return [tag if tag in EMOTICONS else tag.replace("_", " ") for tag in kept]


def as_input(image: Image, side: int) -> np.ndarray:
    """float32 [1, side, side, 3] in BGR, 0..255: padded to a square with white, as these models were trained."""
    import numpy as np
    from PIL import Image as images

    longest = max(image.size)
    square = images.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), images.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])


def _files(model: str) -> tuple[Path, Path]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=list(FILES)))
        except Exception as error:  # offline, unknown, gated: all the same to the user
            raise BadInput(f"the tagger {model} is neither a folder nor on the Hub: {' '.join(str(error).split())[:150]}", fix=f"a folder with {' and '.join(FILES)}") from None
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise BadInput(f"lacks {' and '.join(missing)}", where=str(folder))
    return folder / FILES[0], folder / FILES[1]


def _read_tags(path: Path) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise BadInput("has no columns name and category", where=str(path))
    return [(row["name"], row["category"]) for row in rows]
