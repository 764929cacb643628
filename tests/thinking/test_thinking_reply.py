"""Answers of models that think first: the known forms are read, everything else is harmless."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.thinking_reply import asks_to_think, first_object, parse_reply

READ = {
    "think and recaption": ("<think>two cats</think><recaption>two cats sit</recaption>", "two cats", "two cats sit"),
    "think and answer": ("<think>two cats</think>\n<answer>two cats sit</answer>", "two cats", "two cats sit"),
    "think and bare text": ("<think>two cats</think> two cats sit", "two cats", "two cats sit"),
    "answer alone": ("Sure! <answer>two cats sit</answer> Enjoy.", "", "two cats sit"),
    "bare text": ("two cats sit", "", "two cats sit"),
    "opening tag in the chat template": ("two cats</think><answer>two cats sit</answer>", "two cats", "two cats sit"),
    "code fence": ("```text\n<think>a</think><recaption>two cats sit</recaption>\n```", "a", "two cats sit"),
    "fence inside": ("<answer>```\ntwo cats sit\n```</answer>", "", "two cats sit"),
    "fence on one line": ("<answer>```two cats sit```</answer>", "", "two cats sit"),
    "several, last wins": ("<answer>no</answer><think>b</think><answer>two cats sit</answer>", "b", "two cats sit"),
    "capital tags": ("<THINK>a</THINK><ReCaption>two cats sit</ReCaption>", "a", "two cats sit"),
    "chinese": ("<think>主体：两只猫</think><recaption>两只猫坐着</recaption>", "主体：两只猫", "两只猫坐着"),
    "control characters": ("<answer>two\x00cats sit</answer>", "", "two cats sit"),
}
REFUSED = {
    "cut off in the answer": ("<think>a</think><recaption>two cats", "never closed"),
    "cut off in thought": ("<think>two cats, one", "never closed"),
    "nested": ("<think><answer>x</answer></think>", "does not belong"),
    "closed twice": ("<answer>x</answer></answer>", "does not belong"),
    "closed by another": ("<answer>x</recaption>", "does not belong"),
    "empty": ("", "no prompt"),
    "empty answer": ("<think>a</think><answer> </answer>", "no prompt"),
    "only thought": ("<think>a</think>", "no prompt"),
    "oversized": ("a" * 100_001, "at most"),
}


@pytest.mark.parametrize("text, think, prompt", READ.values(), ids=READ.keys())
def test_known_forms_are_read(text, think, prompt):
    reply = parse_reply(text)
    assert (reply.think, reply.prompt) == (think, prompt)


@pytest.mark.parametrize("text, reason", REFUSED.values(), ids=REFUSED.keys())
def test_disordered_answers_give_no_prompt_and_a_reason(text, reason):
    reply = parse_reply(text)
    assert reply.prompt is None
    assert reason in reply.reason


@pytest.mark.parametrize("filling", [" ", "\n", "```a\n", "a "])
def test_a_fence_that_never_ends_is_read_in_one_pass(filling):
    """A model that loops on blanks kept the reader busy for hours."""
    text = "```" + filling * (90_000 // len(filling)) + "x"
    assert parse_reply(text).prompt == text


PIECES = st.sampled_from(["<think>", "</think>", "<recaption>", "</recaption>", "<answer>", "</answer>", "< think >", "<", "/", "```", "{", "}", "\x00", "a cat", "猫", "\n"])


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_any_text_is_harmless(text):
    reply = parse_reply(text)
    assert (reply.prompt is None) == bool(reply.reason)
    if reply.prompt is not None:
        assert reply.prompt.strip()
        assert "<think>" not in reply.prompt and "</answer>" not in reply.prompt.lower()
    first_object(text)
    asks_to_think(text)


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"), blacklist_characters="<>`\ufeff"), min_size=1, max_size=60).map(str.strip).filter(bool)


@settings(max_examples=80, deadline=None)
@given(TEXT, TEXT)
def test_written_replies_are_read_back(think, prompt):
    reply = parse_reply(f"<think>{think}</think><recaption>{prompt}</recaption>")
    assert (reply.think, reply.prompt) == (think, prompt)


@pytest.mark.parametrize("text, value", [
    ('Here: {"a": 1} and more', {"a": 1}), ('{"a": [1, 2,], }', {"a": [1, 2]}), ("{" * 5000, None), ("[1]", None), ("", None), ('{"a": ', None)])
def test_first_object_forgives_trailing_commas_only(text, value):
    assert first_object(text) == value


@pytest.mark.parametrize("prompt, marked, bare", [
    ("<think> a cat", True, "a cat"), ("a cat <THINK/>", True, "a cat"), ("a cat", False, "a cat"),
    ('<think>say "A  B"</think>', True, 'say "A  B"'), ("i <think you", False, "i <think you")])
def test_the_mark_in_a_prompt_is_seen_and_removed(prompt, marked, bare):
    assert asks_to_think(prompt) == (marked, bare)
