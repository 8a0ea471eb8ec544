"""Port a trained torch network to plain JAX, and continue its training.

Trains a small convolutional network in torch on handwritten digits, and converts its
parameters and running statistics by `jaxbn.interop.torch`. The training continues in
JAX with functions only: there are no modules, but one dict of parameters and one dict
of statistics. The torch network takes the same further steps.

What to expect: both networks give the same logits to float32 precision, and the same
losses in the further steps.

Run it with

    python examples/torch_port.py

Options:
    --steps N    Steps in torch, and further steps in both (default 30).

Needs `pip install 'jaxbn[examples]' torch`.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch  # type: ignore  (installed by `make peers`)
from _options import positive
from jax import lax
from sklearn.datasets import load_digits

import jaxbn

LEARNING_RATE, BATCH = 0.1, 64
OPTIONS = jaxbn.interop.torch.options()  # momentum=0.1, eps=1e-5, as in torch
NORM = jaxbn.layers.standard(**OPTIONS)


def torch_net() -> torch.nn.Module:
    layers = torch.nn
    return layers.Sequential(
        layers.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        layers.BatchNorm2d(16),
        layers.ReLU(),
        layers.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        layers.BatchNorm2d(32),
        layers.ReLU(),
        layers.Flatten(),
        layers.Linear(128, 10),
    )


def converted(net: torch.nn.Module) -> tuple[dict, dict]:
    """Parameters and statistics, with kernels in HWIO instead of OIHW."""
    arrays = {key: value.numpy() for key, value in net.state_dict().items()}
    params, stats = {}, {}
    for name, (own, state) in jaxbn.interop.torch.batch_norms(arrays).items():
        params[f"norm_{name}"], stats[f"norm_{name}"] = own, state
    for name in ("0", "3"):
        params[f"conv_{name}"] = jnp.asarray(arrays[f"{name}.weight"]).transpose(
            2, 3, 1, 0
        )
    # torch flattens images with channels first, and `apply` with channels last.
    dense = arrays["7.weight"].reshape(10, 32, 2, 2).transpose(2, 3, 1, 0)
    params["dense"] = jnp.asarray(dense.reshape(128, 10))
    params["bias"] = jnp.asarray(arrays["7.bias"])
    return params, stats


def apply(params: dict, stats: dict, x: jax.Array, training: bool):
    """Logits, and the new statistics."""
    new = {}
    for conv, norm in (("conv_0", "norm_1"), ("conv_3", "norm_4")):
        layout = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, params[conv], (2, 2), [(1, 1)] * 2, dimension_numbers=layout
        )
        x, new[norm] = NORM.apply(params[norm], stats[norm], x, training=training)
        x = jax.nn.relu(x)
    return x.reshape(x.shape[0], -1) @ params["dense"] + params["bias"], new


@jax.jit
def jax_step(params: dict, stats: dict, x: jax.Array, y: jax.Array):
    def loss(params):
        logits, new = apply(params, stats, x, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    moved = lambda p, g: p - LEARNING_RATE * g  # noqa: E731
    return value, jax.tree.map(moved, params, grads), stats


def torch_step(net: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    net.train().zero_grad()
    given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    loss = torch.nn.functional.cross_entropy(net(given), torch.from_numpy(y))
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= LEARNING_RATE * parameter.grad  # type: ignore  (not None)
    return loss.item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=positive(int), default=30, metavar="N")
    steps = parser.parse_args(argv).steps
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    net = torch_net()
    for rows in (rng.choice(len(images), BATCH) for _ in range(steps)):
        torch_step(net, images[rows], labels[rows])

    params, stats = converted(net)
    test = torch.from_numpy(images[:100].transpose(0, 3, 1, 2).copy())
    theirs = net.eval()(test).detach().numpy()
    ours, _ = apply(params, stats, jnp.asarray(images[:100]), training=False)
    logits = float(np.max(np.abs(ours - theirs)))
    losses = []
    for rows in (rng.choice(len(images), BATCH) for _ in range(steps)):
        value, params, stats = jax_step(params, stats, images[rows], labels[rows])
        losses.append((float(value), torch_step(net, images[rows], labels[rows])))
    apart = max(abs(a - b) for a, b in losses)
    print(f"logits after the conversion: {logits:.1e} apart, at most")
    print(f"losses of {steps} further steps: {apart:.1e} apart, at most")
    print(f"last losses: {losses[-1][0]:.4f} in JAX, {losses[-1][1]:.4f} in torch")
    return {"logits": logits, "losses": apart, "last": losses[-1][0]}


if __name__ == "__main__":
    main()
