"""One annotator at the rating page: what comes next, what was answered, what can be undone. Knows nothing of the web.

All state is the replay of the folder's log, so a session that was killed goes on where its last answer reached the disk.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_tools.errors import BadInput, DataError

from finetune.preference.agreement import trust
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.comparisons import CRITERIA, Event, Judgement, Skip, Undo
from finetune.preference.rating_plan import PlanSettings, Question, RatingPlan
from finetune.randomness import python_random

LONGEST_VIEW = 86_400_000


@dataclass(frozen=True)
class Answer:
    """What the page sends. id: made by the page, so that a repeated request is one event.  question: its key.
    position: of the preferred picture on the screen.  ranking: a rank for each position.  points: by criterion."""

    id: str
    question: str
    position: int | None = None
    tie: bool = False
    both_bad: bool = False
    ranking: tuple[int, ...] | None = None
    points: Mapping[str, int] | None = None
    ms: int | None = None


class RatingSession:
    """Questions for one annotator of one folder."""

    def __init__(self, folder: CandidateFolder, annotator: str, settings: PlanSettings, criteria: Sequence[str] = CRITERIA):
        if not annotator.strip() or len(annotator) > 80:
            raise BadInput("an annotator's name has 1 to 80 characters", where="--annotator")
        self.folder, self.annotator, self.criteria = folder, annotator.strip(), tuple(criteria)
        self.plan = RatingPlan(folder, settings)
        self.log = folder.log()
        self.revisiting = False
        self._order: list[Question] = []
        self._by_key: dict[str, Question] = {}

    def _sync(self) -> None:
        """Take in what other processes wrote and what the plan gained."""
        self.log.refresh()
        if len(self._by_key) != len(self.plan.questions):
            for question in self.plan.questions:
                self._by_key.setdefault(question.key, question)
            self._order = self._own_order()

    def _own_order(self) -> list[Question]:
        """Portion by portion as planned, but within the whole in an order of this annotator's own; repeats come late."""
        known = [question for question in self._order if question.key in self._by_key]
        old = {question.key for question in known}
        fresh = [question for question in self.plan.questions if question.key not in old]
        python_random(self.plan.settings.seed, f"order for {self.annotator}", len(old)).shuffle(fresh)
        fresh.sort(key=lambda question: question.repeat)
        return known + fresh

    def upcoming(self, count: int = 3) -> list[Question]:
        """The next questions; grows the plan where this annotator has come to its end."""
        self._sync()
        waiting = self._waiting()
        while len(waiting) < count and self.plan.grow():
            self._sync()
            waiting = self._waiting()
        return waiting[:count]

    def _waiting(self) -> list[Question]:
        mine, others = set(), set()
        for event in self.log.standing():
            if event.rater != self.annotator:
                others.add(_key(event))
            elif isinstance(event, Judgement) or not self.revisiting:
                mine.add(_key(event))
        return [
            question for question in self._order
            if (key := _key(question)) not in mine and (key not in others or self.plan.is_shared(question))
        ]

    def shown(self, question: Question) -> tuple[str, ...]:
        """The pictures in the order of the screen: random by annotator and question, the other way round in a repeat."""
        items = list(question.items)
        python_random(self.plan.settings.seed, f"sides for {self.annotator}", index=int(replace(question, repeat=False).key[:8], 16)).shuffle(items)
        return tuple(reversed(items)) if question.repeat else tuple(items)

    def prompt(self, question: Question) -> str:
        """The words that the pictures were made from."""
        return self.folder.candidates()[question.items[0]].prompt

    def answer(self, answer: Answer) -> None:
        """Put one answer on disk. Raises BadInput for an answer that does not fit the question, and for a second one to it, which a page that was
        left open elsewhere sends: it would count as another judgement."""
        question = self._question(answer.question)
        if not self.log.knows(answer.id) and any(isinstance(event, Judgement) and _key(event) == question.key for event in self.log.standing(self.annotator)):
            raise BadInput("this question was answered before", where="answer", fix="load the page again")
        shown = self.shown(question)
        judgement = Judgement(
            id=answer.id, rater=self.annotator, mode=question.mode, prompt_id=question.prompt_id, prompt=self.prompt(question), items=question.items,
            shown=shown, choice=self._chosen(answer, shown), tie=answer.tie or answer.both_bad, both_bad=answer.both_bad,
            ranking=_stored_ranking(answer, question, shown), axes=self._points(answer, question), ms=None if answer.ms is None else min(answer.ms, LONGEST_VIEW), repeat=question.repeat,
        )
        try:
            self.log.append(judgement)
        except DataError as error:
            raise BadInput(error.what, where="answer") from None

    def _chosen(self, answer: Answer, shown: tuple[str, ...]) -> str | None:
        if answer.position is None:
            return None
        if not 0 <= answer.position < len(shown):
            raise BadInput(f"position {answer.position} of {len(shown)} pictures", where="answer")
        return shown[answer.position]

    def _points(self, answer: Answer, question: Question) -> Mapping[str, int] | None:
        if question.mode != "score":
            return None
        if set(answer.points or {}) != set(self.criteria):
            raise BadInput(f"points are needed for {', '.join(self.criteria)}", where="answer")
        return answer.points

    def skip(self, question_key: str, event_id: str) -> None:
        """Pass over a question; it can be looked at again at the end."""
        question = self._question(question_key)
        self.log.append(Skip(id=event_id, rater=self.annotator, mode=question.mode, items=question.items, repeat=question.repeat))

    def undo(self, event_id: str) -> bool:
        """Take back this annotator's latest answer or skip of this mode; its question comes next. False: nothing left."""
        self._sync()
        if self.log.knows(event_id):
            return True
        own = [event for event in self.log.standing(self.annotator) if event.mode == self.plan.settings.mode and _key(event) in self._by_key]
        if not own:
            return False
        self.log.append(Undo(id=event_id, rater=self.annotator, undoes=own[-1].id))
        question = self._by_key[_key(own[-1])]
        self._order.remove(question)
        self._order.insert(0, question)
        return True

    def _question(self, key: str) -> Question:
        self._sync()
        if key not in self._by_key:
            raise BadInput("this question is not in the plan", where="answer", fix="load the page again")
        return self._by_key[key]

    def progress(self) -> dict[str, Any]:
        """Counts for the page: answered, skipped, total for this annotator."""
        self._sync()
        own = [event for event in self.log.standing(self.annotator) if _key(event) in self._by_key]
        answered = len({_key(event) for event in own if isinstance(event, Judgement)})
        skipped = len({_key(event) for event in own if isinstance(event, Skip)} - {_key(event) for event in own if isinstance(event, Judgement)})
        repeats = round(self.plan.wanted * self.plan.settings.repeats) if self.plan.settings.mode == "pair" else 0
        planned_more = max(0, self.plan.wanted + repeats - len(self.plan.questions))
        return {"answered": answered, "skipped": skipped, "total": max(answered + len(self._waiting()) + planned_more + (0 if self.revisiting else skipped), 1)}

    def summary(self) -> dict[str, Any]:
        """Figures for the closing screen, of this annotator's own judgements and of agreement among all."""
        judgements = self.log.judgements()
        own = trust([judgement for judgement in judgements if judgement.rater == self.annotator])
        return {"judgements": own.judgements, "left": own.left.value, "consistency": own.consistency.value, "seconds": own.seconds.get(self.annotator), "annotators": len({judgement.rater for judgement in judgements}), "agreement": trust(judgements).pair_agreement.value}


def _key(event: Event | Question) -> str:
    return _key_of(event.mode, event.items, event.repeat)


@functools.lru_cache(maxsize=65536)
def _key_of(mode: str, items: tuple[str, ...], repeat: bool) -> str:
    return Question(mode, "", items, repeat).key


def _stored_ranking(answer: Answer, question: Question, shown: tuple[str, ...]) -> tuple[int, ...] | None:
    """From ranks by screen position to ranks in the order of the question's items."""
    if question.mode != "rank" or answer.ranking is None:
        return None
    if len(answer.ranking) != len(shown):
        raise BadInput(f"{len(answer.ranking)} ranks for {len(shown)} pictures", where="answer")
    rank_of = dict(zip(shown, answer.ranking, strict=True))
    return tuple(rank_of[item] for item in question.items)


def parse_criteria(text: str) -> tuple[str, ...]:
    """Names separated by commas. Raises BadInput for none, too many, or one twice."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not 1 <= len(names) <= 8 or len(set(names)) != len(names):
        raise BadInput("1 to 8 different criteria are needed", where="--criteria", fix="--criteria alignment,aesthetics")
    return names
