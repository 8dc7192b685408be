"""One table: the logical axes that models name -> the mesh axes that they are split over."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES = {
    "rows": "fsdp",  # of activations: the batch
    "embed": "fsdp",  # the input side of weights: splitting the output side costs copies on TPU
    "text": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "modulation": "tensor",
    "vocab": "tensor",
}


def shardings(mesh: Mesh, abstract, axes):
    """A layout for each parameter: abstract shapes, and logical axes of the same tree.

    A rule does not apply where the dimension does not divide, or its mesh axis is taken by an
    earlier dimension of the same parameter.
    """
    def layout(leaf, logical):
        spec, used = [], set()
        for size, name in zip(leaf.shape, logical, strict=False):
            axis = RULES.get(name)
            fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
            used |= {axis} if fits else set()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(layout, abstract, axes)
