"""Small candidate folders for tests: plain colours with a known quality, no model needed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from PIL import Image

from finetune.preference.candidate_folder import Candidate, CandidateFolder
from finetune.preference.comparisons import Judgement


def colour_folder(root: Path, *, prompts: int = 3, per_prompt: int = 4, size: int = 16, words: str = "a picture") -> CandidateFolder:
    """Candidates c<prompt>-<n> whose redness is random; the folder has no judgements yet."""
    chance = random.Random(7)
    folder = CandidateFolder(root)
    folder.pictures.mkdir(parents=True, exist_ok=True)
    for prompt in range(prompts):
        for number in range(per_prompt):
            image = Image.new("RGB", (size, size))
            base = [chance.randrange(256) for _ in range(3)]
            image.putdata([tuple(min(255, max(0, channel + chance.randrange(-30, 30))) for channel in base) for _ in range(size * size)])
            path = folder.pictures / f"c{prompt}-{number}.png"
            image.save(path)
            folder.add(Candidate(id=f"c{prompt}-{number}", prompt_id=f"p{prompt}", prompt=f"{words} {prompt}", path=f"pictures/{path.name}", seed=number))
    return folder


def warmth_of(folder: CandidateFolder, item: str) -> float:
    """Red minus blue, 0..255."""
    with Image.open(folder.picture(item)) as image:
        pixels = list(image.convert("RGB").getdata())
    return sum(pixel[0] - pixel[2] for pixel in pixels) / len(pixels)


def rate_all_pairs(folder: CandidateFolder, *, quality=warmth_of, mistakes: float = 0.0, rater: str = "simulated") -> None:
    """Judge every pair of every prompt by `quality`, wrong with probability `mistakes`."""
    chance, log = random.Random(rater), folder.log()
    for prompt_id, group in folder.by_prompt().items():
        truth = {candidate.id: quality(folder, candidate.id) for candidate in group}
        for one, other in itertools.combinations(truth, 2):
            better, worse = (one, other) if truth[one] >= truth[other] else (other, one)
            choice = worse if chance.random() < mistakes else better
            log.append(Judgement(rater, "pair", prompt_id, group[0].prompt, (one, other), choice=choice))
