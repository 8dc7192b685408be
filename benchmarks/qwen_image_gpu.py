"""Qwen-Image's transformer in one step on one GPU, side by side with diffusers' compiled one.

    pip install -e ".[test]" -c constraints.txt && pip install -U "jax[cuda12]"
    python benchmarks/qwen_image_gpu.py --json qwen_image_gpu.json

The published size with random bfloat16 weights: 1024x1024 pixels, 128 text tokens, one network
evaluation, at batch 1 and at the largest batch up to 10 that fits. Each system runs in a process of
its own, one after the other on the same card. `--layers 1 --size 64` tries it on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time

TEXT = 128
WARM, TIMED = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--batches", default="1,10,8,6,4", help="1, then the first that fits")
    parser.add_argument("--json")
    parser.add_argument("--system", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.system:
        build = {"jax": jax_step, "torch": torch_step}[args.system]
        print(json.dumps(measure(*build(args.layers, args.size), batches)))
        return
    found = {}
    for system in ("jax", "torch"):
        command = [sys.executable, __file__, *sys.argv[1:], "--system", system]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[system] = json.loads(done.stdout.splitlines()[-1])
        print(system, found[system], flush=True)
    for batch in batches:
        times = [found[system].get(str(batch), {}).get("seconds") for system in ("jax", "torch")]
        if all(times):
            print(f"batch {batch}: diffusers / ours = {times[1] / times[0]:.3f} in time")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


def measure(step, peak_bytes, is_full, batches: list[int]) -> dict[str, dict[str, float]]:
    """Median seconds and peak bytes by batch: of batch 1, and of the first other that fits.

    step(batch) runs one evaluation to its end; is_full tells errors of memory from others.
    """
    found = {}
    for batch in batches:
        if batch > 1 and any(int(done) > 1 for done in found):
            break
        try:
            begin = time.perf_counter()
            step(batch)
            first = time.perf_counter() - begin
            for _ in range(WARM):
                step(batch)
            seconds = []
            for _ in range(TIMED):
                begin = time.perf_counter()
                step(batch)
                seconds.append(time.perf_counter() - begin)
        except Exception as error:
            if not is_full(error):
                raise
            print(f"batch {batch} does not fit", file=sys.stderr)
            continue
        found[str(batch)] = {
            "seconds": sorted(seconds)[TIMED // 2], "first": first, "peak_gib": peak_bytes() / 2**30
        }
    return found


def jax_step(layers: int, size: int):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from twinflow_jax import models, sampling
    from twinflow_jax.models import names

    model = models.create({"name": "qwen_image", "layers": layers, "dtype": "bfloat16"})
    grid = sampling.few_step(1)
    flat = names.flatten(model.abstract_params())
    random = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    keys = dict(zip(flat, jax.random.split(jax.random.key(0), len(flat)), strict=True))
    params = names.unflatten({path: random(keys[path], flat[path].shape) for path in flat})

    def step(batch: int) -> None:
        shape = (batch, size // 8, size // 8, 16)
        noise = jax.random.normal(jax.random.key(1), shape)
        cond = {
            "tokens": jnp.ones((batch, TEXT, 3584), jnp.bfloat16),
            "mask": np.ones((batch, TEXT), bool),
        }
        key = jax.random.key(2)
        sampling.sample(model.apply, params, noise, cond, grid, key).block_until_ready()

    peak = lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return step, peak, lambda error: "RESOURCE_EXHAUSTED" in str(error)


def torch_step(layers: int, size: int):
    import torch
    from diffusers import QwenImageTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        network = QwenImageTransformer2DModel(num_layers=layers).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    compiled = torch.compile(network)
    side = size // 16

    @torch.no_grad()
    def step(batch: int) -> None:
        noise = torch.randn(batch, side * side, 64, device=device, dtype=torch.float32)
        out = compiled(
            hidden_states=noise.bfloat16(),
            encoder_hidden_states=torch.ones(batch, TEXT, 3584, device=device),
            encoder_hidden_states_mask=torch.ones(batch, TEXT, dtype=torch.bool, device=device),
            timestep=torch.ones(batch, device=device), img_shapes=[[(1, side, side)]] * batch,
            return_dict=False,
        )[0]
        (noise - out.float()).sum().item()

    peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: 0
    return step, peak, lambda error: isinstance(error, torch.OutOfMemoryError)


if __name__ == "__main__":
    main()
