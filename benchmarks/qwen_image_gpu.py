"""Qwen-Image's transformer in one step on one GPU, side by side with diffusers' compiled one.

    pip install -e ".[test]" -c constraints.txt && pip install -U "jax[cuda12]"
    python benchmarks/qwen_image_gpu.py --json qwen_image_gpu.json

The published size with random bfloat16 weights: 1024x1024 pixels, 128 text tokens, one network
evaluation, at batch 1 and at the largest batch up to 10 that fits. `--layers 1 --size 64` tries it
on a CPU.
"""

import argparse
import json
import sys

import side_by_side

TEXT, WIDTH = 128, 3584


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
    found = side_by_side.run_each(("jax", "torch"), __file__)
    for batch in found["jax"].keys() & found["torch"].keys():
        ours, theirs = (found[system][batch]["seconds"] for system in ("jax", "torch"))
        print(f"batch {batch}: diffusers / ours = {theirs / ours:.3f} in time")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


def measure(step, peak_gib, batches: list[int]) -> dict[str, dict[str, float]]:
    """By batch: of batch 1, and of the first other that fits. step(batch) is one evaluation."""
    found = {}
    for batch in batches:
        if batch > 1 and any(int(done) > 1 for done in found):
            break
        try:
            found[str(batch)] = side_by_side.measure(lambda batch=batch: step(batch))
        except Exception as error:
            if not side_by_side.is_full(error):
                raise
            print(f"batch {batch} does not fit", file=sys.stderr)
            continue
        found[str(batch)]["peak_gib"] = peak_gib()
    return found


def jax_step(layers: int, size: int):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from twinflow_jax import models, sampling

    model = models.create({"name": "qwen_image", "layers": layers, "dtype": "bfloat16"})
    grid, params = sampling.few_step(1), side_by_side.random_params(model.abstract_params())

    def step(batch: int) -> None:
        noise = jax.random.normal(jax.random.key(1), (batch, size // 8, size // 8, 16))
        tokens = jnp.ones((batch, TEXT, WIDTH), jnp.bfloat16)
        cond = {"tokens": tokens, "mask": np.ones((batch, TEXT), bool)}
        key = jax.random.key(2)
        sampling.sample(model.apply, params, noise, cond, grid, key).block_until_ready()

    return step, side_by_side.jax_peak_gib


def torch_step(layers: int, size: int):
    import torch
    from diffusers import QwenImageTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
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
            encoder_hidden_states=torch.ones(batch, TEXT, WIDTH, device=device),
            encoder_hidden_states_mask=torch.ones(batch, TEXT, dtype=torch.bool, device=device),
            timestep=torch.ones(batch, device=device), img_shapes=[[(1, side, side)]] * batch,
            return_dict=False,
        )[0]
        (noise - out.float()).sum().item()

    return step, side_by_side.torch_peak_gib


if __name__ == "__main__":
    main()
