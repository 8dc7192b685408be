"""The seconds of `plan` held against step times that others published.

    pip install -e ".[pod]"
    python benchmarks/calibration.py --out runs/calibration

Each workload is a program of the same shape, written here, compiled for its slice by the TPU's
compiler and predicted by the model behind `plan`. Published: MaxText's dense decoders
(MaxText/configs/v5e/README.md, v5p/README.md and the scripts beside them), as TFLOP/s a chip,
which are seconds by its own count of the FLOPs.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from twinflow_jax.parallel.mesh import MeshConfig, make_mesh
from twinflow_jax.planning import compiling, cost, hlo, topology
from twinflow_jax.planning.topology import GIB

TOKENS, VOCAB, HEAD = 2048, 32000, 128
BLOCK = 512  # queries and keys of the attention kernel at once
CAUSAL = 0.5  # of its blocks are skipped, which the model of the kernel does not know


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A dense decoder, all parameters in float32 with Adam's moments, computing in bfloat16.

    rows: of 2,048 tokens for each chip. teraflops: published, a second and chip. tensor: chips that
    share the heads and the hidden units of a row. keeps: whether the products with weights stay
    for the backward pass, or every layer is recomputed."""

    width: int
    heads: int
    hidden: int
    layers: int
    rows: int
    teraflops: float
    tensor: int = 1
    keeps: bool = False

    @property
    def flops(self) -> float:
        """Of a step and chip, as the publisher counts them: nothing recomputed, no mask."""
        width, inner = self.width, self.heads * HEAD
        weights = self.layers * (4 * width * inner + 3 * width * self.hidden) + width * VOCAB
        attended = 12 * self.layers * TOKENS * inner
        return self.rows * TOKENS * (6 * weights + attended)

    @property
    def published(self) -> float:
        """Seconds of a step."""
        return self.flops / self.teraflops / 1e12


WORKLOADS = {  # by name, and the slice that it ran on
    "MaxText 16B, v5e-256": ("v5e:16x16", Decoder(4096, 64, 28672, 32, 6, 120)),
    "MaxText 32B, v5e-256": ("v5e:16x16", Decoder(8192, 64, 28672, 32, 4, 132)),
    "MaxText 64B, v5e-256": ("v5e:16x16", Decoder(8192, 64, 28672, 64, 2, 118)),
    "MaxText 64B, v5p-128": ("v5p:4x4x4", Decoder(8192, 64, 28672, 64, 3, 323, 4, True)),
}
# As its scripts set them.
COMMON = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
OPTIONS = {
    "v5e": COMMON,
    "v5p": COMMON | {
        "xla_tpu_megacore_fusion_allow_ags": "false",
        "xla_enable_async_collective_permute": "true",
        "xla_tpu_enable_ag_backward_pipelining": "true",
    },
}


def shapes(config: Decoder) -> dict[str, tuple[tuple[int, ...], P]]:
    """Of each weight, with how it is split: its stream over fsdp, heads and hidden over tensor."""
    width, inner, layers = config.width, config.heads * HEAD, config.layers
    into = lambda out: ((layers, width, out), P(None, "fsdp", "tensor"))
    back = lambda given: ((layers, given, width), P(None, "tensor", "fsdp"))
    return {
        "table": ((VOCAB, width), P("tensor", "fsdp")),
        "logits": ((width, VOCAB), P("fsdp", "tensor")),
        "last_norm": ((width,), P("fsdp")),
        **{name: ((layers, width), P(None, "fsdp")) for name in ("norm", "mlp_norm")},
        **{name: into(inner) for name in ("query", "key", "value")}, "out": back(inner),
        "gate": into(config.hidden), "up": into(config.hidden), "down": back(config.hidden),
    }


def attention(mesh) -> Callable:
    """Causal attention, `(q, k, v) (rows, heads, tokens, HEAD) -> the same`, a chip's own part."""
    def own(query, key, value):
        heads, tokens = query.shape[1:3]
        sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), BLOCK)
        attend = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * heads), head_shards=1,
            q_seq_shards=1,
            block_sizes=kernels.BlockSizes(**sizes, use_fused_bwd_kernel=True),
        )
        return jax.vmap(attend)(query, key, value)

    rows = P("fsdp", "tensor")
    return jax.shard_map(own, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False)


def normed(x, scale):
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale).astype(jnp.bfloat16)


