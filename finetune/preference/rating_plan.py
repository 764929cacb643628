"""Which pictures are shown together, written down so that every annotator meets the same questions after any restart.

The plan grows in portions: the first is a balanced design, later ones ask what the answers so far leave open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from data_tools.atomic_files import write_text
from data_tools.errors import DataError

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import MODES
from finetune.preference.pair_choice import balanced_sets, informative_pairs
from finetune.preference.pairs import preference_pairs
from finetune.randomness import python_random, stable_seed

PORTION = 24


@dataclass(frozen=True)
class Question:
    """Pictures that are judged together. repeat: asked a second time, to measure an annotator's consistency."""

    mode: str
    prompt_id: str
    items: tuple[str, ...]
    repeat: bool = False

    @property
    def key(self) -> str:
        """The same name in every process."""
        return hashlib.sha256(json.dumps([self.mode, sorted(self.items), self.repeat]).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class PlanSettings:
    """mode: pair, rank or score.  wanted: questions in all (None: a sensible number).  set_size: pictures of a ranking.
    repeats: share of pairs asked again, 0..0.5.  overlap: share of questions that every annotator answers, 0..1; the
    rest are answered by whoever comes first.  seed: order and choice among equals."""

    mode: str = "pair"
    wanted: int | None = None
    set_size: int = 4
    repeats: float = 0.0
    overlap: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises DataError for a value out of range."""
        if self.mode not in MODES:
            raise DataError(f"mode {self.mode!r} is not one of {', '.join(MODES)}", where="--mode")
        if self.wanted is not None and self.wanted < 1:
            raise DataError(f"{self.wanted} questions; at least 1", where="--questions")
        if not 2 <= self.set_size <= 9:
            raise DataError(f"rankings of {self.set_size} pictures; 2 to 9 fit the number keys", where="--set-size")
        if not 0 <= self.repeats <= 0.5:
            raise DataError(f"a share of {self.repeats} repeats; 0 to 0.5", where="--repeats")
        if not 0 <= self.overlap <= 1:
            raise DataError(f"an overlap of {self.overlap}; 0 to 1", where="--overlap")


class RatingPlan:
    """The questions of one folder and mode, kept in `rating_plan.json`."""

    def __init__(self, folder: CandidateFolder, settings: PlanSettings):
        settings.check()
        self.folder, self.settings = folder, settings
        self._groups = {prompt_id: [candidate.id for candidate in group] for prompt_id, group in folder.by_prompt().items()}
        self._other_modes: list[dict] = []
        self.questions: list[Question] = self._read()
        self.possible = self._possible()
        if not self.possible:
            raise DataError(f"no prompt has enough pictures for mode {settings.mode}", where=str(folder.root), fix="make more candidates a prompt: brushwork prefer candidates --per-prompt 4")
        self.wanted = max(len(self.questions), self._wanted())

    def _possible(self) -> int:
        sizes = [len(group) for group in self._groups.values()]
        if self.settings.mode == "pair":
            return sum(size * (size - 1) // 2 for size in sizes)
        if self.settings.mode == "score":
            return sum(sizes)
        return sum(size // self.settings.set_size * max(1, size - 1) for size in sizes)

    def _wanted(self) -> int:
        """Pairs: enough for every picture to be met about four times; rankings and scores: every picture once."""
        if self.settings.wanted is not None:
            return min(self.settings.wanted, self.possible)
        pictures = sum(len(group) for group in self._groups.values())
        return min(self.possible, {"pair": 2 * pictures, "rank": max(1, pictures // self.settings.set_size), "score": pictures}[self.settings.mode])

    def _read(self) -> list[Question]:
        path = self.folder.plan
        if not path.is_file():
            return []
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["questions"]
            questions = [Question(entry["mode"], entry["prompt_id"], tuple(entry["items"]), bool(entry["repeat"])) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a rating plan ({type(error).__name__})", where=str(path), fix="delete it: the plan is made again and no judgement is lost") from None
        known = self.folder.candidates()
        self._other_modes = [asdict(question) for question in questions if question.mode != self.settings.mode]
        return [question for question in questions if question.mode == self.settings.mode and all(item in known for item in question.items)]

    def grow(self) -> int:
        """Add the next portion, chosen by the judgements so far, or what another process added meanwhile; how many."""
        there = len(self.questions)
        self.questions = max(self._read(), self.questions, key=len)
        if len(self.questions) > there:
            return len(self.questions) - there
        missing = self.wanted - len(self._first_time())
        if missing <= 0:
            return 0
        fresh = self._choose(min(missing, PORTION if self.settings.mode == "pair" else missing))
        order = python_random(self.settings.seed, "repeats", len(self.questions))
        again = [Question(q.mode, q.prompt_id, q.items, True) for q in [*self._first_time(), *fresh] if self.settings.mode == "pair"]
        taken = {question.key for question in self.questions}
        again = [question for question in again if question.key not in taken]
        order.shuffle(again)
        added = [*fresh, *again[:round(len(fresh) * self.settings.repeats)]]
        self.questions += added
        write_text(self.folder.plan, json.dumps({"v": 1, "questions": self._other_modes + [asdict(question) for question in self.questions]}, ensure_ascii=False))
        return len(added)

    def _first_time(self) -> list[Question]:
        return [question for question in self.questions if not question.repeat]

    def _choose(self, count: int) -> Sequence[Question]:
        mode, seed = self.settings.mode, self.settings.seed
        if mode == "pair":
            asked = {frozenset(question.items) for question in self.questions}
            known = preference_pairs(self.folder.log().judgements(), ties=True)
            return [Question(mode, prompt_id, items) for prompt_id, items in informative_pairs(self._groups, known, count, seed=seed, asked=asked)]
        if mode == "score":
            asked_items = {question.items[0] for question in self.questions}
            singles = [Question(mode, prompt_id, (item,)) for prompt_id, items in self._groups.items() for item in items if item not in asked_items]
            python_random(seed, "choice of pictures").shuffle(singles)
            return singles[:count]
        asked_sets = {frozenset(question.items) for question in self.questions}
        sets = balanced_sets(self._groups, self.settings.set_size, self.possible, seed=seed)
        return [Question(mode, prompt_id, items) for prompt_id, items in sets if frozenset(items) not in asked_sets][:count]

    def is_shared(self, question: Question) -> bool:
        """Whether every annotator answers this question; decided by its key, so all processes agree."""
        return question.repeat or stable_seed(self.settings.seed, question.key) % 10_000 < self.settings.overlap * 10_000
