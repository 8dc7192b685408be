"""Features of natural images by EfficientNet-lite0: independent of what is judged, and not FID's.

Its weights come from a file that twinflow features writes.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from twinflow_jax import cache
from twinflow_jax.arrays import Features, HostImages, Images
from twinflow_jax.checkpoints import tensors
from twinflow_jax.errors import UserError
from twinflow_jax.models import efficientnet, names

SIDE = 128  # pixels that images are scaled to; at 224 it takes three times as long
BATCH = 32


def batched(program: Callable, x: HostImages) -> np.ndarray:
    """What a program gives for images, BATCH of them at once."""
    parts = []
    for start in range(0, len(x), BATCH):
        rows = np.arange(start, start + BATCH) % len(x)  # the last batch wraps: one shape
        parts.append(np.asarray(program(np.asarray(x[rows], np.float32))))
    return np.concatenate(parts)[: len(x)]


def scaled(x: Images, side: int) -> Float[Array, "B {side} {side} 3"]:
    """Images of another size, linear and antialiased."""
    return jax.image.resize(x, (x.shape[0], side, side, 3), "linear")


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The feature network with its weights. digest: of those."""

    params: dict
    digest: bytes

    @functools.cached_property
    def program(self):
        """Jitted: (params, images) -> features."""
        network = efficientnet.EfficientNet()
        return jax.jit(lambda params, x: network.apply({"params": params}, scaled(x, SIDE)))

    def __call__(self, x: HostImages) -> Features:
        """Features of images in [-1, 1], in float64."""
        return batched(functools.partial(self.program, self.params), x).astype(np.float64)

    def remembered(self, x: HostImages) -> Features:
        """The same, kept for the next time: of real images, which are seen again and again."""
        x = np.ascontiguousarray(x, np.float32)
        key = self.digest, repr((SIDE, x.shape)).encode(), x.tobytes()
        # Nothing is lost in float32, which the network computes in.
        found = cache.kept("features", key, lambda: {"features": self(x).astype(np.float32)})
        return found["features"].astype(np.float64)


def load(file: epath.PathLike) -> Network:
    """The network with weights from a file of twinflow features.

    Raises:
      UserError: no such file, or not of this network.
    """
    found = tensors.read_header(epath.Path(file))
    table = efficientnet.table(efficientnet.Config())
    check(file, {key: tensor.shape for key, tensor in found.items()})
    flat = {rule.path: rule.ours(found[rule.key].read()) for rule in table.rules}
    digest = hashlib.sha256()
    for path in sorted(flat):
        digest.update(path.encode() + np.ascontiguousarray(flat[path]).tobytes())
    return Network(names.unflatten(jax.tree.map(jnp.asarray, flat)), digest.digest())


def check(file: epath.PathLike, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The network's published keys, all of them in a file with these shapes.

    Raises:
      UserError: something is missing or has another shape.
    """
    config = efficientnet.Config()
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), "float32")
    init = efficientnet.EfficientNet(config).init
    leaves = names.flatten(jax.eval_shape(init, jax.random.key(0), image)["params"])
    expected = efficientnet.table(config).shapes({k: leaf.shape for k, leaf in leaves.items()})
    wrong = [key for key, shape in expected.items() if tuple(shapes.get(key, ())) != shape]
    if wrong:
        raise UserError(
            f"{file} does not hold the weights of EfficientNet-lite0: {len(wrong)} of "
            f"{len(expected)} tensors are missing or of another shape, as {wrong[0]}; write it "
            "with twinflow features"
        )
    return list(expected)
