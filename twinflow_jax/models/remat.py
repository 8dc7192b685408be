"""Rematerialisation: which activations of a block are kept for the backward pass, by name.

Blocks mark their activations with `jax.ad_checkpoint.checkpoint_name`; a policy says which of
them stay in memory, and the backward pass computes the others again.
"""

import flax.linen as nn
import jax

from twinflow_jax.errors import UserError

_saved = jax.checkpoint_policies
_attention = _saved.save_only_these_names("attention_output")

# From the most memory to the least, apart from "full". "dots" keeps the outputs of projections
# and of attention, but no scores: their matrix products have batch dimensions.
POLICIES = {
    "none": None,
    "dots": _saved.save_from_both_policies(
        _saved.dots_with_no_batch_dims_saveable, _attention
    ),
    "attention": _attention,
    "full": _saved.nothing_saveable,
}


def check(name: str) -> None:
    """Raises UserError unless `name` is one of POLICIES."""
    if name not in POLICIES:
        raise UserError(f"remat is {name!r}; choose from {', '.join(POLICIES)}")


def block(module_class: type[nn.Module], name: str) -> type[nn.Module]:
    """The class of a block under `nn.scan`, recomputed in backward as policy `name` says.

    Raises:
      UserError: no such policy.
    """
    check(name)
    if POLICIES[name] is None:
        return module_class
    # Inside a scan nothing can merge the two computations, so their guard would only cost.
    return nn.remat(module_class, prevent_cse=False, policy=POLICIES[name])
