"""What a synchronized layer sends: one all-reduce each way, on however many devices.

This is for XLA's sums; what the CPU kernels send beside is in `test_kernels.py`.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

pytestmark = pytest.mark.optimized

ROWS, ALL = P("data"), P()
XLA = {"implementation": "xla"}


def forward_and_backward(mesh, *, near=True, masked=False, sync=True, shape=(4,)):
    """Program of a layer, its rows spread over a mesh, and of its gradients."""

    def layer(x, scale, bias):
        return jaxbn.batch_norm(
            x,
            scale,
            bias,
            weights=x[:, :1] > 0 if masked else None,
            shift=bias if near else None,
            axis_name="data" if sync else None,
            **XLA,
        )

    def step(x, scale, bias, ct):
        y, vjp, m = jax.vjp(layer, x, scale, bias, has_aux=True)
        return y, m, vjp(ct)

    if sync:
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(ROWS, ALL, ALL, ROWS),
            out_specs=(ROWS, ALL, (ROWS, ALL, ALL)),
        )
    x = struct(mesh, (8 * mesh.size, *shape), ROWS)
    vector = struct(mesh, shape[-1:], ALL)
    return jax.jit(step).lower(x, vector, vector, x)


def struct(mesh, shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def reduced(text):
    """How many numbers each all-reduce of a compiled program sums."""
    found = re.findall(r"= (\(?[^=]*?\)?) all-reduce(?:-start)?\(", text)
    sizes = lambda shapes: re.findall(r"f32\[(\d*)\]", shapes)
    return [sum(int(n or 1) for n in sizes(shapes)) for shapes in found]


def over(devices):
    return Mesh(np.array(devices), ("data",))


@pytest.mark.parametrize(("near", "reduces"), [(True, 2), (False, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_one_all_reduce_forward_and_one_backward(near, reduces, masked, devices):
    """Two forward without a shift. What it sums does not grow with the devices."""
    mesh = over(jax.devices()[:devices])
    lowered = forward_and_backward(mesh, near=near, masked=masked)
    assert lowered.as_text().count("stablehlo.all_reduce") == reduces
    compiled = lowered.compile().as_text()
    # Σδ, Σδ² and the count; then Σdy and Σdy·δ.
    sums = [2 * 4 + 1, 2 * 4] if near else [4 + 1, 2 * 4, 2 * 4]
    assert sorted(reduced(compiled)) == sorted(sums)
    assert "all-gather" not in compiled


@pytest.mark.parametrize("devices", [2, 8])
def test_a_sharded_batch_under_jit(devices):
    """The same sums without an axis name: the compiler finds them."""
    mesh = over(jax.devices()[:devices])
    compiled = forward_and_backward(mesh, sync=False).compile().as_text()
    assert sum(reduced(compiled)) == 4 * 4
    assert "all-gather" not in compiled


@pytest.mark.parametrize(
    ("cls", "issued"), [(jaxbn.linen.BatchNorm, 2), (nn.BatchNorm, 4)]
)
def test_all_reduces_that_a_module_issues(cls, issued):
    own = XLA if cls is jaxbn.linen.BatchNorm else {}
    layer = cls(False, axis_name="data", **own)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4)))

    def step(params, x, ct):
        def f(params, x):
            given = {**variables, "params": params}
            return layer.apply(given, x, mutable=["batch_stats"])

        y, vjp, new = jax.vjp(f, params, x, has_aux=True)
        return y, new, vjp(ct)

    step = jax.shard_map(
        step,
        mesh=over(jax.devices()),
        in_specs=(ALL, ROWS, ROWS),
        out_specs=(ROWS, ALL, (ALL, ROWS)),
    )
    x = jnp.ones((16, 4))
    lowered = jax.jit(step).lower(variables["params"], x, x)
    assert lowered.as_text().count("stablehlo.all_reduce") == issued


def table_of_all_reduces():
    """Numbers that docs/derivatives.md tells, by form, or None for an error."""
    page = (pathlib.Path(__file__).parents[1] / "docs/derivatives.md").read_text()
    rows = page.partition("| all-reduces |")[2].partition("\n\n")[0].splitlines()[2:]
    for row in rows:
        form, *cells = row.strip("| ").split(" | ")
        yield form.strip('`"'), [None if cell == "–" else int(cell) for cell in cells]


@pytest.mark.parametrize(("form", "told"), list(table_of_all_reduces()))
def test_all_reduces_of_each_derivative(form, told):
    def layer(x, scale, bias):
        sums = {"shift": jnp.full(3, 0.1), "axis_name": "data", **XLA}
        if form in ("vjp", "jvp"):
            return jaxbn.batch_norm(x, scale, bias, **sums, derivatives=form)[0]
        m = jaxbn.moments(x, **sums)
        return jaxbn.normalize(x, m.mean, m.var, scale, bias)

    loss = lambda *a: jnp.sum(jnp.sin(layer(*a)))
    along = lambda f: lambda *a: jax.jvp(f, a, a)[1]
    derivatives = [
        (layer, ROWS),
        (jax.grad(loss, (0, 1, 2)), (ROWS, ALL, ALL)),
        (along(layer), ROWS),
        (along(jax.grad(loss)), ROWS),
        (jax.grad(along(loss)), ROWS),
    ]
    operands = jnp.ones((16, 3)), jnp.ones(3), jnp.ones(3)
    for (f, out), number in zip(derivatives, told, strict=True):
        specs = {"in_specs": (ROWS, ALL, ALL), "out_specs": out}
        spread = jax.jit(jax.shard_map(f, mesh=over(jax.devices()[:2]), **specs))
        if number is None:
            with pytest.raises((TypeError, NotImplementedError)):
                spread.lower(*operands)
        else:
            text = spread.lower(*operands).as_text()
            assert text.count("stablehlo.all_reduce") == number


def remat_collectives(policy):
    """All-reduces of three layers that are recomputed, as issued and as compiled."""

    def network(x):
        for _ in range(3):
            options = {"axis_name": "data", "shift": jnp.zeros(3), **XLA}
            x = jaxbn.batch_norm(jnp.sin(x), **options)[0]
        return (x**2).sum()

    def step(x):
        value, dx = jax.value_and_grad(jax.checkpoint(network, policy=policy))(x)
        return value[None], dx

    step = jax.shard_map(
        step, mesh=over(jax.devices()), in_specs=ROWS, out_specs=(ROWS, ROWS)
    )
    # Compiled, as layers of one shape share a function of the lowered program.
    return len(reduced(jax.jit(step).lower(jnp.ones((16, 3))).compile().as_text()))


def test_a_remat_policy_keeps_the_moments():
    policies = jax.checkpoint_policies
    assert remat_collectives(policies.everything_saveable) == 6
    assert remat_collectives(None) > 6
    keep = policies.save_only_these_names("jaxbn_moments")
    assert remat_collectives(keep) == 6


TPU = """
import sys
sys.path.insert(0, {tests!r})
from jax.experimental import topologies
from test_collectives import forward_and_backward, over, reduced
for name in sys.argv[1:]:
    devices = topologies.get_topology_desc(name, "tpu").devices
    for sync in (True, False):
        lowered = forward_and_backward(over(devices), sync=sync, shape=(28, 28, 128))
        text = lowered.compile().as_text()
        print(len(devices), sync, "all-gather" in text, *reduced(text))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu: pip install "jax[tpu]"',
)
def test_compiled_for_tpu_topologies():
    script = TPU.format(tests=str(pathlib.Path(__file__).parent))
    names = ["v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"]
    # A process of its own, because libtpu takes a lock and looks for a TPU.
    out = subprocess.run(
        [sys.executable, "-c", script, *names],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu"}
        | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    lines = [line.split() for line in out.stdout.splitlines() if line[0].isdigit()]
    assert [int(line[0]) for line in lines[::2]] == [4, 16, 64, 256]
    for _, sync, gathers, *sums in lines:
        assert gathers == "False"
        assert len(sums) == 2
        # The same on 4 and on 256 chips; under jit there is no count to sum.
        expected = 4 * 128 + 1 if sync == "True" else 4 * 128
        assert sum(map(int, sums)) == expected
