"""Two systems on one accelerator, each in a process of its own, one after the other."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

WARM, TIMED = 2, 5


def measure(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of the first call, which compiles, and the median of later ones."""
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    for _ in range(WARM):
        step()
    seconds = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "first": first}


def is_full(error: Exception) -> bool:
    """Whether an exception of jax or torch says that memory is full."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def run_each(systems: tuple[str, ...], file: str) -> dict[str, dict]:
    """What each system prints as the last line of its process, a JSON object."""
    found = {}
    for system in systems:
        command = [sys.executable, file, *sys.argv[1:], "--system", system]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[system] = json.loads(done.stdout.splitlines()[-1])
        print(system, json.dumps(found[system]), flush=True)
    return found


def jax_peak_gib() -> float:
    """The most memory of the accelerator that jax has used."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


def torch_peak_gib() -> float:
    """The same of torch."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def random_params(abstract):
    """Normal bfloat16 parameters of the shapes of a tree, one leaf at a time."""
    import jax
    import jax.numpy as jnp

    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([draw(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
