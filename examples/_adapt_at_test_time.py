"""Methods of test-time adaptation, and their predictions for streams of images."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _covariate_shift import Digits, Network, Variables

import jaxbn
from jaxbn.interop.optax import batch_norm_mask
from jaxbn.linen import BatchNorm, BatchRenorm, StreamingBatchNorm

DECAY = 0.99  # The weight of old statistics after one image.
PSEUDO_SAMPLES = 16.0
LEARNING_RATE = 1e-2  # Of Tent.
TTN_BATCH, TTN_RATE = 64, 0.05

ORDER = [
    "source",
    "batch statistics",
    f"pseudo-samples, N = {PSEUDO_SAMPLES:g}",
    "α-BN, α = 1/2",
    "TTN",
    "AdaBN",
    "average of the stream",
    "Tent",
    "Tent, renormalized",
]


class Variant(Network):
    """The network of the study with another batch norm, and the same variables."""

    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """Logits of images of shape (n, 8, 8)."""
        x = x[..., None]
        for i, stride in enumerate(self.strides):
            x = nn.Conv(self.width, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(self.norm(not training, name=f"BatchNorm_{i}")(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class MixedBatchNorm(nn.Module):
    """TTN (test-time normalization): a mixture of training and batch statistics.

    The collection `weights` holds the weight of the batch in each channel.
    """

    use_running_average: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x`."""
        source = jaxbn.RunningStats(
            self.get_variable("batch_stats", "mean"),
            self.get_variable("batch_stats", "var"),
            jnp.int32(0),
        )
        weight = self.get_variable("weights", "test")
        mixed = jaxbn.population.adapt(source, jaxbn.moments(x), weight=weight)
        scale, bias = (self.get_variable("params", name) for name in ("scale", "bias"))
        return jaxbn.normalize(x, mixed.mean, mixed.var, scale, bias)


class Method(NamedTuple):
    """A network, whether it follows the stream, and what trains scale and bias."""

    net: Network
    variables: Variables
    follows: bool = False
    optimizer: optax.GradientTransformation | None = None


class State(NamedTuple):
    """What a stream changes. In `norms`, all other parameters are None."""

    norms: Any
    batch_stats: Any
    opt_state: Any


def methods(
    net: Network, variables: Variables, weights: Any, size: int
) -> dict[str, Method]:
    """All methods but AdaBN, for batches of `size`."""

    def variant(norm, **options):
        return Variant(net.width, net.strides, norm=partial(norm, **options))

    source = variables["batch_stats"]
    decay = DECAY**size
    renorm = variant(
        BatchRenorm,
        r_max=jnp.inf,
        d_max=jnp.inf,
        warm_up_steps=1,  # For the first batch there are no running statistics.
        momentum=jaxbn.debiased(decay),
    )
    zeros, ones = np.zeros(net.width, np.float32), np.ones(net.width, np.float32)
    unknown = {"mean": zeros, "std": ones, "step": np.int32(0)}
    fresh = {**variables, "batch_stats": dict.fromkeys(source, unknown)}
    adam = optax.adam(LEARNING_RATE)
    made = [
        Method(variant(BatchNorm), variables),
        Method(variant(BatchNorm, pseudo_samples=0.0), variables),
        Method(variant(BatchNorm, pseudo_samples=PSEUDO_SAMPLES), variables),
        # As many as the batch has, so that each has half of the weight.
        Method(variant(BatchNorm, pseudo_samples=float(size)), variables),
        Method(variant(MixedBatchNorm), {**variables, "weights": weights}),
        Method(
            variant(StreamingBatchNorm, momentum=lambda step: decay), variables, True
        ),
        Method(variant(BatchNorm), variables, True, adam),
        Method(renorm, fresh, True, adam),
    ]
    return dict(zip(ORDER[:5] + ORDER[6:], made, strict=True))


def entropy(logits: jax.Array) -> jax.Array:
    """The mean entropy of the predictions."""
    return optax.softmax_cross_entropy(logits, nn.softmax(logits)).mean()


def only_norms(variables: Variables) -> Any:
    """The scales and biases of batch norms; None for all other parameters."""
    mask = batch_norm_mask(variables["params"], variables["batch_stats"])
    return jax.tree.map(lambda p, own: p if own else None, variables["params"], mask)


