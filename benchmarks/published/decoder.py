"""MaxText's dense decoders: configs/v5e/README.md, v5p/README.md and the scripts beside them.

Published are TFLOP/s a chip, which are seconds by their count of the FLOPs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from published.common import OPTIONS, attention, rms, rotated
from twinflow_jax.parallel.mesh import MeshConfig, make_mesh

TOKENS, VOCAB, HEAD = 2048, 32000, 128
V5P = OPTIONS | {
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
}


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
    options: dict[str, str] = dataclasses.field(default_factory=lambda: OPTIONS)

    attended = 0.5  # the mask is causal

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
            "table": ((VOCAB, width), P("tensor", "fsdp")),
            "logits": ((width, VOCAB), P("fsdp", "tensor")),
            "last_norm": ((width,), P("fsdp")),
            **{name: ((layers, width), P(None, "fsdp")) for name in ("norm", "mlp_norm")},
            **{name: into(inner) for name in ("query", "key", "value")}, "out": back(inner),
            "gate": into(self.hidden), "up": into(self.hidden), "down": back(self.hidden),
        }
        return {name: (shape, jnp.float32, spec) for name, (shape, spec) in shapes.items()}

    def batch(self, chips: int) -> tuple[tuple[int, ...], jnp.dtype, P]:
        return (self.rows * chips, TOKENS + 1), jnp.int32, P("fsdp")

    def loss(self, mesh) -> Callable:
        """`(params, tokens) -> loss`, of the tokens that come next."""
        mask = masks.CausalMask((TOKENS, TOKENS))
        return functools.partial(
            _loss, self, attention(mesh, mask, block=512),
            NamedSharding(mesh, P("fsdp", None, "tensor")),
        )


def _loss(config: Decoder, attend: Callable, over: NamedSharding, params, tokens):
    saved = jax.checkpoint_policies
    keeps = saved.dots_with_no_batch_dims_saveable if config.keeps else saved.nothing_saveable
    angle = jnp.arange(TOKENS)[:, None] / 1e4 ** (jnp.arange(0, HEAD, 2) / HEAD)

    def layer(x, weights):
        w = {k: v if v.ndim == 1 else v.astype(jnp.bfloat16) for k, v in weights.items()}
        given = rms(x, w["norm"])
        heads = lambda name: (given @ w[name]).reshape(*x.shape[:2], config.heads, HEAD)
        query, key = rotated(heads("query"), angle), rotated(heads("key"), angle)
        first = lambda a: a.transpose(0, 2, 1, 3)
        attended = first(attend(first(query / HEAD**0.5), first(key), first(heads("value"))))
        x = x + attended.reshape(*x.shape[:2], -1) @ w["out"]
        given = rms(x, w["mlp_norm"])
        x = x + (jax.nn.silu(given @ w["gate"]) * (given @ w["up"])) @ w["down"]
        return jax.lax.with_sharding_constraint(x, over), None

    stacked = {k: v for k, v in params.items() if k not in ("table", "logits", "last_norm")}
    # As a product with the tokens' one-hot rows, like the original's.
    chosen = jax.nn.one_hot(tokens[:, :-1], VOCAB, dtype=jnp.bfloat16)
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
        "v5p:4x4x4", Decoder(8192, 64, 28672, 64, 3, 323, 4, True, V5P)
    ),
}
