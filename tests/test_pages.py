"""The pages in docs/: what they show is run."""

import doctest
import pathlib
import re
import subprocess
import sys

import jax
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
# Pages whose examples are in a library that need not be installed.
NEEDS = {
    "migrating/haiku.md": "haiku",
    "migrating/equinox.md": "equinox",
    "migrating/keras.md": "keras",
    "migrating/torch.md": "torch",
    "recipes/onnx.md": "jax2onnx",
}
PAGES = [
    str(page.relative_to(DOCS))
    for page in sorted(DOCS.rglob("*.md"))
    if ">>> " in page.read_text()
]


def test_there_are_pages():
    assert {*NEEDS, "recipes/plain_jax.md", "migrating/flax.md"} <= set(PAGES)


def test_no_python_is_shown_that_is_not_run():
    for page in DOCS.rglob("*.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
        assert all(block.startswith(">>> ") for block in blocks), page


def test_no_line_is_taken_for_a_comment():
    """MyST leaves out a line that begins with a percent sign."""
    for page in DOCS.rglob("*.md"):
        assert not re.search(r"^\s*%", page.read_text(), re.M), page


ENTRIES = "troubleshooting.md"  # A page of entries, each of which must run alone.


def run(name, text):
    """Runs the examples of a text, and counts those that fail."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    with jax.numpy_rank_promotion("allow"):  # as everywhere but in these tests
        return doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)


@pytest.mark.parametrize("page", [page for page in PAGES if page != ENTRIES])
def test_page(page):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason="`make peers` installs it")
    result = run(page, (DOCS / page).read_text())
    assert result.attempted > 0
    assert result.failed == 0


def entries():
    """What all entries of a page share, and the entries by their headings."""
    first, *rest = re.split(r"^### ", (DOCS / ENTRIES).read_text(), flags=re.M)
    return first, {entry.partition("\n")[0]: entry for entry in rest}


@pytest.mark.parametrize("heading", entries()[1])
def test_an_entry_runs_alone(heading):
    first, own = entries()
    result = run(heading, first + own[heading])
    assert result.failed == 0


def test_references_to_other_projects_are_links():
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
        bare = re.findall(r"(?<![\[\w/.-])[\w.-]+/[\w.-]+#\d+", text)
        assert not bare, page


def test_notebooks_are_those_of_their_pages():
    script = DOCS / "notebooks.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
