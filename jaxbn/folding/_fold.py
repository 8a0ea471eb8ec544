"""`fold`: a program without those normalizations that its layers can take up."""

from collections.abc import Callable, Hashable
from typing import Any

import jax

from jaxbn.folding._plan import Plan, plan


def fold(
    inference_fn: Callable[..., Any], params: Any, *example_inputs: Any
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Folds the batch norms of a whole inference function into its layers.

        conv(x, W) + b, normalized   →   conv(x, W') + b'
        W' = W·a    b' = (b − mean)·a + bias    a = scale / √(var + epsilon)

    Finds each `jaxbn.normalize` whose statistics are from `params` and which follows a
    convolution or matrix product (and the addition of a bias) that nothing else uses,
    or precedes one, and takes it into that layer's kernel and bias: exact, up to
    rounding, for any network of `jaxbn.linen`, `jaxbn.nnx` or plain functions. What
    depends on `params` alone is computed here, once, before any cast to a narrower
    dtype. What cannot be folded is left as it is; `report` tells which and why.

    `x·W' + b'` loses digits where |mean| is far above √var, which `normalize` does not.

    Args:
      inference_fn: Function `(params, *inputs)` that infers: of a linen module
        `lambda variables, x: model.apply(variables, x)`, of an nnx module
        `lambda state, x: nnx.merge(graphdef, state)(x)`, in inference mode.
      params: Any pytree of arrays: all that is to be folded and the rest of the
        parameters. What the function closes over instead is not folded.
      *example_inputs: Pytrees of arrays, or of `jax.ShapeDtypeStruct`, to trace it on.

    Returns:
      `(folded_fn, folded_params)`. The parameters are a dict from paths, such as
      "params/Conv_0/kernel", to arrays: what the function still needs, the new bias
      beside its kernel. `folded_fn(folded_params, *inputs)` gives what
      `inference_fn(params, *inputs)` does, under `jit`, `grad` and `vmap` too; inputs
      of other shapes are traced when they come.

    Raises:
      TypeError: `inference_fn` is not callable.
      ValueError: Later, from `folded_fn`: parameters are missing, or for inputs of
        these shapes others are needed than those that were folded.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> params = {
      ...     "dense": {"kernel": jnp.array([[2.0], [6.0]])},
      ...     "norm": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])},
      ... }
      >>> def infer(params, x):
      ...     y = x @ params["dense"]["kernel"]
      ...     return jaxbn.normalize(y, **params["norm"], epsilon=0.0)
      >>> x = jnp.ones((1, 2))
      >>> folded_fn, folded = jaxbn.folding.fold(infer, params, x)
      >>> for path, array in folded.items():
      ...     print(path, array.ravel())
      dense/kernel [1. 3.]
      dense/bias [-0.5]
      >>> print(infer(params, x), folded_fn(folded, x))
      [[3.5]] [[3.5]]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference" (2018), section 3.2.
    """
    abstract = shapes_of(inference_fn, params)
    plans: dict[Hashable, tuple[Callable[..., Any], Any]] = {}

    def planned(inputs: tuple) -> tuple[Plan, Any]:
        return trace(inference_fn, abstract, inputs)

    first, tree = planned(example_inputs)
    signature = first.signature(jax.tree.leaves(abstract))
    plans[_kinds(example_inputs)] = jax.jit(first.run), tree

    def folded_fn(folded_params: dict[str, jax.Array], *inputs: Any) -> Any:
        kinds = _kinds(inputs)
        if kinds not in plans:
            other, tree = planned(inputs)
            _require_same(signature, other.signature(jax.tree.leaves(abstract)))
            plans[kinds] = jax.jit(other.run), tree
        run, tree = plans[kinds]
        _require_names(folded_params, first)
        needed = {name: folded_params[name] for name in first.names}
        return jax.tree.unflatten(tree, run(needed, jax.tree.leaves(inputs)))

    return folded_fn, first.parameters(jax.tree.leaves(params))


def shapes_of(inference_fn: Callable[..., Any], params: Any) -> Any:
    """The shapes and dtypes of `params`, both arguments checked."""
    if not callable(inference_fn):
        raise TypeError(
            f"`inference_fn` must be a function of `params` and inputs, got "
            f"{type(inference_fn).__name__}. Pass, for example, "
            "`lambda variables, x: model.apply(variables, x)`."
        )
    return jax.eval_shape(lambda tree: tree, params)


def trace(inference_fn: Callable, params: Any, inputs: tuple) -> tuple[Plan, Any]:
    """The folded program of a function, and the structure of what it returns."""
    traced, shape = jax.make_jaxpr(inference_fn, return_shape=True)(params, *inputs)
    return plan(traced, paths_of(params)), jax.tree.structure(shape)


def paths_of(params: Any) -> list[str]:
    """The path of each leaf: its keys joined by "/"."""
    paths = []
    for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        # A variable of nnx is a node of its own, of one leaf.
        if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
            keys = keys[:-1]
        paths.append(jax.tree_util.keystr(keys, simple=True, separator="/"))
    return paths


def _kinds(inputs: tuple) -> Hashable:
    structs, tree = jax.tree.flatten(jax.eval_shape(lambda tree: tree, inputs))
    return tree, tuple(structs)


def _require_same(first: tuple, other: tuple) -> None:
    if first != other:
        own, found = set(first[0].items()), set(other[0].items())
        differ = sorted({name for name, _ in own ^ found}) or "how they are computed"
        raise ValueError(
            "Inputs of these shapes need other folded parameters than those of "
            f"`example_inputs`: {differ} differ. Fold again with such an example."
        )


def _require_names(folded_params: Any, plan: Plan) -> None:
    missing = sorted(set(plan.names) - set(folded_params))
    if missing:
        raise ValueError(
            f"`folded_params` lacks {missing}. Pass the dict that `fold` returned with "
            "this function, or one with the same keys."
        )
