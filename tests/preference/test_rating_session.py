"""One annotator's questions: plan, order, undo, skip, resume, several annotators."""

import pytest

from data_tools.errors import BadInput, DataError
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.rating_plan import PlanSettings
from finetune.preference.rating_session import Answer, RatingSession, parse_criteria
from tests.preference.pictures import colour_folder


def session(folder, annotator="ada", **settings):
    criteria = settings.pop("criteria", ("alignment", "style"))
    return RatingSession(CandidateFolder.existing(folder.root), annotator, PlanSettings(**settings), criteria)


def answer_all(one, position=0):
    seen = []
    while upcoming := one.upcoming(1):
        seen.append(upcoming[0])
        one.answer(Answer(f"{one.annotator}-{len(seen)}", upcoming[0].key, position=position))
    return seen


def test_every_pair_once_then_the_end(tmp_path):
    one = session(colour_folder(tmp_path), wanted=10)
    seen = answer_all(one)
    assert len({question.key for question in seen}) == 10
    assert one.progress() == {"answered": 10, "skipped": 0, "total": 10}
    assert one.summary()["judgements"] == 10


def test_position_on_the_screen_becomes_the_right_picture(tmp_path):
    one = session(colour_folder(tmp_path), wanted=18)
    sides = set()
    while upcoming := one.upcoming(1):
        question = upcoming[0]
        shown = one.shown(question)
        sides.add(shown == question.items)
        one.answer(Answer(f"a{len(one.log.judgements())}", question.key, position=1))
        assert one.log.judgements()[-1].choice == shown[1] and one.log.judgements()[-1].shown == shown
    assert sides == {True, False}


def test_a_new_process_goes_on_where_the_last_answer_was_written(tmp_path):
    folder = colour_folder(tmp_path)
    one = session(folder, wanted=8)
    answered = []
    for number in range(5):
        answered.append(one.upcoming(1)[0].key)
        one.answer(Answer(f"a{number}", answered[-1], position=0))
    again = session(folder, wanted=8)
    assert again.progress() == {"answered": 5, "skipped": 0, "total": 8}
    assert not {question.key for question in answer_all(again)} & set(answered)


def test_a_page_that_was_left_open_elsewhere_does_not_judge_twice(tmp_path):
    """Two tabs or processes of one annotator show the same question; its second answer counted as another judgement."""
    folder = colour_folder(tmp_path)
    first, second = session(folder, wanted=4), session(folder, wanted=4)
    key = first.upcoming(1)[0].key
    assert second.upcoming(1)[0].key == key
    first.answer(Answer("one", key, position=0))
    first.answer(Answer("one", key, position=0))  # the same answer sent again, as after a lost reply
    with pytest.raises(BadInput, match="answered before"):
        second.answer(Answer("two", key, position=1))
    assert len(folder.log().judgements()) == 1
    second.undo("undo")
    second.answer(Answer("three", key, position=1))
    assert [judgement.id for judgement in folder.log().judgements()] == ["three"]


def test_undo_brings_the_question_back_first_and_goes_far_back(tmp_path):
    one = session(colour_folder(tmp_path), wanted=6)
    keys = []
    for number in range(3):
        keys.append(one.upcoming(1)[0].key)
        one.answer(Answer(f"a{number}", keys[-1], position=0))
    for number in (2, 1, 0):
        assert one.undo(f"u{number}") and one.upcoming(1)[0].key == keys[number]
    assert not one.undo("u9") and one.progress()["answered"] == 0
    assert one.undo("u0")  # the same request again changes nothing


def test_skipped_questions_come_again_only_when_asked_for(tmp_path):
    one = session(colour_folder(tmp_path), wanted=3)
    first = one.upcoming(1)[0]
    one.skip(first.key, "s1")
    answer_all(one)
    assert one.progress() == {"answered": 2, "skipped": 1, "total": 3}
    one.revisiting = True
    assert [question.key for question in one.upcoming()] == [first.key]


def test_annotators_share_out_what_does_not_overlap(tmp_path):
    folder = colour_folder(tmp_path, prompts=6)
    ada, bo = (session(folder, name, wanted=36, overlap=0.3) for name in ("ada", "bo"))
    by_ada = {question.key for question in answer_all(ada)}
    by_bo = {question.key for question in answer_all(bo)}
    assert len(by_ada) == 36 and 0 < len(by_bo) < 25 and by_bo < by_ada


def test_repeats_show_the_sides_swapped(tmp_path):
    one = session(colour_folder(tmp_path), wanted=18, repeats=0.5)
    answer_all(one)
    repeated = [judgement for judgement in one.log.judgements() if judgement.repeat]
    first = {judgement.items: judgement for judgement in one.log.judgements() if not judgement.repeat}
    assert len(repeated) == 9 and all(judgement.shown == tuple(reversed(first[judgement.items].shown)) for judgement in repeated)
    assert one.summary()["consistency"] == 0.0  # always the left one: never the same picture twice


def test_rankings_are_stored_by_picture(tmp_path):
    one = session(colour_folder(tmp_path), mode="rank", wanted=1, set_size=3)
    question = one.upcoming(1)[0]
    shown = one.shown(question)
    one.answer(Answer("a", question.key, ranking=(2, 1, 2)))
    stored = one.log.judgements()[0]
    assert dict(zip(stored.items, stored.ranking, strict=True)) == dict(zip(shown, (2, 1, 2), strict=True))


def test_scores_need_every_criterion(tmp_path):
    one = session(colour_folder(tmp_path), mode="score")
    question = one.upcoming(1)[0]
    with pytest.raises(BadInput, match="alignment, style"):
        one.answer(Answer("a", question.key, points={"style": 3}))
    one.answer(Answer("a", question.key, points={"style": 3, "alignment": 5}))
    assert one.log.judgements()[0].axes == {"style": 3, "alignment": 5}


@pytest.mark.parametrize("wrong", [{"position": 2}, {}, {"position": 0, "tie": True}, {"ranking": (1, 2)}])
def test_an_answer_that_does_not_fit_is_refused_and_not_written(tmp_path, wrong):
    one = session(colour_folder(tmp_path))
    with pytest.raises(BadInput):
        one.answer(Answer("a", one.upcoming(1)[0].key, **wrong))
    assert one.log.judgements() == []


def test_unknown_questions_and_bad_settings_are_named(tmp_path):
    folder = colour_folder(tmp_path)
    with pytest.raises(BadInput, match="not in the plan"):
        session(folder).answer(Answer("a", "0" * 20, position=0))
    for settings in ({"mode": "pears"}, {"wanted": 0}, {"set_size": 1}, {"repeats": 0.9}, {"overlap": 2}):
        with pytest.raises(DataError):
            session(folder, **settings)
    with pytest.raises(BadInput):
        session(folder, annotator="  ")
    with pytest.raises(BadInput):
        parse_criteria("a,a")
    with pytest.raises(DataError, match="not a rating plan"):
        folder.plan.write_text("{}")
        session(folder)


def test_later_questions_follow_from_earlier_answers(tmp_path):
    """The plan grows in portions, so that what is known by then decides what is asked."""
    folder = colour_folder(tmp_path, prompts=4, per_prompt=6)
    one = session(folder, wanted=40)
    one.upcoming(1)
    first_portion = len(one.plan.questions)
    answer_all(one)
    assert first_portion < 40 == len(one.plan.questions)
