"""The text encoder against OpenUni's computation, prompts, and the published names."""

import dataclasses
import functools
import warnings

import numpy as np
import pytest
import torch

from tests import openuni_oracle
from tests.models import oracles
from tests.qwen_folder import randomise
from twinflow_jax.errors import UserError
from twinflow_jax.models import names, openuni
from twinflow_jax.models.openuni import prompt, text_encoder, tiny
from twinflow_jax.models.openuni.text_encoder import Config

NETWORK = openuni.NETWORKS["text_encoder"]
PUBLISHED = {  # as tools/openuni.py writes it for OpenUni-L with InternVL3-2B
    "architectures": ["OpenUniTextEncoder"], "num_queries": 256, "caption_channels": 2304,
    "llm_config": {
        "model_type": "qwen2", "vocab_size": 151674, "hidden_size": 1536,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 32768, "hidden_act": "silu", "use_sliding_window": False,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    },
    "connector": {"hidden_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 24,
                  "intermediate_size": 8960},
}
SMALL = tiny.CONFIGS["text_encoder"]


@functools.cache
def small():
    """A PyTorch model with every weight random, our config and the same weights as ours."""
    model = randomise(openuni_oracle.Encoder(SMALL), 0).float().eval()
    config = Config.from_published(SMALL)
    return model, config, oracles.converted(model, NETWORK, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_of_different_lengths(dtype):
    """Theirs has the padding in the middle, ours at the end."""
    model, config, params = small()
    ids, mask = oracles.prompts(config.vocab, (1, 23, 40), 40)
    expected = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).numpy()
    assert expected.shape == (3, 256, config.out) and 0.3 < expected.std() < 3
    config = dataclasses.replace(config, dtype=dtype)
    ours = np.asarray(oracles.compiled(NETWORK, config)(params, ids, mask), np.float32)
    assert oracles.relative_error(ours, expected) < oracles.BOUNDS[dtype]
    other = np.where(mask, ids, 7)[:, :41]  # neither what padding is nor how much
    again = np.asarray(oracles.compiled(NETWORK, config)(params, other, mask), np.float32)
    np.testing.assert_array_equal(again, ours)


def test_the_table_has_the_published_names():
    config = Config.from_published(PUBLISHED)
    assert config == Config()
    leaves = names.flatten(NETWORK.abstract(config)[0])
    shapes = text_encoder.table(config).shapes({k: leaf.shape for k, leaf in leaves.items()})
    body = {k: v for k, v in shapes.items() if k.startswith("language_model.")}
    count = lambda keys: sum(int(np.prod(shapes[key])) for key in keys)
    assert len(body) == 338 and count(body) == 1_543_311_872
    own = shapes.keys() - body.keys()
    assert len(own) == 99 and count(own) == 225_844_992
    with torch.device("meta"):
        state = openuni_oracle.Encoder(PUBLISHED).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes


def test_a_config_that_computes_something_else():
    with pytest.raises(UserError) as error:
        Config.from_published(PUBLISHED | {
            "num_queries": 64, "vision_config": {}, "caption_channels": "many",
            "llm_config": PUBLISHED["llm_config"] | {"model_type": "llama", "hidden_size": 1530},
            "connector": {"hidden_act": "relu", "hidden_size": 8},
        })
    for part in ("num_queries is 64", "vision_config is not known", "caption_channels", "llama",
                 "relu"):
        assert part in str(error.value)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prompt.load_tokenizer(folder)


def test_prompts_stand_in_the_template(tokenizer):
    ids, mask = prompt.tokenize(tokenizer, ["two cats ", ""], negative=True)
    said = [tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]
    wrapped = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
    assert said == [
        wrapped.format("Generate an image: two cats"), wrapped.format("Generate an image."),
    ]
    assert ids[1][mask[1]][-1] == tokenizer.convert_tokens_to_ids("<img>")
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        prompt.tokenize(tokenizer, ["a", " "])
    with pytest.raises(UserError, match="text of 300 tokens is asked for; OpenUni takes 256"):
        prompt.tokenize(tokenizer, ["a"], 300)
    with pytest.warns(UserWarning, match="only the first 512 are used"):
        assert prompt.tokenize(tokenizer, ["1" * 600], 256)[0].shape == (1, 512)


def test_another_tokenizer_is_refused(tmp_path):
    from twinflow_jax.models.qwen_image.tiny import save_tokenizer

    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is not InternVL3's: <img> is not one token"):
        prompt.load_tokenizer(tmp_path)
