"""No block of code is passed over; the tests that promises.md names are there, its table is what was run."""

import pathlib
import re

import pytest
from markdown_it import MarkdownIt

import blocks

TESTS = pathlib.Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = [TESTS.parent / "README.md", *(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
DIRECTIVES = ("{eval-rst}", "{include}", "{literalinclude}", "{math}", "{toctree}")  # of MyST: not code
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


def passed_over(page):
    """Return the blocks of a page that are neither run as tests, nor of a language that is only shown."""
    document = blocks.PAGES.parse(page)
    lines = {e.line for e in document.examples() if not isinstance(e.region.evaluator, blocks.Skipper)}
    found = []
    for token in MarkdownIt().parse(page.read_text()):
        language = token.info.split(" ")[0]
        shown = language in (*blocks.SHOWN, *DIRECTIVES)
        # A fence and the line that it begins in, or what is code by being indented, which nothing runs.
        if token.type == "code_block" or (
            token.type == "fence" and not shown and token.map[0] + 1 not in lines
        ):
            found.append((token.map[0] + 1, token.info))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TESTS.parent)))
def test_no_block_is_passed_over(page):
    assert passed_over(page) == []


@pytest.mark.parametrize(
    "block",
    [
        "```\nnbbn info\n```",
        "```bash\nnbbn info\n```",
        "```python title\nimport nbbn\n```",
        "~~~py\nimport nbbn\n~~~",
        "- a list\n\n  ```pycon\n  >>> 1\n  ```",
        "text\n\n    import nbbn",
    ],
)
def test_a_block_of_an_unknown_language_is_found(tmp_path, block):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```python\n>>> 1\n1\n```\n\n```text\nshown\n```\n\n{block}\n")
    assert len(passed_over(page)) == 1


def test_a_skip_without_a_reason_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n<!--- skip: next -->\n```sh\nfalse\n```\n")
    with pytest.raises(ValueError, match="reason"):
        blocks.PAGES.parse(page)
