"""How different the pictures of one prompt look: the paper's Table 9, by LPIPS."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import images, parallel
from twinflow_jax.checkpoints import store, tensors
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites import results
from twinflow_jax.evaluation.suites.suite import Item, Suite
from twinflow_jax.models import lpips, names

TITLES = {"alex": "LPIPS diversity (AlexNet)", "vgg": "LPIPS diversity (VGG-16)"}


def load(file: str, network: str):
    """The parameters of a network of `lpips.NETWORKS`, from a file of twinflow features.

    Raises:
      UserError: no such file, or not of this network.
    """
    found = tensors.read_header(epath.Path(file))
    paths = check(file, {key: tensor.shape for key, tensor in found.items()}, network)
    return names.unflatten({path: found[f"{network}/{path}"].read() for path in paths})


def check(
    file: epath.PathLike, shapes: Mapping[str, tuple[int, ...]], network: str
) -> list[str]:
    """The paths of a network's parameters, all of them in a file with these shapes.

    Raises:
      UserError: something is missing or has another shape.
    """
    wanted = lpips.shapes(lpips.NETWORKS[network])
    wrong = [p for p, shape in wanted.items() if tuple(shapes.get(f"{network}/{p}", ())) != shape]
    if wrong:
        raise UserError(
            f"{file} does not hold the weights of LPIPS: {len(wrong)} of {len(wanted)} tensors are "
            f"missing or of another shape, as {network}/{wrong[0]}; write it with twinflow features"
        )
    return list(wanted)


def measure(
    folder: epath.Path, suite: Suite, items: Sequence[Item], file: str, network: str
) -> dict[str, Any]:
    """The mean over prompts of the mean distance of two pictures of one, at their own size.

    Raises:
      UserError: the suite has one picture of a prompt, or they are not all there.
    """
    if suite.samples == 1 or suite.grid:
        raise UserError(f"{suite.name} has no several files of one prompt: diversity is of geneval")
    params, found = load(file, network), []
    devices = np.array(parallel.own_devices())
    mesh = jax.sharding.Mesh(devices, ("prompts",))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("prompts"))
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    program = jax.jit(functools.partial(lpips.distances, lpips.NETWORKS[network]))
    batches = [items[i : i + len(devices)] for i in range(0, len(items), len(devices))]
    for x, count in store.ahead(_opened(folder, suite, batches, len(devices))):
        pairs = program(params, jax.device_put(x, over))
        found.append(np.asarray(pairs, np.float64)[:count].mean(1))
    values = np.concatenate(found)
    score, *interval = results.scored(None, {"": (values, np.ones(len(values)))})
    return {
        "metric": "diversity" if network == "alex" else f"diversity-{network}",
        "title": TITLES[network], "scale": 1.0, "score": score, "interval": interval,
        "judge": f"LPIPS v0.1, {network}", "usual_judge": f"LPIPS v0.1, {network}",
        "found": len(values), "expected": len(items), "groups": {}, "further": {},
        "notes": ["it rises with noise and artefacts too: compare at like GenEval only"],
    }


def _opened(
    folder: epath.Path, suite: Suite, batches: Sequence[Sequence[Item]], size: int
) -> Iterator[tuple[Float[np.ndarray, "P K H W 3"], int]]:
    """Pictures in [-1, 1] of each batch of items, the last one filled up, and how many items."""
    for batch in batches:
        of_items = []
        for item in batch:
            places = [folder / place for place in suite.pictures(item)]
            try:
                pixels = [np.asarray(images.opened(place.read_bytes())) for place in places]
                of_items.append(np.stack(pixels).astype(np.float32) / 127.5 - 1)
            except Exception as error:  # Pillow raises many kinds
                raise UserError(
                    f"the pictures of {item.id} in {folder} are not all there or torn: `evaluate "
                    "suite check` says which"
                ) from error
        yield np.stack([of_items[i % len(batch)] for i in range(size)]), len(batch)
