"""Trains one step by functions and by modules, with jaxbn as it is installed.

Run outside of a checkout, in an environment that has the wheels and optax.
"""

import importlib.metadata
import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxbn

here = pathlib.Path(jaxbn.__file__)
assert "site-packages" in here.parts, here
assert (here.parent / "py.typed").exists()

x = jnp.asarray(jax.random.normal(jax.random.key(0), (32, 8)))
kernels = importlib.util.find_spec("jaxbn_cpu") is not None
m = jaxbn.moments(x, implementation="native" if kernels else None)
assert jnp.allclose(m.var, x.var(0), rtol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.relu(x))


net, optimizer = Net(), optax.sgd(0.1)
variables = net.init(jax.random.key(1), x, False)
state = optimizer.init(variables["params"])


@jax.jit
def step(variables, state):
    def loss(params):
        given = {**variables, "params": params}
        y, new = net.apply(given, x, True, mutable=["batch_stats"])
        return jnp.mean(y**2), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(variables["params"], updates)
    return {"params": params, **new}, state


variables, state = step(variables, state)
assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
infer = lambda variables, x: net.apply(variables, x, False)
folded_fn, folded = jaxbn.folding.fold(infer, variables, x)
assert jnp.allclose(folded_fn(folded, x), infer(variables, x), atol=1e-5)
print(
    f"jaxbn {importlib.metadata.version('jaxbn')}, jax {jax.__version__}, "
    f"{'with' if kernels else 'without'} kernels: trained a step, folded it."
)
