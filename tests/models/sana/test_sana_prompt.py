"""Prompts against diffusers' SanaPipeline, with a small tokenizer and text encoder."""

import inspect
import json
import warnings

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.models import oracles
from tests.models.sana import test_sana_text_encoder as text
from twinflow_jax.errors import UserError
from twinflow_jax.models import sana
from twinflow_jax.models.sana import prompt, tiny

PROMPTS = [
    "A Cat sleeping ", "two cats,\n one of them 猫 in a {box} on the street", "<eos>\n É", "x",
    "1 " * 140, "long " * 120,
]
NEGATIVE = ["", " low Quality", "x", "blurry, <bos>", "1 " * 140, "long " * 120]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tokenizer, with what the published folder says about it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    published = {
        "add_bos_token": True, "add_eos_token": False, "tokenizer_class": "GemmaTokenizer",
        "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}, "extra_ids": 0,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prompt.load_tokenizer(folder)


@pytest.fixture(scope="module")
def instruction():
    defaults = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    assert defaults["negative_prompt"].default == ""
    assert defaults["clean_caption"].default is False
    assert defaults["max_sequence_length"].default == prompt.TOKENS
    return defaults["complex_human_instruction"].default


def test_the_instruction(instruction):
    assert "\n".join(instruction) == prompt.INSTRUCTION


@pytest.mark.filterwarnings("ignore:prompt 6 of 6")
def test_embeddings_are_the_pipelines(folder, tokenizer, instruction):
    model, config, params = text.both(text.SMALL)
    pipeline = diffusers.SanaPipeline(
        transformers.GemmaTokenizerFast.from_pretrained(folder), model, vae=None,
        transformer=None, scheduler=None,
    )
    theirs = pipeline.encode_prompt(
        PROMPTS, negative_prompt=NEGATIVE, device="cpu", complex_human_instruction=instruction
    )
    start = len(tokenizer(prompt.INSTRUCTION)["input_ids"])
    for prompts, length, expected, valid in (
        (PROMPTS, start + 298, *theirs[:2]), (NEGATIVE, 300, *theirs[2:])
    ):
        ids, mask = prompt.tokenize(tokenizer, prompts, negative=prompts is NEGATIVE)
        assert ids.shape == mask.shape == (len(prompts), length)
        assert ids.dtype == np.int32
        tokens, mask = sana.embed(config, params, *map(jnp.asarray, (ids, mask)))
        assert tokens.shape == (len(prompts), 300, config.width)
        np.testing.assert_array_equal(mask, valid.bool().numpy())
        mask = np.asarray(mask)
        assert oracles.relative_error(
            np.asarray(tokens)[mask], expected.detach().numpy()[mask]
        ) < 2e-5
        assert not np.asarray(tokens)[~mask].any()
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # valid tokens come first
        assert mask[:, 0].all()
        assert mask[-1].all()


def test_selection_keeps_the_valid_tokens_first():
    for length in (300, 301, 569):
        places = np.broadcast_to(np.arange(length), (length, length))
        counts = np.arange(1, length + 1)
        states = jnp.asarray(places[..., None], jnp.float32)
        tokens, mask = prompt.select(states, jnp.asarray(places < counts[:, None]))
        assert tokens[0, :, 0].tolist() == [0, *range(length - 299, length)]
        valid = np.maximum(1, counts + 300 - length)
        np.testing.assert_array_equal(mask, np.arange(300) < valid[:, None])


def test_a_long_prompt_is_cut_with_a_warning(tokenizer):
    start = len(tokenizer(prompt.INSTRUCTION)["input_ids"])
    with pytest.warns(UserWarning, match="prompt 2 of 2 makes 305 tokens: only the first 298 are"):
        ids, mask = prompt.tokenize(tokenizer, ["1" * 298, "1" * 305])
    assert mask.all()
    assert ids[1].tolist() == tokenizer(prompt.INSTRUCTION + "1" * 298)["input_ids"]
    assert ids.shape[1] == start + 298
    with pytest.warns(UserWarning, match="prompt 1 of 1 makes 300 tokens: only the first 299 are"):
        assert prompt.tokenize(tokenizer, ["1" * 300], negative=True)[1].sum() == 300


def test_an_empty_prompt(tokenizer):
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="prompt 2 of 3 is empty"):
            prompt.tokenize(tokenizer, ["a", empty, "b"])
        ids, mask = prompt.tokenize(tokenizer, [empty], negative=True)
        assert mask.sum() == 1
        assert ids[0, :2].tolist() == [tokenizer.bos_token_id, tokenizer.pad_token_id]


def test_a_folder_without_its_tokenizer(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere holds no tokenizer"):
        prompt.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{ not JSON")
    with pytest.raises(UserError, match="cannot be read: "):
        prompt.load_tokenizer(tmp_path)
    bare = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(UserError, match="is not SANA's"):
        prompt.load_tokenizer(tmp_path)
