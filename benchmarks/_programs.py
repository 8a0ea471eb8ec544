"""The kernels of a compiled program, and the bytes that each reads and writes."""

import math
import re
from typing import NamedTuple

SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "s32": 4, "u32": 4}
SIZES |= {"pred": 1, "s8": 1, "u8": 1}
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
# Copies between memories of a device, which run beside other work.
FREE |= {"copy-start", "copy-done", "slice-start", "slice-done"}
FREE |= {"all-reduce-done", "partition-id"}
SLICES = {"slice", "dynamic-slice", "gather"}
PRODUCTS = {"convolution", "dot"}
LIBRARY = re.compile(r'custom_call_target="[^"]*(?:conv|cublas|gemm|matmul|Conv)')
KINDS = ("convolutions", "reductions", "elementwise")


class Instruction(NamedTuple):
    """A line of a program: `name = shape op(operands), attributes`."""

    name: str
    bytes: int
    op: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs: the body of a fusion, or of a call."""
        words = r"(?:calls|body|condition|to_apply)=%([\w.-]+)"
        return re.findall(words, self.attributes)


class Kernel(NamedTuple):
    """An instruction that does work: its kind, and the bytes that it moves.

    The kind is one of `KINDS`, or the name of a collective.
    """

    name: str
    kind: str
    bytes: int


Computation = dict[str, Instruction]


def kernels(text: str) -> list[Kernel]:
    """Of the entry computation of a program, and of what it calls."""
    computations, entry = _parse(text)
    return _kernels(computations, entry)


def array_bytes(shapes: str) -> int:
    """The size of one or several arrays, as programs write them: f32[8,4]."""
    return sum(
        SIZES.get(dtype, 0) * math.prod(int(n) for n in lengths.split(",") if n)
        for dtype, lengths in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    )


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    found: dict[str, Computation] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            body = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif parts := re.match(
            r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line
        ):
            name, shape, op, rest = parts.groups()
            given, _, attributes = rest.partition(")")
            operands = re.findall(r"%([\w.-]+)", given)
            if op == "parameter":
                operands = [given]  # Its number.
            body[name] = Instruction(name, array_bytes(shape), op, operands, attributes)
    return found, entry


def _kernels(computations: dict[str, Computation], name: str) -> list[Kernel]:
    body, found = computations[name], []
    for line in body.values():
        if line.op in ("call", "while", "conditional"):
            for called in line.called:
                found += _kernels(computations, called)
        elif line.op not in FREE:
            read = sum(
                _read(computations, body[operand].bytes, line, i)
                for i, operand in enumerate(line.operands)
                if operand in body
            )
            kind = _kind(computations, line)
            found.append(Kernel(line.name, kind, read + line.bytes))
    return found


def _kind(computations: dict[str, Computation], line: Instruction) -> str:
    if line.op.startswith(("all-", "reduce-scatter", "collective-")):
        return line.op.removesuffix("-start")
    lines = [line, *_inside(computations, line)]
    if any(one.op in PRODUCTS or LIBRARY.search(one.attributes) for one in lines):
        return "convolutions"
    if any(one.op in ("reduce", "reduce-window") for one in lines):
        return "reductions"
    return "elementwise"


def _inside(computations: dict[str, Computation], line: Instruction):
    for called in line.called if line.op in ("fusion", "call", "map") else ():
        for inner in computations[called].values():
            yield inner
            yield from _inside(computations, inner)


def _read(
    computations: dict[str, Computation], size: int, line: Instruction, index: int
) -> int:
    """The bytes of an operand that are read: only the parts, where it is sliced."""
    if line.op in SLICES:
        return min(size, line.bytes) if index == 0 else size
    if line.op != "fusion" or not line.called:
        return size
    body = computations[line.called[0]]
    number = str(index)
    for inner in body.values():
        if inner.op == "parameter" and inner.operands == [number]:
            sliced = _sliced(body, inner.name)
            return size if sliced is None else min(size, sliced)
    return size


def _sliced(body: Computation, name: str) -> int | None:
    """The bytes of the slices of an array, if nothing else is read of it."""
    total = 0
    for user in (line for line in body.values() if name in line.operands):
        if user.op == "bitcast":
            part = _sliced(body, user.name)
        else:
            first = user.op in SLICES and user.operands[0] == name
            part = user.bytes if first else None
        if part is None:
            return None
        total += part
    return total
