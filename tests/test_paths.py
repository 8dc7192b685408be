"""Paths as users have them: whatever a file system takes, in every place where one is given."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import checkpoints, encode, files, sample, train
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.errors import UserError
from twinflow_jax.models.minilm_dit import tiny

# Patterns, addresses, formats, shells; the same letter in both normal forms; a long name.
ODD = "runs [v1] *?%41#{x}%s ~$HOME 'a' \"b\" `id` a:b@c \u00e9 e\u0301 " + "x" * 150

CONFIG = """
from twinflow_jax import objectives
from twinflow_jax.training import defaults

def get_config(variant="one"):
    made = defaults.get()
    made.model = {model!r}
    made.data.update(batch_size=4, text_tokens=32)
    made.objective = objectives.preset("flow_matching")
    made.train.update(steps=2, checkpoint_every=1, keep=1, log_every=1, sample_every=2)
    made.sample.update(steps=(1,), columns=1)
    return made
"""
MODEL = {
    "name": "minilm_dit", "sample_shape": (8, 8, 3), "patch": 4, "width": 16, "depth": 1,
    "heads": 2, "text_width": tiny.CONFIGS["text_encoder"]["hidden_size"], "remat": "none",
}


def test_any_path_will_do_everywhere(tmp_path, monkeypatch):
    """Odd ones in every place that takes one, each given from the home folder."""
    folder = tmp_path / ODD
    monkeypatch.setenv("HOME", str(folder))
    (folder / "in").mkdir(parents=True)
    lines = []
    for number in range(8):
        file = folder / "in" / f"[{number}] 50%.png"
        Image.fromarray(np.full((8, 8, 3), 30 * number, np.uint8)).save(file)
        lines.append(json.dumps({"image": file.name, "caption": f"grey {number}"}))
    (folder / "in" / "all.jsonl").write_text("\n".join(lines))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "config.py").write_text(CONFIG.replace("{model!r}", repr(MODEL)))
    write_random("minilm_dit", folder / "pipeline", seed=0)

    assert call(
        encode, "~/in/all.jsonl", "~/records", "--size", "8", "--min-side", "8",
        "--pipeline", "~/pipeline",
    ) == 0
    settings = [
        "--config", "~/config.py:two", "--config.pipeline=~/pipeline",
        "--config.data.records=('~/records',)",
    ]
    assert call(train, *settings, "--workdir=~/run") == 0
    assert call(train, *settings, "--workdir=~/second", "--config.train.init_from=~/run") == 0
    assert checkpoints.read_run(folder / "second").train.init_from == str(folder / "run")
    assert call(
        sample, "--checkpoint", "~/second", "--out", "~/out", "--prompts", "~/prompts.txt",
        "--save-latents", "~/latents.safetensors",
    ) == 0
    assert len(list((folder / "out").iterdir())) == 2
    made = {entry.name for entry in folder.iterdir()} - {"__pycache__"}  # Python's, of config.py
    assert made == {
        "in", "prompts.txt", "config.py", "pipeline", "records", "run", "second", "out",
        "latents.safetensors",
    }


def test_a_user_that_there_is_not():
    with pytest.raises(UserError, match="~nobody here/x names a user that there is not"):
        files.path("~nobody here/x")


@pytest.mark.parametrize("text, expanded", [
    ("~/x", "{home}/x"), ("~", "{home}"), ("a~/b", "a~/b"), ("./~", "./~"), ("$HOME/x", "$HOME/x"),
    ("gs://bucket/~", "gs://bucket/~"), ("", ""), ("a//b/", "a//b/"),
])
def test_home_is_expanded_and_nothing_else(monkeypatch, tmp_path, text, expanded):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.path(text) == expanded.format(home=tmp_path)


@pytest.mark.parametrize("text", [
    "two\nlines", "two\rlines", "http://host/x", "file:///x", "s3://bucket/x", "hf://name/x",
    "a/" + "x" * 300, "nul\0",
])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(UserError, match="path"):
        files.path(text)
