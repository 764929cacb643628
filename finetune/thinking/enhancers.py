"""Think about a prompt before it is drawn: `think` is the one function that the rest of the product calls.

The enhancer behind it is rules (offline, the default), a local chat model, or an endpoint. Whatever it answers, the
result is a checked record, and where anything that the prompt names would be lost the original prompt is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from data_tools.thinking import ThinkingRecord, record_problems
from data_tools.thinking_named import language_of, lost
from data_tools.thinking_reply import asks_to_think
from data_tools.thinking_rules import LONGEST_PROMPT, take_apart, think_by_rules
from finetune.errors import BadInput

# HunyuanImage-3.0's scale: prompts that ask for more than this many things are thought through by themselves.
MANY_ELEMENTS = 5

TokenCounts = Callable[[str], Mapping[str, tuple[int, int]]]


@dataclass(frozen=True)
class Question:
    """What an enhancer is asked. fits: whether a text is within the token limits.  seed: for models that draw words."""

    prompt: str
    language: str
    trigger: str | None
    seed: int
    fits: Callable[[str], bool]


class Enhancer(Protocol):
    """Turns a question into a record. backend and model name it in the record."""

    backend: str
    model: str | None

    def __call__(self, question: Question) -> ThinkingRecord:
        """The record; `ok` false and `reason` set where there is nothing better than the original prompt."""
        ...


class RulesEnhancer:
    """Offline, without a model, the same answer always."""

    backend = "rules"
    model = None

    def __call__(self, question: Question) -> ThinkingRecord:
        return think_by_rules(question.prompt, language=question.language, trigger=question.trigger, fits=question.fits)


RULES = RulesEnhancer()


def too_long(counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """The encoders that would cut a text off, in words: "BERT has 90 of 77 tokens"."""
    return [f"{encoder} has {tokens} of {limit} tokens" for encoder, (tokens, limit) in counts.items() if tokens > limit]


def wants_thinking(prompt: str, *, trigger: str | None = None) -> bool:
    """Whether a prompt is thought through without being told: it carries `<think>`, or names more than five elements."""
    marked, bare = asks_to_think(prompt)
    return marked or len(take_apart(bare, trigger=trigger).elements) > MANY_ELEMENTS


def think(prompt: str, *, enhancer: Enhancer = RULES, token_counts: TokenCounts | None = None, trigger: str | None = None,
          language: str | None = None, seed: int = 0) -> ThinkingRecord:
    """The thinking record of a prompt. `record.enhanced` is what to draw with, whether `record.ok` or not.

    token_counts: text -> {encoder: (tokens, limit)}, as `ModelFamily.token_counts`; without it nothing limits the length.
    trigger: the adapter's; if the prompt holds it, so does the result.  language: "en" or "zh", else found from the prompt.
    Raises BadInput for a prompt that is empty or longer than any encoder takes, and what the enhancer raises when it
    cannot be reached; a wrong answer never raises.
    """
    _, bare = asks_to_think(prompt)
    if not bare.strip():
        raise BadInput("the prompt is empty", fix="say what to draw")
    if len(bare) > LONGEST_PROMPT:
        raise BadInput(f"the prompt has {len(bare)} characters, at most {LONGEST_PROMPT} are taken", fix="shorten it")

    def fits(text: str) -> bool:
        return token_counts is None or not too_long(token_counts(text))

    question = Question(bare, language or language_of(bare), trigger, seed, fits)
    return checked(enhancer(question), question, enhancer)


def checked(record: ThinkingRecord, question: Question, enhancer: Enhancer) -> ThinkingRecord:
    """The record as it may be used: nothing lost, within the limits, in order; otherwise given up, with the reason."""
    record = replace(record, backend=enhancer.backend, model=enhancer.model, seed=question.seed, trigger=question.trigger)
    if not record.ok:
        return record
    missing = lost(record.prompt, record.enhanced, question.trigger)
    if missing:
        return record.given_up("the enhanced prompt lost " + ", ".join(missing))
    if not question.fits(record.enhanced):
        return record.given_up("the enhanced prompt is longer than the text encoders take")
    problems = record_problems(record.to_json())
    if problems:
        return think_by_rules(question.prompt, trigger=question.trigger).given_up("the answer is no valid record: " + "; ".join(problems[:3]))
    return record
