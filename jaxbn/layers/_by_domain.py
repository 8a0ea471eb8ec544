"""Moments of each domain, and normalization by them, at the cost of the batch.

A domain's sums are those of its examples, added up (`_devices.sum_rows`), and examples
take their domain's vectors from a table (`_devices.take_rows`). Neither grows with the
number of domains.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, _dtypes, _kernels, _sums
from jaxbn._batch import Batch
from jaxbn._moments import Moments, moments_about, pooled
from jaxbn._normalize import checked_epsilon, factors
from jaxbn._running_stats import RunningStats
from jaxbn._shift import Sampled, Shift
from jaxbn.layers._domains import Domains
from jaxbn.layers._layer import Affine, Norm
from jaxbn.layers._per_example import example_ids, has_one_position


class ByDomain(NamedTuple):
    """A batch with sums for each domain, where `Batch` has one: see there.

    `examples` is the batch with the batch axis as a further feature axis, the one at
    `place` of them.
    """

    examples: Batch
    place: int
    domains: Domains

    @property
    def x(self) -> jax.Array:
        return self.examples.x

    @property
    def weights(self) -> jax.Array | None:
        return self.examples.weights

    @property
    def feature_axes(self) -> tuple[int, ...]:
        return self.examples.feature_axes

    @property
    def axis_name(self) -> _devices.AxisName | None:
        return self.examples.axis_name

    @property
    def axis_index_groups(self) -> None:
        return None

    @property
    def count(self) -> jax.Array:
        """The weight of each domain on this device, with length 1 along features."""
        x, axes = self.x, self.feature_axes
        own = self.examples.count
        if own.ndim == 0:
            shape = [1] * len(axes)
            shape[self.place] = x.shape[axes[self.place]]
            return self.summed(jnp.broadcast_to(own, shape))[0]
        if not self.has_own_weights:
            for i in range(len(axes)):
                own = own if i == self.place else lax.slice_in_dim(own, 0, 1, axis=i)
        return self.summed(own)[0]

    @property
    def has_own_weights(self) -> bool:
        """Whether each feature has weights of its own."""
        if self.weights is None:
            return False
        axes = [a for i, a in enumerate(self.feature_axes) if i != self.place]
        own, features = (_axes.lengths(a, axes) for a in (self.weights, self.x))
        spread = _devices.is_spread_further(self.x, self.weights, self.axis_name)
        return any(n != 1 for n in own) or (own == features and not spread)

    @property
    def total(self) -> jax.Array:
        """The weighted sums on this device, as constants."""
        return self.summed(self.examples.total)[0]

    def all_sum(self, *sums: jax.Array) -> list[jax.Array]:
        """The sums over the devices, named for remat policies."""
        return self.examples.all_sum(*sums)

    def summed(self, *vectors: jax.Array) -> list[jax.Array]:
        """Vectors of examples, added up for each domain."""
        rows = [jnp.moveaxis(v, self.place, 0) for v in vectors]
        row, count = self.domains.row, self.domains.rows
        if len({r.dtype for r in rows}) > 1:
            return [_devices.sum_rows(r, row, count) for r in rows]
        # In one scatter, which is faster than one for each.
        table = _devices.sum_rows(jnp.stack(rows, axis=1), row, count)
        return [table[:, i] for i in range(len(rows))]

    def of_examples(self, table: jax.Array, rows: jax.Array) -> jax.Array:
        """The vectors of examples, which have these rows of a table."""
        return jnp.moveaxis(_devices.take_rows(table, rows), 0, self.place)

    def moments(self, shift: jax.Array | None) -> Moments:
        """The moments of the domains, about those of all domains if there are any."""
        kernels = self.examples.kernels
        if kernels and self.axis_name is not None and shift is not None:
            kernels = _kernels.unless_for_accelerators(kernels)
        near = None if shift is None else self.domains.of_rows(shift)
        central_sums, mean = self._sums_about(shift, near), None
        if kernels:
            central_sums, mean = self._sums_by_kernels(shift, kernels)
        m = pooled(self, near, central_sums, mean)  # type: ignore  (as a `Batch`)
        if self.has_own_weights:
            return m
        return m._replace(count=m.count.reshape(m.count.shape[:1]))

    def _sums_about(self, shift: jax.Array | None, near: jax.Array | None) -> Callable:
        """`_sums.central_sums` for each domain. `near` are the rows of `shift`."""

        def central_sums(x, center, weights, axes):
            # Not by way of `near`: XLA computes a row of a row for every element.
            given = center is near
            table, rows = (
                (shift, self.domains.ids) if given else (center, self.domains.row)
            )

            def sums(x, table):
                centers = self.of_examples(table, rows)
                return self.summed(*_sums.central_sums(x, centers, weights, axes))

            return jax.checkpoint(sums, prevent_cse=False)(x, table)

        return central_sums

    def _sums_by_kernels(
        self, shift: jax.Array | None, kernels: _kernels.Chosen
    ) -> tuple[Callable, jax.Array]:
        """The same by kernels, and the domains' means on this device."""
        x, weights, domains = self.x, self.weights, self.domains
        near = None if shift is None else self.of_examples(shift, domains.ids)
        known = _kernels.first_pass(x, near, weights, kernels)

        def central_sums(x, center, weights, _):
            about = self.of_examples(center, domains.row)
            sums = _kernels.central_sums(x, about, known, weights, kernels)
            return self.summed(*sums)

        (total,) = self.summed(self.examples.count * known.mean)
        return central_sums, _sums.over(total, self.count)


