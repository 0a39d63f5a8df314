"""The page on planning says what is."""

import doctest
import pathlib


def test_the_page_runs():
    path = pathlib.Path(__file__).parents[2] / "docs" / "planning.md"
    assert doctest.testfile(str(path), module_relative=False, raise_on_error=True).attempted > 10
