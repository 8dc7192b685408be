"""A family with two text encoders, each with its tokenizer, and a pooled vector."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from twinflow_jax import models
from twinflow_jax.checkpoints import imported, random
from twinflow_jax.drawing import Pipeline, text
from twinflow_jax.encoding.captions import Captions
from twinflow_jax.encoding.encode import manifest_of
from twinflow_jax.encoding.workspace import ShardReport
from twinflow_jax.models import minilm_dit, sana

PROMPTS = ["a red fox", "two cats"]


def tokenize(tokenizers, prompts, tokens=None, negative=False):
    """SANA's tokens, then MiniLM's."""
    return {
        "text_encoder": sana.prompt.tokenize(tokenizers["text_encoder"], prompts, None, negative),
        "text_encoder_2": minilm_dit.prompt.tokenize(
            tokenizers["text_encoder_2"], prompts, tokens, negative
        ),
    }


def embed(configs, params, prompts):
    """The mean of MiniLM's tokens, padded to SANA's width, then SANA's tokens and a MiniLM's."""
    one, two = (
        module.embed(configs[name], params[name], *prompts[name])
        for name, module in (("text_encoder", sana), ("text_encoder_2", minilm_dit))
    )
    width = one[0].shape[-1]
    pooled = two[0].mean(1, keepdims=True)[..., :8]
    pooled = jnp.pad(pooled, ((0, 0), (0, 0), (0, width - 8)))
    valid = jnp.ones((len(pooled), 1), bool)
    return jnp.concatenate([pooled, one[0]], 1), jnp.concatenate([valid, one[1]], 1)


@pytest.fixture
def checkpoint(monkeypatch, tmp_path) -> imported.Imported:
    family = models.FAMILIES["sana"].text_to_image
    second = dataclasses.replace(
        minilm_dit.NETWORKS["text_encoder"], folder="text_encoder_2"
    )
    family = dataclasses.replace(
        family, networks=family.networks | {"text_encoder_2": second}, tokenize=tokenize,
        embed=embed,
        tiny=family.tiny | {"text_encoder_2": minilm_dit.tiny.CONFIGS["text_encoder"]},
    )
    two = dataclasses.replace(models.FAMILIES["sana"], text_to_image=family)
    monkeypatch.setitem(models.FAMILIES, "two", two)
    return random.write_random("two", tmp_path / "two", 0)


def test_prompts_go_through_all_encoders(checkpoint):
    family = checkpoint.text_to_image
    assert list(family.encoders) == ["text_encoder", "text_encoder_2"]
    assert sorted(p.name for p in (checkpoint.folder / "files").iterdir()) == [
        "tokenizer", "tokenizer_2"
    ]
    pipeline = Pipeline(checkpoint, "float32", progress=False)
    made = text.embed(pipeline, PROMPTS, 16, negative="")
    alone = dataclasses.replace(checkpoint, record=checkpoint.record | {"family": "sana"})
    theirs = text.embed(Pipeline(alone, "float32", progress=False), PROMPTS, negative="")
    np.testing.assert_allclose(made.tokens[:, 1:], theirs.tokens, atol=1e-5)
    np.testing.assert_array_equal(made.mask[:, 1:], theirs.mask)
    pooled = made.tokens[:, 0]
    assert made.mask[:, 0].all() and not pooled[:, 8:].any()
    assert np.abs(np.diff(pooled[:, :8], axis=0)).max(axis=1).all()  # each prompt has its own

    manifest = manifest_of(pipeline, pictures=False)
    assert manifest.text_width == checkpoint.text_width == 48
    both = [checkpoint.identity(name) for name in family.encoders]
    assert manifest.text_encoder == " + ".join(both) and both[0] != both[1]
    assert both[0] == alone.text_identity
    with text.encoder(pipeline, 8) as encode:
        (rows,), _ = Captions(pipeline, encode, 16)([PROMPTS[:1], PROMPTS[1:]], ShardReport())
    valid = made.tokens[0, made.mask[0]]
    np.testing.assert_allclose(rows, valid, atol=1e-5)
    null = text.null(pipeline)
    again = text.null(pipeline)  # from its file
    np.testing.assert_array_equal(null.tokens, again.tokens)
