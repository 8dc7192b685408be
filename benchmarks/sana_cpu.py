"""SANA-0.6B and DC-AE at their published size on a CPU, side by side with PyTorch.

    python benchmarks/sana_cpu.py parity    # import, sample at 1 and 2 NFE, export: about 10 GB of
                                            # disk and of memory, a few minutes
    python benchmarks/sana_cpu.py speed     # forward, forward and backward, decode; and of what
                                            # a gradient consists: products, stacks of layers

parity writes a pipeline folder with random weights through diffusers itself (the published
transformer with a second embedder, the published autoencoder, a two-layer Gemma of the published
width), imports it, samples 512x512 pixels with the command line, and computes the same in PyTorch
with the same noise. speed takes both from one process in turns, the same weights, threads and
shapes, float32.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.models.normalization import AdaLayerNormSingle
from safetensors.numpy import load_file
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from twinflow_jax.models import names
from twinflow_jax.models.sana import NETWORKS, tiny
from twinflow_jax.sampling import few_step

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRANSFORMER = {
    "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
    "cross_attention_dim": 1152, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "caption_channels": 2304, "sample_size": 16,
}
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
AUTOENCODER = {
    "attention_head_dim": 32, "latent_channels": 32, "scaling_factor": 0.41407,
    "encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
}
PROMPTS = ("a red fox in fresh snow", "two lighthouses")
SIZE, LATENTS = 512, 16
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("parity", "speed"))
    what = parser.parse_args().what
    torch.manual_seed(0)
    with torch.no_grad():
        transformer = randomised(SanaTransformer2DModel(**TRANSFORMER))
    {"parity": parity, "speed": speed}[what](transformer)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Random values for every tensor, scaled so that signals survive."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def add_second_embedder(module: torch.nn.Module) -> None:
    """TwinFlow's E1(t) + E2(r) (t - r), both outputs; module.r is the target time."""
    module.time_embed_2 = randomised(AdaLayerNormSingle(TRANSFORMER["cross_attention_dim"]))

    def add(_, inputs, outputs):
        t = inputs[0] / 1000
        second = module.time_embed_2(1000 * module.r, hidden_dtype=torch.float32)
        return tuple(a + b * (t - module.r)[:, None] for a, b in zip(outputs, second, strict=True))

    module.time_embed.register_forward_hook(add)


