"""What a plan traced is kept: found again for the same question, and for no other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from finetune.training import plan_kept
from finetune.training.plan_kept import kept


@dataclass(frozen=True)
class Found:
    bytes: float
    name: str
    layers: tuple[tuple[int, ...], ...] = ((8, 4), ())


@pytest.fixture
def asked(tmp_path):
    """Ask for something that takes work, and hear how often that was done."""
    done: list[tuple] = []

    def ask(*parts, folder=tmp_path, lasting=True):
        def trace():
            done.append(parts)
            return Found(1.5 * len(done), "whole")

        return kept(folder, Found, parts, trace, lambda _: lasting), len(done)

    return ask


def test_the_same_question_is_answered_without_tracing_and_another_is_not(asked):
    first, _ = asked("sd3", {"depth": 2})
    assert asked("sd3", {"depth": 2}) == (first, 1)
    assert asked("sd3", {"depth": 3})[1] == 2 and asked("sd3", {"depth": 2}) == (first, 2)


def test_other_libraries_or_other_code_are_another_question(asked, monkeypatch):
    asked("sd3")
    monkeypatch.setattr(plan_kept, "_ground", lambda: ["later libraries"])
    assert asked("sd3")[1] == 2


def test_what_does_not_last_and_what_has_no_folder_is_traced_every_time(asked):
    assert [asked("sd3", lasting=False)[1] for _ in range(2)] == [1, 2]
    assert [asked("sd3", folder=None)[1] for _ in range(2)] == [3, 4]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"bytes": 1}', '{"bytes": 1, "name": "a", "more": 2}'])
def test_a_torn_or_foreign_file_is_made_anew(asked, tmp_path, content):
    asked("sd3")
    (path,) = (tmp_path / "plans").iterdir()
    path.write_text(content)
    found, times = asked("sd3")
    assert found == Found(3.0, "whole") and times == 2
    assert asked("sd3") == (found, 2)
