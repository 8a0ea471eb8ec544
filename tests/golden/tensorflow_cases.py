"""The calls that are compared with TensorFlow's: their arguments and their numbers.

`make_tensorflow.py` makes them in TensorFlow, `test_tf_nn.py` in jaxbn. This file
imports neither, so that both do the same.
"""

import json
import random
import zlib
from math import prod
from typing import Any, NamedTuple

import numpy as np


class Numbers(NamedTuple):
    """An array of fractions with few digits: with `mean` 1 every dtype holds them.

    They spread over `mean` ± 3.5 · 16/per; with `positive`, up to 4 · 16/per.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    positive: bool = False
    mean: int = 1
    per: int = 16  # what they are multiples of: 1/per
    zeros: bool = False  # every third element


class Case(NamedTuple):
    """A call: its function, the arguments that are arrays, and the others.

    `gradients` names the arrays by which the first output is differentiated.
    """

    function: str
    arrays: dict[str, Numbers]
    options: dict[str, Any] = {}  # noqa: RUF012
    gradients: tuple[str, ...] = ()


def inputs(name: str, case: Case) -> dict[str, np.ndarray]:
    """The arrays of a case, in float64."""
    return {key: numbers(f"{name} {key}", spec) for key, spec in case.arrays.items()}


def cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the first output of a case is differentiated with."""
    return numbers(f"{name} cotangent", Numbers(shape))


def numbers(seed: str, spec: Numbers) -> np.ndarray:
    # Python promises the same numbers for ever, NumPy does not.
    draw = random.Random(zlib.crc32(seed.encode())).random
    low, high = (1, 65) if spec.positive else (-56, 57)
    drawn = [low + int(draw() * (high - low)) for _ in range(prod(spec.shape))]
    if spec.zeros:
        drawn[::3] = [0] * len(drawn[::3])
    center = 0 if spec.positive else spec.mean
    return center + np.reshape(np.array(drawn, float), spec.shape) / spec.per


