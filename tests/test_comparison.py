"""`benchmarks/comparison.py`: the README's table is what each library does here."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def libraries():
    stored = json.loads((ROOT / "benchmarks/results/comparison.json").read_text())
    return [name for name in stored["rows"][0] if name], stored["rows"]


@pytest.mark.parametrize("name", libraries()[0])
def test_the_stored_answers_are_those_of_today(name):
    import comparison
    from _comparison import installed

    found = [library for library in installed() if library.name == name]
    if not found:
        pytest.skip(f"{name} is not installed: `make peers` installs it")
    for row in libraries()[1]:
        assert comparison.ROWS[row[""]](found[0]) == row[name], row[""]
