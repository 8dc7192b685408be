"""The communication of a program: its collectives, and what runs beside them."""

import math
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from twinflow_jax.planning.hlo import Program, Step, fused
from twinflow_jax.planning.instructions import Computation, Instruction

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")


@dataclass(frozen=True)
class Collective:
    """Communication between devices.

    bytes: of one execution, as ring arithmetic counts them: the whole result of an all-gather,
        the whole operand of everything else (before the scatter of a reduce-scatter). A device
        sends and receives (group - 1) / group of them, twice for an all-reduce.
    groups: device numbers in the order of the mesh's devices; empty where the text has none.
    axes: of the torus, whose links it uses at once; 0 where the compiler does not say.
    network: "ici" inside a slice, "dcn" between slices.
    overlapped: whether it runs beside other work: the instructions `covers` of the computation, in
        the walk's visit number `visit`.
    """

    kind: str
    count: int
    bytes: int
    group: int
    groups: tuple[tuple[int, ...], ...]
    axes: int
    network: str
    in_loop: bool
    overlapped: bool
    covers: tuple[str, ...]
    visit: int

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
    axes = axes_at_once(op.attributes) or axes_at_once(step.op.attributes)
    return Collective(kind, step.times, size, group, groups, axes, "ici", step.in_loop,
                      beside is not None, beside or (), step.visit)


def axes_at_once(attributes: str) -> int:
    """Torus axes whose links the compiler's algorithm uses at once; 0 where it names none.

    On a SparseCore the data goes in colors, each of which takes the axes in another order, one way
    round: two for each axis. Otherwise a gather is a ring ("1DAllGather...", through all chips of
    its group), or one of more axes. A sum has colors, which go along different axes at a time: both
    ways, or one way in each of two ("UniDirection..."); a ring has one.
    """
    offloaded = attributes.count('"phase_rings"')
    if offloaded:
        return max(offloaded // 2, 1)
    gather = re.search(r'"emitter":"(\d)DAllGather', attributes)
    if gather:
        return int(gather[1])
    sums = re.search(r'"strategy":"(\w+)","debug":"[^"]*?colors:(\d+)', attributes)
    if not sums:
        return 0
    colors = int(sums[2])
    return max(colors // 2, 1) if sums[1].startswith("UniDirection") else colors


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
            found.append(as_reduce_scatter(computation, one))
    return found


def as_reduce_scatter(computation: Computation, one: Collective) -> Collective:
    """A fused all-reduce of which only a slice is kept is a reduce-scatter of the operand."""
    slices = any(op.opcode == "dynamic-slice" for op in computation.instructions.values())
    if one.kind != "all-reduce" or not slices:
        return one
    # The operand before padding to a multiple of the group.
    size = sum(array.bytes for array in computation.parameters[0].results)
    return replace(one, kind="reduce-scatter", bytes=size)


def carriers(program: Program, step: Step, op: Instruction) -> tuple[str, ...]:
    """The fusions with matrix products that carry a started collective on, found by its chain."""
    chain = op.quoted("chain_id")
    found = []
    for other in step.schedule.instructions.values():
        if other.opcode == "fusion" and chain:
            inside = list(fused(program, other))
            carries = any(inner.opcode in COLLECTIVES and inner.quoted("chain_id") == chain
                          for _, inner in inside)
            if carries and any(inner.opcode in ("dot", "convolution") for _, inner in inside):
                found.append(other.name)
    return tuple(found)


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
    rendezvous = send.op.quoted("_xla_host_transfer_rendezvous")
    receive = next(op for op in send.computation.instructions.values()
                   if op.opcode == "recv" and f'rendezvous="{rendezvous}"' in op.attributes)
    kind = send.op.quoted("_xla_megascale_transfer_type").lower().replace("_", "-")
    data = receive.results if kind == "all-gather" else send.op.results
    slices = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', send.op.attributes)
    count = len(numbers(slices[1])) if slices else 2
    return Collective(
        kind, send.times, sum(array.bytes for array in data[:-2]), count, (), 0, "dcn",
        send.in_loop, True, covers(send) or (), send.visit)


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