def put_back(norms: Any, params: Any) -> Any:
    """The parameters with these scales and biases."""
    return jax.tree.map(
        lambda own, p: p if own is None else own,
        norms,
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def start(method: Method) -> State:
    norms = only_norms(method.variables)
    opt_state = None if method.optimizer is None else method.optimizer.init(norms)
    return State(norms, method.variables["batch_stats"], opt_state)


def step(
    method: Method, variables: Variables, state: State, x: jax.Array
) -> tuple[State, jax.Array]:
    """Predicts a batch, and adapts for the next."""
    net, _, follows, optimizer = method

    def forward(norms):
        now = {
            **variables,
            "params": put_back(norms, variables["params"]),
            "batch_stats": state.batch_stats,
        }
        logits, new = net.apply(now, x, training=follows, mutable=["batch_stats"])
        return entropy(logits), (logits, new["batch_stats"])

    if optimizer is None:
        _, (logits, stats) = forward(state.norms)
        return state._replace(batch_stats=stats), logits
    grads, (logits, stats) = jax.grad(forward, has_aux=True)(state.norms)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    norms = optax.apply_updates(state.norms, updates)
    return State(norms, stats, opt_state), logits


@partial(jax.jit, static_argnums=0)
def _step_of_all(static, variables, states, x):
    """A step of each stream. They share all parameters except scale and bias."""
    net, follows, optimizer = static
    method = Method(net, variables, follows, optimizer)
    return jax.vmap(partial(step, method, variables))(states, x)


@partial(jax.jit, static_argnums=0)
def _predict_all(net, variables, x):
    apply = partial(net.apply, variables, training=False)
    return jax.vmap(jax.vmap(apply))(x)


def predictions(method: Method, x: np.ndarray) -> np.ndarray:
    """Labels for streams of shape (streams, batches, batch, 8, 8), batch by batch."""
    if not method.follows:
        return np.asarray(_predict_all(method.net, method.variables, x).argmax(-1))
    static = method.net, method.follows, method.optimizer
    states = jax.tree.map(lambda a: jnp.stack([a] * len(x)), start(method))
    found = []
    for i in range(x.shape[1]):
        states, logits = _step_of_all(static, method.variables, states, x[:, i])
        found.append(logits)
    return np.asarray(jnp.stack(found, 1).argmax(-1))


def augmented(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes gain, background and noise of the whole batch, like a new domain."""
    gain, background, noise = rng.uniform((0.3, 0, 0), (1, 0.5, 0.3))
    x = gain * x + background + noise * rng.standard_normal(x.shape)
    return np.clip(x, 0, 1).astype(np.float32)


def ttn_weights(
    net: Network, variables: Variables, data: Digits, seed: int, steps: int
) -> Any:
    """The weight of the batch in each channel, trained on augmented training images.

    This uses labels of training data. The parameters of the network do not change.
    """
    rng = np.random.default_rng(seed)
    half = {"test": jnp.zeros(net.width)}
    logits = dict.fromkeys(variables["batch_stats"], half)
    opt_state = optax.adam(TTN_RATE).init(logits)
    variant = Variant(net.width, net.strides, norm=MixedBatchNorm)
    for _ in range(steps):
        rows = rng.choice(len(data.train_x), TTN_BATCH, replace=False)
        batch = augmented(data.train_x[rows], rng), data.train_y[rows]
        logits, opt_state = _train_weights(variant, variables, logits, opt_state, batch)
    return jax.tree.map(nn.sigmoid, logits)


@partial(jax.jit, static_argnums=0)
def _train_weights(variant, variables, logits, opt_state, batch):
    x, y = batch

    def loss(logits):
        mixed = {**variables, "weights": jax.tree.map(nn.sigmoid, logits)}
        predicted = variant.apply(mixed, x, training=False)
        return optax.softmax_cross_entropy_with_integer_labels(predicted, y).mean()

    updates, opt_state = optax.adam(TTN_RATE).update(jax.grad(loss)(logits), opt_state)
    return optax.apply_updates(logits, updates), opt_state
