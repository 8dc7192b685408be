"""What a compiled program executes, read from its optimised HLO (`compiled.as_text()`).

`parse` gives a Program: every scheduled instruction with the number of times it runs, loops and
called computations followed. The functions below count its matrix products, kernels, collectives
and memory traffic, all for one device and one run of the program.

A program that was split over devices has the shapes of one device, so everything here is per
device. Branches of a conditional all count, which makes the sums upper bounds.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")

# Opcodes that move and compute nothing themselves.
STRUCTURE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
             "conditional", "after-all", "partition-id", "replica-id", "async-start",
             "async-update", "call-start", "opt-barrier", "add-dependency", "send", "recv"}
# Custom calls that only name memory.
NAMING_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
KERNEL_CALL = "tpu_custom_call"


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

    @property
    def target(self) -> str:
        """The custom_call_target, or nothing."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution, where it gives one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def source(self) -> str:
        """Where in the traced program it comes from: jit(step)/while/body/dot_general."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


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
    trip_counts: dict[str, int] = field(default_factory=dict)  # of each while instruction


# Parsing

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
# Alone in its line: a kernel's metadata may hold other braces and line breaks.
CLOSING = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?")


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
            computations[name] = Computation(name, instructions(lines))
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
    return replace(program, steps=steps, unknown_loops=tuple(walker.unknown),
                   trip_counts=walker.trips)


def instructions(lines: list[str]) -> dict[str, Instruction]:
    parsed = (instruction(line) for line in lines)
    return {op.name: op for op in parsed}


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
        self.trips: dict[str, int] = {}
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
            count = 1
        self.trips[loop.op.name] = count
        return count


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


# Matrix products

def matmul_flops(program: Program) -> int:
    """FLOPs of all dots and convolutions of one run, on one device; kernels are not in it."""
    return sum(step.times * step_flops(program, step) for step in program.steps)


def step_flops(program: Program, step: Step) -> int:
    """FLOPs of one execution of a step's dots and convolutions, two per multiply-add."""
    return sum(flops(computation, op) for computation, op in within(program, step)
               if op.opcode in ("dot", "convolution"))


def flops(computation: Computation, op: Instruction) -> int:
    """FLOPs of one dot or convolution."""
    left, right = (computation.instructions[name].results[0] for name in op.operands[:2])
    if op.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        sizes = [left.dims[int(axis)] for axis in contracted[1].split(",") if axis]
        return 2 * math.prod(op.results[0].dims) * math.prod(sizes)
    return convolution_flops(left.dims, right.dims, op.results[0].dims, op.attributes)


def convolution_flops(left, right, result, attributes: str) -> int:
    """FLOPs of a convolution: positions where the window lies on padding do not count.

    TPUs compute every matrix product as a convolution; batched ones have the batch as a
    dilated spatial axis, of which the padding is most.
    """
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}
    size = lambda labels, dims, label: dims[labels.index(label)]
    pairs = 1
    for axis, label in enumerate(sorted(set(inputs) - {"b", "f"}, key=int)):
        number = lambda name, axis=axis: int(fields.get(name, "x".join("1" * 9)).split("x")[axis])
        low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
        pairs *= window_pairs(
            size(inputs, left, label), size(kernel, right, label), size(output, result, label),
            low, number("stride"), number("lhs_dilate"), number("rhs_dilate"))
    batch, features = size(output, result, "b"), size(output, result, "f")
    return 2 * batch * features * size(kernel, right, "i") * pairs


