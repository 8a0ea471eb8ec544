"""How fast is each layer of `jaxbn.layers`, beside `standard`? For `speed.py --family`.

All are called in turn in one process, as in `speed.py`; XLA computes. The mixtures have
inference of their own only. Domains have ids at random, one for each example, or
("one of 400") one for all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _peers import MODES, Run, jax_run
from _tables import markdown, shape_text
from _timing import interleaved, quartiles

from jaxbn import layers

BASE = "standard"
INFERENCE = MODES[-1:]


def ids(count: int, examples: int) -> dict[str, Any]:
    """An id for each example."""
    found = np.random.default_rng(1).integers(0, count, examples)
    return {"domain_ids": jnp.asarray(found)}


def classes(examples: int) -> dict[str, Any]:
    """A class for each example."""
    return {"condition": ids(10, examples)["domain_ids"]}


def embeddings(examples: int) -> dict[str, Any]:
    """An embedding for each example."""
    return {"condition": jnp.ones((examples, 16))}


def one_domain(examples: int) -> dict[str, Any]:
    """One id for all."""
    return {"domain_ids": jnp.int32(7)}


def nothing(examples: int) -> dict[str, Any]:
    """No further keyword."""
    return {}


# How each is made, what else it takes for so many examples, and the modes that it has.
FAMILY: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    BASE: (layers.standard, nothing, MODES),
    "ghost": (partial(layers.ghost, num_groups=2), nothing, MODES),
    "renorm": (partial(layers.renorm, r_max=3.0, d_max=5.0), nothing, MODES),
    "domain, 2": (partial(layers.domain, num_domains=2), partial(ids, 2), MODES),
    "domain, 400": (partial(layers.domain, num_domains=400), partial(ids, 400), MODES),
    "domain, one of 400": (partial(layers.domain, num_domains=400), one_domain, MODES),
    "conditional, classes": (
        partial(layers.conditional, num_classes=10),
        classes,
        MODES,
    ),
    "conditional, embedding": (
        partial(layers.conditional, embedding_size=16),
        embeddings,
        MODES,
    ),
    "streaming": (layers.streaming, nothing, MODES),
    "in_place": (layers.in_place, nothing, MODES),
    "example_weight": (
        partial(layers.standard, example_weight=0.1),
        nothing,
        INFERENCE,
    ),
    "pseudo_samples": (
        partial(layers.standard, pseudo_samples=16.0),
        nothing,
        INFERENCE,
    ),
}


def make(name: str, shape: list[int], dtype: str, mode: str) -> Run:
    """A layer of the family, ready to be called."""
    build, more, _ = FAMILY[name]
    layer = build(implementation="xla")
    params, state = layer.init(shape[-1])
    x, ct = (
        jnp.asarray(a, dtype)
        for a in np.random.default_rng(0).standard_normal((2, *shape))
    )
    given = more(shape[0])
    return jax_run(jax.jit(step(layer, mode)), params, state, x, ct, given)


def step(layer: layers.Layer, mode: str) -> Callable:
    """The function that a mode stands for, as for the other libraries."""

    def forward(params, state, x, ct, given):
        return layer.apply(params, state, x, training=True, **given)

    def both(params, state, x, ct, given):
        def moving(params, x):
            return forward(params, state, x, ct, given)

        y, vjp, new = jax.vjp(moving, params, x, has_aux=True)
        return y, new, vjp(ct)

    def infer(params, state, x, ct, given):
        return layer.apply(params, state, x, training=False, **given)[0]

    modes: dict[str, Callable] = dict(zip(MODES, (forward, both, infer), strict=True))
    return modes[mode]


def measure(shape: list[int], dtype: str, mode: str, rounds: int) -> dict:
    """The quartiles of all layers that have the mode."""
    names = [name for name, (_, _, modes) in FAMILY.items() if mode in modes]
    runs = {name: make(name, shape, dtype, mode) for name in names}
    times = {k: quartiles(v) for k, v in interleaved(runs, rounds).items()}
    jax.clear_caches()
    return {"mode": mode, "dtype": dtype, "shape": shape, "layers": times}


def table(cases: list[dict]) -> str:
    """Times relative to `standard`: a table for each shape, a row for each layer."""
    tables = []
    for shape in dict.fromkeys(tuple(case["shape"]) for case in cases):
        alike = [case for case in cases if tuple(case["shape"]) == shape]
        base = [case["layers"][BASE][1] for case in alike]
        rows = [[f"{BASE}, ms", *(f"{ms:.3g}" for ms in base)]]
        for name in FAMILY:
            if name != BASE:
                found = [case["layers"].get(name) for case in alike]
                ratios = [
                    f"{f[1] / b:.2f}" if f else "–"
                    for f, b in zip(found, base, strict=True)
                ]
                rows.append([name, *ratios])
        head = [shape_text(shape), *(f"{c['dtype']}, {c['mode']}" for c in alike)]
        tables.append(markdown(head, rows))
    return "\n\n".join(tables)