def call(nn: Any, case: Case, arrays: dict[str, Any]) -> tuple:
    """The outputs of a case, `nn` being `tf.nn` or `jaxbn.interop.tf_nn`."""
    function = COMPOSED.get(case.function)
    if function is None:
        outputs = getattr(nn, case.function)(**arrays, **case.options)
    else:
        outputs = function(nn, **arrays, **case.options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def normalized(nn, x, scale, offset, axes, epsilon):
    """What most code does in training."""
    mean, variance = nn.moments(x, axes, keepdims=True)
    return nn.batch_normalization(x, mean, variance, offset, scale, epsilon)


def one_pass(nn, x, axes, shift=None, keepdims=False):
    """Moments from sufficient statistics."""
    sums = nn.sufficient_statistics(x, axes, shift, keepdims)
    return nn.normalize_moments(*sums)


COMPOSED = {"normalized": normalized, "one_pass": one_pass}

X = (4, 3, 5)
DTYPES = ("float16", "bfloat16", "float64")


def moments_cases():
    for axes in (0, [0], (0, 1), [-1], [0, 2], [0, 1, 2], []):
        yield Case("moments", {"x": Numbers(X)}, {"axes": axes})
    for axes in ((1, 0), [-1], [0, 1, 2]):
        options = {"axes": axes, "keepdims": True}
        yield Case("moments", {"x": Numbers(X)}, options)
    for dtype in DTYPES:
        yield Case("moments", {"x": Numbers(X, dtype)}, {"axes": [0, 1]})
    for shift in ((), (5,), (1, 1, 5)):
        arrays = {"x": Numbers(X), "shift": Numbers(shift)}
        yield Case("moments", arrays, {"axes": [0, 1]})
    yield Case("moments", {"x": Numbers(X, mean=4000)}, {"axes": [0, 1]})
    yield Case("moments", {"x": Numbers((1, 5))}, {"axes": [0]})


def weighted_cases():
    weights = Numbers((4, 1, 1), positive=True)
    for axes, keepdims in (([0], False), ([0, 2], True), ((-1, 0), False)):
        options = {"axes": axes, "keepdims": keepdims}
        yield Case(
            "weighted_moments", {"x": Numbers(X), "frequency_weights": weights}, options
        )
    shapes = [
        (X, ()),
        (X, (5,)),
        (X, (3, 1)),
        (X, (1, 3, 5)),
        (X, X),
        ((4, 3, 1), (5,)),  # x broadcasts against the weights
        ((3, 5), (2, 3, 5)),
        ((3, 1), (4, 1, 5)),
    ]
    for x, w in shapes:
        spec = Numbers(w, positive=True, zeros=bool(w))
        arrays = {"x": Numbers(x), "frequency_weights": spec}
        yield Case("weighted_moments", arrays, {"axes": [0, 1]})
    for dtype in DTYPES:
        arrays = {"x": Numbers(X, dtype), "frequency_weights": weights}
        yield Case("weighted_moments", arrays, {"axes": [0, 1]})
    for dtype in ("bool", "int32"):
        mask = Numbers((4, 3, 1), dtype, positive=True, zeros=True)
        arrays = {"x": Numbers(X), "frequency_weights": mask}
        yield Case("weighted_moments", arrays, {"axes": [0, 1]})


def sufficient_cases():
    for axes, keepdims in (([0], False), ((0, 1), True), ([-1, 0], False), ([], False)):
        options = {"axes": axes, "keepdims": keepdims}
        yield Case("sufficient_statistics", {"x": Numbers(X)}, options)
    for dtype in ("float32", *DTYPES):
        arrays = {"x": Numbers(X, dtype), "shift": Numbers((5,), dtype)}
        yield Case("sufficient_statistics", arrays, {"axes": [0, 1]})
    for shift, axes, keepdims in [
        ((), [0], False),
        ((), [0, 1, 2], True),
        ((1, 1, 5), [0, 1], True),
        ((3, 1), [0, 2], True),
        ((3, 5), [0], False),
    ]:
        arrays = {"x": Numbers(X), "shift": Numbers(shift)}
        options = {"axes": axes, "keepdims": keepdims}
        yield Case("sufficient_statistics", arrays, options)
        yield Case("one_pass", arrays, options, ("x",))
    yield Case("one_pass", {"x": Numbers(X)}, {"axes": [0]}, ("x",))
    arrays = {"x": Numbers(X, mean=4000), "shift": Numbers((5,), mean=4000)}
    yield Case("one_pass", arrays, {"axes": [0, 1]})


def normalize_moments_cases():
    for counts, mean_ss, variance_ss, shift in [
        ((), (5,), (5,), None),
        ((), (5,), (5,), (5,)),
        ((3, 1), (3, 5), (3, 5), ()),
        ((), (1, 1, 5), (1, 1, 5), (5,)),
        ((2,), (), (), ()),
        ((), (5,), (1, 5), (3, 1)),
    ]:
        for dtype in ("float32", *DTYPES) if mean_ss == (5,) == shift else ("float32",):
            arrays = {
                "counts": Numbers(counts, dtype, positive=True),
                "mean_ss": Numbers(mean_ss, dtype, mean=0),
                "variance_ss": Numbers(variance_ss, dtype, mean=200),
            }
            if shift is not None:
                arrays["shift"] = Numbers(shift, dtype)
            options = {"shift": None} if shift is None else {}
            yield Case("normalize_moments", arrays, options)


def batch_normalization_cases():
    for x, mean, variance, offset, scale in [
        (X, (5,), (5,), (5,), (5,)),
        (X, (), (), (), ()),
        (X, (1, 1, 5), (5,), None, (1, 5)),
        (X, (4, 1, 5), (4, 1, 5), (5,), None),
        (X, (5,), (5,), None, None),
        (X, (3, 1), (1, 1), (1,), (3, 1)),
        (X, (1, 3, 1), (4, 1, 1), X, (5,)),
        ((4, 3, 1), (5,), (5,), (5,), (5,)),  # x broadcasts against the others
        ((3, 5), (2, 1, 5), (5,), (2, 3, 1), None),
        ((5,), (), (3, 1), None, (4, 1, 1)),
    ]:
        yield batch_normalization_case(x, mean, variance, offset, scale)
    five = ((5,),) * 4
    for dtype in DTYPES:
        yield batch_normalization_case(X, *five, dtype, dtype)
    yield batch_normalization_case(X, *five, "float16", "float32")
    yield batch_normalization_case(X, *five, "float32", "bfloat16")


def batch_normalization_case(
    x, mean, variance, offset, scale, dtype="float32", vectors="float32"
):
    arrays = {
        "x": Numbers(x, dtype),
        "mean": Numbers(mean, vectors),
        "variance": Numbers(variance, vectors, positive=True),
    }
    options = {"variance_epsilon": 0.01}
    for name, shape in (("offset", offset), ("scale", scale)):
        if shape is None:
            options[name] = None
        else:
            arrays[name] = Numbers(shape, vectors)
    return Case("batch_normalization", arrays, options, tuple(arrays))


def normalized_cases():
    vectors = {"scale": Numbers((3, 1)), "offset": Numbers((3, 1))}
    for dtype in ("float32", "float64"):
        arrays = {
            name: spec._replace(dtype=dtype)
            for name, spec in ({"x": Numbers(X)} | vectors).items()
        }
        options = {"axes": [0, 2], "epsilon": 0.01}
        yield Case("normalized", arrays, options, tuple(arrays))


IMAGES = {
    "NHWC": (2, 3, 4, 5),
    "NCHW": (2, 5, 3, 4),
    "NDHWC": (2, 3, 2, 2, 5),
    "NCDHW": (2, 5, 3, 2, 2),
}


def fused_cases():
    for data_format, shape in IMAGES.items():
        for training in (True, False):
            options = {"data_format": data_format, "is_training": training}
            yield fused_case(shape, running=not training, **options)
    volume = (2, 3, 2, 2, 5)
    yield fused_case(volume, data_format="NHWC")
    yield fused_case((2, 5, 3, 4), data_format="NCDHW")
    x = IMAGES["NHWC"]
    for factor in (0.0, 0.1, 0.5, 1.0):
        yield fused_case(x, running=True, exponential_avg_factor=factor)
    yield fused_case(x, running=True, is_training=False, exponential_avg_factor=0.1)
    for epsilon in (0.0, 1e-6, 1.001e-5, 0.1):  # with variances of about 4e-6
        small = {"mean": 0, "per": 2**14, "epsilon": epsilon}
        yield fused_case(x, **small)
        yield fused_case(x, running=True, is_training=False, **small)
    for factor in (0.1, 1.0):  # one element per channel
        yield fused_case((1, 1, 1, 5), running=True, exponential_avg_factor=factor)
    for dtype in ("float16", "bfloat16"):
        yield fused_case(x, dtype)
        yield fused_case(x, dtype, running=True, is_training=False)
        yield fused_case(x, dtype, running=True, exponential_avg_factor=0.1)
    yield fused_case(x, mean=4000)


def fused_case(shape, dtype="float32", *, mean=1, per=16, running=False, **options):
    arrays = {
        "x": Numbers(shape, dtype, mean=mean, per=per),
        "scale": Numbers((5,)),
        "offset": Numbers((5,)),
    }
    if running:
        arrays["mean"] = Numbers((5,))
        arrays["variance"] = Numbers((5,), positive=True, per=per**2 // 16)
    gradients = ("x", "scale", "offset")
    return Case("fused_batch_norm", arrays, options, gradients)


def described(case: Case) -> str:
    """A case in one line: what it is stored under."""
    arrays = ", ".join(f"{name}={written(spec)}" for name, spec in case.arrays.items())
    options = ", ".join(f"{name}={value}" for name, value in case.options.items())
    return f"{case.function}({arrays}; {options})"


def written(spec: Numbers) -> str:
    """An array in a few words: what differs from the defaults."""
    defaults = Numbers._field_defaults.items()
    differing = (
        f"{k}={getattr(spec, k)}" for k, v in defaults if getattr(spec, k) != v
    )
    return " ".join([str(list(spec.shape)), *differing])


def pack(arrays: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Many small arrays, with the names of their dtypes, as two for `np.savez`."""
    index = [(name, dtype, a.shape) for name, (dtype, a) in arrays.items()]
    values = np.concatenate([a.astype(float).ravel() for _, a in arrays.values()])
    return {"index": json.dumps(index), "values": values}


def unpack(stored: Any) -> dict[str, tuple[str, np.ndarray]]:
    """What was packed; all values in float64."""
    index = json.loads(str(stored["index"]))
    ends = np.cumsum([prod(shape) for _, _, shape in index])
    parts = np.split(stored["values"], ends[:-1])
    return {
        name: (dtype, part.reshape(shape))
        for (name, dtype, shape), part in zip(index, parts, strict=True)
    }


CASES = {
    described(case): case
    for cases in (
        moments_cases,
        weighted_cases,
        sufficient_cases,
        normalize_moments_cases,
        batch_normalization_cases,
        normalized_cases,
        fused_cases,
    )
    for case in cases()
}
