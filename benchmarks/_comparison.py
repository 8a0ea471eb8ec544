"""One layer of each library with the same few verbs, at its default settings."""

import importlib.util
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.linen


class Trained(NamedTuple):
    """Of one training step: its output, the new statistics, and a gradient of x."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    gradient: np.ndarray


class InJax:
    """A layer that is a function `(x, mask) -> y, mean, var`."""

    has_mask, has_devices, epsilon = False, True, 1e-5

    def call(self, x: jax.Array, mask: Any, guarded: bool = False) -> tuple:
        raise NotImplementedError("Define `call` in the class of the library.")

    def train(self, x, mask=None, gradient: bool = False, guarded: bool = False):
        """One step from the initial statistics."""
        rows = None if mask is None else jnp.asarray(mask)[:, None]
        given = None if mask is None else rows
        y, mean, var = self.call(jnp.asarray(x), given, guarded)

        def loss(x: jax.Array) -> jax.Array:
            y = self.call(x, given)[0]
            return jnp.sum(jnp.sin(y if rows is None else jnp.where(rows, y, 0)))

        slope = jax.grad(loss)(jnp.asarray(x)) if gradient else jnp.zeros(())
        return Trained(*map(np.asarray, (y, mean, var, slope)))

    def residuals(self, x: np.ndarray) -> int:
        """The bytes that the backward pass needs of the forward pass."""
        _, backward = jax.vjp(lambda x: self.call(x, None)[0], jnp.asarray(x))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))


class Flax(InJax):
    name, has_mask = "flax", True
    module: Any = nn.BatchNorm

    def call(self, x, mask, guarded=False, **options):
        layer = self.module(use_running_average=False, momentum=0.0, **options)
        own = layer.clone(axis_name=None) if options else layer
        variables = own.init(jax.random.key(0), jnp.ones_like(x[:2]))
        y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        stats = new["batch_stats"]
        return y, stats["mean"], stats["var"]

    def train_on_devices(self, x, mask, count: int) -> np.ndarray:
        """The mean that devices find together."""
        mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))
        spread = jax.shard_map(
            lambda x, m: self.call(x, m, axis_name="d")[1],
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P(),
            check_vma=False,
        )
        return np.asarray(jax.jit(spread)(jnp.asarray(x), jnp.asarray(mask)[:, None]))


class Jaxbn(Flax):
    name, module = "jaxbn", jaxbn.linen.BatchNorm

    def call(self, x, mask, guarded=False, **options):
        options |= {"skip_nonfinite": True} if guarded else {}
        return super().call(x, mask, **options)


class Haiku(InJax):
    name = "haiku"

    def call(self, x, mask, guarded=False):
        import haiku as hk

        def layer(x: jax.Array) -> jax.Array:
            return hk.BatchNorm(True, True, 0.0, name="bn")(x, True)

        net = hk.transform_with_state(layer)
        params, state = net.init(jax.random.key(0), x)
        y, state = net.apply(params, state, None, x)
        means = (state[f"bn/~/{n}_ema"]["average"] for n in ("mean", "var"))
        return y, *means


class Equinox(InJax):
    name = "equinox"

    def call(self, x, mask, guarded=False):
        import equinox as eqx

        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        layer, state = make(x.shape[1], "batch", momentum=0.0, mode="batch")
        y, state = jax.vmap(layer, (0, None), (0, None), axis_name="batch")(x, state)
        mean, var = state.get(layer.batch_state_index)
        return y, mean, var


class Keras(InJax):
    name, has_mask, has_devices, epsilon = "keras", True, False, 1e-3

    def call(self, x, mask, guarded=False):
        import keras

        layer = keras.layers.BatchNormalization(momentum=0.0)
        layer.build(x.shape)
        kept = [v.value for v in layer.trainable_variables]
        moved = [v.value for v in layer.non_trainable_variables]
        rows = {} if mask is None else {"mask": mask[:, 0]}
        y, new = layer.stateless_call(kept, moved, x, training=True, **rows)
        return y, *new


class Torch:
    name, has_mask, has_devices, epsilon = "torch", False, True, 1e-5

    def train(self, x, mask=None, gradient: bool = False, guarded: bool = False):
        """One step from the initial statistics."""
        import torch

        layer = torch.nn.BatchNorm1d(x.shape[1], momentum=1.0)
        y = layer(torch.from_numpy(x)).detach().numpy()
        mean, var = (b.numpy() for b in (layer.running_mean, layer.running_var))
        return Trained(y, mean, var, np.zeros(()))

    def residuals(self, x: np.ndarray) -> int:
        """The bytes that the backward pass needs of the forward pass."""
        import torch

        saved = []

        def kept(tensor: Any) -> Any:
            saved.append(tensor.nbytes)
            return tensor

        layer = torch.nn.BatchNorm1d(x.shape[1])
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            layer(torch.from_numpy(x).requires_grad_())
        return sum(saved)


LIBRARIES = (Jaxbn, Flax, Haiku, Equinox, Keras, Torch)


def installed() -> list[Any]:
    """The libraries that are here."""
    found = (library() for library in LIBRARIES)
    return [own for own in found if importlib.util.find_spec(own.name) is not None]
