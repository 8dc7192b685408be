"""Seconds and bytes that a compiled program is expected to take: a model, not a measurement.

`predict` charges every scheduled instruction of a Program once: matrix products by the compiler's
cycles or by FLOPs, kernels by FLOPs, collectives by bytes over the torus axes that they use, the
rest by memory traffic. The constants below are all that is assumed beyond the program and the
chip's published figures, and this: a collective takes bytes * (n - 1) / n over the summed rates of
the torus axes that the compiler's algorithm for its group of n uses at once, twice that for an
all-reduce; groups that share links do not slow each other down; attention has no mask. The result
ranks programs and catches regressions; how far its seconds are off is OFF.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from twinflow_jax.parallel.mesh import slice_of
from twinflow_jax.planning.collectives import Collective, collectives, covers
from twinflow_jax.planning.hlo import Program, Step
from twinflow_jax.planning.topology import Generation, generation_of, torus
from twinflow_jax.planning.traffic import CHIP, HOST, MAIN, moves, step_traffic
from twinflow_jax.planning.work import Kernel, step_flops, step_kernels

# By how much steps come out shorter and longer than published ones that had no part in the fit of
# MATMUL_LEAST and ATTENTION_SHARE: benchmarks/calibration.py.
OFF = (.13, .15)
MATMUL_SHARE = .9  # of peak, where the compiler's cycles are absent or not trusted
MATMUL_LEAST = .85  # of peak, that products reach whatever the compiler's cycles say
TRUSTED_CYCLES = ("v4", "v5e", "v5p")  # generations: right for matmuls
ATTENTION_SHARE = .75  # of peak, in Pallas kernels
LINE = .5  # rate of an axis without the link that closes its ring
VMEM = 20.  # rate of on-chip memory, in rates of main memory
DIE = 6.  # rate between the devices of one chip, in rates of a torus axis
HOST_RATE = 16e9  # bytes/s per device to and from the host's memory


@dataclass(frozen=True)
class Component:
    """One row of the breakdown, for one device and step.

    seconds: with nothing overlapped. hidden: of these, what runs beside other work.
    amount: FLOPs or bytes. count: executions of instructions.
    """

    name: str
    seconds: float
    hidden: float
    amount: float
    unit: str
    count: int


@dataclass(frozen=True)
class Prediction:
    """The breakdown of one step. notes: what the model could not see."""

    components: tuple[Component, ...]
    peak: float  # FLOP/s of a device
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Per step, with nothing overlapped."""
        return sum(part.seconds for part in self.components)

    @property
    def overlapped(self) -> float:
        """Per step, less the overlap that the compiler shows."""
        return self.seconds - sum(part.hidden for part in self.components)

    @property
    def flops(self) -> float:
        """Executed per device and step, recomputation included."""
        return sum(part.amount for part in self.components if part.unit == "FLOP")

    @property
    def utilisation(self) -> float:
        """Share of peak, of executed FLOPs over `overlapped` seconds."""
        return self.flops / self.peak / self.overlapped if self.overlapped else 0.


def predict(program: Program, devices: Sequence) -> Prediction:
    """What one run of the program costs on these devices.

    devices: those that it was compiled for, in the order of the mesh (`mesh.devices.flat`).
    Raises UserError where the devices' generation is unknown.
    """
    devices = list(devices)
    generation = generation_of(devices)
    network = Network(generation, slice_devices(program, devices))
    rows, free, notes = [], {}, set()  # rows: of one execution, how often, where, beside what
    for step in program.steps:
        row, beside = charge(program, step, generation), covers(step)
        if row is None:
            continue
        rows.append((row, step.times, step.visit, beside or ()))
        if beside is None:  # only work that the device waits for can hide other work
            free[step.visit, step.op.name] = row.seconds
        if row.name == "other kernels":
            notes |= {f"kernel {kernel.name}: FLOPs unknown, charged for its memory traffic"
                      for kernel in step_kernels(program, step)}
    for one in collectives(program):
        row = Component(f"{one.kind} ({one.network})", network.seconds(one), 0., one.bytes, "B", 1)
        rows.append((row, one.count, one.visit, one.covers))
    parts = {}
    for row, times, visit, beside in rows:
        add(parts, row, hide(row.seconds, beside, visit, free), times)
    notes |= {f"loop {name}: trip count unknown, taken as 1" for name in program.unknown_loops}
    order = sorted(parts.values(), key=lambda part: -part.seconds)
    return Prediction(tuple(order), generation.peak, tuple(sorted(notes)))


def slice_devices(program: Program, devices: list) -> list:
    """The devices that the program's numbers mean: with several slices, those of one."""
    if len(devices) == program.devices:
        return devices
    return [device for device in devices if slice_of(device) == slice_of(devices[0])]


def add(parts: dict, row: Component, hidden: float, times: int) -> None:
    """Adds `times` executions of a row to the component of its name."""
    old = parts.get(row.name, Component(row.name, 0., 0., 0., row.unit, 0))
    parts[row.name] = Component(
        row.name, old.seconds + row.seconds * times, old.hidden + hidden * times,
        old.amount + row.amount * times, row.unit, old.count + times)


def hide(seconds: float, beside: Sequence[str], visit: int, free: dict) -> float:
    """How much of `seconds` fits beside the named instructions; uses up their time in `free`."""
    left = seconds
    for name in beside:
        taken = min(left, free.get((visit, name), 0.))
        if taken:
            free[visit, name] -= taken
            left -= taken
    return seconds - left


