"""Steps whose seconds others published, as programs of the same shape, for calibration.py.

Each workload knows its `published` seconds, its `mesh`, its `parameters` and `batch` (shapes with
their layouts), its `optimizer`, `loss` and compiler `options`, and which share of the attention
kernel's blocks it computes (`attended`).
"""
