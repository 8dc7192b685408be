"""What a compiled program executes, read from its optimised HLO (`compiled.as_text()`).

`parse` gives a Program: every scheduled instruction with the number of times it runs, loops and
called computations followed. What its steps cost is counted by work (matrix products, kernels),
collectives and traffic, all for one device and one run of the program.

A program that was split over devices has the shapes of one device, so everything here is per
device. Branches of a conditional all count, which makes the sums upper bounds.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from twinflow_jax.planning.instructions import LINE, Computation, Instruction, instruction

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
# Alone in its line: a kernel's metadata may hold other braces and line breaks.
CLOSING = re.compile(r'^\}(, execution_thread="\w+")?\s*$')


@dataclass(frozen=True)
class Step:
    """A scheduled instruction and how often it runs.

    visit: numbers the times that the walk entered a schedule, so that (visit, name) is unique.
    issuer: the instruction of `schedule` that runs it: itself, or the start of the asynchronous
        call around it.
    """

    op: Instruction
    computation: Computation
    times: int
    in_loop: bool
    visit: int
    schedule: Computation
    issuer: str


@dataclass(frozen=True)
class Program:
    """A parsed module. unknown_loops: loops whose trip count the text does not give, taken as 1."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    steps: tuple[Step, ...] = ()
    unknown_loops: tuple[str, ...] = ()


def parse(text: str) -> Program:
    """Reads an optimised module; raises ValueError for text that is not one."""
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        header = None if lines is not None else HEADER.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif lines is None:
            continue
        elif CLOSING.match(line):
            computations[name] = Computation(name, {op.name: op for op in map(instruction, lines)})
            lines = None
        elif LINE.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line
    if entry is None or entry not in computations:
        raise ValueError("not an HLO module: it has no complete ENTRY computation")
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    program = Program(computations, entry, math.prod(map(int, counts)))
    walker = Walker(program)
    steps = tuple(walker.walk(computations[entry], 1, False, None))
    return replace(program, steps=steps, unknown_loops=tuple(walker.unknown))


# Walking: which instructions run, and how often


@dataclass(frozen=True)
class Frame:
    """Who called a computation: the instruction, where it stands, and its own caller."""

    op: Instruction
    computation: Computation
    caller: "Frame | None"


class Walker:
    """Follows a program from its entry, and keeps what it learns about loops on the way."""

    def __init__(self, program: Program):
        self.program = program
        self.unknown: list[str] = []
        self.visits = 0

    def walk(self, computation: Computation, times: int, in_loop: bool, caller: Frame | None,
             issued: Step | None = None) -> Iterator[Step]:
        """Every scheduled instruction under a computation that runs `times`.

        issued: the start of the asynchronous call that the computation is.
        """
        self.visits += 1
        visit = self.visits
        for op in computation.instructions.values():
            step = Step(op, computation, times, in_loop, visit, computation, op.name)
            if issued:
                step = replace(step, visit=issued.visit, schedule=issued.schedule,
                               issuer=issued.issuer)
            yield step
            frame = Frame(op, computation, caller)
            if op.opcode == "while":
                inner = times * self.trip_count(frame)
                for name, runs in (("body", inner), ("condition", inner + times)):
                    yield from self.walk(self.called(op, name)[0], runs, True, frame, issued)
            elif op.opcode in ("call", "conditional"):
                for branch in self.called(op, "to_apply", "calls", "branch_computations",
                                          "true_computation", "false_computation"):
                    yield from self.walk(branch, times, in_loop, frame, issued)
            elif op.opcode in ("async-start", "call-start"):
                for inside in self.called(op, "calls", "to_apply"):
                    yield from self.walk(inside, times, in_loop, frame, issued or step)

    def called(self, op: Instruction, *attributes: str) -> list[Computation]:
        return [self.program.computations[name] for name in op.calls(*attributes)]

    def trip_count(self, loop: Frame) -> int:
        count = trip_count(self.program, loop)
        if count is None:
            self.unknown.append(loop.op.name)
        return 1 if count is None else count


