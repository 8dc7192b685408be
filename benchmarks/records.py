"""How fast records are read: batches a second of what Qwen-Image, SANA and the emoji train on.

    python benchmarks/records.py [--folder FOLDER]

Writes records of random numbers in the form that twinflow encode gives them, reads batches of
them as training does, without a network, and prints records per second and megabytes per second.
"""

import argparse
import pathlib
import tempfile
import time
import types

import numpy as np

from twinflow_jax import data
from twinflow_jax.data import records
from twinflow_jax.data.batches import AHEAD
from twinflow_jax.training import records as training_records

# name: (sample shape, downscale, autoencoder, text width, tokens a caption, that training takes)
KINDS = {
    "Qwen-Image, 512x512": ((64, 64, 16), 8, "random", 3584, 120, 512),
    "Qwen-Image, 1024x1024": ((128, 128, 16), 8, "random", 3584, 120, 512),
    "SANA, 512x512": ((16, 16, 32), 32, "random", 2304, 120, 300),
    "SANA, 1024x1024": ((32, 32, 32), 32, "random", 2304, 120, 300),
    "emoji, 32x32": ((32, 32, 3), 1, "", 384, 10, 16),
}
COUNT, BATCH, SECONDS = 512, 32, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, help="to write to (default: temporary)")
    args = parser.parse_args()
    print("| records | kB each | records/s | MB/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, kind in KINDS.items():
            size = write(pathlib.Path(folder) / name, *kind[:5])
            rate = read(pathlib.Path(folder) / name, kind[0], kind[3], kind[5])
            cells = (name, f"{size / 1e3:.0f}", f"{rate:.0f}", f"{rate * size / 1e6:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def write(folder, shape, downscale: int, autoencoder: str, width: int, tokens: int) -> float:
    """Writes COUNT records; returns the bytes of one."""
    folder.mkdir(parents=True)
    manifest = records.Manifest("random", "random", width, autoencoder, shape[2], downscale)
    rng = np.random.default_rng(0)
    split = f"{shape[1] * downscale}x{shape[0] * downscale}"

    def examples():
        for number in range(COUNT):
            sample = rng.uniform(-1, 1, shape).astype(np.float32)
            text = rng.standard_normal((tokens, width), np.float32)
            yield records.Example(str(number), ["random"], [text], sample, (64, 64))

    path = records.shard_file(folder, split, 0, 1)
    written = records.write_shard(path, examples(), manifest)
    records.finish(folder, manifest, {split: [(COUNT, written)]}, {})
    return written / COUNT


def read(folder, shape, width: int, tokens: int) -> float:
    """Records read per second."""
    settings = types.SimpleNamespace(sample_shape=shape, text_width=width, dtype="bfloat16")
    opened = [records.open_records(folder)]
    streams = training_records.streams(opened, (), settings, (tokens,))
    batches = data.batches(tuple(streams.values()), BATCH, seed=0)
    for _ in range(2 * AHEAD):  # what was read before the clock starts
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
