"""The domains of a batch: rows of tables, as few as can be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Domains(NamedTuple):
    """The domains that a batch may have, each with a row in tables of so many `rows`.

    Attributes:
      ids: The domain of each example, or of all of them.
      row: Its row.
      rows: How many there are.
      domain: The domain of each row, a number out of range if it has none. None if row
        k is domain k.
      row_of: The row of each domain, `rows` if it has none.
    """

    ids: jax.Array
    row: jax.Array
    rows: int
    domain: jax.Array | None = None
    row_of: jax.Array | None = None

    def of_rows(self, table: jax.Array) -> jax.Array:
        """From a table with all domains; any vector for a row that has no domain."""
        if self.domain is None:
            return table
        return table.at[self.domain].get(mode="clip")

    def of_domains(self, rows: jax.Array, default: jax.Array | float) -> jax.Array:
        """A table with all domains, with `default` where a domain has no row."""
        if self.row_of is None:
            return rows
        table = rows.at[self.row_of].get(mode="clip")
        found = jnp.expand_dims(self.row_of < self.rows, tuple(range(1, table.ndim)))
        return jnp.where(found, table, default)


def domains_of(ids: jax.Array, num_domains: int, axis_name: Any) -> Domains:
    """The domains of examples with these ids, or of a batch with one id.

    A batch of few examples has few of many domains, and needs no more rows than it has
    examples. Devices of `axis_name` have other examples, but share their tables: there
    each domain has a row, and so it is where ids are sharded on an explicit mesh.
    """
    if axis_name is not None or any(jax.typeof(ids).sharding.spec):
        return Domains(ids, ids, num_domains)
    none = num_domains
    ids = jnp.where(ids < 0, none, ids)  # NumPy takes them from the end.
    if not ids.ndim:
        row_of = jnp.where(jnp.arange(num_domains) == ids, 0, 1)
        row = jnp.where(ids < none, 0, 1)
        return Domains(ids, row, 1, jnp.expand_dims(ids, 0), row_of)
    examples = ids.shape[0]
    if not isinstance(examples, int) or examples >= num_domains:
        return Domains(ids, ids, num_domains)
    # The row of a domain is the number of its first example.
    number = jnp.arange(examples)
    row_of = jnp.full(num_domains, examples).at[ids].min(number, mode="drop")
    row = row_of.at[ids].get(mode="fill", fill_value=examples)
    return Domains(ids, row, examples, jnp.where(row == number, ids, none), row_of)
