"""A layer on a mesh of devices, and on one device: cases at random, and their programs.

Axes of a mesh are called a, b and c. A string of these letters stands for several, the
empty string for none.
"""

import contextlib
import random
from collections.abc import Mapping
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from data import assert_close
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import cumulative, layers

NAMES = "abc"
KINDS = {"A": AxisType.Auto, "E": AxisType.Explicit}
MESHES = ((8,), (1, 8), (8, 1), (2, 4), (4, 2), (1, 1, 8), (2, 2, 2), (2, 1, 4), (1,))
MAKERS = {
    "standard": layers.standard,
    "ghost": layers.ghost,
    "renorm": partial(layers.renorm, r_max=1.2, d_max=0.3),
    "domain": partial(layers.domain, num_domains=3),
    "classes": partial(layers.conditional, num_classes=3),
    "embedding": partial(layers.conditional, embedding_size=2),
    "streaming": layers.streaming,
    "in_place": layers.in_place,
}
INPUTS = {"domain": "domain_ids", "classes": "condition", "embedding": "condition"}
OF_EXAMPLES = {"ghost", *INPUTS}
# Options beside those of all layers: of which layers, with which values.
ANY = tuple(MAKERS)
OPTIONS = {
    "use_scale": (ANY, (True, True, False)),
    "use_bias": (ANY, (True, True, False)),
    "implementation": (ANY, (None, None, "xla")),
    "momentum": (set(ANY) - {"streaming"}, (0.9, "cumulative", "array")),
    "use_fast_variance": (set(ANY) - {"streaming"}, (True, False)),
    "unbiased": (set(ANY) - {"streaming", "renorm"}, (False, True)),
    "skip_nonfinite": (ANY, (False, False, True)),
    "derivatives": (("standard", "ghost", "renorm"), ("vjp", "jvp")),
    "strided": (("ghost",), (False, True)),
    "update_per_group": (("ghost",), (False, True)),
    "shared_affine": (("domain",), (False, True)),
    "activation": (("in_place",), ("leaky_relu", "elu", "identity")),
}
# Those of which a layer takes one.
EITHER = {
    "standard": ({}, {}, {"example_weight": 0.25}, {"pseudo_samples": 0.25}),
    "ghost": tuple({n: k} for n in ("group_size", "num_groups") for k in (1, 2, 4, 8)),
}
# Which axes weights have, as functions of the reduced axes and the feature axes.
WEIGHTS = {
    "none": None,
    "scalar": lambda reduced, features: (),
    "example": lambda reduced, features: reduced[:1],
    "position": lambda reduced, features: reduced,
    "feature": lambda reduced, features: features,
    "example and feature": lambda reduced, features: (*reduced[:1], *features),
    "full": lambda reduced, features: (*reduced, *features),
}


