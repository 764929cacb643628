"""Keys are found in the line where they stand, whatever TOML form they are written in."""

from __future__ import annotations

import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.recipe_lines import key_lines, line_of

TRICKY = '''# [comment]
[a]
x = 1 # = y
"quo.ted" = """
y = 2
[b]
"""
z = [
  "]", # ]
  2,
]
'lit' = \'\'\'
[c]\'\'\'
w = {k = "}"}

[ d . "e f" ]
x.y = 'a # b'
[[list]]
n = "\\"["
last = 3'''


def test_tricky_toml():
    tomllib.loads(TRICKY)
    assert key_lines(TRICKY) == {
        ("a",): 2, ("a", "x"): 3, ("a", "quo.ted"): 4, ("a", "z"): 8, ("a", "lit"): 12, ("a", "w"): 14,
        ("d", "e f"): 16, ("d", "e f", "x", "y"): 17, ("list",): 18, ("list", "0"): 18, ("list", "0", "n"): 19, ("list", "0", "last"): 20,
    }


def test_a_key_inside_an_inline_table_has_the_line_of_the_table():
    lines = key_lines("a = 1\nb = {c = {d = 2}}\n")
    assert line_of(lines, ("b", "c", "d")) == 2
    assert line_of(lines, ("zzz",)) is None


def test_each_table_of_a_list_has_its_own_lines():
    lines = key_lines("[[a.b]]\nx = 1\n[[a.b]]\nx = 2\n[c]\ny = 1\n")
    assert lines["a", "b", "0", "x"] == 2 and lines["a", "b", "1", "x"] == 4 and lines["c", "y"] == 6
    assert line_of(lines, ("a", "b", "1", "missing")) == 3


values = st.sampled_from(["1", "true", '"a"', "'#'", '"""\n[x]\ny = 1\n"""', "'''\n'''", "[\n1,\n2, # ]\n]", '{p = "]"}', "1979-05-27", '"[\\"#"'])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(values, st.integers(0, 2)), max_size=12))
def test_every_key_is_found_where_it_was_written(entries):
    text, expected = "", {}
    for number, (value, blank_lines) in enumerate(entries):
        text += "\n" * blank_lines + f"k{number} = {value}\n"
        expected[f"k{number}",] = text[: text.rindex(f"k{number} =")].count("\n") + 1
    tomllib.loads(text)
    assert key_lines(text) == expected
