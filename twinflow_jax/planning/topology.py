"""TPU generations, the names of their slices, and devices to compile for without having any."""

import importlib.util
import itertools
import math
import os
import re
from dataclasses import dataclass

from twinflow_jax.errors import UserError, reason
from twinflow_jax.parallel.mesh import slice_of
from twinflow_jax.parallel.peaks import PEAKS

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One TPU generation. A device is what JAX calls one: a chip, or half of one (tpu7x)."""

    name: str
    kind: str  # jax.Device.device_kind
    axes: int  # of the torus: 2 or 3
    devices_per_chip: int
    hbm_bytes: int  # per device: what the compiler lets a program use
    hbm: float  # per device: bytes/s
    ici: float  # per chip and torus axis, both directions of a wrapped axis together: bytes/s
    dcn: float  # per chip: bytes/s between slices
    clock: float  # Hz: the compiler's estimated cycles per second
    count_cores: bool  # whether the number in a cloud name counts cores, two per chip
    wraps: int  # an axis is a ring where its length is a multiple of this, else a line

    @property
    def peak(self) -> float:
        """Per device: bf16 FLOP/s."""
        return PEAKS[self.kind]


# HBM is what the TPU compiler's out-of-memory errors name as available. Peaks, HBM, and the network
# between slices are Google's system architecture pages (docs.cloud.google.com/tpu/docs/v5p and its
# neighbours; v5e and v6e give the last per pod of 256; v4's pages do not, it is taken as v5p's).
# ICI: those pages give 400 (v5e), 800 (v6e) and 1200 (v5p, tpu7x) GB/s per chip over 4, 4 and 6
# links, both directions; 90 % of that reaches a program. v4 has half of v5p's. Clocks are peak
# over FLOPs per cycle of the matrix units.
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", "TPU v4", 3, 1, int(30.75 * GIB), 1228e9, 90e9, 6.25e9, 1.05e9, True, 4),
        Generation("v5e", "TPU v5 lite", 2, 1, int(15.75 * GIB), 819e9, 90e9, 3.125e9, 1.5e9,
                   False, 16),
        Generation("v5p", "TPU v5", 3, 1, int(95.74 * GIB), 2765e9, 180e9, 6.25e9, 1.75e9, True, 4),
        Generation("v6e", "TPU v6 lite", 2, 1, int(31.25 * GIB), 1638e9, 180e9, 12.5e9, 1.75e9,
                   False, 16),
        Generation("tpu7x", "TPU7x", 3, 2, int(94.75 * GIB), 3690e9, 180e9, 12.5e9, 2.2e9, True, 4),
    )
}

CLOUD_NAMES = {"v5litepod": "v5e", **{name: name for name in GENERATIONS}}
# Chips of slices below one cube of 4x4x4, and of all slices of the two-dimensional generations.
SMALL = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
        256: (16, 16)}
LARGEST = 8192  # chips of a slice: beyond it a number is a typing error


@dataclass(frozen=True)
class Topology:
    """Slices of one generation: each `shape` chips, joined by the data-centre network."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """The name of one slice as the compiler writes it: v5p:4x4x4."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """The name that `resolve` reads: v5p:4x4x4, or 2*v5p:4x4x4."""
        return self.slice_name if self.slices == 1 else f"{self.slices}*{self.slice_name}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices


def known_names() -> str:
    """Examples of what `resolve` reads, for its error messages."""
    examples = ("v4:2x2x4", "v5e:4x4", "v5p:4x4x4", "v6e:16x16", "tpu7x:4x4x4", "2*v5p:4x4x4")
    return (f"a topology is one of {', '.join(examples)} (chips along each torus axis), "
            "or a cloud name such as v4-64, v5litepod-256, v5p-128, v6e-256, tpu7x-128")


def resolve(name: str) -> Topology:
    """The topology of a name: "v5p:4x4x4", "2*v5p:4x4x4" or a cloud name ("v5p-128").

    A cloud name's number counts cores for v4, v5p and tpu7x, chips for v5e and v6e.
    Raises UserError for a name or size that does not exist.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+)(?::(\d+(?:x\d+)+)|-(\d+))", name.strip().lower())
    if match is None or match[2] not in CLOUD_NAMES:
        raise UserError(f"unknown topology {name!r}: {known_names()}")
    slices = int(match[1] or 1)
    if slices < 1:
        raise UserError(f"{name!r}: the number of slices must be positive, not {slices}")
    generation = GENERATIONS[CLOUD_NAMES[match[2]]]
    if match[3]:
        shape = tuple(int(size) for size in match[3].split("x"))
    else:
        shape = standard_shape(generation, int(match[4]))
    topology = Topology(generation, shape, slices)
    check_shape(topology, name)
    return topology