class Case(NamedTuple):
    """A layer on a mesh. `spec` names what each axis of x is split over.

    Vectors and weights that are not `placed` are the same on all devices; the axes that
    are `manual` are those of a `shard_map`. A layer that is `halved` is run by its
    `forward` and `update`.
    """

    layer: str
    options: Mapping[str, Any] = MappingProxyType({})
    shape: tuple[int, ...] = (8, 4)
    feature_axes: tuple[int, ...] = (1,)
    weights: str = "none"
    values: str = "mask"
    mesh: tuple[int, ...] = (4, 2)
    kinds: str = "EE"
    spec: tuple[str, ...] = ("a", "b")
    manual: str = ""
    vectors_placed: bool = True
    weights_placed: bool = True
    training: bool = True
    checked: bool = True
    in_context: bool = True
    halved: bool = False
    dtype: str = "float64"

    @property
    def reduced(self) -> tuple[int, ...]:
        """The reduced axes of x."""
        return tuple(i for i in range(len(self.shape)) if i not in self.feature_axes)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of feature vectors."""
        return tuple(self.shape[axis] for axis in self.feature_axes)

    def parts(self, names: str) -> int:
        """How many devices there are along these axes of the mesh."""
        return prod(self.mesh[NAMES.index(name)] for name in names)


def draw(seed: int) -> Case:
    """A case at random, of those that make sense."""
    rng, layer = random.Random(seed), ANY[seed % len(ANY)]
    while not _makes_sense(case := _drawn(rng, layer)):
        pass
    return case


def _drawn(rng: random.Random, layer: str) -> Case:
    mesh = rng.choice(MESHES)
    kind = rng.choice(("E", "E", "A", "AE"))
    names, shares = NAMES[: len(mesh)], rng.random() < 0.4
    shape, feature_axes = _layout(rng)
    spec = [""] * len(shape)
    for name in names:
        spec[rng.randrange(len(shape))] += rng.choice((name, name, name, ""))
    return Case(
        layer,
        _options(rng, layer),
        shape,
        feature_axes,
        weights=rng.choice(("none", *WEIGHTS)),
        values=rng.choice(("mask", "mask", "floats", "counts", "nothing")),
        mesh=mesh,
        kinds="".join(rng.choice(kind) for _ in mesh),
        spec=tuple(spec),
        manual="".join(n for n in names if shares and rng.random() < 0.6),
        vectors_placed=rng.random() < 0.6,
        weights_placed=rng.random() < 0.6,
        training=rng.random() < 0.8,
        checked=rng.random() < 0.7,
        in_context=rng.random() < 0.7,
        halved=rng.random() < 0.3,
        dtype=rng.choice(("float64", "float32")),
    )


def _layout(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and its feature axes: last, second, two of them or all."""
    rank = rng.choice((1, 2, 2, 3, 3, 4))
    first = rng.choice((rank - 1, min(1, rank - 1)))
    more = rng.choice((first, first, first, first, first, rng.randrange(rank)))
    axes = tuple(sorted({first, more}))
    if rng.random() < 0.06:
        axes = tuple(range(rank))
    lengths = [rng.choice((1, 2, 3, 4)) for _ in range(rank)]
    for axis in axes:
        lengths[axis] = rng.choice((1, 2, 4, 4, 8, 8))
    if axes and axes[0] > 0:
        lengths[0] = rng.choice((1, 8, 8, 16))
    return tuple(lengths), axes


def _options(rng: random.Random, layer: str) -> dict[str, Any]:
    options = dict(rng.choice(EITHER.get(layer, ({},))))
    for name, (whose, values) in OPTIONS.items():
        if layer in whose:
            options[name] = rng.choice(values)
    return options


def _makes_sense(case: Case) -> bool:
    return _has_examples(case) and _divides(case) and _fits_shard_map(case)


def _has_examples(case: Case) -> bool:
    options = case.options
    if case.reduced:
        size = options.get("group_size", options.get("num_groups", 1))
        return case.shape[case.reduced[0]] % size == 0
    per_example = {"example_weight", "pseudo_samples"} & set(options)
    return case.layer not in OF_EXAMPLES and not per_example


def _divides(case: Case) -> bool:
    """Axes that are not automatic take only what they divide."""
    own = zip(case.shape, case.spec, strict=True)
    uneven = not case.manual and set(case.kinds) == {"A"}
    return uneven or all(n % case.parts(names) == 0 for n, names in own)


def _fits_shard_map(case: Case) -> bool:
    if not case.manual:
        return True
    if set(case.manual) & set("".join(case.spec[axis] for axis in case.feature_axes)):
        if case.options.get("momentum") == "array":
            return False  # A layer has one array, for all parts of x.
        if not case.checked and case.weights not in ("none", "scalar"):
            return False  # Unchecked, each device counts the steps of its own features.
    # XLA does not compile a plain psum over one device beside axes that JAX keeps.
    rest = set(NAMES[: len(case.mesh)]) - set(case.manual)
    if case.parts("".join(rest)) > 1 and any(case.parts(n) == 1 for n in case.manual):
        return False
    # Groups, and an example's own moments, are of what one device has of an example.
    inner = "".join(case.spec[axis] for axis in case.reduced[1:])
    own = case.layer == "ghost" or "example_weight" in case.options
    if own and set(inner) & set(case.manual):
        return False
    # Groups of several devices, but not of all, need a single axis.
    outer = set(case.spec[case.reduced[0]]) if case.reduced else set()
    if case.layer == "ghost" and len(outer & set(case.manual)) > 1:
        return False
    # What is split over several axes is so first over the manual ones.
    flags = [[name not in case.manual for name in names] for names in case.spec]
    return all(own == sorted(own) for own in flags)


class Arguments(NamedTuple):
    """Those of `apply`, and where x is shown to the loss; or how each is spread."""

    params: Any
    state: Any
    x: Any
    weights: Any
    given: Any
    shown: Any


