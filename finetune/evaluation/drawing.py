"""Draw every subject's pictures: same prompts, same seeds, one loaded base, whole files only, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.progress import Progress
from finetune.evaluation.evidence import Pixels
from finetune.evaluation.prompts import EvaluationPrompt
from finetune.evaluation.subjects import Subject

if TYPE_CHECKING:
    from finetune.families.base_models import BaseModel
    from finetune.families.protocol import Conditioning

SETTINGS_NAME = "evaluation"


@dataclass(frozen=True)
class DrawingSettings:
    """Everything but the adapter that decides what a picture looks like. height, width: pixels."""

    base: str
    revision: str | None
    base_files: str
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    negative: str
    height: int
    width: int

    @property
    def hash(self) -> str:
        """Short name of these settings; the seeds are left out, since each picture has its own."""
        return hashlib.sha256(json.dumps(asdict(self) | {"seeds": []}, sort_keys=True).encode()).hexdigest()[:16]


def base_files(folder: Path) -> str:
    """A hash of names, sizes and small files of a base: another base in the same place has another."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)}|{size}|".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


class PictureFolder:
    """Where one subject's pictures lie; only pictures of the same settings count as there."""

    def __init__(self, folder: Path, settings: DrawingSettings):
        self.folder, self.settings = folder, settings

    def path(self, prompt: EvaluationPrompt, seed: int) -> Path:
        return self.folder / f"{prompt.prompt_id}-{seed}.png"

    def read(self, prompt: EvaluationPrompt, seed: int) -> Pixels | None:
        """The picture, or None when it is missing, damaged, or of other settings or words."""
        from PIL import Image

        from finetune.sampling import SETTINGS_KEY

        try:
            with Image.open(self.path(prompt, seed)) as image:
                pixels = np.asarray(image.convert("RGB"))
                stored = json.loads(image.info.get(SETTINGS_KEY, "{}"))
        except (OSError, ValueError, SyntaxError):
            return None
        return pixels if stored.get(SETTINGS_NAME) == self._mark(prompt) else None

    def _mark(self, prompt: EvaluationPrompt) -> str:
        return f"{self.settings.hash}/{hashlib.sha256(prompt.prompt.encode()).hexdigest()[:16]}"

    def write(self, image: Any, prompt: EvaluationPrompt, seed: int, subject: Subject) -> None:
        from finetune.sampling import save_picture

        told = {"prompt": prompt.prompt, "seed": seed, "steps": self.settings.steps, "guidance": self.settings.guidance, "negative": self.settings.negative,
                "base": self.settings.base, "adapter": subject.sha256, "weight": subject.weight}
        save_picture(image, self.path(prompt, seed), told | {SETTINGS_NAME: self._mark(prompt)})


class Studio:
    """One base in memory: prompts encoded once (and once for each subject that trains text encoders), then transformer and
    VAE, adapters attached one after the other."""

    def __init__(self, base: BaseModel, settings: DrawingSettings, prompts: Iterable[str], subjects: Sequence[Subject], progress: Progress):
        from finetune.generation import best_device, best_dtype, encode_texts

        self.base, self.settings, self.progress = base, settings, progress
        self.device = best_device()
        dtype = best_dtype(self.device)
        texts = list(dict.fromkeys([*prompts, settings.negative, ""]))
        with progress.phase("encoding prompts", len(texts)) as advance:
            worn = [[] if subject.path is None else [(subject.load(), subject.weight)] for subject in subjects]
            self.conditionings, *encoded = encode_texts(base, texts, dtype, self.device, [[], *worn])
            self._encoded: dict[str, dict[str, Conditioning]] = dict(zip((subject.name for subject in subjects), encoded, strict=True))
            advance(len(texts))
        with progress.phase("loading the model"):
            self.pipeline = base.family.load(base.folder, frozenset({"transformer", "vae"}), dtype)
            self.pipeline.to(self.device)

    def draw(self, subject: Subject, folder: PictureFolder, wanted: Sequence[tuple[EvaluationPrompt, int]], batch_size: int = 8) -> int:
        """Draw what is not there yet; returns how many pictures were drawn. Every batch is on disk before the next begins."""
        missing = [(prompt, seed) for prompt, seed in wanted if folder.read(prompt, seed) is None]
        if not missing:
            return 0
        with self.progress.phase(f"drawing {subject.name}", len(missing)) as advance:
            conditionings = self._attach(subject)
            try:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    for (prompt, seed), image in zip(batch, self._pictures(batch, conditionings), strict=True):
                        folder.write(image, prompt, seed, subject)
                    advance(len(batch))
            finally:
                self._detach(subject)
        return len(missing)

    def _attach(self, subject: Subject) -> dict[str, Conditioning]:
        from finetune.adapters.attach import attach
        from finetune.thinking.tokens import conditionings_with_tokens, tokens_of

        if subject.path is None:
            return self.conditionings
        adapter = subject.load()
        tokens = tokens_of(adapter, subject.path, self.base.family.facts.text_stream)
        conditionings = conditionings_with_tokens(self._encoded[subject.name], tokens, {self.settings.negative})
        attach(self.pipeline.transformer, replace(adapter, text_encoders={}), "subject", subject.weight)
        return conditionings

    def _detach(self, subject: Subject) -> None:
        from finetune.adapters.attach import detach
        from finetune.adapters.lora import adapter_names

        if subject.path is not None and adapter_names(self.pipeline.transformer):
            detach(self.pipeline.transformer)

    def _pictures(self, batch: Sequence[tuple[EvaluationPrompt, int]], conditionings: dict[str, Conditioning]) -> list[Any]:
        from finetune.sampling import PictureRequest, draw

        settings = self.settings
        requests = [PictureRequest(prompt.prompt, seed, settings.height, settings.width, settings.steps, settings.guidance, settings.negative)
                    for prompt, seed in batch]
        return draw(self.base.family, self.pipeline, requests, conditionings, batch_size=len(batch))
