"""How the project is built: imports, public names, docstrings."""

import ast
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys

import older
import pytest

import jaxbn
from jaxbn import _compat

ROOT = pathlib.Path(jaxbn.__file__).parent

# A file imports from floors below its own only, or from its own package.
FLOORS = [
    {"_compat", "_dtypes"},
    {"_axes"},
    {"_devices"},
    {"_operation"},
    {"_sums"},
    {"_sample"},
    {"_kernels"},
    {"_batch"},
    {"_shift"},
    {"_moments", "_normalize"},
    {"_rules"},
    {"_batch_norm"},
    {"_running_stats"},
    {"_replicated"},
    {"layers"},
    {"_flax"},
    {"linen", "nnx", "population", "folding", "interop"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def imports_of(path):
    """The parts of jaxbn that a file imports, by the first name after `jaxbn`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            head, _, rest = node.module.partition(".")
            if head == "jaxbn" and rest:
                yield rest.partition(".")[0]
            elif head == "jaxbn":
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("jaxbn.") for a in node.names), path


def sources():
    return [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path):
        assert name == own or LEVEL[name] < LEVEL[own], f"{own} imports {name}"


def test_importing_jaxbn_imports_no_flax():
    script = (
        "import sys, jaxbn\n"
        "loaded = {'flax', 'optax', 'chex', 'torch', 'keras'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert 'linen' in dir(jaxbn) and 'nnx' in dir(jaxbn)\n"
        "jaxbn.linen.BatchNorm\n"
        "assert 'flax' in sys.modules\n"
    )
    if older.FLAX >= (0, 12):
        script += "jaxbn.nnx.BatchNorm\n"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_flax_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.2")
    with pytest.raises(ImportError, match=r"`jaxbn.nnx` needs flax 0\.12\.0.*0\.11\.2"):
        _compat.require_flax("jaxbn.nnx", 0, 12, 0)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.12.0.dev1")
    _compat.require_flax("jaxbn.nnx", 0, 12, 0)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'moment'"):
        jaxbn.moment  # noqa: B018


EMPTY = inspect.Parameter.empty
INTEROP = (
    "crossq",
    "equinox",
    "flax",
    "haiku",
    "keras",
    "optax",
    "praxis",
    "tf_nn",
    "torch",
)


def public():
    """Every public function and class, by its name."""
    modules = {
        "jaxbn": jaxbn,
        "jaxbn.layers": jaxbn.layers,
        **{f"jaxbn.interop.{name}": getattr(jaxbn.interop, name) for name in INTEROP},
        "jaxbn.linen": jaxbn.linen,
        "jaxbn.nnx": jaxbn.nnx,
        "jaxbn.population": jaxbn.population,
        "jaxbn.folding": jaxbn.folding,
    }
    for prefix, module in modules.items():
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith("jaxbn")
            if callable(value) and own and not name.startswith("_"):
                yield f"{prefix}.{name}", value


@pytest.mark.parametrize("name", [name for name, _ in public()])
def test_docstrings_are_whole(name):
    value = dict(public())[name]
    doc = inspect.getdoc(value)
    assert doc, name
    assert "Example:" in doc, name
    assert ">>>" in doc, name
    if inspect.isfunction(value):
        assert "Returns:" in doc
        for parameter in inspect.signature(value).parameters.values():
            written = str(parameter.replace(annotation=EMPTY, default=EMPTY))
            assert f"  {written}: " in doc, f"{name}: {parameter.name}"
            assert parameter.annotation is not parameter.empty
    if not (inspect.isclass(value) and issubclass(value, tuple)):
        assert "References:" in doc or name.endswith((".cumulative", ".init_stats"))


def test_the_list_of_public_names():
    names = {name for name, _ in public() if name.count(".") == 1}
    assert names == {
        f"jaxbn.{name}"
        for name in (
            "Moments",
            "RunningStats",
            "assert_replicated",
            "batch_norm",
            "cumulative",
            "debiased",
            "init_stats",
            "merge_moments",
            "moments",
            "normalize",
            "sync_stats",
            "update",
        )
    }


def test_versions_are_asked_for_in_one_file():
    words = re.compile(r"jax\.__version|hasattr\((jax|lax|core)\b|jax\._src|FLAX\b")
    for path in ROOT.rglob("*.py"):
        if path.name != "_compat.py":
            assert not words.search(path.read_text()), path
