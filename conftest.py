"""Pages of the documentation are collected as tests, one for each block of code: see tests/blocks.py."""

import pathlib
import sys

TESTS = str(pathlib.Path(__file__).parent / "tests")


def pytest_collect_file(file_path, parent):
    """Take the pages, which pytest knows nothing of."""
    if file_path.suffix != ".md":
        return None
    # Only now: whoever runs the other tests need not have Sybil.
    if TESTS not in sys.path:
        sys.path.append(TESTS)
    import blocks

    return blocks.collect(file_path, parent)
