"""The arithmetic of a program: FLOPs of its matrix products, and its Pallas kernels."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from twinflow_jax.planning.hlo import Program, Step, within
from twinflow_jax.planning.instructions import Array, Computation, Instruction

KERNEL_CALL = "tpu_custom_call"


def step_flops(program: Program, step: Step) -> int:
    """FLOPs of one execution of a step's dots and convolutions, two per multiply-add, on one
    device; kernels are not in it."""
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


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of some operand shapes."""

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]


def step_kernels(program: Program, step: Step) -> list[Kernel]:
    """The kernels of one execution of a step."""
    return [Kernel(kernel_name(op), computation.operand_arrays(op), op.results)
            for computation, op in within(program, step) if op.target == KERNEL_CALL]


def kernel_name(op: Instruction) -> str:
    """The name given to pallas_call; the instruction's where the source does not tell."""
    match = re.search(r"([^/]+)/pallas_call", op.source)
    return match[1] if match else re.sub(r"(\.\d+|\.clone)+$", "", op.name)