def charge(program: Program, step: Step, generation: Generation) -> Component | None:
    """One execution of a step; None for collectives and for what costs nothing."""
    found = step_kernels(program, step)
    if found:
        return kernel_cost(program, step, found, generation)
    work = step_flops(program, step)
    cycles = step.op.cycles
    if work and step.op.opcode in ("fusion", "dot", "convolution"):
        ideal = work / generation.peak
        moving = traffic_seconds(step_traffic(program, step), generation)
        if cycles and generation.name in TRUSTED_CYCLES:
            # The compiler's word, but never faster than the chip.
            slowest = max(ideal / MATMUL_LEAST, moving)
            seconds = max(ideal, min(cycles / generation.clock, slowest))
        else:
            seconds = max(ideal / MATMUL_SHARE, moving)
        return Component("matmul", seconds, 0., work, "FLOP", 1)
    if not moves(program, step):
        return None
    traffic = step_traffic(program, step)
    seconds = traffic_seconds(traffic, generation)
    if cycles:
        seconds = min(seconds, cycles / generation.clock)
    if traffic[HOST]:
        name = "host copies"
    else:
        name = "memory" if covers(step) is None else "asynchronous copies"
    return Component(name, seconds, 0., traffic[HOST] or traffic[MAIN], "B", 1)


def traffic_seconds(traffic: Counter[int], generation: Generation) -> float:
    """The slowest memory's time."""
    return max(traffic[MAIN] / generation.hbm, traffic[CHIP] / generation.hbm / VMEM,
               traffic[HOST] / HOST_RATE)


def kernel_cost(program: Program, step: Step, found: list[Kernel],
                generation: Generation) -> Component:
    """Attention by its FLOPs; a kernel that is not known as attention by its memory traffic."""
    work = [attention_flops(kernel) for kernel in found]
    if None in work:
        traffic = step_traffic(program, step)
        seconds = traffic_seconds(traffic, generation)
        return Component("other kernels", seconds, 0., traffic[MAIN], "B", 1)
    seconds = sum(work) / generation.peak / ATTENTION_SHARE
    return Component("attention kernels", seconds, 0., sum(work), "FLOP", 1)


def attention_flops(kernel: Kernel) -> int | None:
    """FLOPs of one execution of an attention kernel without a mask; None for other kernels.

    Reads q (..., heads, rows, depth), k and v as the first three floating operands. Forward: 2
    products of rows x columns x depth; backward for k and v: 4, with q's gradient in the same
    kernel 5; for q: 3.
    """
    arrays = [array for array in kernel.operands
              if array.dtype.startswith(("f", "bf")) and len(array.dims) >= 3]
    if "attention" not in kernel.name and "mha" not in kernel.name and "mqa" not in kernel.name:
        return None
    if len(arrays) < 3:
        return None
    q, k, v = arrays[:3]
    depth, value_depth = q.dims[-1], v.dims[-1]
    if "dkv" in kernel.name:
        # Partial gradients of q, one per block of keys, have one axis more than q.
        fused = any(len(array.dims) == len(q.dims) + 1 for array in kernel.results)
        products = 2 * depth + 2 * value_depth + (depth if fused else 0)
    elif "dq" in kernel.name:
        products = 2 * depth + value_depth
    else:
        products = depth + value_depth
    return 2 * math.prod(q.dims[:-1]) * k.dims[-2] * products


class Network:
    """The links between devices: which torus axes a group spans, and how fast they are."""

    def __init__(self, generation: Generation, devices: list):
        """devices: of one slice or all, in the order that the program numbers them."""
        self.generation, self.devices = generation, devices
        self.shape, self.rates = torus(devices), {}

    def seconds(self, one: Collective) -> float:
        """Of one execution of a collective."""
        if one.kind == "collective-permute":  # one link, one direction
            passes = .5 / LINE
        else:
            passes = (one.group - 1) / one.group * (2 if one.kind == "all-reduce" else 1)
        return passes * one.bytes / self.rate(one)

    def rate(self, one: Collective) -> float:
        """Bytes per second that a device receives in the slowest group of a collective."""
        between = self.generation.dcn / self.generation.devices_per_chip
        if one.network == "dcn":
            return between
        groups = one.groups or (tuple(range(len(self.devices))),)
        key = groups, one.axes
        if key not in self.rates:
            self.rates[key] = min(self.group_rate(group, one.axes, between) for group in groups)
        return self.rates[key]

    def group_rate(self, group: tuple[int, ...], at_once: int, between: float) -> float:
        """at_once: torus axes, 0 for all that the group spans."""
        members = [self.devices[number] for number in group]
        if len({slice_of(device) for device in members}) > 1:
            return between
        per_device = self.generation.ici / self.generation.devices_per_chip
        axes = [axis for axis in range(len(self.shape))
                if len({device.coords[axis] for device in members}) > 1]
        if not axes:  # inside one chip
            return per_device * DIE
        if at_once == 1 and len(axes) > 1:  # one ring through all, neighbour to neighbour
            return per_device
        rings = sorted(map(self.ring, axes), reverse=True)
        return per_device * sum(rings[:at_once or None])

    def ring(self, axis: int) -> float:
        """1 for an axis whose ends are joined, LINE for one whose ends are not."""
        return 1. if self.shape[axis] % self.generation.wraps == 0 else LINE
