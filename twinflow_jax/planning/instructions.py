"""The lines of an optimised HLO text as data: instructions, their arrays, computations.

Nothing here knows what runs, or how often: that is hlo.py.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Array:
    """One array of a result: its element type, dimensions and memory.

    space: 0 the device's main memory, 1 on-chip vector memory, 5 the host's memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without the padding that tiled layouts add."""
        return math.prod(self.dims) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    """Bits of one element: 16 for bf16, 8 for f8e4m3fn, 4 for s4."""
    if dtype in BITS:
        return BITS[dtype]
    return int(re.match(r"[a-z]+(\d+)", dtype)[1])


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: name = results opcode(arguments), attributes."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # a nested tuple's arrays in one row
    arguments: str  # as written: a constant's value, a parameter's number, names
    attributes: str
    root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    def calls(self, *attributes: str) -> tuple[str, ...]:
        """The computations that these attributes name: calls("body")."""
        found = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            found += re.findall(r"%([\w.\-]+)", match[1]) if match else []
        return tuple(found)

    def quoted(self, attribute: str) -> str:
        """The text of an attribute, written NAME="TEXT"; nothing where it is not there."""
        match = re.search(rf'{attribute}="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.quoted("custom_call_target")

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution, where it gives one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def source(self) -> str:
        """Where in the traced program it comes from: jit(step)/while/body/dot_general."""
        return self.quoted("op_name")


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are written, which is the schedule's."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(op for op in self.instructions.values() if op.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(op.arguments): op for op in self.instructions.values()
                if op.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = {name: [] for name in self.instructions}
        for op in self.instructions.values():
            for operand in dict.fromkeys(op.operands):
                users[operand].append(op)
        return users

    @cached_property
    def order(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.instructions)}

    def operand_arrays(self, op: Instruction) -> tuple[Array, ...]:
        """The arrays that an instruction of this computation reads."""
        return tuple(array for name in op.operands for array in self.instructions[name].results)


# Reading

LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?")


def instruction(line: str) -> Instruction:
    """One instruction from its text, which may contain line breaks."""
    match = LINE.match(line)
    rest = match[3]
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = rest.index("(", end)
    close = closing(rest, call)
    return Instruction(
        match[2], rest[end:call].strip(), arrays(rest[:end]), rest[call + 1:close],
        rest[close + 1:], bool(match[1]))


def closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape or tuple of shapes as HLO writes them."""
    found = []
    for dtype, dims, layout in ARRAY.findall(shape):
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)
