"""What a compiled program costs: read off the program, with no clock and no device."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from _programs import array_bytes, kernels
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P


class Cost(NamedTuple):
    """Of a compiled program.

    Attributes:
      bytes: Read and written by its kernels, each operand once, and of what is sliced
        only the parts.
      kernels: Instructions that do work.
      all_reduces: How many there are.
      scratch: Bytes that it needs beside its arguments and results.
    """

    bytes: int
    kernels: int
    all_reduces: int
    scratch: int


def cost(function: Callable, arguments, devices: Sequence[Any]) -> Cost:
    """Compiled for one device, or for several that share the arrays' first axis."""
    return cost_of(traced_for(function, arguments, devices).lower().compile())


def cost_of(compiled: Any) -> Cost:
    """Of a program that is compiled already."""
    found = kernels(compiled.as_text())
    scratch = compiled.memory_analysis().temp_size_in_bytes
    reduces = sum(kernel.kind == "all-reduce" for kernel in found)
    return Cost(sum(kernel.bytes for kernel in found), len(found), reduces, scratch)


def traced_for(
    function: Callable, arguments, devices: Sequence[Any], whole: tuple[int, ...] = ()
) -> Any:
    """For arguments given as `jax.ShapeDtypeStruct`s.

    Several devices share the first axis of arrays, and have all of each vector, and of
    the arguments at the positions `whole`.
    """
    placed = [
        jax.tree.map(partial(_placed, devices=devices, split=i not in whole), argument)
        for i, argument in enumerate(arguments)
    ]
    return jax.jit(function).trace(*placed)


def compile_for(function: Callable, arguments, devices: Sequence[Any], **options):
    """As `traced_for`."""
    return traced_for(function, arguments, devices, **options).lower().compile()


def _placed(array, devices: Sequence[Any], split: bool) -> jax.ShapeDtypeStruct:
    if len(devices) == 1:
        place = SingleDeviceSharding(devices[0])
    else:
        mesh = Mesh(np.array(devices), ("data",))
        split = split and len(array.shape) > 1
        place = NamedSharding(mesh, P("data") if split else P())
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def all_reduced(text: str) -> list[int]:
    """The bytes that each all-reduce of a program sums."""
    found = re.findall(r"= (\(?[^=]*?\)?) all-reduce(?:-start)?\(", text)
    return [array_bytes(shapes) for shapes in found]
