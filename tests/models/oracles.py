"""Parity with PyTorch modules: their random weights through our name table, and the error."""

import numpy as np

from twinflow_jax.models import names


def params_of(module, table: names.NameTable, expected) -> dict:
    """Our parameters from a PyTorch module's weights.

    expected: our abstract parameters; the table has to reach each of their leaves, with its
    shape, and to use or carry every tensor of the module.
    """
    state = module.state_dict().items()
    tensors = {table.published(key): value.detach().float().numpy() for key, value in state}
    flat, used = {}, set()
    for rule in table.rules:
        keys = table.keys(rule)
        if rule.copy_of and keys[0] not in tensors:
            keys = [rule.copy_of]
        used |= set(keys)
        leaves = [rule.ours(tensors[key]) for key in keys]
        flat[rule.path] = np.stack(leaves) if rule.stacked else leaves[0]
    left = [key for key in tensors if key not in used and not table.is_carried(key)]
    assert not left, left
    shapes = {path: leaf.shape for path, leaf in names.flatten(expected).items()}
    assert {path: leaf.shape for path, leaf in flat.items()} == shapes
    return names.unflatten(flat)


def relative_error(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
