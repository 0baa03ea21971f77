"""The page of promises: the tests that it names are there, and its table is what was run."""

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGE = (DOCS / "promises.md").read_text()
PROMISES = re.findall(r"^\*\*(.+?)\.\*\*(.*?)(?=^\*\*|^## )", PAGE, re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`(test_\w+\.py)::(\w+)`")


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED.findall(PAGE))))
def test_every_test_that_is_named_is_there(file, test):
    assert re.search(rf"^(def )?{test}\b( = |\()", (TESTS / file).read_text(), re.MULTILINE)


def test_every_promise_names_its_tests():
    assert len(PROMISES) == 10
    for promise, text in PROMISES:
        assert NAMED.search(text), promise


def test_the_table_is_what_was_run():
    """Both come from one run of benchmarks/peers.py."""
    run = (DOCS / "results" / "peers.md").read_text()
    results = [line for line in run.splitlines() if line.startswith(("| ", "|---", "- "))]
    assert len(results) > 40
    lines = PAGE.splitlines()
    at = lines.index(results[0])
    assert [line for line in lines[at:] if line.startswith(("| ", "|---", "- "))] == results
