"""Prompt files: plain or JSON lines; what is wrong is named with its line."""

import pytest

from finetune.errors import BadInput
from finetune.evaluation.prompts import prompt_id_of, read_prompts, shortened


def test_plain_lines_and_json_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeff# a comment\na dog\n\n{"prompt": "猫", "prompt_id": "cat", "split": "unrelated", "tags": ["zh"]}\n', encoding="utf-8")
    dog, cat = read_prompts(path)
    assert (dog.prompt_id, dog.prompt, dog.split) == (prompt_id_of("a dog"), "a dog", "style")
    assert (cat.prompt_id, cat.prompt, cat.split, cat.tags) == ("cat", "猫", "unrelated", ("zh",))
    assert shortened([dog, cat], 1) == [dog, cat] and shortened([dog, dog], 1) == [dog]


@pytest.mark.parametrize("content, said", [
    ("", "no prompts"), ("# only\n", "no prompts"), ("a dog\na dog", "twice"), ('{"prompt": "a"', "line 1: is not a JSON object"), ('{"prompt": 3}', "no prompt"),
    ('{"prompt": "a", "split": "test"}', "split 'test'"), ('{"prompt": "a", "prompt_id": "../a"}', "cannot be a file name"), ('{"prompt": "a", "tags": "x"}', "tags"),
    (b"\xff\xfe\x00", "UTF-8"), ('{"prompt": "a dog \\ud800"}', "line 1: its prompt holds half of a character")])
def test_broken_files_are_named(tmp_path, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        read_prompts(path)
    assert said in str(caught.value) and "prompts.jsonl" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_prompts(tmp_path / "nothing.txt")
