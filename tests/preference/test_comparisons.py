"""The log of judgements: nothing is lost, nothing strange gets in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.errors import DataError
from finetune.preference.comparisons import ComparisonLog, Judgement, Skip, Undo, event_from_record
from finetune.preference.journal import Journal

REFERENCE_LINE = (
    '{"v":1,"event":"judgement","id":"j1","rater":"r1","mode":"pair","prompt_id":"p17","prompt":"...",'
    '"items":["c1","c2"],"shown":["c2","c1"],"choice":"c1","tie":false,"axes":null,"ms":2140,"ts":"2026-01-01T00:00:00Z"}'
)


def judgement(**changes) -> dict:
    return json.loads(REFERENCE_LINE) | changes


def test_the_documented_line_is_read(tmp_path):
    (tmp_path / "comparisons.jsonl").write_text(REFERENCE_LINE + "\n")
    [read] = ComparisonLog(tmp_path / "comparisons.jsonl").refresh().judgements()
    assert (read.rater, read.items, read.shown, read.choice, read.ms) == ("r1", ("c1", "c2"), ("c2", "c1"), "c1", 2140)


def test_what_is_appended_is_read_back_equal(tmp_path):
    log = ComparisonLog(tmp_path / "comparisons.jsonl")
    given = [
        Judgement("ada", "pair", "p", "红色的狗 <b>", ("a", "b"), ("b", "a"), choice="b", ms=12, id="1", ts="t"),
        Judgement("ada", "pair", "p", "x", ("a", "b"), ("a", "b"), tie=True, both_bad=True, id="2", ts="t"),
        Judgement("bo", "rank", "p", "x", ("a", "b", "c"), ("c", "a", "b"), ranking=(2, 1, 2), id="3", ts="t"),
        Judgement("bo", "score", "p", "x", ("a",), ("a",), axes={"alignment": 5}, id="4", ts="t"),
    ]
    for one in given:
        log.append(one)
    assert ComparisonLog(tmp_path / "comparisons.jsonl").refresh().judgements() == given


def test_undo_takes_back_and_keeps_history(tmp_path):
    log = ComparisonLog(tmp_path / "comparisons.jsonl")
    log.append(Judgement("ada", "pair", "p", "x", ("a", "b"), choice="a", id="1"))
    log.append(Undo("ada", undoes="1"))
    log.append(Skip("ada", "pair", ("a", "b")))
    assert log.judgements() == [] and len(log.standing()) == 1
    assert len((tmp_path / "comparisons.jsonl").read_text().splitlines()) == 3


def test_the_same_answer_sent_twice_is_one_line(tmp_path):
    log = ComparisonLog(tmp_path / "comparisons.jsonl")
    for _ in range(2):
        log.append(Judgement("ada", "pair", "p", "x", ("a", "b"), choice="a", id="1"))
    assert len((tmp_path / "comparisons.jsonl").read_text().splitlines()) == 1


def test_two_logs_on_one_file_see_each_other(tmp_path):
    one, other = (ComparisonLog(tmp_path / "comparisons.jsonl") for _ in range(2))
    one.append(Judgement("ada", "pair", "p", "x", ("a", "b"), choice="a"))
    other.append(Judgement("bo", "pair", "p", "x", ("a", "b"), choice="b"))
    assert [judgement.rater for judgement in one.refresh().judgements()] == ["ada", "bo"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_only_itself(tmp_path, cut):
    path = tmp_path / "comparisons.jsonl"
    second = REFERENCE_LINE.replace("j1", "j2")
    path.write_bytes((REFERENCE_LINE + "\n" + second[:-cut]).encode())
    log = ComparisonLog(path).refresh()
    assert [one.id for one in log.judgements()] == ["j1"] and log.journal.torn
    log.append(Judgement("ada", "pair", "p", "x", ("a", "b"), choice="a", id="j3"))
    assert [one.id for one in ComparisonLog(path).refresh().judgements()] == ["j1", "j3"]
    assert (tmp_path / "comparisons.jsonl.torn").read_text().strip() == second[:-cut]


def test_a_last_line_without_newline_counts(tmp_path):
    path = tmp_path / "comparisons.jsonl"
    path.write_text(REFERENCE_LINE)
    log = ComparisonLog(path).refresh()
    log.append(Judgement("ada", "pair", "p", "x", ("a", "b"), choice="a", id="j2"))
    assert [one.id for one in ComparisonLog(path).refresh().judgements()] == ["j1", "j2"]


@pytest.mark.parametrize(("changes", "named"), [
    ({"v": 2}, "version 2"), ({"v": True}, "version"), ({"event": "jugement"}, "jugement"), ({"event": ["x"]}, "event"), ({"mode": "pairs"}, "pairs"), ({"items": ["c1"], "shown": ["c1"]}, "1 items"),
    ({"items": ["c1", "c1"]}, "twice"), ({"items": "c1"}, "items"), ({"shown": ["c1", "c9"]}, "shown"), ({"choice": "c9"}, "c9"), ({"choice": None}, "choice"),
    ({"tie": True}, "choice"), ({"tie": "no"}, "tie"), ({"tie": 1}, "tie"), ({"ms": -1}, "ms"), ({"ms": "fast"}, "ms"), ({"rater": ""}, "rater"), ({"prompt": 3}, "prompt"), ({"id": None}, "id"),
    ({"mode": "rank"}, "ranking"), ({"mode": "rank", "ranking": [1]}, "2 items"), ({"mode": "rank", "ranking": [0, 1]}, "rank"), ({"mode": "score"}, "one item"),
    ({"mode": "score", "items": ["c1"], "shown": ["c1"], "axes": {"a": 6}}, "1 to 5"), ({"axes": {"a": True}}, "1 to 5"),
])
def test_a_wrong_line_is_named(changes, named):
    with pytest.raises(DataError) as caught:
        event_from_record(judgement(**changes), "comparisons.jsonl, line 3")
    assert named in caught.value.what and caught.value.where == "comparisons.jsonl, line 3"


@pytest.mark.parametrize("content", [b"not json\n", b"[1]\n", b'{"v": NaN}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'"' + b"x" * (1 << 21) + b'"\n'])
def test_a_strange_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "comparisons.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        ComparisonLog(path).refresh()
    assert "line 1" in caught.value.where


WRITER = """
import sys
from finetune.preference.comparisons import ComparisonLog, Judgement
log = ComparisonLog(sys.argv[1])
number = 0
while True:
    log.append(Judgement("ada", "pair", "p", "x", ("a", "b"), choice="a", id=f"{sys.argv[2]}-{number}"))
    print(number, flush=True)
    number += 1
"""


def test_every_acknowledged_answer_survives_sigkill(tmp_path):
    path = tmp_path / "comparisons.jsonl"
    for turn in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(turn)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        for _ in range(5 + 3 * turn):
            acknowledged = int(writer.stdout.readline())
        time.sleep(0.003 * turn)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        ids = {judgement.id for judgement in ComparisonLog(path).refresh().judgements()}
        assert {f"{turn}-{number}" for number in range(acknowledged + 1)} <= ids


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "comparisons.jsonl"
    journal = Journal(path)
    journal.append({"n": 1})
    real = os.write

    def fails_half_way(descriptor, content):
        if len(content) > 5:
            real(descriptor, content[:5])
            raise OSError(28, "No space left on device")
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", fails_half_way)
    with pytest.raises(OSError, match="No space"):
        journal.append({"n": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"n": 1}\n'
