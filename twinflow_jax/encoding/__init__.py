"""From pictures and captions, in the forms that people have them, to training records."""

from twinflow_jax.encoding.drawn import Drawing
from twinflow_jax.encoding.encode import Job, encode
from twinflow_jax.encoding.opening import open_edits, open_source

__all__ = ["Drawing", "Job", "encode", "open_edits", "open_source"]