def standard_shape(generation: Generation, size: int) -> tuple[int, ...]:
    """The standard slice of a cloud name's number; raises UserError where there is none."""
    chips = size // 2 if generation.count_cores else size
    shapes = FLAT if generation.axes == 2 else SMALL
    odd = generation.count_cores and size % 2
    if chips in shapes and not odd:
        return shapes[chips]
    if generation.axes == 3 and chips and chips % 64 == 0 and not odd:
        return most_cubic(chips)
    unit = "cores" if generation.count_cores else "chips"
    sizes = [chips * 2 if generation.count_cores else chips for chips in shapes]
    more = " or a multiple of 128" if generation.axes == 3 else ""
    raise UserError(f"{generation.name} has no standard slice of {size} {unit}: "
                    f"choose {', '.join(map(str, sizes))}{more}, or name the shape; "
                    f"{known_names()}")


def most_cubic(chips: int) -> tuple[int, int, int]:
    """The box of 4x4x4 cubes with this many chips and the shortest sides, in rising order."""
    cubes = chips // 64
    divisors = [size for size in range(1, cubes + 1) if cubes % size == 0]
    pairs = itertools.combinations_with_replacement(divisors, 2)
    boxes = [(a, b, cubes // (a * b)) for a, b in pairs
             if cubes % (a * b) == 0 and cubes // (a * b) >= b]
    return tuple(4 * side for side in min(boxes, key=sum))


def check_shape(topology: Topology, name: str) -> None:
    """Raises UserError for shapes that the generation is not built in."""
    generation, shape = topology.generation, topology.shape
    if len(shape) != generation.axes:
        raise UserError(f"{name!r}: {generation.name} has {generation.axes} torus axes, "
                        f"not {len(shape)}: {known_names()}")
    # Hosts hold 2x2 chips; a single chip exists alone.
    whole_hosts = shape[0] % 2 == shape[1] % 2 == 0
    limit, chips = 256 if generation.axes == 2 else LARGEST, math.prod(shape)
    if not 0 < chips <= limit or not (whole_hosts or chips == 1):
        raise UserError(f"{name!r}: no such slice: the first two axes must be even and "
                        f"{generation.name} has at most {limit} chips: {known_names()}")


def devices(topology: Topology) -> list:
    """The topology's devices, to build a mesh from and compile for; nothing can run on them.

    Devices of one slice follow each other. Sets the environment variables that libtpu reads when it
    is loaded (those already set stay as they are), so call it before anything else loads libtpu.
    Raises UserError where libtpu is missing or refuses the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu, which is not installed: "
                        "pip install libtpu==0.0.42.1")
    libtpu_environment()
    from jax.experimental import topologies

    options = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.generation.name == "v4":
        options["chip_config_name"] = "megacore"  # otherwise two devices per chip
    if topology.shape[0] == 1 or topology.shape == (2, 4):  # one host, which has 2x2 otherwise
        options["chips_per_host_bounds"] = [*topology.shape, 1][:3]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.slice_name, **options)
    except Exception as error:  # whatever libtpu raises: its types differ between versions
        raise UserError(f"libtpu refuses {topology.name}: {reason(error)}") from error
    return list(found.devices)


def libtpu_environment() -> None:
    """Tells libtpu not to look for a TPU or for its metadata server."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-128",  # any type will do: the topology's name decides
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(name, value)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # Several compiling processes may share a machine, but never one with a TPU in use.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def torus(devices: list) -> tuple[int, ...]:
    """Chips along each axis of one slice of these devices, read from their coordinates."""
    first = [device.coords for device in devices if slice_of(device) == slice_of(devices[0])]
    return tuple(len({coords[axis] for coords in first}) for axis in range(len(first[0])))


def generation_of(devices: list) -> Generation:
    """The generation of JAX devices; raises UserError where it is not in GENERATIONS."""
    kind = devices[0].device_kind
    for generation in GENERATIONS.values():
        if generation.kind == kind:
            return generation
    raise UserError(f"no figures for device kind {kind!r}: "
                    f"known are {', '.join(g.kind for g in GENERATIONS.values())}")
