"""What saving costs the training loop, and what restoring costs memory.

    python benchmarks/checkpoints.py            # a state of 4.3 GB; takes 9 GB of memory and disk
    python benchmarks/checkpoints.py --arrays 2 --folder gs://BUCKET/saved
    python -m tests.bucket python benchmarks/checkpoints.py --arrays 2 --folder gs://bucket/saved

The last in a bucket that this machine plays. Saves through the run's own Saver: `save` returns
when the buffers may be donated, the writing goes on behind. Compared with copying the same state to
the host's memory, which saving has to do.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from twinflow_jax import checkpoints

SIZE = 67_108_864  # of an array in float32: 268 MB
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrays", type=int, default=16, help="of 268 MB each")
    parser.add_argument("--folder", help="that is empty or not there; default: a temporary one")
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), args.arrays)
    make = jax.jit(lambda key: jax.random.normal(key, (SIZE // 4096, 4096), jnp.float32))
    parts = {"params": {f"leaf_{i}": make(key) for i, key in enumerate(keys)}}
    jax.block_until_ready(parts)
    copies, blocked, written = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoints.Saver(args.folder or folder, keep=1)
        for turn in range(TURNS):
            begin = time.perf_counter()
            for leaf in jax.tree.leaves(parts):
                np.array(leaf)
            copies.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            saver.save(turn + 1, parts)
            blocked.append(time.perf_counter() - begin)
            saver.wait()
            written.append(time.perf_counter() - begin)
            print(f"turn {turn + 1} of {TURNS}", file=sys.stderr)
        wanted = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), parts
        )
        del parts
        before = resident()
        peak = Peak()
        begin = time.perf_counter()
        restored = jax.block_until_ready(saver.load(TURNS, wanted))
        seconds, above = time.perf_counter() - begin, peak.stop() - before
        saver.close()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
    print(json.dumps({
        "state_gb": size / 1e9,
        "copy_seconds": statistics.median(copies),
        "blocked_seconds": statistics.median(blocked),
        "blocked / copy": statistics.median(blocked) / statistics.median(copies),
        "written_seconds": statistics.median(written),
        "restore_seconds": seconds,
        "restore_peak_gb_above_the_state": (above - size) / 1e9,
        "largest_tensor_gb": SIZE * 4 / 1e9,
    }, indent=2))


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


class Peak:
    """The most memory held while it runs, looked at every 5 ms."""

    def __init__(self):
        self._most, self._running = resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while self._running:
            self._most = max(self._most, resident())
            time.sleep(0.005)

    def stop(self) -> int:
        self._running = False
        self._thread.join()
        return self._most


if __name__ == "__main__":
    main()