def rotated(x):
    """Rotary positions, of (rows, tokens, heads, HEAD)."""
    angle = jnp.arange(TOKENS)[:, None] / 1e4 ** (jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def loss_of(config: Decoder, mesh) -> Callable:
    """`(params, tokens) -> loss`, of the tokens that come next."""
    attend, over = attention(mesh), NamedSharding(mesh, P("fsdp", None, "tensor"))
    saved = jax.checkpoint_policies
    keeps = saved.dots_with_no_batch_dims_saveable if config.keeps else saved.nothing_saveable

    def layer(x, weights):
        w = {k: v if v.ndim == 1 else v.astype(jnp.bfloat16) for k, v in weights.items()}
        given = normed(x, w["norm"])
        heads = lambda name: (given @ w[name]).reshape(*x.shape[:2], config.heads, HEAD)
        query, key = rotated(heads("query")), rotated(heads("key"))
        first = lambda a: a.transpose(0, 2, 1, 3)
        attended = first(attend(first(query / HEAD**0.5), first(key), first(heads("value"))))
        x = x + attended.reshape(*x.shape[:2], -1) @ w["out"]
        given = normed(x, w["mlp_norm"])
        x = x + (jax.nn.silu(given @ w["gate"]) * (given @ w["up"])) @ w["down"]
        return jax.lax.with_sharding_constraint(x, over), None

    def loss(params, tokens):
        stacked = {k: v for k, v in params.items() if k not in ("table", "logits", "last_norm")}
        # As a product with the tokens' one-hot rows, like the original's.
        chosen = jax.nn.one_hot(tokens[:, :-1], VOCAB, dtype=jnp.bfloat16)
        x = jax.lax.with_sharding_constraint(chosen @ params["table"].astype(jnp.bfloat16), over)
        recomputed = jax.checkpoint(layer, prevent_cse=False, policy=keeps)
        x, _ = jax.lax.scan(recomputed, x, stacked)
        x = normed(x, params["last_norm"])
        logits = (x @ params["logits"].astype(jnp.bfloat16)).astype(jnp.float32)
        logits = jax.lax.with_sharding_constraint(logits, over)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def predicted(config: Decoder, name: str, slice_name: str):
    """What the compiler makes of a step, and the model's prediction of it."""
    devices = topology.devices(topology.resolve(slice_name))
    mesh = make_mesh(
        MeshConfig(fsdp=len(devices) // config.tensor, tensor=config.tensor), devices
    )
    optimizer, loss = optax.adamw(3e-5, b2=0.95, weight_decay=0.1), loss_of(config, mesh)
    placed = lambda spec: NamedSharding(mesh, spec)
    params = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed(spec))
        for key, (shape, spec) in shapes(config).items()
    }
    layouts = jax.tree.map(lambda leaf: leaf.sharding, params)
    moments = optax.tree.map_params(
        optimizer, lambda _, like: like, jax.eval_shape(optimizer.init, params), params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placed(P())
        ),
    )
    tokens = jax.ShapeDtypeStruct(
        (config.rows * len(devices), TOKENS + 1), jnp.int32, sharding=placed(P("fsdp"))
    )

    def step(params, moments, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        gradient = jax.lax.with_sharding_constraint(gradient, layouts)
        norm = optax.global_norm(gradient)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), gradient)
        changes, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments, value

    lower = lambda: jax.jit(step, donate_argnums=(0, 1)).trace(params, moments, tokens).lower(
        lowering_platforms=("tpu",)
    )
    options = OPTIONS[slice_name.partition(":")[0]]
    made = compiling.compiled(lower, options, list(mesh.devices.flat), name)
    if made.refused:
        raise SystemExit(f"{name}: {made.refused}")
    return made, cost.predict(hlo.parse(made.text), list(mesh.devices.flat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for the results")
    parser.add_argument("--only", help="workloads whose name holds this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| workload | published s | predicted s | error | GiB | matmul | attention | "
          "collectives, of them hidden | rest |\n|---|---|---|---|---|---|---|---|---|")
    for name, (slice_name, config) in WORKLOADS.items():
        if args.only and args.only not in name:
            continue
        made, found = predicted(config, name, slice_name)
        by_name = {part.name: part for part in found.components}
        take = lambda key: by_name[key].seconds if key in by_name else 0.0  # noqa: B023
        attended = take("attention kernels") * CAUSAL
        seconds = found.overlapped - take("attention kernels") + attended
        moved = [part for part in found.components if "(" in part.name]
        all_moved, hidden = (sum(get(p) for p in moved) for get in (
            lambda p: p.seconds, lambda p: p.hidden,
        ))
        rest = seconds - take("matmul") - attended - all_moved + hidden
        error = seconds / config.published - 1
        print(f"| {name} | {config.published:.2f} | {seconds:.2f} | {error:+.0%} | "
              f"{made.peak / GIB:.1f} | {take('matmul'):.2f} | {attended:.2f} | {all_moved:.2f}, "
              f"{hidden:.2f} | {rest:.2f} |", flush=True)
        record = {"published": config.published, "predicted": seconds, "components": {
            part.name: [part.seconds, part.hidden, part.amount] for part in found.components
        }}
        file = args.out / f"{name.replace(' ', '_').replace(',', '')}.json"
        file.write_text(json.dumps(record, indent=1))
        for note in found.notes:
            print(note, file=sys.stderr)


if __name__ == "__main__":
    main()