class Found(NamedTuple):
    """The moments of the domains of a batch, a row for each."""

    moments: Moments
    domains: Domains
    shift: jax.Array | None  # Of all domains.

    def of_all_domains(self) -> Moments:
        """The moments of all domains; those that are not in the batch have count 0."""
        mean, var, count = self.moments
        mean = self.domains.of_domains(mean, 0 if self.shift is None else self.shift)
        rest = (self.domains.of_domains(v, 0) for v in (var, count))
        return Moments(mean, *rest)

    def moved(self, state: RunningStats, move: Callable) -> RunningStats:
        """The state, moved. Where rows are few, no others are touched."""
        own, domains = self.domains, state.mean.shape[0]
        # Rows can be stored in place if the state is donated; a scatter of many rows
        # takes longer than to move them all.
        if own.domain is None or 4 * own.rows > domains:
            return move(state, self.of_all_domains())
        new = move(jax.tree.map(own.of_rows, state), self.moments)

        def stored(table, rows):
            return table.at[own.domain].set(rows, mode="drop")

        return jax.tree.map(stored, state, new)


def located(norm: Norm, x: jax.Array, domain_ids: ArrayLike | None) -> jax.Array:
    """The domain of each example, or the one of all of them."""
    axes = _axes.canonical(norm.feature_axes, x.ndim)
    ids = example_ids("domain_ids", domain_ids, x, axes)
    if norm.axis_name is None:
        return ids
    examples = x.shape[_axes.batch_axis(axes, x)]
    return jnp.broadcast_to(ids, (examples,))  # Devices may have different ids.


def found(norm: Norm, x: jax.Array, weights, domains: Domains, shift: Shift) -> Found:
    """The moments of a batch's domains, about their rows of the `shift` of all.

    Without a shift, and where it is to be a sample of each domain, in two passes.
    """
    sampled = isinstance(shift, Sampled)
    mean = _shift_table(shift.otherwise if isinstance(shift, Sampled) else shift, x)
    if domains.row.ndim:
        batch = _batch_by_domain(norm, x, weights, domains)
        return Found(batch.moments(None if sampled else mean), domains, mean)
    near = None if mean is None else domains.of_rows(mean)[0]
    m = moments_about(Sampled(near) if sampled else near, norm.batch(x, weights))
    return Found(Moments(*(jnp.expand_dims(v, 0) for v in m)), domains, mean)


def _batch_by_domain(norm: Norm, x: jax.Array, weights, domains: Domains) -> ByDomain:
    axes = _axes.canonical(norm.feature_axes, x.ndim)
    axis = _axes.batch_axis(axes, x)
    features = tuple(sorted((axis, *axes)))
    batch = norm._replace(feature_axes=features).batch(x, weights)
    if batch.kernels and not batch.kernels.demanded and has_one_position(x, axes):
        batch = batch._replace(kernels=None)  # There is nothing to sum.
    return ByDomain(batch, features.index(axis), domains)


def _shift_table(mean: Any, x: jax.Array) -> jax.Array | None:
    """The domains' running means as shifts for `x`."""
    if mean is None:
        return None
    mean = lax.stop_gradient(mean)
    _dtypes.require_no_imaginary_loss("state.mean", mean, "x", x.dtype)
    mean = mean.astype(_dtypes.widen(x).dtype)
    return jnp.where(jnp.isfinite(mean), mean, 0)


def normalized_by_domain(
    norm: Norm,
    x: jax.Array,
    found: Found,
    affine: Affine,
    weights: ArrayLike | None,
) -> jax.Array:
    """Normalizes each example by its domain's row of the moments, scale and bias.

    Scale and bias that have no rows are shared.

        y = (x − c)·k + b      k = scale/√(var + ε)      b = bias − k·(mean − c)

    where c is the mean, but a constant in all derivatives, as y does not depend on it:
    the backward pass adds up two arrays by domain, for k and b, and no third.
    """
    m, row = found.moments, found.domains.row
    shared = m.mean.ndim - 1
    scale, bias = (
        jnp.expand_dims(v, 0) if v is not None and v.ndim == shared else v
        for v in affine
    )
    _, k = factors(m.var, checked_epsilon(norm.epsilon), scale, x, m.mean, bias)
    center = lax.stop_gradient(m.mean)
    b = -k * (m.mean - center)
    if bias is not None:
        b = _dtypes.widen(bias, b) + b

    def apply(x, center, k, b):
        center, k, b = (_devices.take_rows(v, row) for v in (center, k, b))
        var = jnp.ones(m.var.shape[1:], m.var.dtype)  # k has the variance in it.
        return norm._replace(epsilon=0.0).by_stats(x, center, var, (k, b), weights)

    # It keeps tables, not vectors of examples.
    return jax.checkpoint(apply, prevent_cse=False)(x, center, k, b)
