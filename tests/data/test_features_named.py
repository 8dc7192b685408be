"""Reading a dataset runs no code that its folder brings."""

import json

import numpy as np
import pytest

from twinflow_jax.data import features, records
from twinflow_jax.errors import UserError


@pytest.mark.parametrize("hidden", [False, True])
def test_modules_that_a_folder_names_are_not_imported(tmp_path, monkeypatch, hidden):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    manifest = records.Manifest("minilm_dit", "BertModel", 4, "", 0, 1)
    (tmp_path / "set").mkdir()
    file = records.shard_file("set", records.PROMPTS, 0, 1)
    one = records.Example("a", ("text",), (np.zeros((2, 4)),))
    size = records.write_shard(file, [one], manifest)
    records.finish("set", manifest, {records.PROMPTS: [(1, size)]}, {})
    features.check("set")
    (tmp_path / "set/payload.py").write_text("open('ran', 'w')")
    bad = {"pythonClassName": "set.payload.Feature", "jsonFeature": {"json": "{}"}}
    if hidden:
        own = "tensorflow_datasets.core.features.text_feature.Text"
        bad = {"pythonClassName": own, "jsonFeature": {"json": json.dumps({"f": bad})}}
    (tmp_path / "set/features.json").write_text(json.dumps(bad))
    with pytest.raises(UserError, match="set.payload.Feature"):
        records.open_records("set").splits  # noqa: B018
    assert not (tmp_path / "ran").exists()
