"""Kernels in int8, of a network that does not train: those of stacked layers, (layers, in, out).

A kernel is `values` times `scale`, the largest of each layer and output channel over 127; no other
weight is changed. A layer's is multiplied out where the layer has its weights
(`stack.run_layers`), so that int8 is what is kept and what travels. (qwix 0.1.8 does nearly the
same, over 127.5, but its functions are not public.)
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Float

from twinflow_jax.arrays import AnyArray
from twinflow_jax.errors import UserError
from twinflow_jax.models import names

NAME = "int8"


@no_type_check  # layouts of weights, and what JAX fills trees with, are built as weights
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """values: int8 (layers, in, out). scale: float32 (layers, 1, out)."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, Quantised)


def quantised(kernel: Float[AnyArray, "layers into out"]) -> Quantised:
    """The nearest in int8; computed in float32."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.abs(kernel).max(1, keepdims=True) / 127
    values = jnp.round(kernel / jnp.where(scale > 0, scale, 1))
    return Quantised(values.astype(jnp.int8), scale)


def base(params):
    """The weights with their kernels in int8; those that are so already stay.

    Raises:
      UserError: there are none.
    """
    flat = names.flatten(params)
    kernels = {k: a for k, a in flat.items() if k.endswith("/kernel") and len(a.shape) == 3}
    if not kernels:
        raise UserError(
            "train.weights is 'int8', for kernels of stacked layers, which this network has none "
            "of: use bfloat16"
        )
    made = {k: a if is_quantised(a) else quantised(a) for k, a in kernels.items()}
    return names.unflatten(flat | made)


def dequantised(params, dtype: str):
    """The weights with the kernels that are in int8 multiplied out, rounded to dtype once."""
    one = lambda a: (a.values * a.scale).astype(dtype) if is_quantised(a) else a
    return jax.tree.map(one, params, is_leaf=is_quantised)
