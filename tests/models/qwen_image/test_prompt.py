"""Prompts against diffusers' QwenImagePipeline, with a small tokenizer and text encoder."""

import warnings

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import oracles
from tests.models.qwen_image import test_text_encoder as text
from twinflow_jax.errors import UserError
from twinflow_jax.models import qwen_image
from twinflow_jax.models.qwen_image import prompt, tiny

PROMPTS = [
    "Generate an image.", "two cats,\n one of them 猫 in a {box}", "<|im_end|>\n ", "1 " * 30,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prompt.load_tokenizer(folder)


@pytest.mark.filterwarnings("ignore:prompt 5")
def test_embeddings_are_the_pipelines(tokenizer):
    model, config, params = text.both(text.SMALL)
    pipeline = diffusers.QwenImagePipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=model, tokenizer=tokenizer
    )
    assert pipeline.prompt_template_encode == prompt.TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == prompt.PREFIX
    assert pipeline.tokenizer_max_length == prompt.MAX_TOKENS

    for prompts, length, limit in [
        (PROMPTS, 128, None), ([*PROMPTS, "long " * 300], 1024, None),
        ([*PROMPTS, "long " * 300], 128, 128),
    ]:
        ids, mask = prompt.tokenize(tokenizer, prompts, limit)
        assert ids.shape == mask.shape == (len(prompts), prompt.PREFIX + length)
        inputs = map(jnp.asarray, (ids, mask))
        tokens, mask = map(np.asarray, qwen_image.embed(config, params, *inputs))
        theirs, valid = pipeline.encode_prompt(prompts, "cpu", max_sequence_length=limit or 1024)
        assert (mask.sum(axis=1) == valid.sum(axis=1).numpy()).all()
        assert oracles.relative_error(
            tokens[mask], theirs.detach().numpy()[valid.bool().numpy()]
        ) < 2e-5
        assert not tokens[~mask].any()


def test_the_smallest_bucket_that_holds_the_longest(tokenizer):
    for letters, bucket in ((59, 64), (60, 128), (251, 256), (252, 512), (1019, 1024)):
        ids, mask = prompt.tokenize(tokenizer, ["1" * letters, prompt.NULL_PROMPT])
        assert ids.dtype == np.int32
        assert ids.shape == (2, 34 + bucket)
        assert mask.sum(axis=1).tolist() == [34 + letters + 5, 34 + 9]
        assert (ids[~mask] == tokenizer.pad_token_id).all()


def test_a_long_prompt_is_cut_with_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="prompt 2 of 2 makes 1025 tokens: only the first 1024"):
        ids, mask = prompt.tokenize(tokenizer, ["a", "1" * 1020])
    assert mask[1].all()
    whole = tokenizer(prompt.TEMPLATE.format("1" * 1020))["input_ids"]
    assert ids[1].tolist() == whole[: 34 + 1024]
    with pytest.warns(UserWarning, match="prompt 1 of 1 makes 105 tokens: only the first 64"):
        assert prompt.tokenize(tokenizer, ["1" * 100], 64)[0].shape == (1, 34 + 64)


def test_an_empty_prompt(tokenizer):
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="prompt 2 of 3 is empty"):
            prompt.tokenize(tokenizer, ["a", empty, "b"])
    assert prompt.tokenize(tokenizer, [" "], negative=True)[1].sum() == 34 + 1 + 5


def test_both_formats_of_a_tokenizer(folder, tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    ids, _ = prompt.tokenize(prompt.load_tokenizer(tmp_path), PROMPTS)
    np.testing.assert_array_equal(ids, prompt.tokenize(tokenizer, PROMPTS)[0])


def test_a_folder_without_its_tokenizer(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no tokenizer"):
        prompt.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        prompt.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not JSON")
    with pytest.raises(UserError, match="cannot be read: Expecting"):
        prompt.load_tokenizer(tmp_path)
    tiny.save_tokenizer(tmp_path, words=())
    with pytest.warns(UserWarning, match="is not Qwen-Image's: the template's start is 149 tokens"):
        prompt.load_tokenizer(tmp_path)
