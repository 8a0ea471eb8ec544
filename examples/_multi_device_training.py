"""Training steps of the multi-device example, in three styles."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _multi_device_networks import Network, network
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxbn

AXIS = "data"
OPTIMIZER = optax.adamw(
    3e-3, weight_decay=1e-2, mask=jaxbn.interop.optax.weight_decay_mask
)


class State(NamedTuple):
    """What training changes.

    `stats` is one set of running statistics if the devices share them. Otherwise it is
    one set per device, stacked.
    """

    params: Any
    stats: Any
    opt_state: Any


class Data(NamedTuple):
    train_x: Any
    train_y: Any
    test_x: Any
    test_y: Any


def load_data() -> Data:
    """Images of 8 × 8 pixels from 0 to 1, and labels, as NumPy arrays."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype("float32")
    x, test_x, y, test_y = train_test_split(
        x, y.astype("int32"), test_size=0.25, stratify=y, random_state=0
    )
    return Data(x, y, test_x, test_y)


def data_mesh(devices: int) -> Mesh:
    used = jax.devices()[:devices]
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=used)


class Sync(NamedTuple):
    """Which devices share statistics: "global", "none", or "group:K" for K devices."""

    name: str

    @property
    def shared(self) -> bool:
        """Whether all devices have the same statistics."""
        return self.name == "global"

    def group(self, devices: int) -> int:
        """The number of devices that share statistics."""
        sizes = {"global": devices, "none": 1}
        return sizes.get(self.name) or int(self.name.partition(":")[2])

    def options(self, devices: int) -> dict[str, Any]:
        """Options for the batch norms, inside a map over the devices."""
        if self.shared:
            return {"axis_name": AXIS}
        size = self.group(devices)
        if size == 1:
            return {}
        groups = [tuple(range(i, i + size)) for i in range(0, devices, size)]
        return {"axis_name": AXIS, "axis_index_groups": tuple(groups)}


def new_state(api: str, seed: int) -> State:
    """The initial state. It does not depend on the devices or the synchronization."""
    params, stats = jax.jit(network(api).init)(seed)
    return jax.device_get(State(params, stats, OPTIMIZER.init(params)))


def placed(state: State, sync: Sync, mesh: Mesh) -> State:
    """Puts a state with one set of statistics on the devices of a mesh."""
    state = jax.device_put(state, NamedSharding(mesh, P()))
    if sync.shared:
        return state

    def stack(stats):
        return jax.tree.map(lambda a: jnp.stack([a] * mesh.size), stats)

    per_device = jax.jit(stack, out_shardings=NamedSharding(mesh, P(AXIS)))
    return state._replace(stats=per_device(state.stats))


def collected(state: State, sync: Sync, mesh: Mesh) -> State:
    """The state with one set of statistics: the shared one, or all of them pooled."""
    if sync.shared:
        jaxbn.assert_replicated(state)
        return state

    def pool(stats):
        one = jax.vmap(partial(jaxbn.sync_stats, axis_name=AXIS), axis_name=AXIS)(stats)
        return jax.tree.map(lambda a: a[0], one)

    replicated = NamedSharding(mesh, P())
    stats = jax.jit(pool, out_shardings=replicated)(state.stats)
    return state._replace(stats=stats)


def train_step(style: str, sync: Sync, api: str, mesh: Mesh) -> Callable[..., State]:
    """A function `(state, x, y) -> state` of a whole batch, split over devices."""
    if style == "jit" and sync.shared:
        # The global view: no axis has a name, and the compiler sums over devices.
        return jax.jit(partial(step, network(api)), donate_argnums=0)

    net = network(api, **sync.options(mesh.size))
    body = partial(device_step, net, style=style, shared=sync.shared)
    if style == "shard_map":
        of = State(P(), P() if sync.shared else P(AXIS), P())
        mapped = jax.shard_map(
            body, mesh=mesh, in_specs=(of, P(AXIS), P(AXIS)), out_specs=of
        )
        return jax.jit(mapped, donate_argnums=0)

    # pmap, or vmap under jit: a leading axis holds the parts of the devices.
    map_ = jax.pmap if style == "pmap" else jax.vmap
    of = State(None, None if sync.shared else 0, None)
    mapped = map_(body, in_axes=(of, 0, 0), out_axes=of, axis_name=AXIS)

    def whole(state, x, y):
        x, y = (a.reshape(mesh.size, -1, *a.shape[1:]) for a in (x, y))
        return mapped(state, x, y)

    return whole if style == "pmap" else jax.jit(whole, donate_argnums=0)


def device_step(net: Network, state: State, x, y, *, style: str, shared: bool) -> State:
    """A step on a device's part of the batch, inside a map over the devices."""
    # shard_map keeps the axis of the devices, with length 1.
    rows = style == "shard_map" and not shared
    if rows:
        state = state._replace(stats=jax.tree.map(lambda a: a[0], state.stats))
    state = step(net, state, x, y, devices=lax.axis_size(AXIS), style=style)
    if rows:
        state = state._replace(stats=jax.tree.map(lambda a: a[None], state.stats))
    return state


def step(net: Network, state: State, x, y, *, devices=1, style="") -> State:
    """A step on a batch, or on the part of it that is on one device."""

    def loss(params):
        logits, stats = net.apply(params, state.stats, x, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean() / devices, stats

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    if style in ("jit", "pmap"):
        # Under pmap or vmap, they are of this device's rows. shard_map has summed them.
        grads = lax.psum(grads, AXIS)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), stats, opt_state)


@partial(jax.jit, static_argnums=0)
def evaluate(net: Network, state: State, x, y) -> dict[str, jax.Array]:
    """Loss and accuracy with one set of running statistics."""
    logits, _ = net.apply(state.params, state.stats, x, training=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return {"loss": losses.mean(), "accuracy": (logits.argmax(-1) == y).mean()}