def trip_count(program: Program, loop: Frame) -> int | None:
    """How often a while's body runs: the compiler's word, or its counter's start, step and limit.

    None where the text does not say. A start that cannot be followed is taken as 0, a step as 1:
    what loops over arrays have.
    """
    known = re.search(r'"?known_trip_count"?:?=?\{"?n"?[:=]"?(\d+)', loop.op.attributes)
    if known:
        return int(known[1])
    body, condition = (program.computations[loop.op.calls(kind)[0]]
                       for kind in ("body", "condition"))
    direction, left, right = comparison(program, condition)
    index = tuple_index(condition, left)
    limit = scalar(program, condition, right, loop)
    if direction is None or index is None or limit is None:
        return None
    start = element(program, loop.computation, loop.op.operands[0], index, loop.caller) or 0
    step = counter_step(program, body, index, loop)
    span = {"LT": limit - start, "LE": limit - start + 1, "NE": limit - start,
            "GT": start - limit, "GE": start - limit + 1}.get(direction)
    return None if span is None else max(0, math.ceil(span / abs(step)))


def comparison(program: Program, condition: Computation) -> tuple:
    """(direction, left, right) of the comparison that a condition returns, or three times None."""
    op = condition.root
    if op.opcode == "fusion":  # a fused comparison of the fusion's own operands
        fused = program.computations[op.calls("calls")[0]]
        inner = fused.root
        names = [op.operands[int(fused.instructions[name].arguments)]
                 if fused.instructions[name].opcode == "parameter" else None
                 for name in inner.operands]
    else:
        inner, names = op, list(op.operands)
    direction = re.search(r"direction=(\w+)", inner.attributes)
    if inner.opcode != "compare" or direction is None or None in names:
        return None, None, None
    return direction[1], *names


PASSING = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


def through_copies(computation: Computation, name: str | None) -> Instruction | None:
    op = computation.instructions.get(name)
    while op is not None and op.opcode in PASSING:
        op = computation.instructions[op.operands[0]]
    return op


def tuple_index(computation: Computation, name: str | None) -> int | None:
    """Which element of its computation's parameter a name is."""
    op = through_copies(computation, name)
    if op is None or op.opcode != "get-tuple-element":
        return None
    source = computation.instructions[op.operands[0]]
    return index_of(op) if source.opcode == "parameter" else None


def index_of(op: Instruction) -> int:
    return int(re.search(r"index=(\d+)", op.attributes)[1])


def scalar(program: Program, computation: Computation, name: str | None,
           caller: Frame | None) -> int | None:
    """The integer that a name stands for, followed through copies, tuples and callers."""
    op = through_copies(computation, name)
    if op is None:
        return None
    if op.opcode == "constant":
        return int(op.arguments) if re.fullmatch(r"-?\d+", op.arguments) else None
    if op.opcode == "get-tuple-element":
        return element(program, computation, op.operands[0], index_of(op), caller)
    return None


def element(program: Program, computation: Computation, name: str, index: int,
            caller: Frame | None) -> int | None:
    """The integer at one position of a tuple, where it can be followed."""
    op = computation.instructions[name]
    if op.opcode == "tuple":
        return scalar(program, computation, op.operands[index], caller)
    if op.opcode == "parameter" and caller is not None and caller.op.opcode == "while":
        body = program.computations[caller.op.calls("body")[0]]
        if passes(body, index):
            return element(program, caller.computation, caller.op.operands[0], index, caller.caller)
    if op.opcode == "while" and passes(program.computations[op.calls("body")[0]], index):
        return element(program, computation, op.operands[0], index, caller)
    return None


def passes(body: Computation, index: int) -> bool:
    """Whether a loop's body hands one element of its state on unchanged."""
    return body.root.opcode == "tuple" and tuple_index(body, body.root.operands[index]) == index


def counter_step(program: Program, body: Computation, index: int, loop: Frame) -> int:
    """What a body adds to its counter."""
    if body.root.opcode == "tuple":
        op = through_copies(body, body.root.operands[index])
        if op.opcode in ("add", "subtract"):
            values = [scalar(program, body, name, loop) for name in op.operands]
            return next((value for value in values if value), 1)
    return 1


def within(program: Program, step: Step) -> Iterator[tuple[Computation, Instruction]]:
    """A step's instruction and, where it is a fusion, everything fused into it."""
    yield step.computation, step.op
    if step.op.opcode == "fusion":
        yield from fused(program, step.op)


def fused(program: Program, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    computation = program.computations[fusion.calls("calls")[0]]
    for op in computation.instructions.values():
        yield computation, op
        if op.opcode == "fusion":
            yield from fused(program, op)
