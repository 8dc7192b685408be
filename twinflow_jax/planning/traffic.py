"""The memory traffic of a program: what is no matrix product, kernel or collective."""

from collections import Counter

from twinflow_jax.planning.collectives import COLLECTIVES
from twinflow_jax.planning.hlo import Program, Step, within
from twinflow_jax.planning.instructions import Computation, Instruction
from twinflow_jax.planning.work import KERNEL_CALL

# Opcodes that move and compute nothing themselves.
STRUCTURE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
             "conditional", "after-all", "partition-id", "replica-id", "async-start",
             "async-update", "call-start", "opt-barrier", "add-dependency", "send", "recv"}
# Custom calls that only name memory.
NAMING_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
# Those that begin a copy, which a -done ends.
ASYNCHRONOUS = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
MAIN, CHIP, HOST = 0, 1, 5  # memories, as Array.space numbers them


def moves(program: Program, step: Step) -> bool:
    """Whether a step's cost is its memory traffic."""
    op = step.op
    if op.opcode in STRUCTURE or op.opcode.endswith("-done") or op.target in NAMING_CALLS:
        return False
    if op.opcode.removesuffix("-start") in COLLECTIVES or op.target == KERNEL_CALL:
        return False
    return not any(inner.opcode in ("dot", "convolution", *COLLECTIVES)
                   or inner.target == KERNEL_CALL for _, inner in within(program, step))


def step_traffic(program: Program, step: Step) -> Counter[int]:
    """Bytes that one execution of an instruction reads and writes, by memory.

    Slices count by what they take, updates in place by what they write.
    """
    op, computation = step.op, step.computation
    if op.opcode in ASYNCHRONOUS:
        return started_traffic(computation, op)
    total = Counter()
    for position, name in enumerate(op.operands):
        source = computation.instructions[name].results
        limit = read_bytes(program, op, position)
        for array in source:
            total[array.space] += array.bytes if limit is None else min(limit, array.bytes)
    if op.opcode in ("fusion", "dynamic-update-slice"):
        written = written_bytes(program, computation, op)
    else:
        written = [array.bytes for array in op.results]
    for array, size in zip(op.results, written, strict=True):
        total[array.space] += size
    return total


def started_traffic(computation: Computation, op: Instruction) -> Counter[int]:
    """Bytes of a copy that goes on beside other work: what moves, where it was and where it goes.

    Its results are the copy, the source again and a flag; of a slice its operands again, the slice
    and a flag; of an update in place its operands again, the whole and a flag.
    """
    sources = [computation.instructions[name].results[0] for name in op.operands]
    if op.opcode == "dynamic-update-slice-start":
        target, part = sources[:2]
        source = part
    else:
        source = sources[0]
        part = target = op.results[0 if op.opcode == "copy-start" else len(sources)]
    total = Counter()
    for array in (source, target):
        total[array.space] += part.bytes
    return total


def read_bytes(program: Program, op: Instruction, position: int) -> int | None:
    """Bytes that an instruction reads of an operand; None for all of it."""
    if op.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
        return op.results[0].bytes
    if op.opcode in ("dynamic-update-slice", "scatter") and position == 0:
        return 0  # the rest of the array stays where it is
    if op.opcode != "fusion":
        return None
    computation = program.computations[op.calls("calls")[0]]
    return parameter_bytes(program, computation, computation.parameters[position].name)


def parameter_bytes(program: Program, computation: Computation, name: str) -> int | None:
    """Bytes that a fused computation reads of a value; None for all of it."""
    if computation.root.name == name:
        return None
    total = 0
    for user in computation.users[name]:
        if renames(program, user):
            size = parameter_bytes(program, computation, user.name)
        else:
            size = read_bytes(program, user, user.operands.index(name))
        if size is None:
            return None
        total += size
    return total


def renames(program: Program, op: Instruction) -> bool:
    """Whether a fused instruction only hands its operand on, perhaps in another layout."""
    if op.opcode == "fusion":
        inside = program.computations[op.calls("calls")[0]].instructions.values()
        return all(one.opcode == "parameter" or renames(program, one) for one in inside)
    return op.opcode in ("bitcast", "copy")


def written_bytes(program: Program, computation: Computation, op: Instruction) -> list[int]:
    """Bytes written of each result of a fusion, or of an instruction that ends a fusion."""
    if op.opcode == "dynamic-update-slice":
        return [computation.instructions[op.operands[1]].results[0].bytes]
    if op.opcode in ("bitcast", "copy"):
        return written_bytes(program, computation, computation.instructions[op.operands[0]])[:1]
    if op.opcode == "tuple":
        return [size for name in op.operands
                for size in written_bytes(program, computation, computation.instructions[name])]
    if op.opcode == "fusion":
        inner = program.computations[op.calls("calls")[0]]
        sizes = written_bytes(program, inner, inner.root)
        if len(sizes) == len(op.results):
            return sizes
    return [array.bytes for array in op.results]
