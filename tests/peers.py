"""One layer of each library, with the same few verbs, for tests beside jaxbn's.

Each has channels last and is run as its library wants it: `train` makes a step of
its statistics, `infer` normalizes by them, `arrays` and `load` are its checkpoint in
the form that `jaxbn.interop` takes.
"""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import interop

FEATURES = 5
DOUBLE = MappingProxyType({"rtol": 1e-9, "atol": 1e-12})
MISSING = "`make peers` installs it"


class Torch:
    close = DOUBLE
    module = interop.torch
    options = interop.torch.options(momentum=0.2, eps=1e-4)
    to, back = {}, {"unbiased": True}

    def __init__(self):
        self.torch = pytest.importorskip("torch", reason=MISSING)
        self.layer = self.torch.nn.BatchNorm1d(FEATURES, momentum=0.2, eps=1e-4)
        self.layer.double()

    def _rows(self, x):
        return self.torch.from_numpy(np.array(x).reshape(-1, FEATURES))

    def train(self, x):
        self.layer.train()(self._rows(x))

    def infer(self, x):
        return self.layer.eval()(self._rows(x)).detach().numpy().reshape(x.shape)

    def arrays(self):
        return self.layer.state_dict()

    def load(self, arrays):
        tensors = {key: self.torch.from_numpy(v) for key, v in arrays.items()}
        self.layer.load_state_dict(tensors)


class TorchCumulative(Torch):
    options = interop.torch.options(momentum=None)

    def __init__(self):
        super().__init__()
        layer = self.torch.nn.BatchNorm1d(FEATURES, momentum=None)
        self.layer = layer.double()


class Keras:
    module = interop.keras
    options = interop.keras.options(momentum=0.8)
    to, back = {}, {}
    close = MappingProxyType({"rtol": 1e-5, "atol": 1e-5})  # float32 inside

    def __init__(self):
        keras = pytest.importorskip("keras", reason=MISSING)
        made = {"momentum": 0.8, "dtype": "float64"}
        self.layer = keras.layers.BatchNormalization(**made)
        self.layer.build((None, None, FEATURES))

    def train(self, x):
        self.layer(x, training=True)

    def infer(self, x):
        return self.layer(x, training=False)

    def arrays(self):
        return {v.name: v for v in self.layer.weights}

    def load(self, arrays):
        self.layer.set_weights(list(arrays.values()))


class Haiku:
    close = DOUBLE
    module = interop.haiku
    options = interop.haiku.options(
        create_scale=True, create_offset=True, decay_rate=0.9
    )
    to, back = {}, {"ndim": 3, "decay_rate": 0.9}

    def __init__(self):
        hk = pytest.importorskip("haiku", reason=MISSING)
        net = hk.transform_with_state(
            lambda x, train: hk.BatchNorm(True, True, 0.9, name="bn")(x, train)
        )
        self.apply = net.apply
        x = jnp.ones((2, 3, FEATURES), float)
        self.params, self.state = net.init(jax.random.key(0), x, True)

    def train(self, x):
        _, self.state = self.apply(self.params, self.state, None, x, True)

    def infer(self, x):
        return self.apply(self.params, self.state, None, x, False)[0]

    def arrays(self):
        averages = {
            name: self.state[f"bn/~/{name}"] for name in ("mean_ema", "var_ema")
        }
        return {**self.params["bn"], **averages}

    def load(self, arrays):
        arrays = jax.tree.map(jnp.asarray, arrays)
        for name in ("mean_ema", "var_ema"):
            self.state[f"bn/~/{name}"] = arrays.pop(name)
        self.params = {"bn": arrays}


class Equinox:
    close = DOUBLE
    module = interop.equinox
    mode, options = "batch", interop.equinox.options(momentum=0.9)
    to, back = {"momentum": 0.9}, {"momentum": 0.9}
    fields = ("batch_counter", "batch_state_index")

    def __init__(self):
        self.eqx = eqx = pytest.importorskip("equinox", reason=MISSING)
        self.layer, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            FEATURES, "batch", momentum=0.9, mode=self.mode
        )

    def _run(self, x, inference):
        first = jnp.moveaxis(x, -1, 1)
        call = lambda x, s: self.layer(x, s, inference=inference)
        mapped = jax.vmap(call, (0, None), (0, None), axis_name="batch")
        y, state = mapped(first, self.state)
        return jnp.moveaxis(y, 1, -1), state

    def train(self, x):
        _, self.state = self._run(x, False)

    def infer(self, x):
        return self._run(x, True)[0]

    def arrays(self):
        kept = {name: self.state.get(getattr(self.layer, name)) for name in self.fields}
        return {"weight": self.layer.weight, "bias": self.layer.bias, **kept}

    def load(self, arrays):
        arrays = jax.tree.map(jnp.asarray, arrays)
        for name in self.fields:
            self.state = self.state.set(getattr(self.layer, name), arrays[name])
        where = lambda layer: (layer.weight, layer.bias)
        new = arrays["weight"], arrays["bias"]
        self.layer = self.eqx.tree_at(where, self.layer, new)


class EquinoxEma(Equinox):
    mode, options = "ema", interop.equinox.options(momentum=0.9, mode="ema")
    to, back = {}, {"momentum": None}
    fields = ("ema_first_time_index", "ema_state_index")


class Linen:
    close = DOUBLE
    module = interop.flax
    options = MappingProxyType({"momentum": 0.8, "epsilon": 1e-4})
    to, back = {}, {}

    def __init__(self):
        import flax.linen as nn

        self.layer = nn.BatchNorm(**self.options, use_fast_variance=False)
        x = jnp.ones((2, FEATURES))
        self.variables = self.layer.init(jax.random.key(0), x, True)
        self.variables = jax.tree.map(lambda v: v.astype(float), self.variables)

    def train(self, x):
        _, new = self.layer.apply(self.variables, x, False, mutable=["batch_stats"])
        self.variables = {**self.variables, **new}

    def infer(self, x):
        return self.layer.apply(self.variables, x, True)

    def arrays(self):
        return self.variables

    def load(self, arrays):
        self.variables = arrays


class Nnx:
    close = DOUBLE
    module = interop.flax
    options = MappingProxyType({"momentum": 0.8, "epsilon": 1e-4})
    to, back = {}, {}

    def __init__(self):
        from flax import nnx

        self.nnx = nnx
        self.layer = nnx.BatchNorm(
            FEATURES, **self.options, use_fast_variance=False, rngs=nnx.Rngs(0)
        )
        wide = lambda v: v.astype(float)
        nnx.update(self.layer, jax.tree.map(wide, nnx.state(self.layer)))

    def train(self, x):
        self.layer(x, use_running_average=False)

    def infer(self, x):
        return self.layer(x, use_running_average=True)

    def arrays(self):
        return self.nnx.to_pure_dict(self.nnx.state(self.layer))

    def load(self, arrays):
        flat = {**arrays["params"], **arrays["batch_stats"]}
        self.nnx.update(self.layer, jax.tree.map(jnp.asarray, flat))


ALL = (Torch, TorchCumulative, Keras, Haiku, Equinox, EquinoxEma, Linen, Nnx)
