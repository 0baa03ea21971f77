"""How Sphinx builds these pages: `sphinx-build -W --keep-going -n -b html docs docs/_build/html`."""

import inspect
import pathlib
import re
import subprocess
import sys

from docutils import nodes

import nbbn

HERE = pathlib.Path(__file__).parent

project = "nbbn"
author = "The nbbn developers"
project_copyright = author
version = release = nbbn.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "reference/_commands.md"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Pages of results, which scripts write, begin with the command that wrote them, not with a heading.
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"nbbn {version}"
html_copy_source = False

autodoc_member_order = "bysource"
# numpydoc's sections say what a parameter is, in words that signatures have no room for.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False  # the reference pages list them
autosummary_generate = False  # numpydoc loads it, nothing here uses it
numpydoc_xref_param_type = False
# Missing, unknown and disordered sections and parameters: what makes a docstring wrong, not what is style.
numpydoc_validation_checks = {"GL06", "GL07", "GL08", "PR01", "PR02", "PR03", "PR04", "PR10"}
# Fields of named tuples are documented as attributes, which they are.
TUPLES = (
    "BatchNormForward|BatchNormGradients|BatchNormResidualGradients|BatchStats|Folded|"
    "NormForward|NormGradients|Renorm"
)
numpydoc_validation_exclude = {rf"nbbn\.({TUPLES})$"}

nitpicky = True
default_role = "py:obj"
# In single back-ticks docstrings have names of public objects, and of parameters, which nothing can link to.
PUBLIC = [getattr(nbbn, name) for name in nbbn.__all__ if callable(getattr(nbbn, name))]
CALLABLE = [one for one in PUBLIC if one is not nbbn.DeviceError]
MODULES = [nbbn.BatchNorm, nbbn.LayerNorm, nbbn.RMSNorm, nbbn.GroupNorm, nbbn.InstanceNorm]
CALLABLE += [one for module in MODULES for _, one in inspect.getmembers(module, inspect.isfunction)]
CALLABLE += [nbbn.BatchStats.merge, nbbn.BatchStats.save, nbbn.BatchStats.load]
nitpick_ignore = {("py:obj", name) for one in CALLABLE for name in inspect.signature(one).parameters}
nitpick_ignore |= {("py:obj", "num_batches_tracked")}  # an attribute, and not on pages by itself


def write_command_line(app: object) -> None:
    """Write the reference of the command line as the command line has it: docs/reference/_commands.md."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "nbbn.commands", "utils", "docs", "--name", "nbbn"],
        capture_output=True,
        text=True,
        check=True,
    )
    _, _, commands = made.stdout.partition("# `nbbn`\n")
    (HERE / "reference" / "_commands.md").write_text(commands)


def number_citations(app: object, doctree: nodes.document, page: str) -> None:
    """Show citations as the numbers that they are in docstrings; numpydoc makes unique labels of them."""
    for text in list(doctree.findall(nodes.Text)):
        if label := re.fullmatch(r"\[R[0-9a-f]+-([0-9]+)\]", text):
            text.parent.replace(text, nodes.Text(f"[{label[1]}]"))


def setup(app: object) -> None:
    """Let Sphinx call what is above."""
    app.connect("builder-inited", write_command_line)  # type: ignore[attr-defined]
    app.connect("doctree-resolved", number_citations)  # type: ignore[attr-defined]
