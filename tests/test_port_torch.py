"""A torch network moved to linen: equal in its outputs and in training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import assert_close

import jaxbn
from jaxbn.interop import flax as to_flax
from jaxbn.interop import torch as from_torch

torch = pytest.importorskip("torch", reason="`make peers` installs it")

OPTIONS = from_torch.options()
RATE = 0.1


class TorchBlock(torch.nn.Module):
    """A residual block as in torchvision, and a classifier."""

    def __init__(self):
        super().__init__()
        conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
        self.conv1 = conv(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(8)
        self.conv2 = conv(8, 8, 3, padding=1, bias=False)
        self.bn2 = norm(8)
        self.downsample = torch.nn.Sequential(
            conv(3, 8, 1, stride=2, bias=False), norm(8)
        )
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = torch.relu(y + self.downsample(x))
        return self.fc(y.mean((2, 3)))


class LinenBlock(nn.Module):
    """The same; submodules have torch's names, with a dot as in its keys."""

    @nn.compact
    def __call__(self, x, train: bool):
        def conv(name, size, stride, padding):
            return nn.Conv(
                8, (size, size), stride, padding, use_bias=False, name=name,
                param_dtype=x.dtype,
            )  # fmt: skip

        def norm(name):
            return jaxbn.linen.BatchNorm(
                not train, **OPTIONS, name=name, param_dtype=x.dtype
            )

        y = nn.relu(norm("bn1")(conv("conv1", 3, 2, 1)(x)))
        y = norm("bn2")(conv("conv2", 3, 1, 1)(y))
        side = norm("downsample.1")(conv("downsample.0", 1, 2, 0)(x))
        y = nn.relu(y + side)
        return nn.Dense(4, name="fc", param_dtype=x.dtype)(y.mean((1, 2)))


def ported(state_dict):
    """Linen's variables from torch's."""
    variables = {"params": {}, "batch_stats": {}}
    for prefix, (params, stats) in from_torch.batch_norms(state_dict).items():
        layer = to_flax.from_jaxbn(params, stats)
        variables["params"][prefix] = layer["params"]
        variables["batch_stats"][prefix] = layer["batch_stats"]
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        if prefix in variables["params"] and prefix in variables["batch_stats"]:
            continue
        layer = variables["params"].setdefault(prefix, {})
        array = value.numpy()
        if name == "bias":
            layer["bias"] = array
        else:  # OIHW to HWIO, or OI to IO
            layer["kernel"] = np.moveaxis(array, (0, 1), (-1, -2))
    return jax.tree.map(jnp.asarray, variables)


def images(number, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, size=(number, 9, 8, 3)).astype(dtype)
    return x, rng.integers(0, 4, size=number)


def first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def warmed(dtype):
    """A torch block whose statistics and parameters have moved."""
    torch.manual_seed(0)
    block = TorchBlock().to(dtype)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "bn" in name or "downsample.1" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for seed in range(3):
            block(first(images(6, str(dtype).partition(".")[2], seed)[0]))
    return block


def test_outputs_are_equal():
    block = warmed(torch.float32)
    x, _ = images(5, "float32", seed=9)
    with torch.no_grad():
        expected = block.eval()(first(x)).numpy()
    variables = ported(block.state_dict())
    y = LinenBlock().apply(variables, jnp.asarray(x), train=False)
    assert_close(y, expected, 1e-5, 1e-5)


@pytest.mark.usefixtures("x64")
def test_training_has_equal_losses():
    block = warmed(torch.float64)
    variables = ported(block.state_dict())
    assert variables["params"]["conv1"]["kernel"].dtype == jnp.float64
    stats = from_torch.batch_norms(block.state_dict())
    block.train()
    theirs = torch.optim.SGD(block.parameters(), RATE, momentum=0.9)
    ours = optax.sgd(RATE, momentum=0.9)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = ours.init(params)

    @jax.jit
    def step(params, batch_stats, opt_state, x, labels):
        def loss(params):
            logits, new = LinenBlock().apply(
                {"params": params, "batch_stats": batch_stats}, x, train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = ours.update(grads, opt_state)
        return value, optax.apply_updates(params, updates), batch_stats, opt_state

    losses = []
    for seed in range(5):
        x, labels = images(6, "float64", 20 + seed)
        loss = torch.nn.functional.cross_entropy(
            block(first(x)), torch.from_numpy(labels)
        )
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        own, params, batch_stats, opt_state = step(
            params, batch_stats, opt_state, jnp.asarray(x), labels
        )
        losses.append(float(own))
        # The statistics are float32 in linen, and do not enter the losses.
        assert_close(own, loss.item(), 1e-9)
    assert len(set(losses)) == 5
    for prefix, (_, expected) in from_torch.batch_norms(block.state_dict()).items():
        assert not np.allclose(expected.mean, stats[prefix][1].mean)
        assert_close(batch_stats[prefix]["mean"], expected.mean, 1e-5, 1e-6)
        assert_close(batch_stats[prefix]["var"], expected.var, 1e-5)


def test_a_state_dict_goes_back():
    block = warmed(torch.float32)
    state_dict = block.state_dict()
    made = {
        f"{prefix}.{name}": torch.from_numpy(array)
        for prefix, layer in from_torch.batch_norms(state_dict).items()
        for name, array in from_torch.from_jaxbn(*layer, unbiased=True).items()
    }
    fresh = TorchBlock()
    missing, unexpected = fresh.load_state_dict({**state_dict, **made}, strict=True)
    assert not missing
    assert not unexpected
    for key, value in state_dict.items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert len(made) == 15


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tensors_of_every_dtype(dtype):
    layer = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    params, stats = from_torch.to_jaxbn({**layer.state_dict(), "weight": layer.weight})
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    assert_close(params["scale"], np.ones(3))
    assert stats.step == 0
