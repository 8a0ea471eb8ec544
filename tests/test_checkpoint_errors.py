"""What checkpoints are refused for, and that the message says which key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close

import jaxbn
from jaxbn.interop import equinox, flax, haiku, keras, praxis, torch

V = np.arange(1.0, 4.0, dtype=np.float32)
TORCH = {
    "weight": V,
    "bias": V,
    "running_mean": V,
    "running_var": V,
    "num_batches_tracked": np.int64(7),
}
KERAS = {"gamma": V, "beta": V, "moving_mean": V, "moving_variance": V}
EMA = {"counter": np.int32(2), "hidden": V[None], "average": V[None]}
HAIKU = {"scale": V[None], "offset": V[None], "mean_ema": EMA, "var_ema": EMA}
EQUINOX = {"weight": V, "bias": V, "batch_counter": 3, "batch_state_index": (V, V)}
FLAX = {"params": {"scale": V, "bias": V}, "batch_stats": {"mean": V, "var": V}}
RENORM = {**KERAS, "moving_stddev": V, "renorm_mean": V, "renorm_stddev": V}


def without(arrays, *names):
    return {name: v for name, v in arrays.items() if name not in names}


def at(arrays, path, value):
    """The arrays with another value at a path, such as "var_ema/average"."""
    name, _, rest = path.partition("/")
    return {**arrays, name: at(arrays[name], rest, value) if rest else value}


def equinox_to(arrays):
    return equinox.to_jaxbn(arrays, momentum=0.9)


CASES = [
    (torch.to_jaxbn, without(TORCH, "running_var"), r"\['running_var'\] missing"),
    (torch.to_jaxbn, {**TORCH, "v": V}, r"\['v'\] not known"),
    (torch.to_jaxbn, without(TORCH, "weight"), "`bias` is there, and `weight` is"),
    (torch.to_jaxbn, at(TORCH, "bias", V[:2]), r"`bias` has shape \(2,\), but `run"),
    (torch.to_jaxbn, at(TORCH, "running_var", V - 2), "`running_var` has -1.0 at fea"),
    (torch.to_jaxbn, at(TORCH, "running_var", V * np.nan), "`running_var` has nan at"),
    (torch.to_jaxbn, at(TORCH, "num_batches_tracked", -1), "`num_batches_tracked` mus"),
    (torch.to_jaxbn, at(TORCH, "num_batches_tracked", 2**31), "from 0 to 2³¹ − 1"),
    (torch.to_jaxbn, list(TORCH.values()), "must be a dict of arrays"),
    (keras.to_jaxbn, without(KERAS, "moving_mean"), r"\['moving_mean'\] missing"),
    (keras.to_jaxbn, {**KERAS, "delta": V}, r"\['delta'\] not known"),
    (keras.to_jaxbn, at(KERAS, "gamma", V[:1]), r"`gamma` has shape \(1,\)"),
    (keras.to_jaxbn, at(KERAS, "moving_variance", -V), "`moving_variance` has -1.0"),
    (keras.to_jaxbn, [V, V, V], "`arrays` has 3 of them"),
    (keras.to_jaxbn, without(RENORM, "renorm_mean"), r"\['renorm_mean'\] missing"),
    (keras.to_jaxbn, at(RENORM, "renorm_mean", V + 1), "`renorm_mean` is not the mov"),
    (keras.to_jaxbn, at(RENORM, "renorm_mean", V[:1]), "`renorm_mean` has shape"),
    (keras.to_jaxbn, at(RENORM, "renorm_stddev", -V), "`renorm_stddev` has -1.0"),
    (haiku.to_jaxbn, without(HAIKU, "var_ema"), r"\['var_ema/average'\] missing"),
    (haiku.to_jaxbn, without(HAIKU, "mean_ema"), r"\['mean_ema/average'\] missing"),
    (haiku.to_jaxbn, {**HAIKU, "gain": V}, r"\['gain'\] not known"),
    (
        haiku.to_jaxbn,
        at(HAIKU, "var_ema", without(EMA, "counter")),
        "`var_ema` must be",
    ),
    (haiku.to_jaxbn, at(HAIKU, "var_ema/counter", 3), "`var_ema/counter` 3"),
    (
        haiku.to_jaxbn,
        at(HAIKU, "var_ema/average", -V[None]),
        "`var_ema/average` has -1",
    ),
    (haiku.to_jaxbn, at(HAIKU, "scale", V), r"`scale` has shape \(3,\)"),
    (equinox_to, without(EQUINOX, "batch_counter"), r"\['batch_counter'\] missing"),
    (equinox_to, {**EQUINOX, "eps": V}, r"\['eps'\] not known"),
    (equinox_to, at(EQUINOX, "weight", V[:2]), r"`weight` has shape \(2,\)"),
    (
        equinox_to,
        at(EQUINOX, "batch_state_index", (V, -V)),
        r"`batch_state_index\[1\]`",
    ),
    (equinox_to, at(EQUINOX, "batch_state_index", V), "`batch_state_index` must be a"),
    (equinox_to, at(EQUINOX, "batch_counter", -1), "`batch_counter` must be a whole"),
    (equinox.to_jaxbn, EQUINOX, "`momentum` is needed in mode 'batch'"),
    (flax.to_jaxbn, without(FLAX, "batch_stats"), r"\['mean', 'var'\] missing"),
    (flax.to_jaxbn, {**FLAX, "losses": {}}, r"collections \['losses'\]"),
    (flax.to_jaxbn, at(FLAX, "batch_stats/var", -V), "`var` has -1.0"),
    (flax.to_jaxbn, at(FLAX, "params/scale", V[:2]), r"`scale` has shape \(2,\)"),
    (praxis.to_jaxbn, without(KERAS, "moving_mean"), r"\['moving_mean'\] missing"),
    (praxis.to_jaxbn, at(KERAS, "moving_variance", -V), "`moving_variance` has -1.0"),
]


CASES += [
    (torch.to_jaxbn, at(TORCH, "num_batches_tracked", np.float32(2.5)), "whole number"),
    (torch.to_jaxbn, at(TORCH, "num_batches_tracked", np.arange(3)), "index the first"),
    (torch.to_jaxbn, at(TORCH, "running_var", 1j * V), "`running_var` must be real"),
    (torch.to_jaxbn, at(TORCH, "running_var", V * np.inf), "`running_var` has inf"),
    (torch.to_jaxbn, at(TORCH, "running_mean", V * np.nan), "`running_mean` has NaN"),
    (torch.batch_norms, [("bn.running_mean", V)], "`state_dict` must be a dict"),
    (torch.batch_norms, {0: V}, "`state_dict` must be a dict from names"),
    (torch.batch_norms, {"model": TORCH, "epoch": 3}, r"under one of \['model'\]"),
    (keras.to_jaxbn, {"a/gamma": V, "b/gamma": V}, "two of a name"),
    (keras.to_jaxbn, None, "`arrays` must be a dict or a list"),
    (keras.to_jaxbn, at(RENORM, "moving_stddev", -V), "`moving_stddev` has -1.0"),
    (haiku.to_jaxbn, None, "`arrays` must be a dict, got NoneType"),
    (haiku.to_jaxbn, at(HAIKU, "var_ema/counter", "x"), "`var_ema/counter` must be an"),
    (equinox_to, [V], "`arrays` must be a dict by the layer's fields"),
    (equinox_to, at(EQUINOX, "batch_counter", "x"), "`batch_counter` must be an array"),
    (equinox_to, at(EQUINOX, "batch_counter", 2.5), "`batch_counter` must be a whole"),
    (equinox_to, at(EQUINOX, "batch_counter", 10**12), "`batch_counter` must be a wh"),
    (flax.to_jaxbn, None, "`variables` must be a dict, got NoneType"),
    (flax.batch_norms, None, "`variables` must be a dict, got NoneType"),
    (flax.to_jaxbn, at(FLAX, "batch_stats/step", np.arange(3)), "index the first axis"),
]


@pytest.mark.parametrize(("function", "arrays", "message"), CASES)
def test_refused(function, arrays, message):
    with pytest.raises((ValueError, TypeError), match=message):
        function(arrays)


@pytest.mark.parametrize("value", ["abc", None, object()])
def test_no_array(value):
    with pytest.raises((TypeError, ValueError), match="running_mean"):
        torch.to_jaxbn(at(TORCH, "running_mean", value))


def test_traced_values_are_refused():
    with pytest.raises(TypeError, match="`weight` must be an array with known"):
        jax.jit(torch.to_jaxbn)(TORCH)


def test_integers_are_no_statistics():
    with pytest.raises(TypeError, match="`weight` must be floating, got int"):
        torch.to_jaxbn(at(TORCH, "weight", np.arange(3)))


OPTIONS = [
    (torch.options, {}, "momentum"),
    (keras.options, {}, "momentum"),
    (equinox.options, {}, "momentum"),
    (praxis.options, {}, "decay"),
    (haiku.options, {"create_scale": True, "create_offset": True}, "decay_rate"),
]


@pytest.mark.parametrize(("options", "rest", "name"), OPTIONS)
def test_momentum_outside_0_to_1(options, rest, name):
    for value in (-0.1, 1.1, 2, float("nan"), "0.9", True):
        with pytest.raises(ValueError, match=f"`{name}` must be a number from 0 to 1"):
            options(**rest, **{name: value})
    assert options(**rest, **{name: np.float32(0.5)})


def test_what_no_option_can_be():
    made = {"create_scale": True, "create_offset": True}
    with pytest.raises(ValueError, match="`decay_rate` must be below 1"):
        haiku.options(**made, decay_rate=1.0)
    with pytest.raises(ValueError, match="`momentum` must be below 1"):
        equinox.options(momentum=1.0)
    for options, name in ((torch.options, "eps"), (keras.options, "epsilon")):
        with pytest.raises(ValueError, match=f"`{name}` must be a number of at least"):
            options(**{name: -1.0})


def test_equinox_modes():
    with pytest.raises(ValueError, match="`mode` must be 'batch' or 'ema', got 'lega"):
        equinox.options(mode="legacy")
    ema = {"ema_first_time_index": False, "ema_state_index": (V, V)}
    with pytest.raises(ValueError, match="are for mode 'batch'"):
        equinox.to_jaxbn(ema, momentum=0.9)
    with pytest.raises(ValueError, match="`momentum` must be a number from 0"):
        equinox.to_jaxbn(EQUINOX, momentum=1.5)


STATE = ({"scale": V, "bias": V}, jaxbn.RunningStats(V, V, np.int32(5)))
BACK = [
    (torch.from_jaxbn, {"unbiased": True}),
    (keras.from_jaxbn, {}),
    (haiku.from_jaxbn, {"ndim": 2, "decay_rate": 0.9}),
    (equinox.from_jaxbn, {"momentum": 0.9}),
    (flax.from_jaxbn, {}),
    (praxis.from_jaxbn, {}),
]


@pytest.mark.parametrize(("back", "rest"), BACK)
def test_what_goes_back_is_checked_too(back, rest):
    params, stats = STATE
    with pytest.raises(TypeError, match="`stats` must be a `RunningStats`, got dict"):
        back(params, stats._asdict(), **rest)
    with pytest.raises(ValueError, match=r"but has \['gamma'\]"):
        back({**params, "gamma": V}, stats, **rest)
    with pytest.raises(ValueError, match=r"`params\['scale'\]` has shape \(2,\)"):
        back({**params, "scale": V[:2]}, stats, **rest)
    with pytest.raises(ValueError, match=r"`stats.var` has -1.0 at feature 0"):
        back(params, stats._replace(var=-V), **rest)


@pytest.mark.parametrize(("back", "rest"), BACK[:2] + BACK[3:4] + BACK[5:])
def test_several_feature_axes(back, rest):
    _, stats = STATE
    square = jaxbn.RunningStats(V[None], V[None], stats.step)
    with pytest.raises(ValueError, match="one feature axis"):
        back({}, square, **rest)


FORGETFUL = [*BACK[2:4], (equinox.from_jaxbn, {"momentum": None})]


@pytest.mark.parametrize(("back", "rest"), FORGETFUL)
def test_a_step_that_debiasing_would_forget(back, rest):
    params, stats = STATE
    with pytest.raises(ValueError, match=r"`stats.step` is 0, but the statistics have"):
        back(params, stats._replace(step=np.int32(0)), **rest)


def test_parameters_that_others_cannot_have():
    _, stats = STATE
    with pytest.raises(ValueError, match="'bias' and no 'scale'"):
        torch.from_jaxbn({"bias": V}, stats, unbiased=True)
    with pytest.raises(ValueError, match="both or neither"):
        equinox.from_jaxbn({"scale": V}, stats, momentum=0.9)
    with pytest.raises(ValueError, match="`epsilon` is for `RenormStats`"):
        keras.from_jaxbn(*STATE, epsilon=1e-3)


def test_the_count_is_asked_for_where_it_is_needed():
    ask = "Pass `count`, the number of values per feature"
    with pytest.raises(ValueError, match=f"`running_var` is of unbiased.*{ask}"):
        torch.to_jaxbn(TORCH, unbiased=False)
    with pytest.raises(ValueError, match=f"`stats.var` is of biased.*{ask}.*ed=True"):
        torch.from_jaxbn(*STATE)
    with pytest.raises(ValueError, match=ask):
        keras.to_jaxbn(KERAS, fused=True, unbiased=False)
    with pytest.raises(ValueError, match=f"{ask}.*`unbiased=False`"):
        keras.from_jaxbn(*STATE, unbiased=True)
    for count in (1, 0, -3, float("nan"), float("inf"), "8", V):
        with pytest.raises(ValueError, match="`count` must be a number above 1"):
            torch.to_jaxbn(TORCH, unbiased=False, count=count)
    with pytest.raises(TypeError, match="`unbiased` must be True or False, got 'no'"):
        torch.to_jaxbn(TORCH, unbiased="no")
    with pytest.raises(ValueError, match="not for renorm"):
        keras.to_jaxbn(RENORM, unbiased=True, count=10)
    with pytest.raises(ValueError, match="`count` is 8, but `running_var` is taken as"):
        torch.to_jaxbn(TORCH, count=8)


def dotted(prefix, arrays):
    return {f"{prefix}.{name}": v for name, v in arrays.items()}


def test_flax_boxes_and_windows():
    import flax.linen as nn
    from flax import nnx

    boxed = {
        "scale": nn.Partitioned(jnp.asarray(V), ("features",)),
        "mean": V,
        "var": V,
    }
    assert_close(flax.to_jaxbn(boxed)[0]["scale"], V)
    layer = jaxbn.nnx.BatchNorm(3, accumulate=True, rngs=nnx.Rngs(0))
    found = flax.batch_norms({"norm": nnx.to_pure_dict(nnx.state(layer))})
    assert list(found) == ["norm"]


def test_narrow_checkpoints_lose_nothing():
    var = np.full(3, 6e4, np.float16)
    _, stats = torch.to_jaxbn(at(TORCH, "running_var", var))
    assert_close(
        torch.from_jaxbn({}, stats, unbiased=False, count=2)["running_var"],
        2 * var.astype(float),
    )
    gamma = jnp.full(3, 1e-3, jnp.bfloat16)
    again = praxis.from_jaxbn(*praxis.to_jaxbn(at(KERAS, "gamma", gamma)))
    assert_close(again["gamma"], np.asarray(gamma, float), 1e-4)


def test_whole_state_dicts():
    conv = {"conv.weight": np.ones((3, 3, 1, 1)), "fc.weight": V, "fc.bias": V}
    frozen = without(TORCH, "num_batches_tracked")
    found = torch.batch_norms(
        {**conv, **dotted("a.0.bn", TORCH), **dotted("b", frozen)}
    )
    assert list(found) == ["a.0.bn", "b"]
    assert found["a.0.bn"][1].step == 7
    assert list(torch.batch_norms(TORCH)) == [""]
    by_prefix = {"x": 4, "y": 10}
    both = {**dotted("x", TORCH), **dotted("y", TORCH)}
    biased = torch.batch_norms(both, unbiased=False, count=by_prefix)
    assert_close(biased["x"][1].var, V * 0.75)
    assert_close(biased["y"][1].var, V * 0.9, 1e-6)
    with pytest.raises(ValueError, match=r"Pass `count`") as error:
        torch.batch_norms(both, unbiased=False, count={"x": 4})
    assert "`y.running_var`" in str(error.value)
    with pytest.raises(ValueError, match=r"`count` has \['z'\], which are no batch"):
        torch.batch_norms(both, unbiased=False, count={"x": 4, "y": 4, "z": 4})
    with pytest.raises(ValueError, match="no batch norm: none of its 3 keys"):
        torch.batch_norms(conv)
    for missing in ("running_mean", "running_var", "weight"):
        half = dotted("a.bn", without(TORCH, missing))
        with pytest.raises(ValueError, match=rf"`?a\.bn\.{missing}`?'?\]? (is )?mis"):
            torch.batch_norms({**conv, **half})
    with pytest.raises(ValueError, match=r"\['a.v'\] not known"):
        torch.batch_norms(dotted("a", {**TORCH, "v": V}))
    with pytest.raises(ValueError, match=r"`a.running_var` has -1.0"):
        torch.batch_norms(dotted("a", at(TORCH, "running_var", -V)))


def test_whole_models_of_haiku_and_flax():
    averages = {f"net/~/bn/~/{name}": EMA for name in ("mean_ema", "var_ema")}
    params = {"net/~/bn": {"scale": V[None]}, "net/~/linear": {"w": V}}
    found = haiku.batch_norms(params, averages)
    assert list(found) == ["net/~/bn"]
    assert sorted(found["net/~/bn"][0]) == ["scale"]
    with pytest.raises(ValueError, match=r"\['net/~/bn/var_ema/average'\] missing"):
        haiku.batch_norms(params, without(averages, "net/~/bn/~/var_ema"))
    with pytest.raises(ValueError, match="`state` has no batch norm"):
        haiku.batch_norms(params, {})
    variables = {
        "params": {"block": {"bn": FLAX["params"], "conv": {"kernel": V}}},
        "batch_stats": {"block": {"bn": FLAX["batch_stats"]}},
    }
    found = flax.batch_norms(variables)
    assert list(found) == ["block/bn"]
    assert sorted(found["block/bn"][0]) == ["bias", "scale"]
    odd = {"a/b": FLAX["params"]}, {"a/b": FLAX["batch_stats"]}
    found = flax.batch_norms(dict(zip(("params", "batch_stats"), odd, strict=True)))
    assert sorted(found["a/b"][0]) == ["bias", "scale"]
    renorm = {"batch_stats": {"norm": {"mean": V, "std": V}}}
    assert isinstance(flax.batch_norms(renorm)["norm"][1], jaxbn.layers.RenormStats)
    nnx_like = {"layers": {0: {"scale": V, "mean": V, "var": V}, 1: {"kernel": V}}}
    assert list(flax.batch_norms(nnx_like)) == ["layers/0"]
    with pytest.raises(ValueError, match="no running statistics"):
        flax.batch_norms({"params": {}, "batch_stats": {}})
    with pytest.raises(ValueError, match=r"`block/bn/var` has -1.0"):
        flax.batch_norms(at(variables, "batch_stats/block/bn/var", -V))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_frozen_batch_norm(eps):
    """Also with a variance that a loader has taken below 0."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    var = V - 1 - np.float32(eps) + np.float32(1e-3)
    arrays = without(at(TORCH, "running_var", var), "num_batches_tracked")
    params, stats = torch.frozen_to_jaxbn(arrays, eps=eps)
    layer = jaxbn.layers.standard(**torch.options(eps=0.0))
    y, _ = layer.apply(params, stats, jnp.asarray(x), training=False)
    wide = var.astype(float) + eps
    assert_close(y, (x - V) / np.sqrt(wide) * V + V, 1e-3)
    with pytest.raises(ValueError, match="`running_var` has"):
        torch.frozen_to_jaxbn(at(arrays, "running_var", var - 2e-3), eps=eps)
    with pytest.raises(ValueError, match="`eps` must be a number of at least 0"):
        torch.frozen_to_jaxbn(arrays, eps=-1.0)
