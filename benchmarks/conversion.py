"""Time and memory of twinflow convert on a synthetic folder of real width.

    python benchmarks/conversion.py [--network transformer] [--layers 18] [--dtype float32]

Writes a folder of random bfloat16 weights in the published layout (sharded safetensors with an
index), 12.3 GB by default, then runs import, verify and export on it, each in a process of its
own. For each it prints the wall time, until everything is on disk, and the process's peak
resident memory. Before each, the files are dropped from the page cache, and the disk's speed is
measured with one large file: the floor is the time in which it reads and writes as many bytes.
Takes three times the folder's size, under --folder.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from etils import epath  # noqa: E402

from twinflow_jax import models  # noqa: E402
from twinflow_jax.checkpoints import tensors  # noqa: E402
from twinflow_jax.models import names  # noqa: E402

SHARD = 5_000_000_000
BF16 = tensors.DTYPES["BF16"]
CONFIGS = {
    "transformer": ({"_class_name": "QwenImageTransformer2DModel"}, "num_layers"),
    "text_encoder": (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
            "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152_064,
        },
        "num_hidden_layers",
    ),
}
BARE = {"transformer": {}, "text_encoder": {"lm_head.weight": (152_064, 3584)}}  # only carried


def write_folder(folder: pathlib.Path, name: str, layers: int) -> dict[str, int]:
    """Writes it; returns each tensor's bytes."""
    network = models.FAMILIES["qwen_image"].text_to_image.networks[name]
    published, count = CONFIGS[name]
    published = {**published, count: layers}
    config = network.config.from_published(published)
    leaves = {k: v.shape for k, v in names.flatten(network.abstract(config)[0]).items()}
    table = network.table(config)
    shapes = table.shapes(leaves) | BARE[name]
    added = table.group(names.KNOWS_R)
    shapes = {k: (BF16, shape) for k, shape in shapes.items() if k not in added}
    sizes = {key: int(np.prod(shape)) * 2 for key, (_, shape) in shapes.items()}
    shards: list[dict] = [{}]
    for key, entry in shapes.items():
        if sum(sizes[k] for k in shards[-1]) + sizes[key] > SHARD and shards[-1]:
            shards.append({})
        shards[-1][key] = entry
    place = {}
    for i, shard in enumerate(shards):
        file = f"{network.stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors.write(epath.Path(folder / file), shard, random_weights(shard, seed=i))
        place |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
    (folder / f"{network.stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(published))
    return sizes


def random_weights(shapes: dict, seed: int) -> Iterator[np.ndarray]:
    """Normal values for each shape; each starts elsewhere in one small pool."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(1 << 24, np.float32).astype(BF16)
    for _, shape in shapes.values():
        yield np.resize(np.roll(pool, rng.integers(len(pool))), shape)


def forget(folder: pathlib.Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(arguments: list[str], parent: pathlib.Path) -> tuple[float, float, int]:
    """Runs the verb; returns seconds until all is on disk, CPU seconds, peak resident bytes."""
    forget(parent)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "twinflow_jax.convert", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        sys.exit(f"convert {' '.join(arguments)} failed")
    seconds = time.perf_counter() - begin
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def disk_speeds(folder: pathlib.Path, size: int = 1 << 30) -> tuple[float, float]:
    """Bytes per second that a large file is read and written with."""
    file, block = folder / "disk", np.random.default_rng(0).bytes(64 << 20)
    begin = time.perf_counter()
    with file.open("wb", buffering=0) as handle:
        for _ in range(size // len(block)):
            handle.write(block)
        os.fsync(handle.fileno())
    written = time.perf_counter()
    forget(folder)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as handle:
        while handle.read(len(block)):
            pass
    read = time.perf_counter() - start
    file.unlink()
    return size / read, size / (written - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=CONFIGS, default="transformer")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    parent = pathlib.Path(tempfile.mkdtemp(prefix="conversion", dir=arguments.folder))
    try:
        measure(parent, arguments.network, arguments.layers, arguments.dtype)
    finally:
        shutil.rmtree(parent)


def measure(parent: pathlib.Path, network: str, layers: int, dtype: str) -> None:
    source, ours, back = (parent / name for name in ("source", "checkpoint", "export"))
    source.mkdir()
    sizes = write_folder(source, network, layers)
    size, stored = sum(sizes.values()), sum(sizes.values()) * (2 if dtype == "float32" else 1)
    bound = (3 << 30) + 3 * max(sizes.values())
    print(
        f"{network}, {layers} layers: {size / 1e9:.2f} GB, largest tensor "
        f"{max(sizes.values()) / 1e9:.3f} GB, so the bound is {bound / 1e9:.2f} GB"
    )
    verbs = {
        "import": (["import", source, ours, "--dtype", dtype], size, stored),
        "verify": (["verify", source, ours], size + stored, 0),
        "export": (["export", ours, back], stored, size),
        "verify the export": (["verify", back, ours], size + stored, 0),
    }
    for name, (command, read, written) in verbs.items():
        read_speed, write_speed = disk_speeds(parent)
        seconds, cpu, peak = convert([str(word) for word in command], parent)
        floor = read / read_speed + written / write_speed
        print(
            f"{name}: {seconds:.1f} s (CPU {cpu:.1f}), {seconds / size * 1e9:.2f} s per GB of the "
            f"folder; peak {peak / 1e9:.2f} GB; {seconds / floor:.2f} of the floor {floor:.1f} s "
            f"({read_speed / 1e9:.2f} GB/s read, {write_speed / 1e9:.2f} written)",
            flush=True,
        )


if __name__ == "__main__":
    main()
