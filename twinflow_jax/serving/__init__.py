"""A page in the browser that draws with checkpoints of this machine."""
