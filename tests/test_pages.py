"""The pages in docs/: what they show is run."""

import doctest
import pathlib
import re

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


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason="`make peers` installs it")
    with jax.numpy_rank_promotion("allow"):  # as everywhere but in these tests
        result = doctest.testfile(
            str(DOCS / page), module_relative=False, optionflags=doctest.ELLIPSIS
        )
    assert result.attempted > 0
    assert result.failed == 0
