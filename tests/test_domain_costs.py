"""`layers.domain` as it is compiled: the CPU kernels, and what it costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from test_domains import EXAMPLES, FEATURES, ids_of, started

from jaxbn import layers

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("fast", [True, False])
def test_kernels_sum_the_examples_where_they_can(fast):
    pytest.importorskip("jaxbn_cpu", reason="needs the CPU kernels")
    ids = ids_of(4)
    x = numbers((EXAMPLES, FEATURES, 40), "float32", mean=1e3, std=0.1)
    found = []
    for implementation in ("native", "xla"):
        options = {"feature_axes": 1, "implementation": implementation}
        layer, params, state = started(4, use_fast_variance=fast, **options)
        near = state._replace(mean=jnp.full_like(state.mean, 1e3))
        forward = jax.jit(partial(layer.forward, training=True))
        found.append(forward(params, near, x, domain_ids=ids))
    (y, m), (y_xla, m_xla) = found
    assert_close(m.var, m_xla.var, 1e-4)
    assert_close(y, y_xla, 1e-3, 3e-3)
    np.testing.assert_array_equal(m.count, m_xla.count)


def compiled(layer, shape, training, **given):
    params, state = layer.init(shape[-1])
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, state)
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def step(params, state, x, given):
        forward = lambda p, x: layer.apply(p, state, x, training=training, **given)
        y, vjp, new = jax.vjp(forward, params, x, has_aux=True)
        return y, new, vjp(x)

    return jax.jit(step).lower(*args, x, given).compile()


@pytest.mark.parametrize("domains", [3, 400])
def test_no_array_and_no_cost_of_domains_times_batch(domains):
    """Beside a batch of 1 MB, the tables of 400 domains have 1.6 MB each."""
    shape = (256, 1024)
    ids = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    options = {"implementation": "xla"}
    plain = compiled(layers.standard(**options), shape, True)
    layer = layers.domain(num_domains=domains, **options)
    own = compiled(layer, shape, True, domain_ids=ids)
    batch, table = 4 * shape[0] * shape[1], 4 * domains * shape[1]
    scratch = [c.memory_analysis().temp_size_in_bytes for c in (plain, own)]
    moved = [c.cost_analysis()["bytes accessed"] for c in (plain, own)]
    assert scratch[1] - scratch[0] < 4 * batch + 6 * table
    assert moved[1] - moved[0] < 20 * batch + 60 * table
    assert f"[{shape[0]},{domains},{shape[1]}]" not in own.as_text()
