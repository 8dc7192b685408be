"""How fast devices multiply, at best."""

PEAKS = {  # bf16 FLOP/s by jax.Device.device_kind, of published data sheets
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
    "TPU7x": 1153e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}
