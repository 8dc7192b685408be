"""Records on disk; training and encoding test what is in them."""

import numpy as np
import pytest

from twinflow_jax.data import records
from twinflow_jax.errors import UserError

MANIFEST = records.Manifest("minilm_dit", "BertModel", 4, "", 0, 1)


def test_a_file_appears_whole_or_not_at_all_and_the_disk_is_not_blamed(tmp_path):
    def examples():
        yield records.Example("a", ("text",), (np.zeros((2, 4)),))
        raise RuntimeError("RESOURCE_EXHAUSTED: out of the accelerator's memory")

    path = records.shard_file(tmp_path, records.PROMPTS, 0, 1)
    with pytest.raises(RuntimeError, match="accelerator"):
        records.write_shard(path, examples(), MANIFEST)
    with pytest.raises(UserError, match="cannot be written .*: give the same command"):
        records.write_shard(tmp_path / "gone" / "file", iter(()), MANIFEST)
    assert not list(tmp_path.iterdir())
