"""What is timed: a layer of a library in a mode, as a function that makes `n` calls.

The modes are "forward" (training: the output and the new running statistics),
"forward+backward" (that, and the gradients of x, scale and bias from a cotangent of the
output, as one program) and "inference".
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _layers import EPSILON, LAYERS, MOMENTUM, Layer
from _machine import threads

MODES = ("forward", "forward+backward", "inference")
# A function of how many calls to make; it returns when their results are there.
Run = Callable[[int], None]
NAMES = (*LAYERS, "torch", "torch channels first")
# What libraries need beside JAX and jaxbn.
NEEDS = {
    "jaxbn native": "jaxbn_cpu",
    "linen": "flax",
    "nnx": "flax",
    "haiku": "haiku",
    "equinox": "equinox",
    "keras": "keras",
    "torch": "torch",
    "torch channels first": "torch",
}


def installed(names: Iterable[str]) -> list[str]:
    """Those that run here; of the others, standard error tells what is missing."""
    found = []
    for name in names:
        needed = NEEDS.get(name, "jax")
        if importlib.util.find_spec(needed) is None:
            print(f"Without {name}: no {needed} here.", file=sys.stderr)
        elif jax.default_backend() != "cpu" and not _runs_on_gpu(needed):
            print(f"Without {name}: {needed} cannot use the GPU.", file=sys.stderr)
        else:
            found.append(name)
    return found


def _runs_on_gpu(module: str) -> bool:
    if module == "torch":
        import torch

        return torch.cuda.is_available()
    return module != "jaxbn_cpu"


def arguments(shape, seed: int = 0) -> tuple[np.ndarray, ...]:
    """x, scale, bias, mean, var and a cotangent of the output, in float32."""
    rng = np.random.default_rng(seed)
    x, ct = (rng.standard_normal(shape, np.float32) for _ in range(2))
    # No two of them share memory, as torch moves statistics in place.
    vectors = [np.full(shape[-1], v, np.float32) for v in (1, 0, 0, 1)]
    return x, *vectors, ct


def make(name: str, shape, dtype: str, relu: bool, mode: str) -> Run:
    """A layer of the library `name`, ready to be called."""
    if name.startswith("torch"):
        return torch(shape, dtype, relu, mode, channels_last="first" not in name)
    f = jax.jit(step(LAYERS[name](), relu, mode))
    x, *vectors, ct = arguments(shape)
    given = tuple(map(jnp.asarray, (x.astype(dtype), *vectors, ct.astype(dtype))))
    return jax_run(f, *given)


def step(layer: Layer, relu: bool, mode: str) -> Callable:
    """The function of `arguments` that a mode stands for."""
    activation = jax.nn.relu if relu else lambda y: y

    def forward(x, scale, bias, mean, var, ct=None):
        y, stats = layer.train(x, scale, bias, mean, var)
        return activation(y), stats

    def both(x, scale, bias, mean, var, ct):
        moving = partial(forward, mean=mean, var=var)
        y, vjp, stats = jax.vjp(moving, x, scale, bias, has_aux=True)
        return y, stats, vjp(ct)

    def infer(x, scale, bias, mean, var, ct=None):
        return activation(layer.infer(x, scale, bias, mean, var))

    return dict(zip(MODES, (forward, both, infer), strict=True))[mode]


def jax_run(f: Callable, *given) -> Run:
    """Calls of a compiled function, one after the other.

    A CPU would run several at once, each with less of its threads: there each call is
    awaited. A GPU queues them, which keeps the time of launching them from counting.
    """
    each = jax.default_backend() == "cpu"

    def run(n: int) -> None:
        out = None
        for _ in range(n):
            out = f(*given)
            if each:
                jax.block_until_ready(out)
        jax.block_until_ready(out)

    return run


def torch(shape, dtype: str, relu: bool, mode: str, channels_last: bool) -> Run:
    """PyTorch's function, on a GPU where it has one."""
    import torch

    torch.set_num_threads(threads())
    on = "cuda" if jax.default_backend() == "gpu" else "cpu"

    def tensor(array, kind=torch.float32):
        t = torch.from_numpy(array).to(on, kind)
        if array.ndim < 3:
            return t
        t = t.movedim(-1, 1)
        return t if channels_last else t.contiguous()

    x, *vectors, ct = arguments(shape)
    x, ct = (tensor(a, getattr(torch, dtype)) for a in (x, ct))
    scale, bias, mean, var = map(tensor, vectors)
    normed = [t.requires_grad_() for t in (x, scale, bias)]
    activation = torch.relu if relu else lambda y: y
    training, backward = mode != "inference", mode == "forward+backward"

    def call():
        with torch.set_grad_enabled(backward):
            y = torch.nn.functional.batch_norm(
                x, mean, var, scale, bias, training, 1 - MOMENTUM, EPSILON
            )
            y = activation(y)
        return (y, torch.autograd.grad(y, normed, ct)) if backward else y

    def run(n: int) -> None:
        for _ in range(n):
            call()
        if on == "cuda":
            torch.cuda.synchronize()

    return run


def torch_variance(x: np.ndarray, dtype: str) -> np.ndarray:
    """The biased variance of a batch that its layer stores."""
    import torch

    n, channels = x.shape
    mean, var = torch.zeros(channels), torch.ones(channels)
    rows = torch.from_numpy(x).to(getattr(torch, dtype))
    torch.nn.functional.batch_norm(rows, mean, var, training=True, momentum=1.0)
    return var.numpy() * ((n - 1) / n)