@lru_cache
def window_pairs(length: int, window: int, outputs: int, low: int, stride: int, left_dilation: int,
                 right_dilation: int) -> int:
    """Pairs (output position, window position) of one axis that meet an input element."""
    position = (np.arange(outputs)[:, None] * stride - low
                + np.arange(window)[None] * right_dilation)
    meets = (position >= 0) & (position % left_dilation == 0)
    return int((meets & (position // left_dilation < length)).sum())


# Kernels

@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of some operand shapes, and how often it runs."""

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    count: int


def kernels(program: Program) -> tuple[Kernel, ...]:
    """The program's Pallas kernels; calls of the same kernel with the same shapes are one row."""
    counts = Counter()
    for step in program.steps:
        for kernel in step_kernels(program, step):
            counts[kernel.name, kernel.operands, kernel.results] += step.times
    return tuple(Kernel(*key, count) for key, count in counts.items())


def step_kernels(program: Program, step: Step) -> list[Kernel]:
    """The kernels of one execution of a step, each with count 1, wherever their arrays lie."""
    anywhere = lambda arrays: tuple(Array(array.dtype, array.dims) for array in arrays)
    return [Kernel(kernel_name(op), anywhere(computation.operand_arrays(op)),
                   anywhere(op.results), 1)
            for computation, op in within(program, step) if op.target == KERNEL_CALL]


def kernel_name(op: Instruction) -> str:
    """The name given to pallas_call; the instruction's where the source does not tell."""
    match = re.search(r"([^/]+)/pallas_call", op.source)
    return match[1] if match else re.sub(r"(\.\d+|\.clone)+$", "", op.name)


# Collectives

@dataclass(frozen=True)
class Collective:
    """Communication between devices.

    bytes: of one execution, as ring arithmetic counts them: the whole result of an all-gather,
        the whole operand of everything else (before the scatter of a reduce-scatter). A device
        sends and receives (group - 1) / group of them, twice for an all-reduce.
    groups: device numbers in the order of the mesh's devices; empty where the text has none.
    network: "ici" inside a slice, "dcn" between slices.
    overlapped: whether it runs beside other work: the instructions `covers` of the computation, in
        the walk's visit number `visit`.
    """

    kind: str
    name: str
    count: int
    bytes: int
    group: int
    groups: tuple[tuple[int, ...], ...]
    network: str
    in_loop: bool
    overlapped: bool
    covers: tuple[str, ...]
    visit: int
    source: str

    @property
    def total(self) -> int:
        """Bytes of all executions."""
        return self.count * self.bytes


def collectives(program: Program) -> tuple[Collective, ...]:
    """The program's collectives, an asynchronous one counted once."""
    found = []
    for step in program.steps:
        opcode = step.op.opcode
        if opcode.removesuffix("-start") in COLLECTIVES:
            found.append(collective(program, step, step.computation, step.op, covers(step)))
        elif opcode == "fusion":
            found += fused_collectives(program, step)
        elif opcode == "send" and "_xla_megascale_transfer_type" in step.op.attributes:
            found.append(between_slices(step))
    return tuple(found)


def collective(program: Program, step: Step, computation: Computation, op: Instruction,
               beside: tuple[str, ...] | None) -> Collective:
    """A collective instruction; `beside` is what runs meanwhile, None if it is synchronous."""
    kind = op.opcode.removesuffix("-start")
    if kind == "all-gather":
        # A start's result is the operands, the results and the compiler's flags.
        first = len(op.operands) if op.opcode.endswith("-start") else 0
        results = op.results[first:first + len(op.operands)]
        size = sum(array.bytes for array in results)
    else:
        size = sum(array.bytes for array in computation.operand_arrays(op))
    groups = replica_groups(op.attributes)
    group = len(groups[0]) if groups else program.devices
    return Collective(kind, op.name, step.times, size, group, groups, "ici", step.in_loop,
                      beside is not None, beside or (), step.visit, op.source)


def fused_collectives(program: Program, step: Step) -> list[Collective]:
    """The collectives that a fusion contains or starts.

    An asynchronous collective that is fused with matrix products appears in the fusion that starts
    it, in every fusion that runs beside it and in the one that waits for it: the first counts.
    """
    found = []
    for computation, op in fused(program, step.op):
        if op.opcode not in COLLECTIVES:
            continue
        started = any(user.target == "AsyncCollectiveStart" for user in computation.users[op.name])
        continued = '"async_collective_fusion_config"' in op.attributes
        if started or not continued:
            beside = carriers(program, step, op) if started else None
            one = collective(program, step, computation, op, beside)
            found.append(as_reduce_scatter(step, computation, one))
    return found


def as_reduce_scatter(step: Step, computation: Computation, one: Collective) -> Collective:
    """A fused all-reduce of which only a slice is kept is a reduce-scatter of the operand."""
    slices = any(op.opcode == "dynamic-slice" for op in computation.instructions.values())
    if one.kind != "all-reduce" or not slices:
        return one
    # The operand before padding to a multiple of the group.
    size = sum(array.bytes for array in computation.parameters[0].results)
    return Collective(**{**vars(one), "kind": "reduce-scatter", "bytes": size,
                         "source": one.source or step.op.source})


def carriers(program: Program, step: Step, op: Instruction) -> tuple[str, ...]:
    """The fusions with matrix products that carry a started collective on, found by its chain."""
    chain = chain_id(op)
    found = []
    for other in step.schedule.instructions.values():
        if other.opcode == "fusion" and chain is not None:
            inside = list(fused(program, other))
            carries = any(inner.opcode in COLLECTIVES and chain_id(inner) == chain
                          for _, inner in inside)
            if carries and any(inner.opcode in ("dot", "convolution") for _, inner in inside):
                found.append(other.name)
    return tuple(found)


def chain_id(op: Instruction) -> str | None:
    match = re.search(r'chain_id="(\d+)"', op.attributes)
    return match[1] if match else None


def covers(step: Step) -> tuple[str, ...] | None:
    """What runs between a start and its done; None for an instruction that is not a start."""
    schedule = step.schedule
    issuer = schedule.instructions[step.issuer]
    if not issuer.opcode.endswith("-start") and issuer.opcode not in ("send", "recv"):
        return None
    done = next((user for user in schedule.users[issuer.name] if user.opcode.endswith("-done")),
                None)
    if done is None:
        return None
    first, last = schedule.order[issuer.name], schedule.order[done.name]
    return tuple(list(schedule.instructions)[first + 1:last])


def between_slices(send: Step) -> Collective:
    """The part of a collective that goes between slices: a send and a receive of the same name."""
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', send.op.attributes)[1]
    receive = next(op for op in send.computation.instructions.values()
                   if op.opcode == "recv" and f'rendezvous="{rendezvous}"' in op.attributes)
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.op.attributes)[1]
    kind = kind.lower().replace("_", "-")
    data = receive.results if kind == "all-gather" else send.op.results
    slices = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', send.op.attributes)
    count = len(numbers(slices[1])) if slices else 2
    return Collective(
        kind, rendezvous, send.times, sum(array.bytes for array in data[:-2]), count, (), "dcn",
        send.in_loop, True, covers(send) or (), send.visit, send.op.source)


def numbers(text: str) -> list[int]:
    """The numbers of a list with ranges: 0:3,7 is 0, 1, 2, 3, 7."""
    found = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition(":")
        found += range(int(first), int(last or first) + 1)
    return found


@cache
def parse_groups(text: str) -> tuple[tuple[int, ...], ...]:
    if text.startswith("{"):
        return tuple(tuple(map(int, group.split(",")))
                     for group in re.findall(r"\{([\d,]+)\}", text))
    if text.startswith("mesh"):
        return mesh_groups(text)
    shape, base, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    return grouped(iota(base, order), [int(size) for size in shape.split(",")][-1])


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective in any of HLO's notations: empty for all devices.

    {{0,1},{2,3}}; [2,2]<=[4] and [2,2]<=[2,2]T(1,0); mesh['a'=2,'b'=2] {'b'}; for permutations
    the (source, target) pairs.
    """
    match = re.search(
        r"(?:replica_groups|source_target_pairs)="
        r"(\{\}|\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\].*?\{[^}]*\})",
        attributes)
    return parse_groups(match[1]) if match else ()


def iota(base: str, order: str | None):
    sizes = [int(size) for size in base.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(axis) for axis in order.split(",")]) if order else devices


def grouped(devices, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group)) for group in devices.reshape(-1, size))


def mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b','a':(1)2}.

    'b':(2)2 is a part of an axis: after splitting it as (2, 2, rest), the middle factor.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    ids = re.search(r"device_ids=\((?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text)
    listed = re.search(r"device_ids=\[([\d,]+)\]", text)
    if listed:
        devices = np.array([int(number) for number in listed[1].split(",")])
    else:
        devices = iota(*ids.groups()) if ids else np.arange(math.prod(axes.values()))
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{"):])
    # Split every axis at the borders of the wanted parts, then move the wanted factors last.
    factors, wanted_at = [], {}
    for name, size in axes.items():
        cuts = {1, size}
        for part, before, length in wanted:
            if part == name and before:
                cuts |= {int(before), int(before) * int(length)}
        cuts = sorted(cuts)
        for low, high in zip(cuts, cuts[1:], strict=False):
            for place, (part, before, length) in enumerate(wanted):
                whole = part == name and not before
                if whole or (part == name and int(before) <= low < int(before) * int(length)):
                    wanted_at[len(factors)] = place
            factors.append(high // low)
    kept = [axis for axis in range(len(factors)) if axis not in wanted_at]
    moved = sorted(wanted_at, key=lambda axis: (wanted_at[axis], axis))
    size = math.prod(factors[axis] for axis in moved)
    return grouped(devices.reshape(factors).transpose(kept + moved), size)


# Memory traffic

@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, by memory: the device's main one, the on-chip one, the host's."""

    hbm: int = 0
    vmem: int = 0
    host: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.hbm + other.hbm, self.vmem + other.vmem, self.host + other.host)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.hbm * times, self.vmem * times, self.host * times)


