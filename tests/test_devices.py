"""Statistics over a batch that is spread over eight devices are those of all of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

pytestmark = pytest.mark.usefixtures("x64")
FORMS = ("vjp", "jvp")
ROWS, COUNT = 24, 8


def arguments():
    x = numbers((ROWS, 3), "float64")
    # Weights that differ between devices; device 2 has none, and NaN under the mask.
    w = np.random.default_rng(1).integers(0, 3, size=(ROWS, 1)).astype(np.float64)
    w[6:9] = 0
    x = x.at[7].set(jnp.nan)
    return x, numbers(3, "float64", 5), numbers(3, "float64", 6), jnp.asarray(w)


def terms(x, scale, bias, w, form, shift, axis_name=None, groups=None):
    """A loss of each row and one of the moments, and what was computed on the way."""
    y, m = jaxbn.batch_norm(
        x,
        scale,
        bias,
        weights=w,
        shift=shift,
        axis_name=axis_name,
        axis_index_groups=groups,
        derivatives=form,
    )
    stats = jaxbn.update(jaxbn.init_stats(3, dtype=jnp.float64), m)
    y = jnp.where(w > 0, y, 0)
    return jnp.sin(y).sum(1), (m.mean**2 * m.var).sum(), (y, m, stats)


def whole_batch(form, shift):
    def loss(x, scale, bias, w):
        rows, extra, _ = terms(x, scale, bias, w, form, shift)
        return rows.sum() + extra

    args = arguments()
    out = jax.jit(lambda *a: terms(*a, form, shift)[2])(*args)
    return out, jax.jit(jax.grad(loss, (0, 1, 2)))(*args)


def close(got, expected):
    jax.tree.map(
        partial(assert_close, rtol=1e-10, atol=1e-10),
        got,
        expected,
    )


def mesh_of(*shape, names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


CASES = [(form, shift) for form in FORMS for shift in (None, 0.7)]


def shift_of(value):
    return None if value is None else jnp.full(3, value)


@pytest.mark.parametrize(("form", "shift"), CASES)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("names", ["data", ("data", "more")])
def test_shard_map_gradient_outside(form, shift, check_vma, names):
    mesh = mesh_of(8) if names == "data" else mesh_of(4, 2, names=("data", "more"))
    rows, all_ = P(names), P()
    shift = shift_of(shift)

    def inner(x, scale, bias, w):
        rows, extra, (y, m, stats) = terms(x, scale, bias, w, form, shift, names)
        extra = extra if check_vma else lax.pmean(extra, names)
        return lax.psum(rows.sum(), names) + extra, (y, m, stats)

    f = jax.shard_map(
        inner,
        mesh=mesh,
        in_specs=(rows, all_, all_, rows),
        out_specs=(all_, (rows, all_, all_)),
        check_vma=check_vma,
    )
    grads, out = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*arguments())
    close((out, grads), whole_batch(form, shift))


@pytest.mark.parametrize(("form", "shift"), CASES)
def test_shard_map_gradient_inside(form, shift):
    shift = shift_of(shift)

    def inner(x, scale, bias, w):
        def loss(x, scale, bias):
            rows, extra, _ = terms(x, scale, bias, w, form, shift, "data")
            return rows.sum() + extra / COUNT

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    rows, all_ = P("data"), P()
    f = jax.shard_map(
        inner,
        mesh=mesh_of(8),
        in_specs=(rows, all_, all_, rows),
        out_specs=(rows, all_, all_),
    )
    close(jax.jit(f)(*arguments()), whole_batch(form, shift)[1])


@pytest.mark.parametrize(("form", "shift"), CASES)
@pytest.mark.parametrize("over", ["pmap", "vmap"])
def test_gradient_inside_a_map(form, shift, over):
    shift = shift_of(shift)

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
    split = lambda a: a.reshape(COUNT, -1, *a.shape[1:])
    (dx, dscale, dbias), (y, m, stats) = f(split(x), scale, bias, split(w))
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)
    out = y.reshape(x.shape), first(m), first(stats)
    grads = dx.reshape(x.shape), dscale.sum(0), dbias.sum(0)
    close((out, grads), whole_batch(form, shift))


@pytest.mark.parametrize(("form", "shift"), CASES)
def test_gradient_of_a_vmap(form, shift):
    x, scale, bias, w = arguments()
    split = lambda a: a.reshape(COUNT, -1, *a.shape[1:])

    def loss(x, scale, bias, w):
        f = lambda x, w: terms(x, scale, bias, w, form, shift_of(shift), "data")
        rows, extra, _ = jax.vmap(f, axis_name="data")(split(x), split(w))
        return rows.sum() + extra.mean()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias, w)
    close(grads, whole_batch(form, shift_of(shift))[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_jit_needs_no_axis_name(form, kind):
    mesh = mesh_of(8, kind=kind)
    rows, all_ = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, scale, bias, w = arguments()

    def loss(x, scale, bias, w):
        rows, extra, out = terms(x, scale, bias, w, form, None)
        return rows.sum() + extra, out

    args = [jax.device_put(a, s) for a, s in ((x, rows), (scale, all_), (bias, all_))]
    with jax.set_mesh(mesh):
        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
            *args, jax.device_put(w, rows)
        )
    close((out, grads), whole_batch(form, None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "groups", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 3), (1, 2, 4, 5, 6, 7))]
)
def test_groups_of_devices(form, check_vma, groups):
    x, scale, bias, w = arguments()
    split = lambda a: np.asarray(a).reshape(COUNT, -1, a.shape[-1])

    def inner(x, scale, bias, w):
        rows, _, (y, m, _) = terms(x, scale, bias, w, form, None, "data", groups)
        return lax.psum(rows.sum(), "data"), (y, m.mean[None])

    rows, all_ = P("data"), P()
    f = jax.shard_map(
        inner,
        mesh=mesh_of(8),
        in_specs=(rows, all_, all_, rows),
        out_specs=(all_, (rows, rows)),
        check_vma=check_vma,
    )
    grads, (y, means) = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(x, scale, bias, w)

    def alone(x, scale, bias, w):
        rows, _, (y, m, _) = terms(x, scale, bias, w, form, None)
        return rows.sum(), (y, m.mean)

    total = [0, 0]
    for group in groups:
        part = [
            jnp.asarray(split(a)[list(group)].reshape(-1, a.shape[-1])) for a in (x, w)
        ]
        grad = jax.jit(jax.grad(alone, (0, 1, 2), has_aux=True))
        (dx, *vectors), (y_part, mean) = grad(part[0], scale, bias, part[1])
        total = [a + b for a, b in zip(total, vectors, strict=True)]
        pick = lambda a: split(a)[list(group)].reshape(-1, 3)  # noqa: B023
        close((pick(grads[0]), pick(y)), (dx, y_part))
        for device in group:
            close(means[device], mean)
    close(list(grads[1:]), total)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivative_across_devices(form):
    def penalty(loss):
        return lambda *a: sum(
            jnp.sum(jnp.sin(g)) for g in jax.grad(loss, (0, 1, 2))(*a)
        )

    def whole(x, scale, bias, w):
        rows, extra, _ = terms(x, scale, bias, w, form, None)
        return rows.sum() + extra

    def inner(x, scale, bias, w):
        rows, extra, _ = terms(x, scale, bias, w, form, None, "data")
        return lax.psum(rows.sum(), "data") + extra

    rows, all_ = P("data"), P()
    spread = jax.shard_map(
        inner, mesh=mesh_of(8), in_specs=(rows, all_, all_, rows), out_specs=all_
    )
    args = arguments()
    close(
        jax.jit(jax.grad(penalty(spread), (0, 1, 2)))(*args),
        jax.jit(jax.grad(penalty(whole), (0, 1, 2)))(*args),
    )


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


def test_groups_train_with_their_own_statistics():
    layer = jaxbn.layers.standard(
        axis_name="data", axis_index_groups=((0, 1, 2, 3), (4, 5, 6, 7))
    )
    params, state = layer.init(3)

    def two_steps(x, state):
        state = jax.tree.map(lambda a: lax.pcast(a, "data", to="varying"), state)
        for _ in range(2):
            _, state = layer.apply(params, state, x, training=True)
        return jax.tree.map(lambda a: a[None], state)

    f = jax.shard_map(
        two_steps, mesh=mesh_of(8), in_specs=(P("data"), P()), out_specs=P("data")
    )
    x = numbers((16, 3), "float32")
    new = jax.jit(f)(x, state)
    half = 0.0199 * np.asarray(x).reshape(2, 8, 3).mean(1)
    assert_close(new.mean, np.repeat(half, 4, axis=0), 1e-4, 1e-6)
