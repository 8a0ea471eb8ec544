"""Every function of `interop` on every hostile value at every key.

Either the result is finite and the same as without it, or the error is a ValueError or
TypeError that names the key.
"""

import decimal
import re
from fractions import Fraction
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxbn
from jaxbn.interop import equinox, flax, haiku, keras, praxis, torch

V = np.arange(1.0, 4.0, dtype=np.float32)
TORCH = {name: V for name in ("weight", "bias", "running_mean", "running_var")}
KERAS = {name: V for name in ("gamma", "beta", "moving_mean", "moving_variance")}
RENORM = {name: V for name in ("moving_stddev", "renorm_mean", "renorm_stddev")}
EMA = {"counter": np.int32(7), "hidden": V[None], "average": V[None]}
AVERAGES = {"mean_ema": EMA, "var_ema": EMA}
HAIKU = {"scale": V[None], "offset": V[None]}
EQUINOX = {"weight": V, "bias": V}
OF_BATCH = {"batch_counter": np.int32(7), "batch_state_index": (V, V)}
OF_EMA = {"ema_first_time_index": np.bool_(False), "ema_state_index": (V, V)}
FLAX = {"params": {"scale": V, "bias": V}}
FLAX_STATS = {"mean": V, "var": V, "step": np.int32(7)}
PRAXIS = {"gamma": V, "beta": V}
STATS = {"mean": V, "var": V, "step": np.int32(7)}
OURS = {"params": {"scale": V, "bias": V}, "stats": STATS}
RENORM_STATS = {"mean": V, "std": V, "step": np.int32(7)}


def state_of(fields):
    """Equinox' model and state, as far as they are read."""
    none = dict.fromkeys((*OF_BATCH, *OF_EMA))
    modes = {"momentum": 0.9, "mode": "batch" if "batch_counter" in fields else "ema"}
    affine = {name: fields.get(name) for name in ("weight", "bias")}
    index = {name: name for name in fields if name not in affine}
    layer = SimpleNamespace(**{**none, **modes, **affine, **index})
    return {"norm": layer}, SimpleNamespace(get=fields.get)


def equinox_model(fields, **options):
    return equinox.batch_norms(*state_of(fields), **options)


def haiku_model(trees, **options):
    params, state = {"bn": trees["bn"]}, {f"bn/~/{n}": trees[n] for n in AVERAGES}
    return haiku.batch_norms(params, state, **options)


def back(function, **rest):
    made = jaxbn.RunningStats

    def call(ours):
        stats = ours["stats"]
        kind = jaxbn.layers.RenormStats if "std" in stats else made
        return function(ours["params"], kind(**stats), **rest)

    return call


def to(function, **rest):
    return lambda arrays: function(arrays, **rest)


STEPPED = {**TORCH, "num_batches_tracked": np.int64(7)}
DOTTED = {f"a.bn.{name}": v for name, v in STEPPED.items()}
IN_FILE = {"layers": {"batch_normalization_1": {"vars": {str(i): V for i in range(4)}}}}
TENSORFLOW = {f"bn/{n}/ExponentialMovingAverage": v for n, v in KERAS.items()}
LINEN = {**FLAX, "batch_stats": FLAX_STATS}
NESTED = {"params": {"b": FLAX["params"]}, "batch_stats": {"b": FLAX_STATS}}
PAX = {"params": {"b": PRAXIS}, "non_trainable": {"b": dict(list(KERAS.items())[2:])}}
FUNCTIONS = {
    "torch.to_jaxbn": (torch.to_jaxbn, STEPPED),
    "torch.to_jaxbn, biased": (to(torch.to_jaxbn, unbiased=False, count=10), STEPPED),
    "torch.frozen_to_jaxbn": (torch.frozen_to_jaxbn, TORCH),
    "torch.batch_norms": (torch.batch_norms, DOTTED),
    "keras.to_jaxbn": (keras.to_jaxbn, KERAS),
    "keras.to_jaxbn, renorm": (keras.to_jaxbn, KERAS | RENORM),
    "keras.to_jaxbn, fused": (to(keras.to_jaxbn, unbiased=True, count=10), KERAS),
    "keras.batch_norms": (keras.batch_norms, TENSORFLOW),
    "keras.batch_norms, file": (keras.batch_norms, IN_FILE),
    "haiku.to_jaxbn": (haiku.to_jaxbn, HAIKU | AVERAGES),
    "haiku.batch_norms": (haiku_model, {"bn": HAIKU, **AVERAGES}),
    "equinox.to_jaxbn": (to(equinox.to_jaxbn, momentum=0.9), EQUINOX | OF_BATCH),
    "equinox.to_jaxbn, ema": (equinox.to_jaxbn, EQUINOX | OF_EMA),
    "equinox.batch_norms": (equinox_model, EQUINOX | OF_BATCH),
    "equinox.batch_norms, ema": (equinox_model, EQUINOX | OF_EMA),
    "flax.to_jaxbn": (flax.to_jaxbn, LINEN),
    "flax.to_jaxbn, nnx": (flax.to_jaxbn, {**FLAX["params"], **FLAX_STATS}),
    "flax.batch_norms": (flax.batch_norms, NESTED),
    "flax.batch_norms, nnx": (flax.batch_norms, {0: {**FLAX["params"], **FLAX_STATS}}),
    "praxis.to_jaxbn": (praxis.to_jaxbn, KERAS),
    "praxis.batch_norms": (praxis.batch_norms, PAX),
    "torch.from_jaxbn": (back(torch.from_jaxbn, unbiased=False, count=10), OURS),
    "keras.from_jaxbn": (back(keras.from_jaxbn), OURS),
    "keras.from_jaxbn, renorm": (
        back(keras.from_jaxbn, epsilon=1e-3),
        {**OURS, "stats": RENORM_STATS},
    ),
    "haiku.from_jaxbn": (back(haiku.from_jaxbn, ndim=2, decay_rate=0.9), OURS),
    "equinox.from_jaxbn": (back(equinox.from_jaxbn, momentum=0.9), OURS),
    "flax.from_jaxbn": (back(flax.from_jaxbn, step=True), OURS),
    "praxis.from_jaxbn": (back(praxis.from_jaxbn), OURS),
}
OPTIONAL = re.compile(r"bias|beta|gamma|offset|scale|num_batches|step|^[01]$")
UNREAD = {"hidden"}  # Haiku's, of which the average is made.


