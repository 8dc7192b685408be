"""SANA at 1024x1024 on one GPU, side by side with diffusers and torch.compile.

    pip install -e ".[test]" -c constraints.txt && pip install -U "jax[cuda12]"
    python benchmarks/sana_gpu.py --model 0.6B --json sana_gpu_06b.json
    python benchmarks/sana_gpu.py --model 1.6B --json sana_gpu_16b.json

The paper's Table 4: bfloat16, throughput at batch 10 and latency at batch 1, at 1 and 2 network
evaluations, text encoder and decoder included, and each stage apart. Random weights at the
published sizes. `--tiny` tries it on a CPU.
"""

import argparse
import json

import side_by_side

SIZES = {
    "0.6B": {"layers": 28, "heads": 36, "cross_heads": 16, "cross_head_dim": 72},
    "1.6B": {"layers": 20, "heads": 70, "cross_heads": 20, "cross_head_dim": 112},
}
TEXT_TOKENS = 569  # of a prompt with the instruction before it
STAGES = ("text", "denoise 1", "denoise 2", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="0.6B")
    parser.add_argument("--batches", default="1,10")
    parser.add_argument("--tiny", action="store_true", help="one layer each, 64 pixels")
    parser.add_argument("--json")
    parser.add_argument("--system", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.system:
        build, peak = {
            "jax": (jax_stages, side_by_side.jax_peak_gib),
            "torch": (torch_stages, side_by_side.torch_peak_gib),
        }[args.system]
        stages = build(SIZES[args.model] | ({"layers": 1} if args.tiny else {}), args.tiny)
        found = {
            str(batch): {
                name: side_by_side.measure(lambda s=stage, b=batch: s(b))
                for name, stage in stages.items()
            }
            for batch in batches
        }
        print(json.dumps(found | {"peak_gib": peak()}))
        return
    found = side_by_side.run_each(("jax", "torch"), __file__)
    for batch in map(str, batches):
        seconds = {
            system: {stage: found[system][batch][stage]["seconds"] for stage in STAGES}
            for system in found
        }
        for stage in STAGES:
            ratio = seconds["torch"][stage] / seconds["jax"][stage]
            print(f"batch {batch}, {stage}: diffusers / ours = {ratio:.3f}")
        for nfe in (1, 2):
            whole = {
                system: s["text"] + s[f"denoise {nfe}"] + s["decode"]
                for system, s in seconds.items()
            }
            print(
                f"batch {batch}, {nfe} NFE whole: ours {int(batch) / whole['jax']:.2f} images/s, "
                f"diffusers / ours = {whole['torch'] / whole['jax']:.3f}"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


def jax_stages(size: dict, tiny: bool) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from twinflow_jax import models, sampling
    from twinflow_jax.models import sana

    side = 2 if tiny else 32
    model = models.create(
        {"name": "sana", "sample_shape": (side, side, 32), "dtype": "bfloat16"} | size
    )
    params = side_by_side.random_params(model.abstract_params())
    text_network, vae_network = sana.NETWORKS["text_encoder"], sana.NETWORKS["vae"]
    text = text_network.config(dtype="bfloat16", **({"layers": 1} if tiny else {}))
    text_params = side_by_side.random_params(text_network.abstract(text)[0])
    vae = vae_network.config(dtype="bfloat16")
    vae_params = side_by_side.random_params(vae_network.abstract(vae)[0])
    embed = jax.jit(lambda params, ids, mask: sana.embed(text, params, ids, mask))
    decoder = vae_network.module(vae)
    decode = jax.jit(lambda params, z: decoder.apply({"params": params}, z, method="decode"))

    def encode_text(batch: int) -> None:
        ids = np.ones((batch, TEXT_TOKENS), np.int32)
        jax.block_until_ready(embed(text_params, ids, ids > 0))

    def denoise(batch: int, steps: int) -> None:
        noise = jax.random.normal(jax.random.key(0), (batch, *model.sample_shape))
        tokens = jnp.ones((batch, 300, 2304), jnp.bfloat16)
        cond = {"tokens": tokens, "mask": np.ones((batch, 300), bool)}
        grid = sampling.few_step(steps)
        key = jax.random.key(1)
        sampling.sample(model.apply, params, noise, cond, grid, key).block_until_ready()

    return {
        "text": encode_text, "denoise 1": lambda batch: denoise(batch, 1),
        "denoise 2": lambda batch: denoise(batch, 2),
        "decode": lambda batch: decode(
            vae_params, jnp.ones((batch, *model.sample_shape), jnp.float32)
        ).block_until_ready(),
    }


def torch_stages(size: dict, tiny: bool) -> dict:
    import torch
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from sana_cpu import AUTOENCODER
    from transformers import Gemma2Config, Gemma2Model

    side = 2 if tiny else 32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    width = size["heads"] * 32
    with torch.device(device):
        transformer = SanaTransformer2DModel(
            num_layers=size["layers"], num_attention_heads=size["heads"], attention_head_dim=32,
            num_cross_attention_heads=size["cross_heads"], cross_attention_dim=width,
            cross_attention_head_dim=size["cross_head_dim"], caption_channels=2304,
        )
        text = Gemma2Model(Gemma2Config(
            vocab_size=256000, hidden_size=2304, num_hidden_layers=1 if tiny else 26,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256, intermediate_size=9216,
            attn_implementation="eager",
        ))
        vae = AutoencoderDC(**AUTOENCODER)
    transformer, text, decode = (
        torch.compile(module) for module in (transformer.eval(), text.eval(), vae.eval().decode)
    )
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.no_grad()
    def encode_text(batch: int) -> None:
        ids = torch.ones(batch, TEXT_TOKENS, dtype=torch.long, device=device)
        text(input_ids=ids, attention_mask=ids)
        sync()

    @torch.no_grad()
    def denoise(batch: int, steps: int) -> None:
        x = torch.randn(batch, 32, side, side, device=device, dtype=torch.float32)
        tokens = torch.ones(batch, 300, 2304, device=device)
        mask = torch.ones(batch, 300, dtype=torch.long, device=device)
        for t in torch.linspace(1, 0, steps + 1)[:-1].tolist():
            v = transformer(
                x.bfloat16(), encoder_hidden_states=tokens, encoder_attention_mask=mask,
                timestep=torch.full((batch,), 1000 * t, device=device), return_dict=False,
            )[0]
            x = x - v.float() / steps
        sync()

    @torch.no_grad()
    def decode_latents(batch: int) -> None:
        decode(torch.ones(batch, 32, side, side, device=device))
        sync()

    return {
        "text": encode_text, "denoise 1": lambda batch: denoise(batch, 1),
        "denoise 2": lambda batch: denoise(batch, 2), "decode": decode_latents,
    }


if __name__ == "__main__":
    main()
