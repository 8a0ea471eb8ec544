"""`fold`: removes normalizations from a program by folding them into its layers."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from jaxbn.folding._plan import Plan, distinct, plan


def fold(
    inference_fn: Callable[..., Any], params: Any, *example_inputs: Any
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Folds the batch norms of a whole inference function into its layers.

        conv(x, W) + b, normalized   →   conv(x, W') + b'
        W' = W·a    b' = (b − mean)·a + bias    a = scale / √(var + epsilon)

    and parallel branches become one layer, as in RepVGG:

        conv(x, W₁) + b₁ + conv(x, W₂) + b₂ + a·x + c   →   conv(x, W) + b

    It finds each `jaxbn.normalize` whose statistics come from `params`, and which
    precedes a convolution or matrix product, or follows one (and the addition of a
    bias) that nothing else uses. It folds the normalization into the kernel and bias of
    that layer. This is exact, up to rounding, for any network of `jaxbn.linen`,
    `jaxbn.nnx` or plain functions. Computations on `params` alone run once, here,
    before any cast to a narrower dtype. Other normalizations do not change; `report`
    lists them with the reason.

    Then, in each sum with a batch norm that folds, it adds up the branches into one
    layer: convolutions of one input (of any sizes that fit one grid, with the same
    strides and groups), or matrix products of one input, together with the input
    itself, normalized or not. A single layer and the bare input stay separate.

    `x·W' + b'` loses digits if |mean| is far above √var, while `normalize` does not. A
    kernel in float16 can overflow, if a·W is above 65504. `jax.checkpoint` (also as
    `nn.remat`) is removed from the program, so derivatives of the folded function keep
    more in memory.

    Args:
      inference_fn: Function `(params, *inputs)` for inference: for a linen module
        `lambda variables, x: model.apply(variables, x)`, for an nnx module
        `lambda state, x: nnx.merge(graphdef, state)(x)`, in inference mode.
      params: Any pytree of arrays: all parameters, including the ones to fold.
        Parameters that the function closes over are not folded.
      *example_inputs: Pytrees of arrays, or of `jax.ShapeDtypeStruct`, to trace the
        function with.

    Returns:
      `(folded_fn, folded_params)`. The parameters are a dict from paths, such as
      "params/Conv_0/kernel", to the arrays that the function still needs, with the new
      bias next to its kernel. `folded_fn(folded_params, *inputs)` returns the same as
      `inference_fn(params, *inputs)`, also under `jit`, `grad` and `vmap`. Inputs of
      other shapes are traced on first use.

    Raises:
      TypeError: `inference_fn` is not callable. Later, from `folded_fn`: its parameters
        are not a dict.
      ValueError: Later, from `folded_fn`: parameters are missing or have the wrong
        shape or dtype, or inputs of new shapes need other parameters than were folded.

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
      Integer-Arithmetic-Only Inference" (2018), section 3.2. Ding et al., "RepVGG:
      Making VGG-style ConvNets Great Again" (2021), section 3.3, for the branches.
    """
    abstract = shapes_of(inference_fn, params)
    plans: dict[Hashable, tuple[Callable[..., Any], Any]] = {}

    def planned(inputs: tuple) -> tuple[Plan, Any]:
        return trace(inference_fn, abstract, inputs)

    first, tree = planned(example_inputs)
    leaves = jax.tree.leaves(abstract)
    plans[_kinds(example_inputs)] = jax.jit(first.run), tree

    def folded_fn(folded_params: dict[str, jax.Array], *inputs: Any) -> Any:
        kinds = _kinds(inputs)
        if kinds not in plans:
            other, tree = planned(inputs)
            _require_same(first.signature(leaves), other.signature(leaves))
            plans[kinds] = jax.jit(other.run), tree
        run, tree = plans[kinds]
        needed = _needed(folded_params, first)
        return jax.tree.unflatten(tree, run(needed, jax.tree.leaves(inputs)))

    return folded_fn, first.parameters(jax.tree.leaves(params))


def shapes_of(inference_fn: Callable[..., Any], params: Any) -> Any:
    """Checks both arguments; returns the shapes and dtypes of `params`."""
    if not callable(inference_fn):
        raise TypeError(
            f"`inference_fn` must be a function of `params` and inputs, got "
            f"{type(inference_fn).__name__}. Pass, for example, "
            "`lambda variables, x: model.apply(variables, x)`."
        )
    return jax.eval_shape(lambda tree: tree, params)


def trace(inference_fn: Callable, params: Any, inputs: tuple) -> tuple[Plan, Any]:
    """The folded program of a function, and the structure of its output."""
    traced, shape = jax.make_jaxpr(inference_fn, return_shape=True)(params, *inputs)
    return plan(traced, paths_of(params)), jax.tree.structure(shape)


def paths_of(params: Any) -> list[str]:
    """The path of each leaf: its keys joined by "/", and a number if they repeat."""
    flat = jax.tree_util.tree_flatten_with_path
    paths: dict[str, None] = {}
    for keys, node in flat(params, is_leaf=_is_variable)[0]:
        for inner, _ in flat(node)[0]:
            # An nnx variable is a separate node around its value.
            whole = (*keys, *inner[_is_variable(node) :])
            path = jax.tree_util.keystr(whole, simple=True, separator="/")
            paths[distinct(path, paths)] = None
    return list(paths)


def _is_variable(node: Any) -> bool:
    """Whether it is an nnx variable, without importing Flax."""
    return any(
        kind.__module__.startswith("flax.nnx") and kind.__name__.startswith("Variable")
        for kind in type(node).__mro__
    )


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


def _needed(folded_params: Any, plan: Plan) -> dict[str, Any]:
    """The parameters that the program needs; raises if one is missing or wrong."""
    hint = "Pass the dict that `fold` returned with this function, or one alike."
    if not isinstance(folded_params, Mapping):
        raise TypeError(
            f"`folded_params` must be a dict, got {type(folded_params).__name__}. "
            f"{hint}"
        )
    missing = sorted(set(plan.names) - set(folded_params))
    if missing:
        raise ValueError(f"`folded_params` lacks {missing}. {hint}")
    needed = {name: folded_params[name] for name in plan.names}
    for name, value in plan.names.items():
        found, wanted = _kind(needed[name]), (value.shape, str(value.dtype))
        if found != wanted:
            got = "no array" if found is None else f"shape {found[0]}, dtype {found[1]}"
            raise ValueError(
                f"`folded_params[{name!r}]` must have shape {wanted[0]} and dtype "
                f"{wanted[1]}, got {got}. {hint} For another dtype, fold a function "
                "that casts."
            )
    return needed


def _kind(value: Any) -> tuple[tuple[int, ...], str] | None:
    """The shape and dtype of an array; None for anything else."""
    try:
        aval: Any = jax.typeof(value)
    except TypeError:
        return None
    return aval.shape, str(aval.dtype)