def leaves_of(tree, path=()):
    """The paths to arrays; of Equinox' pairs as well."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in children:
        if isinstance(child, (dict, tuple)):
            yield from leaves_of(child, (*path, key))
        elif key not in UNREAD:
            yield (*path, key), child


def dicts_of(tree, path=()):
    yield path
    for key, child in tree.items():
        if isinstance(child, dict):
            yield from dicts_of(child, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    new = replaced(tree[path[0]], path[1:], value)
    if isinstance(tree, tuple):
        return tuple(new if i == path[0] else v for i, v in enumerate(tree))
    return {**tree, path[0]: new}


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


def some(value, dtype=np.float32):
    """An array that has this value once."""
    array = V.astype(dtype)
    array[1] = value
    return array


def named(message, path):
    """Whether a message has the last name of a path in quotation marks."""
    *_, key = [part for part in path if isinstance(part, str)]
    quoted = "".join(re.findall(r"`[^`]*`|\[[^\]]*\]", message))
    return re.search(rf"\b{re.escape(key)}\b", quoted)


# What means the same number.
SAME = {
    "big-endian": lambda v: v.astype(v.dtype.newbyteorder(">")),
    "float64 big-endian": lambda v: v.astype(">f8"),
    "long double": lambda v: v.astype(np.longdouble),
    "float16": lambda v: v.astype(np.float16),
    "float16 big-endian": lambda v: v.astype(">f2"),
    "bfloat16": lambda v: v.astype(ml_dtypes.bfloat16),
    "float8": lambda v: v.astype(ml_dtypes.float8_e4m3fn),
    "list": lambda v: v.tolist(),
    "jax": jnp.asarray,
    "strided": lambda v: np.stack([v, v], -1)[..., 0],
    "masked nowhere": lambda v: np.ma.masked_array(v, mask=False),
    "masked, without a mask": np.ma.masked_array,
}
SAME_STEP = {
    "int4": lambda v: v.astype(ml_dtypes.int4),
    "uint4": lambda v: v.astype(ml_dtypes.uint4),
    "int16 big-endian": lambda v: v.astype(">i2"),
    "uint64": lambda v: v.astype(np.uint64),
    "float": float,
    "long double": lambda v: v.astype(np.longdouble),
    "int": int,
    "jax": jnp.asarray,
}
# What is no array of the right kind.
BAD = {
    "str": "abc",
    "str array": np.array(["1", "2", "3"]),
    "bytes": b"abc",
    "object": object(),
    "class": np.ndarray,
    "function": np.ones,
    "set": {1.0},
    "ragged": [1.0, [2.0, 3.0], 4.0],
    "object array": np.array([1.0, None, 3.0], object),
    "decimals": [decimal.Decimal(1)] * 3,
    "too long an integer": 10**400,
    "dates": np.array(["2020-01-01"] * 3, "datetime64[D]"),
    "times": np.array([1, 2, 3], "timedelta64[s]"),
    "records": np.zeros(3, [("a", "f4")]),
    "integers": np.arange(3),
    "int4": np.arange(3).astype(ml_dtypes.int4),
    "truths": np.ones(3, bool),
    "key": jax.random.key(0),
    "shape": jax.ShapeDtypeStruct((3,), np.float32),
    "deleted": deleted(),
    "masked": np.ma.masked_array(V, mask=[False, True, False]),
    "scalar": np.float32(1),
    "empty": np.zeros(0, np.float32),
    "other length": V[:2],
    "more axes": np.ones((2, 3, 1), np.float32),
    "nan": some(np.nan),
    "inf": some(np.inf),
    "-inf": some(-np.inf),
    "bfloat16 nan": some(np.nan, ml_dtypes.bfloat16),
    "long double past float64": some(np.longdouble("1e4000"), np.longdouble),
    "complex nan": some(np.nan, np.complex64),
}
PAST_FLOAT32 = {"float64": some(1e300, float), "complex": some(1e300j, complex)}
BAD_STEP = {
    "negative": -1,
    "half": 2.5,
    "nan": np.float32(np.nan),
    "inf": np.inf,
    "complex": 7 + 0j,
    "past int32": np.uint64(2**31),
    "past int64": np.uint64(2**64 - 1),
    "too long an integer": 10**400,
    "several": np.array([7, 7]),
    "time": np.timedelta64(7, "s"),
    "str": "7",
    "object": object(),
    "masked": np.ma.masked,
}
BAD_TREE = {
    "none": None,
    "number": 3,
    "list": [V],
    "str": "abc",
    "array": V,
    "bytes for keys": {b"weight": V},
    "numbers for keys": {0: V, None: V},
    "tuples for keys": {("a", "weight"): V, "weight": V},
}


def is_step(value):
    return np.ndim(value) == 0


def assert_same(result, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(b, float), rtol=1e-6
        ),
        result,
        expected,
    )
    for leaf in jax.tree.leaves(result):
        assert np.all(np.isfinite(np.asarray(leaf, float)))


def refusal(what, function, *arguments, **options):
    """The message of the error, which must be one of the two."""
    try:
        function(*arguments, **options)
    except (ValueError, TypeError) as error:
        return str(error)
    return pytest.fail(f"{what} is taken")


EACH = pytest.mark.parametrize("name", FUNCTIONS)


@EACH
def test_what_means_the_same_is_converted(name):
    function, tree = FUNCTIONS[name]
    expected = function(tree)
    for path, good in leaves_of(tree):
        for change in (SAME_STEP if is_step(good) else SAME).values():
            assert_same(function(replaced(tree, path, change(good))), expected)


@EACH
def test_what_does_not_is_refused_by_its_key(name):
    function, tree = FUNCTIONS[name]
    there = name.endswith("to_jaxbn") or "to_jaxbn," in name or "batch_norms" in name
    for path, good in leaves_of(tree):
        bad = {**BAD_STEP} if is_step(good) else {**BAD}
        if there and not is_step(good):
            bad |= PAST_FLOAT32  # From jaxbn, wider arrays stay as wide.
        for kind, value in bad.items():
            message = refusal((path, kind), function, replaced(tree, path, value))
            assert named(message, path), (path, kind, message)


@EACH
def test_none_is_absent(name):
    """And a dict that has no keys is one without arrays."""
    function, tree = FUNCTIONS[name]
    for path, _ in leaves_of(tree):
        without = replaced(tree, path, None)
        optional = "from_jaxbn" not in name and (
            isinstance(path[-1], str) and OPTIONAL.search(path[-1])
        )
        if optional or ("equinox" in name and path == ("weight",)):
            leaves = jax.tree.leaves(function(without))
            assert all(np.all(np.isfinite(np.asarray(v, float))) for v in leaves)
        else:
            message = refusal(path, function, without)
            assert named(message, path), (path, message)


@EACH
def test_trees_that_are_none(name):
    function, tree = FUNCTIONS[name]
    if "from_jaxbn" in name:
        return  # A NamedTuple, and `params`, below.
    of_nnx = name.endswith("batch_norms, nnx")
    for path in dicts_of(tree):
        for kind, value in BAD_TREE.items():
            if "equinox.batch_norms" in name or ("haiku.batch" in name and not path):
                continue  # The fields of a layer, and two trees, see below.
            message = refusal((path, kind), function, replaced(tree, path, value))
            if not of_nnx:
                assert "`" in message or "missing" in message, (path, kind, message)


@pytest.mark.parametrize("tree", BAD_TREE.values(), ids=BAD_TREE)
def test_trees_in_two_arguments(tree):
    good = {f"bn/~/{n}": v for n, v in AVERAGES.items()}
    stats = jaxbn.RunningStats(**STATS)
    with pytest.raises((ValueError, TypeError), match="`params` must be a dict, got"):
        haiku.batch_norms(tree, good)
    with pytest.raises(TypeError, match="`state` must be a dict, got"):
        haiku.batch_norms({}, tree)
    with pytest.raises(TypeError, match=r"`params\['bn'\]` must be a dict, got"):
        haiku.batch_norms({"bn": tree}, good)
    for function, rest in (
        (torch.from_jaxbn, {}),
        (keras.from_jaxbn, {}),
        (flax.from_jaxbn, {}),
        (praxis.from_jaxbn, {}),
        (equinox.from_jaxbn, {"momentum": None}),
        (haiku.from_jaxbn, {"ndim": 2, "decay_rate": 0.9}),
    ):
        with pytest.raises((TypeError, ValueError), match="`params` must be a dict, g"):
            function(tree, stats, **rest)
        with pytest.raises((TypeError, ValueError), match=r"`(stats|epsilon)`"):
            function({}, tree, **rest)
    with pytest.raises(ValueError, match=r"`model` (has no batch norm|must be a tree)"):
        equinox.batch_norms(tree, SimpleNamespace(get={}.get))
    model, _ = state_of(EQUINOX | OF_EMA)
    with pytest.raises(TypeError, match=r"`state` must be an `eqx.nn.State`, got"):
        equinox.batch_norms(model, tree)


def test_tracers():
    for name, (function, tree) in FUNCTIONS.items():
        for path, good in leaves_of(tree):
            call = lambda v, f=function, t=tree, p=path: f(replaced(t, p, v))
            with pytest.raises(TypeError) as error:
                jax.jit(call)(good)
            assert named(str(error.value), path), (name, path, str(error.value))


def test_what_overflows_on_the_way():
    large = np.full(3, 3e38, np.float32)
    with pytest.raises(ValueError, match=r"`running_var` has .* which becomes inf"):
        torch.frozen_to_jaxbn({**TORCH, "running_var": large}, eps=3e38)
    hidden = {**OF_BATCH, "batch_state_index": (V, large), "batch_counter": 1}
    with pytest.raises(ValueError, match=r"`batch_state_index\[1\]` has .* inf in fl"):
        equinox.to_jaxbn(EQUINOX | hidden, momentum=0.99)
    with pytest.raises(
        ValueError, match=r"`moving_variance` has 3e.*becomes inf in fl"
    ):
        keras.to_jaxbn({**KERAS, "moving_variance": large}, unbiased=True, count=2)
    stats = jaxbn.RunningStats(V, large, np.int32(7))
    with pytest.raises(ValueError, match=r"`stats.var` has 3e.*becomes inf in float32"):
        torch.from_jaxbn({}, stats, unbiased=False, count=2)
    std = jaxbn.layers.RenormStats(V, large, np.int32(7))
    with pytest.raises(ValueError, match=r"`stats.std` has 3e.*becomes inf in float32"):
        keras.from_jaxbn({}, std, epsilon=1e-3)


@pytest.mark.usefixtures("x64")
def test_what_only_64_bits_hold():
    arrays = {**TORCH, "running_var": some(1e300, float)}
    _, stats = torch.to_jaxbn(arrays)
    assert stats.var[1] == 1e300
    assert torch.from_jaxbn({}, stats, unbiased=True)["running_var"][1] == 1e300


def test_statistics_of_no_feature_axis():
    one = np.float32(1)
    numbers = {"running_mean": one, "running_var": one}
    with pytest.raises(ValueError, match=r"`running_mean` has shape \(\), expected a"):
        torch.to_jaxbn(numbers)
    for name, (function, tree) in FUNCTIONS.items():
        scalars = tree
        for path, good in leaves_of(tree):
            if not is_step(good):
                scalars = replaced(scalars, path, one)
        if not name.startswith("flax"):  # Its axes may be none.
            message = refusal(name, function, scalars)
            assert re.search(r"`.*(mean|vars/2|index\[0\]|feature_axes).*`", message)


def test_negative_zero_is_a_variance():
    zero = np.full(3, -0.0, np.float32)
    assert_same(
        torch.to_jaxbn({**TORCH, "running_var": zero}),
        torch.to_jaxbn({**TORCH, "running_var": np.abs(zero)}),
    )


def test_torch_tensors_of_narrow_dtypes():
    t = pytest.importorskip("torch", reason="`make peers` installs it")
    for dtype in (t.bfloat16, t.float16, t.float8_e4m3fn, t.float8_e5m2, t.float64):
        arrays = {name: t.from_numpy(v).to(dtype) for name, v in TORCH.items()}
        assert_same(torch.to_jaxbn(arrays), torch.to_jaxbn(TORCH))
    for bad in (t.ones(3, device="meta"), t.eye(3).to_sparse(), t.ones(3, dtype=int)):
        with pytest.raises((TypeError, ValueError), match="`bias`"):
            torch.to_jaxbn({**TORCH, "bias": bad})


NUMBERS = {
    "none": None,
    "str": "0.9",
    "nan": np.nan,
    "inf": np.inf,
    "negative": -1,
    "truth": True,
    "too long": 10**400,
    "complex": 0.9 + 0j,
    "list": [0.9],
    "array": np.array([0.9, 0.8]),
    "jax": jnp.float32(0.9),
    "object": object(),
    "decimal": decimal.Decimal("0.9"),
}
FLAGS = {"none": None, "str": "no", "list": [], "array": np.ones(2, bool), "one": 1}
MADE = MappingProxyType({"create_scale": True, "create_offset": True})
OPTIONS = {
    torch.options: ({}, ("eps", "momentum"), ("affine", "track_running_stats", "bias")),
    keras.options: ({}, ("epsilon", "momentum"), ("center", "scale", "fused")),
    equinox.options: ({}, ("eps", "momentum"), ("channelwise_affine", "mode")),
    haiku.options: ({**MADE, "decay_rate": 0.9}, ("eps", "decay_rate"), tuple(MADE)),
    praxis.options: ({}, ("decay",), ()),
}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda f: f.__module__)
def test_options(options):
    rest, numbers, flags = OPTIONS[options]
    for names, values in ((numbers, NUMBERS), (flags, FLAGS)):
        for name in names:
            for kind, value in values.items():
                if (options, name, kind) == (torch.options, "momentum", "none"):
                    continue  # torch's plain average
                message = refusal((name, kind), options, **{**rest, name: value})
                assert f"`{name}` must be" in message
    for name in numbers:
        for value in (np.float64(0.5), np.longdouble(0.5), Fraction(1, 2), 0.5):
            made = options(**{**rest, name: value})
            assert made == options(**{**rest, name: 0.5})
            jaxbn.layers.standard(**made)


def test_other_arguments():
    stats = jaxbn.RunningStats(**STATS)
    for value in FLAGS.values():
        for call, name in (
            (lambda v: praxis.to_jaxbn(KERAS, minus_one=v), "minus_one"),
            (lambda v: praxis.from_jaxbn({}, stats, minus_one=v), "minus_one"),
            (lambda v: keras.to_jaxbn(KERAS, fused=v), "fused"),
            (lambda v: keras.batch_norms(KERAS, fused=v), "fused"),
            (lambda v: keras.from_jaxbn({}, stats, fused=v), "fused"),
            (lambda v: flax.from_jaxbn({}, stats, step=v), "step"),
            (lambda v: torch.to_jaxbn(TORCH, unbiased=v), "unbiased"),
            (lambda v: equinox_model(EQUINOX | OF_EMA, correct=v), "correct"),
            (lambda v: equinox.to_jaxbn(EQUINOX | OF_EMA, correct=v), "correct"),
        ):
            with pytest.raises(TypeError, match=f"`{name}` must be True or False"):
                call(value)
    for kind, value in NUMBERS.items():
        with pytest.raises(ValueError, match=r"`(decay_rate|ndim)` must be"):
            haiku.from_jaxbn({}, stats, ndim=2, decay_rate=value)
        with pytest.raises(ValueError, match="`ndim` must be a whole number"):
            haiku.from_jaxbn({}, stats, ndim=value, decay_rate=0.9)
        if kind != "none":
            with pytest.raises(ValueError, match="`count`"):
                torch.to_jaxbn(TORCH, unbiased=False, count=value)
            with pytest.raises(ValueError, match="`momentum` must be"):
                equinox.from_jaxbn({}, stats, momentum=value)
        with pytest.raises(ValueError, match="`eps` must be"):
            torch.frozen_to_jaxbn(TORCH, eps=value)
    count = {0: 3, None: 4, "bn": 5}
    with pytest.raises(ValueError, match=r"`count` has \[0, None\], which are no"):
        keras.batch_norms(TENSORFLOW, unbiased=True, count=count)
