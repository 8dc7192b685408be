"""MaxText's dense decoders: configs/v5e/README.md, v5p/README.md and the scripts beside them, and
tpu-recipes' training/trillium/Llama3.1-8B-MaxText/v6e-8 (3.443 s).

Published are TFLOP/s a chip, which are seconds by their count of the FLOPs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from published.common import OPTIONS, attention, rms, rotated
from twinflow_jax.parallel.mesh import MeshConfig, make_mesh

HEAD = 128
V6E = OPTIONS | {
    "xla_tpu_scoped_vmem_limit_kib": "98304",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disjoint_spmem": "false",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_enable_all_experimental_scheduler_features": "true",
    "xla_tpu_enable_scheduler_memory_pressure_tracking": "true",
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
    "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
    "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
    "xla_max_concurrent_host_send_recv": "100",
    "xla_tpu_scheduler_percent_shared_memory_limit": "100",
    "xla_latency_hiding_scheduler_rerun": "2",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
V5P = OPTIONS | {
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A dense decoder, all parameters in float32 with Adam's moments, computing in bfloat16.

    rows: of so many tokens for each chip. teraflops: published, a second and chip. tensor: chips
    that share the heads and the hidden units of a row. keeps: for the backward pass, "nothing",
    the "products" with weights, or attention's beside a layer's input on the "host". kv_heads: of
    keys and values, 0 for as many as queries have. block: of the attention kernel."""

    width: int
    heads: int
    hidden: int
    layers: int
    rows: int
    teraflops: float
    tensor: int = 1
    keeps: str = "nothing"
    tokens: int = 2048
    vocab: int = 32000
    kv_heads: int = 0
    block: int = 512
    options: dict[str, str] = dataclasses.field(default_factory=lambda: OPTIONS)

    attended = 0.5  # the mask is causal

    @property
    def flops(self) -> float:
        """Of a step and chip, as the publisher counts them: nothing recomputed, no mask."""
        width, inner = self.width, self.heads * HEAD
        layer = 2 * width * (inner + self.narrow) + 3 * width * self.hidden
        attended = 12 * self.layers * self.tokens * inner
        return self.rows * self.tokens * (6 * (self.layers * layer + width * self.vocab) + attended)

    @property
    def narrow(self) -> int:
        """Width of all keys, and of all values."""
        return (self.kv_heads or self.heads) * HEAD

    @property
    def published(self) -> float:
        """Seconds of a step."""
        return self.flops / self.teraflops / 1e12

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(3e-5, b2=0.95, weight_decay=0.1)
        )

    def mesh(self, devices):
        return make_mesh(
            MeshConfig(fsdp=len(devices) // self.tensor, tensor=self.tensor), devices
        )

    def parameters(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype, P]]:
        """Of each weight, with its layout: its stream over fsdp, heads and hidden over tensor."""
        width, inner, layers = self.width, self.heads * HEAD, self.layers
        into = lambda out: ((layers, width, out), P(None, "fsdp", "tensor"))
        back = lambda given: ((layers, given, width), P(None, "tensor", "fsdp"))
        shapes = {
            "table": ((self.vocab, width), P("tensor", "fsdp")),
            "logits": ((width, self.vocab), P("fsdp", "tensor")),
            "last_norm": ((width,), P("fsdp")),
            **{name: ((layers, width), P(None, "fsdp")) for name in ("norm", "mlp_norm")},
            **{name: into(self.narrow) for name in ("key", "value")},
            "query": into(inner), "out": back(inner),
            "gate": into(self.hidden), "up": into(self.hidden), "down": back(self.hidden),
        }
        return {name: (shape, jnp.float32, spec) for name, (shape, spec) in shapes.items()}

    def batch(self, chips: int) -> tuple[tuple[int, ...], jnp.dtype, P]:
        return (self.rows * chips, self.tokens + 1), jnp.int32, P("fsdp")

    def loss(self, mesh) -> Callable:
        """`(params, tokens) -> loss`, of the tokens that come next."""
        mask = masks.CausalMask((self.tokens, self.tokens))
        return functools.partial(
            _loss, self, attention(mesh, mask, self.block),
            NamedSharding(mesh, P("fsdp", None, "tensor")),
        )


def _loss(config: Decoder, attend: Callable, over: NamedSharding, params, tokens):
    saved = jax.checkpoint_policies
    keeps = {
        "nothing": saved.nothing_saveable, "products": saved.dots_with_no_batch_dims_saveable,
        "host": saved.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["kept"],
            offload_src="device", offload_dst="pinned_host",
        ),
    }[config.keeps]
    kept = (lambda a: checkpoint_name(a, "kept")) if config.keeps == "host" else (lambda a: a)
    angle = jnp.arange(config.tokens)[:, None] / 1e4 ** (jnp.arange(0, HEAD, 2) / HEAD)

    def layer(x, weights):
        w = {k: v if v.ndim == 1 else v.astype(jnp.bfloat16) for k, v in weights.items()}
        x = kept(x)
        given = rms(x, w["norm"])
        heads = lambda name: kept(given @ w[name]).reshape(*x.shape[:2], -1, HEAD)
        query, key = rotated(heads("query"), angle), rotated(heads("key"), angle)
        first = lambda a: a.transpose(0, 2, 1, 3)
        attended = first(attend(first(query / HEAD**0.5), first(key), first(heads("value"))))
        x = x + kept(attended.reshape(*x.shape[:2], -1) @ w["out"])
        given = rms(x, w["mlp_norm"])
        x = x + (jax.nn.silu(given @ w["gate"]) * (given @ w["up"])) @ w["down"]
        return jax.lax.with_sharding_constraint(x, over), None

    stacked = {k: v for k, v in params.items() if k not in ("table", "logits", "last_norm")}
    # As a product with the tokens' one-hot rows, like the original's.
    chosen = jax.nn.one_hot(tokens[:, :-1], config.vocab, dtype=jnp.bfloat16)
    x = jax.lax.with_sharding_constraint(chosen @ params["table"].astype(jnp.bfloat16), over)
    recomputed = jax.checkpoint(layer, prevent_cse=False, policy=keeps)
    x, _ = jax.lax.scan(recomputed, x, stacked)
    x = rms(x, params["last_norm"])
    logits = (x @ params["logits"].astype(jnp.bfloat16)).astype(jnp.float32)
    logits = jax.lax.with_sharding_constraint(logits, over)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


WORKLOADS = {  # by name, and the slice that it ran on
    "MaxText 16B, v5e-256": ("v5e:16x16", Decoder(4096, 64, 28672, 32, 6, 120)),
    "MaxText 32B, v5e-256": ("v5e:16x16", Decoder(8192, 64, 28672, 32, 4, 132)),
    "MaxText 64B, v5e-256": ("v5e:16x16", Decoder(8192, 64, 28672, 64, 2, 118)),
    "MaxText 64B, v5p-128": (
        "v5p:4x4x4", Decoder(8192, 64, 28672, 64, 3, 323, 4, "products", options=V5P)
    ),
    "MaxText Llama 8B, v6e-8": ("v6e:2x4", Decoder(
        4096, 32, 14336, 32, 3, 413.433, keeps="host", tokens=8192, vocab=128256, kv_heads=8,
        block=2048, options=V6E,
    )),
}
