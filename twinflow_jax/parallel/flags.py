"""XLA's options for each TPU generation: what `train` compiles with and `plan` shows.

They are given with each compilation, so nothing has to be set in the environment. Options of one
generation are not for another: some stop its programs. What each is worth stands in
docs/benchmarks.md; v5e's compiler hides gathers without any.
"""

_FUSED_GATHERS = {  # run beside matrix products, as parts of them
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
_OFFLOADED = {  # collectives run on the SparseCores, along all axes of the torus at once
    "xla_enable_async_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disable_megacore_partitioning": "true",
}
_LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": "98304"}  # of vector memory for one operation

OPTIONS = {
    "TPU v4": _FUSED_GATHERS,
    "TPU v5": _OFFLOADED | _LARGE_TILES,
    "TPU v6 lite": _OFFLOADED,
    "TPU7x": _OFFLOADED,
}


def options(device_kind: str) -> dict[str, str]:
    """The compiler options for devices of a kind (`jax.Device.device_kind`)."""
    return OPTIONS.get(device_kind, {})
