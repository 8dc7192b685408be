"""Rematerialisation: which activations of a layer are kept for the backward pass, by name.

Layers mark their activations with `jax.ad_checkpoint.checkpoint_name`; a policy says which of
them stay in memory, and the backward pass computes the others again.
"""

import dataclasses
from collections.abc import Callable

import jax

_saved = jax.checkpoint_policies
_attention = _saved.save_only_these_names("attention_output")


@dataclasses.dataclass(frozen=True)
class Policy:
    """saves: what stays, as JAX says it; None for everything. matmul, attention: forwards of each
    that the backward pass computes again."""

    saves: Callable | None
    matmul: int
    attention: int


# From the most device memory to the least. "dots" keeps the outputs of projections and of
# attention, but no scores: their matrix products have batch dimensions. "offload" moves the
# layers' inputs to the host's memory, "full" keeps them on the device.
POLICIES = {
    "none": Policy(None, 0, 0),
    "dots": Policy(
        _saved.save_from_both_policies(_saved.dots_with_no_batch_dims_saveable, _attention), 0, 0
    ),
    "attention": Policy(_attention, 1, 0),
    "full": Policy(_saved.nothing_saveable, 1, 1),
    "offload": Policy(
        _saved.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"],
            offload_src="device", offload_dst="pinned_host",
        ),
        1, 1,
    ),
}


def recomputed(layer: Callable, name: str) -> Callable:
    """The body of a scan over layers, recomputed in backward as policy `name`, one of POLICIES,
    says."""
    saves = POLICIES[name].saves
    if saves is None:
        return layer
    # Inside a scan nothing can merge the two computations, so their guard would only cost.
    return jax.checkpoint(layer, prevent_cse=False, policy=saves)
