"""What a compiled program costs: read off the program, with no clock and no device."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")
DONE = ("copy-start", "copy-done", "slice-start", "slice-done")


class Cost(NamedTuple):
    """Of a compiled program.

    Attributes:
      bytes: Read and written by its kernels, each operand once.
      kernels: Instructions of its entry that do work.
      all_reduces: How many there are.
      scratch: Bytes that it needs beside its arguments and results.
    """

    bytes: int
    kernels: int
    all_reduces: int
    scratch: int


def cost(function: Callable, arguments, devices: Sequence[Any]) -> Cost:
    """Compiled for one device, or for several that share the arrays' first axis."""
    compiled = compile_for(function, arguments, devices)
    text = compiled.as_text()
    total, kernels = moved(text)
    if devices[0].platform == "cpu":  # Whose kernels are not all in the entry.
        total = int(compiled.cost_analysis()["bytes accessed"])
    scratch = compiled.memory_analysis().temp_size_in_bytes
    return Cost(total, kernels, len(all_reduced(text)), scratch)


def compile_for(function: Callable, arguments, devices: Sequence[Any]) -> Any:
    """For arguments given as `jax.ShapeDtypeStruct`s; every device has all vectors."""
    placed = jax.tree.map(lambda a: _placed(a, devices), arguments)
    return jax.jit(function).lower(*placed).compile()


def _placed(array, devices: Sequence[Any]) -> jax.ShapeDtypeStruct:
    if len(devices) == 1:
        place = SingleDeviceSharding(devices[0])
    else:
        mesh = Mesh(np.array(devices), ("data",))
        place = NamedSharding(mesh, P("data") if len(array.shape) > 1 else P())
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def moved(text: str) -> tuple[int, int]:
    """Bytes that the kernels of a program's entry read and write, and the kernels."""
    entry = text[text.index("ENTRY") :].split("\n}")[0]
    sizes: dict[str, int] = {}
    total = kernels = 0
    for line in entry.splitlines()[1:]:
        found = re.match(
            r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line
        )
        if found is None:
            continue
        name, shape, op, rest = found.groups()
        sizes[name] = _size(shape)
        if op not in (*FREE, *DONE):
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            total += sizes[name] + sum(sizes.get(o, 0) for o in operands)
            kernels += 1
    return total, kernels


def all_reduced(text: str) -> list[int]:
    """The bytes that each all-reduce of a program sums."""
    found = re.findall(r"= (\(?[^=]*?\)?) all-reduce(?:-start)?\(", text)
    return [_size(shapes) for shapes in found]


def _size(shape: str) -> int:
    return sum(
        SIZES.get(dtype, 0) * math.prod(int(n) for n in lengths.split(",") if n)
        for dtype, lengths in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
    )
