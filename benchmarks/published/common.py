"""What the restated programs share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

# Options of XLA that the publishers' scripts set on every generation.
OPTIONS = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}


def attention(mesh, mask, block: int) -> Callable:
    """`(q, k, v) (rows, heads, tokens, depth) -> the same`, a chip's own rows and heads.

    mask: of the kernel, (queries, keys). block: queries and keys of the kernel at once.
    """
    def own(query, key, value):
        sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block)
        attend = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[1]), head_shards=1, q_seq_shards=1,
            block_sizes=kernels.BlockSizes(**sizes, use_fused_bwd_kernel=True),
        )
        return jax.vmap(attend)(query, key, value)

    rows = P("fsdp", "tensor")
    return jax.shard_map(own, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False)


def rms(x, scale):
    """Root-mean-square norm over the last axis, computed in float32."""
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale).astype(jnp.bfloat16)


def rotated(x, angle):
    """Rotary positions. x: (rows, tokens, heads, depth); angle: (tokens, depth / 2)."""
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
