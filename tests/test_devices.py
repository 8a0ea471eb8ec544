"""Statistics over a batch that is spread over eight devices are those of all of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs
from data import half_slow, numbers
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spread import (
    CASES,
    CONTEXTS,
    COUNT,
    FORMS,
    arguments,
    close,
    derivatives,
    in_parts,
    mesh_of,
    terms,
    whole,
)

import jaxbn

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def truth(form, shift):
    f = functools.partial(whole, form=form, shift=shift)
    return derivatives(f)(*arguments())


@pytest.mark.parametrize(
    ("context", "form", "shift"),
    half_slow(AllPairs([list(CONTEXTS), FORMS, (None, 0.7)])),
)
def test_values_and_derivatives(context, form, shift):
    f = functools.partial(CONTEXTS[context], form=form, shift=shift)
    close(derivatives(f)(*arguments()), truth(form, shift))


@pytest.mark.parametrize(
    ("form", "shift", "check_vma"),
    list(AllPairs([FORMS, (None, 0.7), (True, False)])),
)
def test_gradient_inside_shard_map(form, shift, check_vma):
    def inner(x, scale, bias, w):
        def loss(x, scale, bias):
            rows, extra, _ = terms(x, scale, bias, w, form, shift, "data")
            return rows.sum() + extra / COUNT

        dx, *vectors = jax.grad(loss, (0, 1, 2))(x, scale, bias)
        # Checked, a replicated parameter's gradient is the sum over the devices.
        return dx, vectors if check_vma else lax.psum(vectors, "data")

    rows, all_ = P("data"), P()
    f = jax.shard_map(
        inner,
        mesh=mesh_of(8),
        in_specs=(rows, all_, all_, rows),
        out_specs=(rows, all_),
        check_vma=check_vma,
    )
    dx, vectors = jax.jit(f)(*arguments())
    _, (grads, _) = truth(form, shift)
    close((dx, *vectors), grads)


@pytest.mark.parametrize(("form", "shift"), CASES)
@pytest.mark.parametrize("over", ["pmap", "vmap"])
def test_gradient_inside_a_map(form, shift, over):
    def loss(x, scale, bias, w):
        rows, extra, out = terms(x, scale, bias, w, form, shift, "data")
        return rows.sum() + extra / COUNT, out

    x, scale, bias, w = arguments()
    mapped = getattr(jax, over)(
        jax.grad(loss, (0, 1, 2), has_aux=True),
        in_axes=(0, None, None, 0),
        axis_name="data",
    )
    f = mapped if over == "pmap" else jax.jit(mapped)
    (dx, dscale, dbias), (y, m, stats) = f(in_parts(x), scale, bias, in_parts(w))
    # The gradients of replicated parameters are per device, the statistics are not.
    grads = dx.reshape(x.shape), dscale.sum(0), dbias.sum(0)
    jaxbn.assert_replicated((m, stats), stacked=True)
    m, stats = jax.tree.map(lambda a: a[0], (m, stats))
    close((grads, (y.reshape(x.shape), m, stats)), truth(form, shift)[1])


@pytest.mark.parametrize(
    ("kind", "vectors", "form", "shift"),
    list(
        AllPairs(
            [
                (AxisType.Auto, AxisType.Explicit),
                (P(), P("model")),
                FORMS,
                (None, 0.7),
            ]
        )
    ),
    ids=str,
)
def test_jit_of_a_sharded_batch_needs_no_axis_name(kind, vectors, form, shift):
    """Rows over four devices, features over two (here of four features, not three)."""
    mesh = mesh_of(4, 2, names=("data", "model"), kind=kind)
    x, _, _, w = arguments()
    x = jnp.concatenate([x, x[:, :1] * 2], axis=1)
    scale, bias = numbers(4, "float64", 5), numbers(4, "float64", 6)
    m_shift = None if shift is None else jnp.full(4, shift)

    def loss(x, scale, bias, w):
        y, m = jaxbn.batch_norm(
            x, scale, bias, weights=w, shift=m_shift, derivatives=form
        )
        value = jnp.sum(jnp.sin(jnp.where(w > 0, y, 0))) + jnp.sum(m.mean**2 * m.var)
        return value, m

    expected = derivatives(loss)(x, scale, bias, w)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        got = derivatives(loss)(
            put(x, P("data", "model")),
            put(scale, vectors),
            put(bias, vectors),
            put(w, P("data")),
        )
    close(got, expected)


@pytest.mark.parametrize(
    ("form", "shift", "check_vma"),
    list(AllPairs([FORMS, (None, 0.7), (True, False)])),
)
def test_one_axis_of_two(form, shift, check_vma):
    """Rows over `data`, features over `model`, and parameters with them."""
    x, _, _, w = arguments()
    x = jnp.concatenate([x, x[:, :1] * 2], axis=1)
    scale, bias = numbers(4, "float64", 5), numbers(4, "float64", 6)

    def f(x, scale, bias, w, axis_name=None):
        y, m = jaxbn.batch_norm(
            x,
            scale,
            bias,
            weights=w,
            shift=None if shift is None else jnp.full(x.shape[1], shift),
            axis_name=axis_name,
            derivatives=form,
        )
        rows = jnp.sin(jnp.where(w > 0, y, 0)).sum(0)
        parts = 1 if axis_name is None else 4
        return (rows + m.mean**2 * m.var / parts)[None], m

    rows, columns = P("data", "model"), P("model")
    spread = jax.shard_map(
        functools.partial(f, axis_name="data"),
        mesh=mesh_of(4, 2, names=("data", "model")),
        in_specs=(rows, columns, columns, P("data")),
        out_specs=(rows, jaxbn.Moments(columns, columns, P())),
        check_vma=check_vma,
    )

    def total(g):
        return lambda *a: (lambda out: (out[0].sum(), out[1]))(g(*a))

    args = x, scale, bias, w
    close(derivatives(total(spread))(*args), derivatives(total(f))(*args))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", [P("data"), P("more"), P()], ids=str)
def test_two_names_of_which_the_rows_vary_over_one(form, spec):
    def inner(x, scale):
        y, m = jaxbn.batch_norm(x, scale, axis_name=("data", "more"), derivatives=form)
        return lax.psum(jnp.sin(y).sum(), tuple(spec)), m.mean + m.var

    x, scale = numbers((8, 3), "float64"), numbers(3, "float64", 5)
    f = jax.shard_map(
        inner,
        mesh=mesh_of(4, 2, names=("data", "more")),
        in_specs=(spec, P()),
        out_specs=(P(), P()),
    )

    def alone(x, scale):
        y, m = jaxbn.batch_norm(x, scale)
        return jnp.sin(y).sum(), m.mean + m.var

    got, expected = (
        jax.jit(jax.value_and_grad(g, (0, 1), has_aux=True))(x, scale)
        for g in (f, alone)
    )
    close(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_replicated_input_with_sharded_parameters(form):
    # x is the same everywhere, scale differs: x's cotangent must be summed.
    x = numbers((5, 3), "float64")
    scale = numbers((8, 3), "float64", 5)

    def inner(x, scale):
        y, _ = jaxbn.batch_norm(x, scale[0], derivatives=form)
        return lax.psum(jnp.sum(jnp.sin(y)), "data")

    spread = jax.shard_map(
        inner, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P()
    )
    loop = lambda x, scale: sum(
        jnp.sum(jnp.sin(jaxbn.batch_norm(x, s)[0])) for s in scale
    )
    got, expected = (jax.jit(jax.grad(f, (0, 1))) for f in (spread, loop))
    close(got(x, scale), expected(x, scale))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [None, ((0, 1, 2, 5), (3, 4, 6, 7))])
def test_scale_that_differs_between_the_devices(form, groups):
    x, scale = numbers((8, 4, 3), "float64"), numbers((8, 3), "float64", 5)

    def summed(bn):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(bn(*a))), (0, 1)))

    def spread(x, scale):
        layer = lambda x, s: jaxbn.batch_norm(
            x, s, axis_name="i", axis_index_groups=groups, derivatives=form
        )[0]
        return jax.vmap(layer, axis_name="i")(x, scale)

    def plain(x, scale):
        parts = []
        for group in groups or (tuple(range(8)),):
            rows = x[np.array(group)].reshape(-1, 3)
            delta = (x[np.array(group)] - rows.mean(0)[None, None]).reshape(-1, 4, 3)
            xhat = delta / jnp.sqrt(rows.var(0) + 1e-5)[None, None]
            parts.append(xhat * scale[np.array(group)][:, None])
        return jnp.concatenate(parts)

    close(summed(spread)(x, scale), summed(plain)(x, scale))