def traffic(program: Program) -> Traffic:
    """Of every instruction that is no matrix product, kernel or collective, in one run."""
    total = Traffic()
    for step in program.steps:
        if moves(program, step):
            total += step_traffic(program, step) * step.times
    return total


def moves(program: Program, step: Step) -> bool:
    """Whether a step's cost is its memory traffic."""
    op = step.op
    if op.opcode in STRUCTURE or op.opcode.endswith("-done") or op.target in NAMING_CALLS:
        return False
    if op.opcode.removesuffix("-start") in COLLECTIVES or op.target == KERNEL_CALL:
        return False
    return not any(inner.opcode in ("dot", "convolution", *COLLECTIVES)
                   or inner.target == KERNEL_CALL for _, inner in within(program, step))


def step_traffic(program: Program, step: Step) -> Traffic:
    """Bytes that one execution of an instruction reads and writes.

    Slices count by what they take, updates in place by what they write.
    """
    op, computation = step.op, step.computation
    total = Traffic()
    for position, name in enumerate(op.operands):
        source = computation.instructions[name].results
        limit = read_bytes(program, op, position)
        for array in source:
            total += spend(array, array.bytes if limit is None else min(limit, array.bytes))
    if op.opcode == "copy-start":  # its results are the copy, the source again, and a flag
        return total + spend(op.results[0], op.results[0].bytes)
    if op.opcode in ("fusion", "dynamic-update-slice"):
        written = written_bytes(program, computation, op)
    else:
        written = [array.bytes for array in op.results]
    for array, size in zip(op.results, written, strict=True):
        total += spend(array, size)
    return total


def spend(array: Array, size: int) -> Traffic:
    """Bytes in the memory that an array lies in; flags and scalars' memories are free."""
    return {0: Traffic(hbm=size), 1: Traffic(vmem=size), 5: Traffic(host=size)}.get(
        array.space, Traffic())


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
