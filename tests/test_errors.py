"""Wrong arguments: an error at trace time that names the argument and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import layers
from jaxbn.interop import tf_nn

X = jnp.ones((4, 3))
V = jnp.ones(3)
C = jnp.ones(3, jnp.complex64)
STATS = jaxbn.init_stats(3)
M = jaxbn.moments(X)
KEY = jax.random.key(0)


def linen(x=X, *args, mask=None, variables=None, **fields):
    """A call of a linen module in training, by default one just initialized."""
    layer = jaxbn.linen.BatchNorm(**fields)
    if variables is None:
        variables = jaxbn.linen.BatchNorm(False).init(KEY, X)
    args = args or (False,)
    return layer.apply(variables, x, *args, mask=mask, mutable=["batch_stats"])


def nnx_(x=X, num_features=3, mask=None, **options):
    """The same of an nnx module."""
    return jaxbn.nnx.BatchNorm(num_features, rngs=nnx.Rngs(0), **options)(x, mask=mask)


def trained(layer, x=X, features=3, **given):
    """A step of a layer that was just initialized."""
    params, state = layer.init(features)
    return layer.apply(params, state, x, training=True, **given)


# What is called, the kind of error, and words of its message in their order.
CASES = {
    "axis out of range": (
        lambda: jaxbn.moments(X, feature_axes=2),
        ValueError,
        ["`feature_axes` has 2", "rank 2", "from -2 to 1"],
    ),
    "axis twice": (
        lambda: jaxbn.batch_norm(X, feature_axes=(1, -1)),
        ValueError,
        ["`feature_axes` names an axis twice", "(1, -1)", "once"],
    ),
    "axis no integer": (
        lambda: jaxbn.moments(X, feature_axes="channels"),
        TypeError,
        ["`feature_axes` must be an integer", "'channels'"],
    ),
    "scale of another length": (
        lambda: jaxbn.batch_norm(X, jnp.ones(4)),
        ValueError,
        ["`scale` has shape (4,)", "expected (3,)", "(4, 3)", "Reshape `scale`"],
    ),
    "bias of another rank": (
        lambda: jaxbn.batch_norm(X, V, jnp.ones(())),
        ValueError,
        ["`bias` has shape ()", "expected (3,)"],
    ),
    "scale per example of another length": (
        lambda: jaxbn.batch_norm(X, jnp.ones((5, 3))),
        ValueError,
        ["`scale` has shape (5, 3)", "expected (3,)", "or (4, 3)"],
    ),
    "mean of another length": (
        lambda: jaxbn.normalize(X, jnp.ones(2), V),
        ValueError,
        ["`mean` has shape (2,)", "expected (3,)"],
    ),
    "mean left out": (
        lambda: jaxbn.normalize(X, None, V),
        TypeError,
        ["`mean`", "None"],
    ),
    "shift of another shape": (
        lambda: jaxbn.moments(X, shift=jnp.ones((4, 3))),
        ValueError,
        ["`shift` has shape (4, 3)", "expected (3,)"],
    ),
    "integer input": (
        lambda: jaxbn.moments(jnp.arange(4)),
        TypeError,
        ["`x` must be floating or complex", "int32", "`x.astype(jnp.float32)`"],
    ),
    "integer mean": (
        lambda: jaxbn.normalize(X, jnp.zeros(3, int), V),
        TypeError,
        ["`mean` must be floating", "int32"],
    ),
    "complex variance": (
        lambda: jaxbn.normalize(X.astype(C.dtype), C, C),
        TypeError,
        ["`var` is complex", "imaginary part"],
    ),
    "complex scale for real x": (
        lambda: jaxbn.batch_norm(X, C),
        TypeError,
        [
            "`scale` is complex (complex64)",
            "`dtype` is real (float32)",
            "Make `dtype` complex",
        ],
    ),
    "complex shift for real x": (
        lambda: jaxbn.moments(X, shift=C),
        TypeError,
        ["`shift` is complex", "`x` is real"],
    ),
    "weights that do not broadcast": (
        lambda: jaxbn.moments(X, weights=jnp.ones(4)),
        ValueError,
        ["`weights` has shape (4,)", "`x` of shape (4, 3)", "`weights[:, None]`"],
    ),
    "weights of higher rank": (
        lambda: jaxbn.batch_norm(X, weights=jnp.ones((1, 4, 3))),
        ValueError,
        ["`weights` has shape (1, 4, 3)", "broadcast"],
    ),
    "complex weights": (
        lambda: jaxbn.moments(X, weights=C),
        TypeError,
        ["`weights` must be boolean or real", "complex64"],
    ),
    "unknown derivatives": (
        lambda: jaxbn.batch_norm(X, derivatives="fwd"),
        ValueError,
        ["`derivatives` must be 'vjp' or 'jvp'", "'fwd'"],
    ),
    "integer output": (
        lambda: jaxbn.batch_norm(X, dtype=jnp.int8),
        TypeError,
        ["`dtype` must be floating or complex", "int8", "jnp.float32"],
    ),
    "real output of complex input": (
        lambda: jaxbn.normalize(X.astype(C.dtype), C, V, dtype=jnp.float32),
        TypeError,
        ["`dtype` must be complex", "complex64", "float32"],
    ),
    "epsilon per feature": (
        lambda: jaxbn.normalize(X, V, V, epsilon=V),
        ValueError,
        ["`epsilon` must be a real scalar", "(3,)"],
    ),
    "negative epsilon": (
        lambda: jaxbn.batch_norm(X, epsilon=-1e-5),
        ValueError,
        ["`epsilon` must not be negative", "-1e-05"],
    ),
    "unbound axis name": (
        lambda: jaxbn.moments(X, axis_name="data"),
        NameError,
        [
            "`axis_name` has 'data'",
            "not bound",
            "(no axis is)",
            "`jax.shard_map`",
            "plain `jax.jit`",
        ],
    ),
    "one of two names unbound": (
        lambda: jax.vmap(
            lambda x: jaxbn.batch_norm(x, axis_name=("i", "j")), axis_name="i"
        )(X[:, None]),
        NameError,
        ["`axis_name` has 'j'", "not bound", "('i' is)"],
    ),
    "groups that do not partition": (
        lambda: jax.vmap(
            lambda x: jaxbn.moments(
                x, axis_name="i", axis_index_groups=((0, 1), (1, 2, 3))
            ),
            axis_name="i",
        )(X[:, None]),
        ValueError,
        ["`axis_index_groups`", "does not partition the 4 indices", "exactly once"],
    ),
    "groups without a name": (
        lambda: jaxbn.moments(X, axis_index_groups=((0,), (1,))),
        ValueError,
        ["`axis_index_groups` needs a single `axis_name`", "None"],
    ),
    "groups of two names": (
        lambda: jax.vmap(
            jax.vmap(
                lambda x: jaxbn.moments(
                    x, axis_name=("i", "j"), axis_index_groups=((0, 1),)
                ),
                axis_name="j",
            ),
            axis_name="i",
        )(jnp.ones((2, 2, 4, 3))),
        ValueError,
        ["needs a single `axis_name`", "('i', 'j')"],
    ),
    "moments of other features": (
        lambda: jaxbn.update(jaxbn.init_stats(4), M),
        ValueError,
        ["`moments.mean` has shape (3,)", "expected (4,)", "`init_stats`"],
    ),
    "complex moments for real statistics": (
        lambda: jaxbn.update(STATS, jaxbn.moments(X.astype(C.dtype))),
        TypeError,
        ["`moments.mean` is complex", "`stats.mean` is real", "imaginary part"],
    ),
    "momentum beyond 1": (
        lambda: jaxbn.update(STATS, M, momentum=1.5),
        ValueError,
        ["`momentum`", "weight of the old value", "1.5"],
    ),
    "momentum of another shape": (
        lambda: jaxbn.update(STATS, M, momentum=jnp.ones(2)),
        ValueError,
        ["`momentum` has shape (2,)", "a scalar or (3,)"],
    ),
    "unbiased that is no bool": (
        lambda: jaxbn.update(STATS, M, unbiased="yes"),
        TypeError,
        ["`unbiased` must be True or False", "'yes'"],
    ),
    "debiased(1)": (
        lambda: jaxbn.debiased(1.0),
        ValueError,
        ["`decay`", "below 1", "`cumulative()`"],
    ),
    "integer statistics": (
        lambda: jaxbn.init_stats(3, dtype=jnp.int32),
        TypeError,
        ["`dtype` must be floating or complex", "int32"],
    ),
    "features that are no integers": (
        lambda: jaxbn.init_stats(2.5),
        TypeError,
        ["`features` must be an integer", "2.5"],
    ),
    "a count that does not fit the stack": (
        lambda: jaxbn.merge_moments(jaxbn.Moments(X, X, jnp.ones(5))),
        ValueError,
        ["`moments_.count` has shape (5,)", "(4,)", "(4, 3)", "`axis`"],
    ),
    "a stacked axis out of range": (
        lambda: jaxbn.merge_moments(jaxbn.Moments(X, X, jnp.ones(4)), axis=7),
        ValueError,
        ["`axis` has 7"],
    ),
    "training that is no bool": (
        lambda: jaxbn.layers.standard().apply({}, STATS, X, training=1),
        TypeError,
        ["`training` must be a Python bool", "1", "static"],
    ),
    "a parameter that the layer does not have": (
        lambda: jaxbn.layers.standard(use_scale=False).apply(
            {"scale": V, "bias": V}, STATS, X, training=True
        ),
        ValueError,
        ["`params` has ['bias', 'scale']", "expected ['bias']", "`use_scale`"],
    ),
    "a count of stacked moments": (
        lambda: jaxbn.update(STATS, M._replace(count=jnp.ones((5, 1)))),
        ValueError,
        ["`moments.count` has shape (5, 1)", "(3,)", "`merge_moments`"],
    ),
    "negative features": (
        lambda: jaxbn.init_stats((2, -1)),
        ValueError,
        ["`features` must not be negative", "(2, -1)"],
    ),
    "linen axis out of range": (
        lambda: linen(axis=2),
        ValueError,
        ["`axis` has 2", "rank 2"],
    ),
    "linen mask that does not broadcast": (
        lambda: linen(mask=jnp.ones(4)),
        ValueError,
        ["`mask` has shape (4,)", "`x` (4, 3)", "`mask[:, None]`", "`mask[None]`"],
    ),
    "linen mask of a rank that may mean two things": (
        lambda: linen(jnp.ones((3, 3, 3)), mask=jnp.ones(3)),
        ValueError,
        ["`mask` has shape (3,)", "`mask[:, None, None]`", "`mask[None]`"],
    ),
    "nnx mask of the first axes": (
        lambda: nnx_(jnp.ones((4, 5, 3)), mask=jnp.ones((4, 5))),
        ValueError,
        ["`mask` has shape (4, 5)", "(4, 5, 3)", "`mask[:, :, None]`"],
    ),
    "ghost's mask of the first axes": (
        lambda: jaxbn.nnx.GhostBatchNorm(3, group_size=2, rngs=nnx.Rngs(0))(
            jnp.ones((4, 5, 2, 3)), mask=jnp.ones((4, 5, 2), bool)
        ),
        ValueError,
        ["`mask` has shape (4, 5, 2)", "`mask[:, :, :, None]`"],
    ),
    "linen statistics of other features": (
        lambda: linen(jnp.ones((4, 5))),
        ValueError,
        [
            "`batch_stats` is for features of shape (3,)",
            "shape (4, 5)",
            "(5,) along `axis`, (1,)",
        ],
    ),
    "linen traced use_running_average": (
        lambda: jax.jit(lambda inference: linen(X, inference))(True),
        TypeError,
        ["`use_running_average` must be a Python bool", "traced", "static"],
    ),
    "nnx axis that is no integer": (
        lambda: nnx_(axis="C"),
        TypeError,
        ["`axis` must be an integer", "'C'"],
    ),
    "nnx mask that does not broadcast": (
        lambda: nnx_(mask=jnp.ones(4)),
        ValueError,
        ["`mask` has shape (4,)", "`mask[:, None]`"],
    ),
    "nnx complex mask": (
        lambda: nnx_(mask=C[None]),
        TypeError,
        ["`mask` must be boolean or real", "complex64"],
    ),
    "nnx other features": (
        lambda: nnx_(num_features=4),
        ValueError,
        [
            "`num_features` is for features of shape (4,)",
            "(3,) along `axis`, (1,)",
            "another `axis`",
        ],
    ),
    "nnx num_features that is no integer": (
        lambda: nnx_(num_features=3.0),
        TypeError,
        ["`num_features` must be an integer", "3.0"],
    ),
    "ghost without groups": (
        lambda: layers.ghost(),
        ValueError,
        ["`group_size` and `num_groups`", "neither"],
    ),
    "ghost with both": (
        lambda: layers.ghost(group_size=2, num_groups=2),
        ValueError,
        ["`group_size` and `num_groups`", "both"],
    ),
    "ghost of no integer": (
        lambda: layers.ghost(group_size=2.0),
        TypeError,
        ["`group_size` must be an integer", "2.0"],
    ),
    "groups that do not divide": (
        lambda: trained(layers.ghost(group_size=3)),
        ValueError,
        ["`group_size` is 3", "does not divide", "4 examples"],
    ),
    "groups that do not divide over devices": (
        lambda: jax.vmap(
            lambda x: trained(layers.ghost(num_groups=3, axis_name="i"), x),
            axis_name="i",
        )(jnp.ones((2, 6, 3))),
        ValueError,
        ["`num_groups` is 3", "6 examples on each of 2 devices"],
    ),
    "ghost without examples": (
        lambda: trained(
            layers.ghost(group_size=1, feature_axes=(0, 1)), features=(4, 3)
        ),
        ValueError,
        ["`x` of shape (4, 3) has no axis of examples", "(0, 1)"],
    ),
    "r_max below 1": (
        lambda: layers.renorm(r_max=0.5),
        ValueError,
        ["`r_max` must be at least 1", "0.5", "batch norm"],
    ),
    "another word for what is averaged": (
        lambda: layers.renorm(tracks="variance"),
        ValueError,
        ["`tracks` must be 'std' or 'var'", "'variance'"],
    ),
    "a warm-up that is no integer": (
        lambda: jaxbn.nnx.BatchRenorm(3, warm_up_steps=1.5, rngs=nnx.Rngs(0)),
        TypeError,
        ["`warm_up_steps` must be an integer", "1.5"],
    ),
    "a negative warm-up": (
        lambda: layers.renorm(warm_up_steps=-1),
        ValueError,
        ["`warm_up_steps` must be at least 0", "-1"],
    ),
    "a warm-up and a schedule": (
        lambda: layers.renorm(warm_up_steps=10, d_max=lambda step: 5.0),
        ValueError,
        ["`warm_up_steps` is 10", "a limit is a function of the step"],
    ),
    "d_max below 0": (
        lambda: layers.renorm(d_max=-1),
        ValueError,
        ["`d_max` must be at least 0", "-1"],
    ),
    "no domains": (
        lambda: layers.domain(num_domains=0),
        ValueError,
        ["`num_domains` must be at least 1", "0"],
    ),
    "ids of another dtype": (
        lambda: trained(layers.domain(num_domains=2), domain_ids=jnp.ones(4)),
        TypeError,
        ["`domain_ids` must be integers", "float32", "astype"],
    ),
    "ids of another shape": (
        lambda: trained(layers.domain(num_domains=2), domain_ids=jnp.ones(3, int)),
        ValueError,
        ["`domain_ids` has shape (3,)", "expected (4,)", "(4, 3)"],
    ),
    "ids left out": (
        lambda: trained(layers.domain(num_domains=2)),
        TypeError,
        ["`domain_ids` is needed"],
    ),
    "classes of another dtype": (
        lambda: trained(layers.conditional(num_classes=2), condition=jnp.ones(4)),
        TypeError,
        ["`condition` must be integers", "float32"],
    ),
    "embedding of another size": (
        lambda: trained(layers.conditional(embedding_size=2), condition=X),
        ValueError,
        ["`condition` has shape (4, 3)", "expected (4, 2)", "`embedding_size`"],
    ),
    "embedding of integers": (
        lambda: trained(
            layers.conditional(embedding_size=2), condition=jnp.ones((4, 2), int)
        ),
        TypeError,
        ["`condition` must be floating", "int32"],
    ),
    "conditional on nothing": (
        lambda: layers.conditional(),
        ValueError,
        ["`num_classes` and `embedding_size`", "neither"],
    ),
    "activation that cannot be inverted": (
        lambda: layers.in_place(activation="relu"),
        ValueError,
        ["`activation` must be one that can be inverted", "elu", "'relu'"],
    ),
    "slope that cannot be inverted": (
        lambda: layers.in_place(negative_slope=0.0),
        ValueError,
        ["`negative_slope` must be above 0", "0.0"],
    ),
    "complex numbers in place": (
        lambda: trained(layers.in_place(), X.astype(C.dtype)),
        TypeError,
        ["`x` is complex", "`in_place` works on real numbers"],
    ),
    "example weight above 1": (
        lambda: layers.standard(example_weight=2.0),
        ValueError,
        ["`example_weight`", "from 0 to 1", "2.0"],
    ),
    "example weights of other features": (
        lambda: layers.standard(example_weight=[0.1] * 7).apply(
            *layers.standard().init(3), X, training=False
        ),
        ValueError,
        ["`example_weight` has shape (7,)", "(3,)"],
    ),
    "pseudo samples of other features": (
        lambda: layers.standard(pseudo_samples=np.ones(7)).apply(
            *layers.standard().init(3), X, training=False
        ),
        ValueError,
        ["`pseudo_samples` has shape (7,)", "(3,)"],
    ),
    "momentum of streaming per feature": (
        lambda: layers.streaming(momentum=V),
        TypeError,
        ["`momentum` must be a number or a function", "all features"],
    ),
    "streaming of other features": (
        lambda: trained(layers.streaming(), features=2),
        ValueError,
        ["`state.mean` is for features of shape (2,)", "(3,)", "`init(3)`"],
    ),
    "standard of other features": (
        lambda: trained(layers.standard(), features=2),
        ValueError,
        ["`state.mean` is for features of shape (2,)", "(4, 3)", "`init(3)`"],
    ),
    "inference of other features": (
        lambda: layers.standard().apply(*layers.standard().init(2), X, training=False),
        ValueError,
        ["`state.mean` is for features of shape (2,)", "(4, 3)", "`init(3)`"],
    ),
    "a mask by another name": (
        lambda: trained(layers.standard(), mask=X > 0),
        TypeError,
        ["takes the keywords ['training', 'weights']", "['mask']", "`weights`"],
    ),
    "an input of another layer": (
        lambda: trained(layers.domain(num_domains=2), condition=0),
        TypeError,
        ["'domain_ids'", "['condition']"],
    ),
    "no x": (
        lambda: layers.ghost(group_size=2).apply({}, STATS, training=True),
        TypeError,
        ["ghost.apply() missing 1 required positional argument: 'x'"],
    ),
    "no such option": (
        lambda: layers.renorm(rmax=2.0),
        TypeError,
        ["renorm()", "'rmax'"],
    ),
    "parameters that are none": (
        lambda: layers.standard().apply(None, STATS, X, training=True),
        TypeError,
        ["`params` must be a dict", "NoneType", "`init`"],
    ),
    "a state as a dict": (
        lambda: layers.standard(use_scale=False, use_bias=False).apply(
            {}, STATS._asdict(), X, training=True
        ),
        TypeError,
        ["`state` must be a `RunningStats`", "dict"],
    ),
    "the state of another layer": (
        lambda: layers.renorm().update(STATS, M),
        TypeError,
        ["`state` must be a `RenormStats`", "RunningStats"],
    ),
    "no momentum": (
        lambda: layers.standard(momentum=None),
        TypeError,
        ["`momentum` is the weight of the old value", "got None"],
    ),
    "a word for momentum": (
        lambda: jaxbn.update(STATS, M, momentum="fast"),
        TypeError,
        ["`momentum` is the weight of the old value", "'fast'"],
    ),
    "no epsilon": (
        lambda: layers.in_place(epsilon=None),
        TypeError,
        ["`epsilon` must be a number", "None"],
    ),
    "an option that is no bool": (
        lambda: layers.standard(use_scale=None),
        TypeError,
        ["`use_scale` must be True or False", "None"],
    ),
    "other derivatives, at once": (
        lambda: layers.ghost(group_size=2, derivatives="reverse"),
        ValueError,
        ["`derivatives` must be 'vjp' or 'jvp'", "'reverse'"],
    ),
    "another implementation, at once": (
        lambda: layers.streaming(implementation="gpu"),
        ValueError,
        ["`implementation` must be None, 'xla' or 'native'", "'gpu'"],
    ),
    "a dtype of integers, at once": (
        lambda: layers.domain(num_domains=2, stats_dtype=jnp.int32),
        TypeError,
        ["`stats_dtype` must be floating or complex", "int32"],
    ),
    "feature axes in words, at once": (
        lambda: layers.in_place(feature_axes="last"),
        TypeError,
        ["`feature_axes` must be an integer", "'last'"],
    ),
    "a limit that is none": (
        lambda: layers.renorm(r_max=None),
        TypeError,
        ["`r_max` must be a number", "None"],
    ),
    "an example weight in words": (
        lambda: layers.standard(example_weight="half"),
        TypeError,
        ["`example_weight` must be a number", "'half'"],
    ),
    "a slope that is none": (
        lambda: layers.in_place(negative_slope=None),
        TypeError,
        ["`negative_slope` must be a number", "None"],
    ),
    "a decay in words": (
        lambda: jaxbn.debiased("0.9"),
        TypeError,
        ["`decay` must be a number", "'0.9'"],
    ),
    "a number for an axis name": (
        lambda: jaxbn.moments(X, axis_name=3),
        TypeError,
        ["`axis_name` must be the name", "3", "`feature_axes`"],
    ),
    "numbers for axis names": (
        lambda: jaxbn.sync_stats(STATS, (0, 1)),
        TypeError,
        ["`axis_name` must be the name", "0"],
    ),
    "groups that are no lists": (
        lambda: jax.vmap(
            lambda x: jaxbn.moments(x, axis_name="i", axis_index_groups=2),
            axis_name="i",
        )(X),
        TypeError,
        ["`axis_index_groups` must be lists of integers", "2"],
    ),
    "several arrays": (
        lambda: jaxbn.moments((X, X)),
        TypeError,
        ["`x` must be one array", "tuple of 2"],
    ),
    "weights in words": (
        lambda: jaxbn.moments(X, weights="all"),
        TypeError,
        ["`weights` must be an array", "'all'"],
    ),
    "a dtype that is none": (
        lambda: jaxbn.batch_norm(X, dtype="narrow"),
        TypeError,
        ["`dtype` must be a dtype", "'narrow'"],
    ),
    "moments of integers": (
        lambda: jaxbn.merge_moments(
            jaxbn.Moments(*[jnp.ones((2, 3), int)] * 2, jnp.ones(2))
        ),
        TypeError,
        ["`moments_.mean` must be floating", "int32"],
    ),
    "moments of other shapes": (
        lambda: jaxbn.merge_moments(
            jaxbn.Moments(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones(2))
        ),
        ValueError,
        ["`moments_.var` has shape (2, 4)", "(2, 3)"],
    ),
    "moments as an array": (
        lambda: jaxbn.merge_moments(X),
        TypeError,
        ["`moments_` must be `Moments`"],
    ),
    "statistics as a tuple": (
        lambda: jaxbn.update((V, V), M),
        TypeError,
        ["`stats` must be `RunningStats`", "tuple"],
    ),
    "statistics of integers": (
        lambda: jaxbn.update(jaxbn.RunningStats(*[jnp.ones(3, int)] * 2, 0), M),
        TypeError,
        ["`stats.mean` must be floating", "int32"],
    ),
    "statistics that are none": (
        lambda: jax.vmap(
            lambda x: jaxbn.sync_stats({"mean": None, "var": x}, "i"), axis_name="i"
        )(X),
        TypeError,
        ["`stats['mean']` must be an array", "None"],
    ),
    "linen's call": (
        lambda: jaxbn.linen.GhostBatchNorm(False, group_size=2).init(KEY, X, train=1),
        TypeError,
        ["GhostBatchNorm.__call__() got an unexpected keyword argument 'train'"],
    ),
    "nnx's call": (
        lambda: jaxbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0))(X, train=True),
        TypeError,
        ["BatchRenorm.__call__() got an unexpected keyword argument 'train'"],
    ),
    "nnx without a momentum": (
        lambda: jaxbn.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0)),
        TypeError,
        ["`momentum` is the weight of the old value", "None"],
    ),
    "linen ghost without groups": (
        lambda: jaxbn.linen.GhostBatchNorm(True).apply({}, X),
        ValueError,
        ["`group_size` and `num_groups`", "neither"],
    ),
    "nnx renorm of a wrong limit": (
        lambda: jaxbn.nnx.BatchRenorm(3, r_max=0.0, rngs=nnx.Rngs(0)),
        ValueError,
        ["`r_max` must be at least 1"],
    ),
    "nnx domain of other features": (
        lambda: jaxbn.nnx.DomainBatchNorm(2, num_domains=5, rngs=nnx.Rngs(0))(
            X, domain_ids=0
        ),
        ValueError,
        ["`num_features`", "(2,)", "(4, 3)", "(3,)"],
    ),
    "sync_stats over no axis": (
        lambda: jaxbn.sync_stats(STATS, "data"),
        NameError,
        ["`axis_name` has 'data'", "not bound"],
    ),
    "sync_stats of no statistics": (
        lambda: jax.vmap(lambda x: jaxbn.sync_stats({"scale": x}, "i"), axis_name="i")(
            X
        ),
        TypeError,
        ["`stats` has ", "Tracer", "Pass `RunningStats`"],
    ),
    "tf axes out of range": (
        lambda: tf_nn.moments(X, [2]),
        ValueError,
        ["`axes` has 2", "rank 2"],
    ),
    "tf mean that does not broadcast": (
        lambda: tf_nn.batch_normalization(X, jnp.ones(4), V, V, V, 1e-3),
        ValueError,
        ["`mean` has shape (4,)", "`x` of shape (4, 3)", "`keepdims=True`"],
    ),
    "tf variance left out": (
        lambda: tf_nn.batch_normalization(X, V, None, None, None, 1e-3),
        TypeError,
        ["`variance`", "None"],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("traced", [False, True])
def test_says_what_and_what_to_do(case, traced):
    call, kind, words = CASES[case]
    with pytest.raises(kind) as error:
        jax.eval_shape(call) if traced else call()
    message, position = str(error.value), 0
    for word in words:
        assert word in message[position:], message
        position = message.index(word, position)


def test_a_shift_that_differs_between_devices_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def f(x):
        return jaxbn.moments(x, shift=x[0], axis_name="data").mean

    spread = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P())
    with pytest.raises(
        ValueError, match=r"`shift` varies over the axes.*'data'.*pmean"
    ):
        spread(np.ones((16, 3), np.float32))


@pytest.mark.parametrize("scalar", [np.float32(1), jnp.zeros(()), 2.0])
def test_a_scalar_has_no_axis_of_devices(scalar):
    with pytest.raises(ValueError, match=r"`tree\['a'\]` is a scalar.*stacked=True"):
        jaxbn.assert_replicated({"a": scalar}, stacked=True)
