"""Runs the core of the tests with each version of JAX that is supported.

    python tests/matrix.py              # all of them, then a table
    python tests/matrix.py 0.7.0        # one

Needs `make` and the interpreters. Each version gets an environment of its own.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
# JAX, Flax, Pythons to choose from. An empty version is the newest.
ROWS = [
    ("0.7.0", "0.10.7", ("python3.11", "python3.12")),
    ("0.8.3", "0.12.6", ("python3.11", "python3.12")),
    ("0.10.2", "0.12.8", ("python3.11", "python3.12")),
    ("", "", ("python3.13", "python3.12")),
]


def interpreter(names):
    """The first of these that there is, and the environment that it is found in."""
    for name in names:
        # Where pyenv has several Pythons, it has to be told which.
        for version in ("", *(f"{name[6:]}.{patch}" for patch in range(20))):
            env = os.environ | ({"PYENV_VERSION": version} if version else {})
            found = shutil.which(name) and subprocess.run(
                [name, "--version"], env=env, capture_output=True
            )
            if found and found.returncode == 0:
                return name, env
    return None, None


def run(jax, flax, names):
    """A row of the table: versions, the last line of each part, and seconds."""
    python, env = interpreter(names)
    if python is None:
        return [jax or "newest", flax, " or ".join(names), "no such Python here", ""]
    options = [f"PYTHON={python}", f"JAX={jax}", f"FLAX={flax}"]
    make = ["make", "-C", str(ROOT), *options]
    subprocess.run([*make, "install"], env=env, check=True, capture_output=True)
    start = time.monotonic()
    done = subprocess.run([*make, "test-core"], env=env, capture_output=True, text=True)
    seconds = f"{time.monotonic() - start:.0f}"
    print(done.stdout[-2000:] if done.returncode else "", file=sys.stderr)
    parts = re.findall(r"^(?:\d+ \w+,? ?)+(?= in )", done.stdout, re.MULTILINE)
    result = "; ".join(parts) if done.returncode == 0 else "FAILED: " + "; ".join(parts)
    return [jax or "newest", flax or "newest", python, result, seconds]


def main():
    """Prints the table."""
    wanted = sys.argv[1:]
    rows = [run(*row) for row in ROWS if not wanted or row[0] in wanted]
    for row in [["JAX", "Flax", "Python", "tests", "s"], ["---"] * 5, *rows]:
        print("| " + " | ".join(row) + " |")
    if any("FAILED" in row[3] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