class Spec(tuple):
    """The names that each axis of an array is split over."""

    __slots__ = ()

    def among(self, names: str) -> P:
        """For JAX, those of the names."""
        return P(*(tuple(n for n in own if n in names) or None for own in self))


def arguments(case: Case, seed: int = 0) -> Arguments:
    """Parameters and statistics at random, and x with NaN under the mask."""
    rng = np.random.default_rng(seed)
    cast = lambda a: jnp.asarray(a, case.dtype)
    near = lambda a: cast(a + rng.uniform(0.3, 0.8, a.shape))
    params, state = layer_of(case).init(case.features)
    params = jax.tree.map(near, params)
    state = type(state)(near(state[0]), near(state[1]), state.step + 1)
    x, w = rng.normal(1, 2, case.shape), _weights(case, rng)
    shown = np.broadcast_to(True if w is None else w != 0, case.shape)
    if case.training:  # Inference does not ask for weights.
        x = np.where(shown | (rng.random(case.shape) < 0.5), x, np.nan)
    given = {}
    if name := INPUTS.get(case.layer):
        examples = case.shape[case.reduced[0]]
        ids, vectors = rng.choice((0, 2), examples), rng.normal(size=(examples, 2))
        given[name] = cast(vectors) if case.layer == "embedding" else jnp.asarray(ids)
    w = w if w is None else jnp.asarray(w)
    return Arguments(params, state, cast(x), w, given, jnp.asarray(shown))


