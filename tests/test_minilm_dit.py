"""minilm_dit end to end: its text encoder's folder in and out, training, pictures of prompts."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from tests.qwen_folder import randomise
from tests.test_text_to_image import draw
from tests.test_verbs import call
from twinflow_jax import checkpoints, objectives, sample
from twinflow_jax.checkpoints import exporting, imported, importing
from twinflow_jax.config import Run
from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.errors import UserError
from twinflow_jax.models.minilm_dit import tiny
from twinflow_jax.training import defaults
from twinflow_jax.training.loop import train

MODEL = {
    "name": "minilm_dit", "sample_shape": (8, 8, 3), "patch": 2, "width": 32, "depth": 2,
    "heads": 2, "text_width": tiny.CONFIGS["text_encoder"]["hidden_size"], "remat": "none",
}


def config(**model):
    made = defaults.get()
    made.pipeline = "random"
    made.data.update(name="digits", batch_size=16, text_tokens=32)
    made.model = MODEL | model
    made.objective = objectives.preset("released", merge_passes=True)  # compiles sooner
    made.train.update(
        steps=3, condition_dropout=0.1, log_every=1, sample_every=3, checkpoint_every=3
    )
    made.optimizer.learning_rate = 0.03  # so that a few steps show
    made.sample.update(steps=(1,), columns=1, prompts=("the handwritten digit two",))
    return Run.of(made.to_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published folder: the text encoder with, beside it, its tokenizer."""
    folder = tmp_path_factory.mktemp("minilm") / "published"
    tiny.save_tokenizer(folder)
    published = transformers.BertConfig(**tiny.CONFIGS["text_encoder"])
    model = randomise(transformers.BertModel(published), 0)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    older = {"embeddings.position_ids": torch.arange(256)[None]}  # as published, an integer tensor
    tensors = safetensors.torch.load_file(file) | older
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    target = folder.parent / "checkpoint"
    return importing.import_folder(str(folder), str(target), progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that made its own text encoder."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config(), str(workdir), progress=False)
    return workdir


def test_a_folder_goes_in_and_comes_back(folder, checkpoint, tmp_path):
    assert checkpoint.family == "minilm_dit" and checkpoint.parts == ("text_encoder",)
    exporting.export_folder(checkpoint, str(tmp_path / "back"), progress=False)
    for file in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes(), file
    configs = [f / "config.json" for f in (folder, tmp_path / "back")]
    before, after = (json.loads(file.read_text()) for file in configs)
    assert before == after
    found = exporting.compare(str(folder), checkpoint, progress=False)["text_encoder"]
    assert found.identical == 40 and not found.lines


def test_prompts_of_a_pipeline_folder_are_the_same(folder, checkpoint, tmp_path):
    """text_encoder/ and tokenizer/, without the networks that are never published."""
    (tmp_path / "published").mkdir()
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "published" / part).symlink_to(folder)
    again = importing.import_folder(
        str(tmp_path / "published"), str(tmp_path / "checkpoint"), progress=False
    )
    one, other = (
        text.embed(Pipeline(each, "float32", progress=False), ["A fox", "two"], negative="")
        for each in (checkpoint, again)
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.tokens.shape == (3, 16, 48) and one.mask.sum(axis=1).tolist() == [6, 5, 2]
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        inputs = tokenizer("A fox", return_tensors="pt", return_token_type_ids=False)
        theirs = model(**inputs).last_hidden_state[0].numpy()
    np.testing.assert_allclose(one.tokens[0, :6], theirs, atol=1e-5)


def test_a_run_draws_its_prompts(run, checkpoint, tmp_path, capsys):
    """With its own text encoder, or with another one."""
    assert imported.open_imported(run / "random").parts == ("text_encoder",)
    with Image.open(run / "samples/step_000003.png") as picture:
        assert "handwritten digit two" in picture.text["rows"]
    prompts = ["--prompt", "one", "--prompt", "another", "--raw"]
    one, other = draw(run, tmp_path / "own", *prompts, size=(8, 12))
    again = draw(
        run, tmp_path / "other", *prompts, "--pipeline", str(checkpoint.folder), size=(8, 12)
    )
    assert one.shape == (8, 12, 3) and one.std() > 20
    assert np.abs(one - other).max() > 1 and np.abs(one - again[0]).max() > 1
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--prompt", "two"]
    assert call(sample, *arguments, "--size", "7") == 2
    assert "not divisible by 2" in capsys.readouterr().err


def test_a_text_encoder_alone_draws_nothing(run, checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint.folder), "--out", str(tmp_path / "out")]
    assert call(sample, *arguments, "--prompt", "two") == 2
    assert "minilm_dit has none to import, train one and give the run" in capsys.readouterr().err
    _, arrays, _ = checkpoints.open_weights(run)
    with pytest.raises(UserError, match="no transformer"):
        exporting.export_folder(checkpoint, str(tmp_path / "export"), trained=arrays)
    assert not (tmp_path / "export").exists()


def test_a_run_for_another_text_encoder_is_refused(checkpoint, tmp_path):
    for pipeline in ("random", str(checkpoint.folder)):
        made = dataclasses.replace(config(text_width=384), pipeline=pipeline)
        with pytest.raises(UserError, match="model.text_width is 384.* of 48 channels"):
            train(made, str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()
    folder, made = str(checkpoint.folder), config()
    start = dataclasses.replace(made.train, init_from=folder)
    made = dataclasses.replace(made, train=start, pipeline=folder)
    with pytest.raises(UserError, match="no transformer"):
        train(made, str(tmp_path / "run"), progress=False)
