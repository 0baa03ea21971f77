"""The bugs of mutations.py can be planted. Whether the tests catch them, running it finds out."""

import pathlib
import re

import pytest

from mutations import MUTATIONS, ROOT

TESTS = pathlib.Path(__file__).parent
by_name = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)


@by_name
def test_bug_can_be_planted(mutation):
    planted = mutation.planted()
    assert planted != (ROOT / "nbbn" / mutation.file).read_text()
    compile(planted, mutation.file, "exec")


@by_name
def test_likely_tests_are_there(mutation):
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        source = (TESTS / file).read_text()
        assert re.search(rf"^def {name.partition('[')[0]}\(", source, re.MULTILINE) or not name, test


def test_names_are_unique():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({mutation.bug for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_page_is_of_these_bugs():
    """Each in its order, and where it is planted now; who caught it is what the run found out."""
    page = (ROOT / "docs" / "mutations.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[1]) for row in rows] == [(f"| {m.bug}", f"`{m.place()}`") for m in MUTATIONS]
    assert all("**nothing**" not in row[3] for row in rows) and f"plants {len(MUTATIONS)} known bugs" in page