def _weights(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    if case.weights == "none":
        return None
    kept = WEIGHTS[case.weights](case.reduced, case.feature_axes)
    shape = tuple(n if i in kept else 1 for i, n in enumerate(case.shape))
    while len(shape) > 1 and shape[0] == 1 and not case.checked:
        shape = shape[1:]  # Aligned at the last axes.
    if case.values == "floats":
        return rng.uniform(0, 2, shape) * (rng.random(shape) < 0.8)
    if case.values == "counts":
        return rng.integers(0, 3, shape)
    return rng.random(shape) < (0.7 if case.values == "mask" else 0)


def specs(case: Case, args: Arguments) -> Arguments:
    """How each argument is spread."""
    features = [case.spec[axis] for axis in case.feature_axes]
    batch = case.spec[case.reduced[0]] if case.reduced else ""

    def of(placed, spec):
        # Each device of a shard_map has its part in any case.
        keep = NAMES if placed else case.manual
        return Spec("".join(n for n in names if n in keep) for names in spec)

    def vector(a):
        spec = [""] * (a.ndim - len(features)) + features
        return of(case.vectors_placed, spec)

    def weights(a):
        own = zip(a.shape, case.shape[-a.ndim :], case.spec[-a.ndim :], strict=True)
        return of(case.weights_placed, [s if n == m else "" for n, m, s in own])

    def first(a):
        return Spec([batch] + [""] * (a.ndim - 1))

    state = args.state
    counted = Spec([""] * state.step.ndim)
    return Arguments(
        jax.tree.map(vector, args.params),
        type(state)(vector(state[0]), vector(state[1]), counted),
        Spec(case.spec),
        jax.tree.map(weights, args.weights),
        jax.tree.map(first, args.given),
        Spec(case.spec),
    )


def layer_of(case: Case, axis_name=None) -> layers.Layer:
    """The layer of a case."""
    options = dict(case.options)
    if options.get("momentum") == "cumulative":
        options["momentum"] = cumulative()
    elif options.get("momentum") == "array":
        momentum = np.linspace(0.1, 0.9, prod(case.features))
        options["momentum"] = momentum.reshape(case.features)
    same = {"feature_axes": case.feature_axes, "axis_name": axis_name}
    return MAKERS[case.layer](**options, **same)


def applied(case: Case, axis_name=None):
    """Output and new state, of positional arguments; beside a halved layer's moments.

    (Whose layout in a shard_map depends on the layer.)
    """
    layer = layer_of(case, axis_name)

    def apply(params, state, x, w, given):
        own = {"weights": w, "training": case.training, **given}
        if not case.halved or case.manual:
            return *layer.apply(params, state, x, **own), None
        y, m = layer.forward(params, state, x, **own)
        return y, layer.update(state, m), m

    return apply


def mapped(case: Case, mesh, spread: Arguments):
    """`applied` in a shard_map over the manual axes."""
    summed = "".join(case.spec[axis] for axis in case.reduced)
    names = tuple(name for name in summed if name in case.manual)
    part = _each(lambda spec: spec.among(case.manual), spread)
    return jax.shard_map(
        applied(case, names[0] if len(names) == 1 else names or None),
        mesh=mesh,
        in_specs=tuple(part[:5]),
        out_specs=(part.x, part.state, None),
        axis_names=set(case.manual),
        check_vma=case.checked,
    )


def step(case: Case, apply, args: Arguments) -> dict[str, Any]:
    """Output and new state, and the gradients of a loss of the output."""
    size = prod(case.shape)
    weight = np.cos(np.arange(size)).reshape(case.shape).astype(case.dtype)

    def loss(params, x):
        y, new, m = apply(params, args.state, x, *args[3:5])
        _require_same_types((y, new), (x, args.state))
        y = jnp.where(args.shown, y, 0)
        return jnp.sum(jnp.sin(y) * weight), {"y": y, "state": new, "moments": m}

    grads, out = jax.grad(loss, (0, 1), has_aux=True)(args.params, args.x)
    return {**out, "dparams": grads[0], "dx": grads[1]}


def _require_same_types(got, expected) -> None:
    """On explicit meshes a loop takes only what keeps its type, sharding included."""
    own, wanted = (
        jax.tree.map(lambda a: str(jax.typeof(a)), t) for t in (got, expected)
    )
    assert own == wanted


def alone(case: Case) -> dict[str, Any]:
    """What `step` returns on one device."""
    return jax.jit(partial(step, case, applied(case)))(arguments(case))


def spread(case: Case) -> dict[str, Any]:
    """What `step` returns on the mesh."""
    program, args, around = on_mesh(case)
    with around:
        return program(args)


def compiled(case: Case) -> str:
    """The program of `step` on the mesh, as XLA has it in the end."""
    program, args, around = on_mesh(case)
    with around:
        return program.lower(args).compile().as_text()


def on_mesh(case: Case) -> tuple[Any, Arguments, Any]:
    """A compiled `step`, its arguments on the mesh, and the context to call it in."""
    kinds = tuple(KINDS[kind] for kind in case.kinds)
    names, devices = tuple(NAMES[: len(kinds)]), jax.devices()[: prod(case.mesh)]
    mesh = jax.make_mesh(case.mesh, names, axis_types=kinds, devices=devices)
    args = arguments(case)
    own = specs(case, args)
    apply = mapped(case, mesh, own) if case.manual else applied(case)

    def place(spec):
        return NamedSharding(mesh, spec.among(NAMES))

    def put(spec, a):
        return jax.device_put(a, place(spec if is_even(spec, a) else Spec()))

    def constrain(spec, a):
        even = is_even(spec, a)
        return a if even else lax.with_sharding_constraint(a, place(spec))

    def is_even(spec, a):
        parts = [case.parts(names) for names in spec]
        return all(n % k == 0 for n, k in zip(a.shape, parts, strict=True))

    def program(args):
        out = step(case, apply, _each(constrain, own, args))
        if all(jax.tree.leaves(_each(is_even, own, args))):
            return out
        # Nothing enters or leaves a program unevenly.
        return lax.with_sharding_constraint(out, NamedSharding(mesh, P()))

    placed = _each(put, own, args)
    # Types alone tell of a mesh that is explicit.
    alone = not case.in_context and not case.manual and set(case.kinds) == {"E"}
    around = contextlib.nullcontext() if alone else jax.set_mesh(mesh)
    return jax.jit(program), placed, around


def _each(f, specs, *trees):
    return jax.tree.map(f, specs, *trees, is_leaf=lambda s: isinstance(s, Spec))


def compare(case: Case) -> None:
    """The mesh with one device."""
    # In float32, groups of two examples that are near each other lose three digits.
    tolerance = 1e-9 if case.dtype == "float64" else 3e-3

    def close(path, got, expected):
        assert got.dtype == expected.dtype
        size = max(1.0, float(np.max(np.abs(expected), initial=0)))
        name = jax.tree_util.keystr(path)
        assert_close(got, expected, tolerance, tolerance * size, err_msg=name)

    jax.tree_util.tree_map_with_path(close, spread(case), alone(case))
