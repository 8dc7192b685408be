"""XLA's options for each TPU generation: what `train` compiles with and `plan` shows.

They are given with each compilation, so nothing has to be set in the environment. Options of one
generation are not for another: some stop its programs.
"""

_FUSED_COLLECTIVES = {  # gathers run beside matrix products
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
_LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": "98304"}  # of vector memory for one operation

OPTIONS = {
    "TPU v5": _FUSED_COLLECTIVES | _LARGE_TILES,
}


def options(device_kind: str) -> dict[str, str]:
    """The compiler options for devices of a kind (`jax.Device.device_kind`)."""
    return OPTIONS.get(device_kind, {})
