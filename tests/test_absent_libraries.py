"""A library that is made absent cannot be imported for a while, and nothing else changes."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from finetune.absent_libraries import absent


def test_an_absent_library_cannot_be_imported_and_comes_back() -> None:
    sys.modules.pop("colorsys", None)
    with absent("colorsys"):
        assert importlib.util.find_spec("colorsys") is None
        with pytest.raises(ImportError):
            importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def test_a_library_that_is_in_use_stays() -> None:
    with absent("json"):
        import json

        assert json.loads("1") == 1
    assert sys.modules["json"] is json


def test_it_comes_back_after_an_error() -> None:
    sys.modules.pop("colorsys", None)
    with pytest.raises(ZeroDivisionError), absent("colorsys"):
        1 / 0
    assert importlib.import_module("colorsys")
