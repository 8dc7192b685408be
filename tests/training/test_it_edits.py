"""A network that was trained on edits does what an instruction says to that very source."""

import json

import edits
import pytest
import studies

from twinflow_jax import config as configs
from twinflow_jax.training.loop import train


@pytest.mark.slow
def test_it_edits(tmp_path, monkeypatch):
    """One and four evaluations on digits that training never saw. Not so with another source, nor
    with instructions that were shuffled, .36 of which stay what they were."""
    changes = studies.STUDIES["edits_lora"].shared | {
        "objective.guidance": 0.5, "optimizer.warmup": 100, "train.steps": 2400,
        "train.flow_matching_steps": 1200, "train.sample_every": 2400,
        "train.checkpoint_every": 2400, "sample.steps": (1,),
    }
    run = configs.parse("configs/emoji_edit.py", [f"{key}={new}" for key, new in changes.items()])
    train(run, str(tmp_path / "run"), progress=False)
    scores = tmp_path / "scores.json"
    monkeypatch.setattr("sys.argv", [
        "edits.py", f"{tmp_path / 'run'}:1,4", "--count", "64", "--among", "64",
        "--json", str(scores),
    ])
    edits.main()
    for row in json.loads(scores.read_text())["scores"]:
        assert row["right"] >= 0.9
        assert row["another source"] <= 0.1 and row["another instruction"] <= 0.4
