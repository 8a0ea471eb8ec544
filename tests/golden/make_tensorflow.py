"""Stores what TensorFlow's batch norm functions return, for `tests/test_tf_nn.py`.

In an environment of its own, which need not have JAX:

    pip install tensorflow-cpu==2.20.0
    python tests/golden/make_tensorflow.py

It writes `tensorflow.npz` beside this file. The numbers that go in are those of
`tensorflow_cases.py`; those that come out are TensorFlow's on a CPU.
"""

import inspect
import json
import pathlib
import types

import numpy as np
import tensorflow as tf
from tensorflow_cases import CASES, call, cotangent, inputs, pack

OUT = pathlib.Path(__file__).with_name("tensorflow.npz")
FUNCTIONS = {
    "moments": tf.nn.moments,
    "weighted_moments": tf.nn.weighted_moments,
    "sufficient_statistics": tf.nn.sufficient_statistics,
    "normalize_moments": tf.nn.normalize_moments,
    "batch_normalization": tf.nn.batch_normalization,
    "fused_batch_norm": tf.compat.v1.nn.fused_batch_norm,
}


def main():
    stored = {}
    for name, case in CASES.items():
        stored |= results(name, case)
    signatures = {name: signature(f) for name, f in FUNCTIONS.items()}
    np.savez_compressed(
        OUT,
        version=tf.__version__,
        signatures=json.dumps(signatures),
        hessian=hessian_of_variance(np.array([1.0, 2.0, 4.0, 7.0])),
        **pack(stored),
    )
    print(f"{len(CASES)} cases of TensorFlow {tf.__version__} in {OUT}")


def results(name, case):
    """Outputs and gradients of a case, under the case's name and their own."""
    nn = types.SimpleNamespace(**FUNCTIONS)
    arrays = {
        key: tf.cast(value, case.arrays[key].dtype)
        for key, value in inputs(name, case).items()
    }
    with tf.GradientTape() as tape:
        tape.watch([arrays[key] for key in case.gradients])
        outputs = call(nn, case, arrays)
    found = {f"output {i}": value for i, value in enumerate(outputs)}
    if case.gradients:
        dy = tf.cast(cotangent(name, outputs[0].shape), outputs[0].dtype)
        sources = {key: arrays[key] for key in case.gradients}
        found |= tape.gradient(outputs[0], sources, output_gradients=dy)
    return {
        f"{name} {key}": (value.dtype.name, tf.cast(value, tf.float64).numpy())
        for key, value in found.items()
        if value is not None  # no shift
    }


def signature(function):
    """Names and defaults of its parameters; a default that is missing is "required"."""
    required = inspect.Parameter.empty
    return [
        (p.name, "required" if p.default is required else p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def hessian_of_variance(x):
    x = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            variance = tf.nn.moments(x, [0])[1]
        gradient = inner.gradient(variance, x)
    return outer.jacobian(gradient, x).numpy()


if __name__ == "__main__":
    main()