@torch.no_grad()
def parity(transformer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        add_second_embedder(transformer)
        pipeline = write(root, transformer)
        convert = [sys.executable, str(ROOT / "tools" / "convert.py")]
        run([*convert, "import", str(root / "source"), str(root / "imported")])
        for steps in (1, 2):
            grid = few_step(steps)
            run([
                sys.executable, "-m", "twinflow_jax.sample", "--checkpoint", str(root / "imported"),
                "--out", str(root / "out"), "--steps", str(steps), "--dtype", "float32",
                "--save-latents", str(root / "latents.safetensors"),
                *(word for prompt in PROMPTS for word in ("--prompt", prompt)),
            ])
            ours = load_file(root / "latents.safetensors")["latents"]
            theirs = np.concatenate([sample(pipeline, prompt, grid) for prompt in PROMPTS])
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            print(f"{steps} NFE at {SIZE}x{SIZE}: relative error of the latents {error:.2e}")
            assert error <= 1e-4
        run([*convert, "export", str(root / "imported"), str(root / "exported")])
        for file in sorted((root / "source").glob("*/*.safetensors")):
            before = load_file(file)
            after = load_file(root / "exported" / file.relative_to(root / "source"))
            same = before.keys() == after.keys() and all(
                before[key].tobytes() == after[key].tobytes() for key in before
            )
            print(f"{file.parent.name}: {len(before)} tensors, byte-identical: {same}")
            assert same


def write(root: pathlib.Path, transformer) -> SanaPipeline:
    """The pipeline folder; returns what is in it."""
    tiny.save_tokenizer(root / "tokenizer")
    text = Gemma2Model(Gemma2Config(
        vocab_size=tiny.TOKENS, hidden_size=2304, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, intermediate_size=1024, attn_implementation="eager",
    )).eval()
    pipeline = SanaPipeline(
        PreTrainedTokenizerFast.from_pretrained(root / "tokenizer"), text,
        randomised(AutoencoderDC(**AUTOENCODER)), transformer,
        DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )
    pipeline.save_pretrained(root / "source")
    return pipeline


def sample(pipeline: SanaPipeline, prompt: str, grid) -> np.ndarray:
    """The any-step sampler in PyTorch: latents (1, h, w, 32), of our noise for seed 0."""
    tokens, mask, *_ = pipeline.encode_prompt(
        prompt, False, complex_human_instruction=tiny.INSTRUCTION.split("\n")
    )
    shape = (LATENTS, LATENTS, 32)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    normal = lambda key: torch.tensor(np.array(jax.random.normal(key, shape))).permute(2, 0, 1)
    x = normal(keys[0])[None]
    for i, (now, then) in enumerate(zip(grid.times[:-1], grid.times[1:], strict=True)):
        pipeline.transformer.r = torch.tensor([grid.target(i)], dtype=torch.float32)
        t = torch.tensor([now], dtype=torch.float32)
        velocity = pipeline.transformer(
            x, encoder_hidden_states=tokens, encoder_attention_mask=mask, timestep=1000 * t
        ).sample
        data, noise = x - now * velocity, x + (1 - now) * velocity
        share = grid.stochastic[i]
        fresh = normal(jax.random.fold_in(keys[1], i))[None]
        x = (1 - then) * data + then * ((1 - share) ** 0.5 * noise + share**0.5 * fresh)
    return data.permute(0, 2, 3, 1).numpy()


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")


def speed(transformer) -> None:
    """Times in turns, and their ratio."""
    threads = torch.get_num_threads()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, LATENTS, LATENTS, 32)).astype(np.float32)
    tokens = rng.standard_normal((1, 300, 2304)).astype(np.float32)
    config = NETWORKS["transformer"].config(time_conditioning="half_r")
    params = converted("transformer", config, transformer)
    module = NETWORKS["transformer"].module(config)
    cond = {"tokens": tokens, "mask": np.ones((1, 300), bool)}
    half = np.full((1,), 0.5, np.float32)
    forward = lambda params: module.apply({"params": params}, x, half, half, cond)
    loss = lambda params: jnp.mean(forward(params) ** 2)
    theirs = {
        "hidden_states": torch.tensor(x).permute(0, 3, 1, 2), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.tensor(tokens),
        "encoder_attention_mask": torch.ones(1, 300, dtype=torch.long),
    }

    def backward():
        transformer.zero_grad()
        (transformer(**theirs).sample ** 2).mean().backward()

    found = {"threads": threads}
    ours = jax.jit(forward)
    found["forward"] = ratio(lambda: ours(params).block_until_ready(),
                             without_grad(lambda: transformer(**theirs)))
    ours = jax.jit(jax.grad(loss))
    found["forward+backward"] = ratio(lambda: jax.block_until_ready(ours(params)), backward)

    with torch.no_grad():
        vae = randomised(AutoencoderDC(**AUTOENCODER))
    config = NETWORKS["vae"].config()
    params = converted("vae", config, vae)
    decoder = NETWORKS["vae"].module(config)
    ours = jax.jit(lambda params: decoder.apply({"params": params}, x, method="decode"))
    latents = torch.tensor(x).permute(0, 3, 1, 2)
    found["decode"] = ratio(lambda: ours(params).block_until_ready(),
                            without_grad(lambda: vae.decode(latents)))
    del params, vae, transformer
    found |= pieces(rng)
    print(json.dumps(found, indent=2))


def pieces(rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """A projection's three products, and a pass over a stack of layers one by one."""
    tokens, width, hidden, layers = 256, 1152, 5760, 28
    x, w, g = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((tokens, width), (width, hidden), (tokens, hidden))
    )
    stack = rng.standard_normal((layers, width, hidden)).astype(np.float32)
    products = jax.jit(lambda x, w, g: (x @ w, g @ w.T, x.T @ g))
    by_layer = jax.jit(lambda stack: jax.lax.map(lambda layer: 2 * layer, stack))
    tx, tw, tg, one_by_one = (torch.tensor(a) for a in (x, w, g, stack))
    return {
        "products of a projection": ratio(
            lambda: jax.block_until_ready(products(x, w, g)),
            lambda: (tx @ tw, tg @ tw.T, tx.T @ tg),
        ),
        "a stack of layers, one by one": ratio(
            lambda: by_layer(stack).block_until_ready(),
            lambda: [2 * layer for layer in one_by_one],
        ),
    }


def without_grad(step):
    def run():
        with torch.no_grad():
            step()
    return run


def converted(name: str, config, module: torch.nn.Module):
    """A PyTorch module's weights as our parameters."""
    network = NETWORKS[name]
    state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    flat = {}
    table = network.table(config)
    for rule in table.rules:
        leaves = [rule.ours(state[key]) for key in table.keys(rule)]
        flat[rule.path] = jnp.asarray(np.stack(leaves) if rule.stacked else leaves[0])
    return names.unflatten(flat)


def ratio(ours, theirs) -> dict[str, float]:
    """Median seconds of each, measured in turns, after one call that warms up."""
    ours(), theirs()
    seconds = {"ours": [], "pytorch": []}
    for _ in range(TURNS):
        for name, step in (("ours", ours), ("pytorch", theirs)):
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"ours / pytorch": medians["ours"] / medians["pytorch"]}


if __name__ == "__main__":
    main()
