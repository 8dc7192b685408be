"""The text encoder against transformers' Qwen3, and prompts against diffusers' ZImagePipeline."""

import functools
import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers

from tests.models import oracles
from tests.zimage_folder import TEMPLATE
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.qwen_image.tiny import save_tokenizer
from twinflow_jax.models.zimage import NETWORKS, prompt, text_encoder
from twinflow_jax.models.zimage.text_encoder import Config

NETWORK = NETWORKS["text_encoder"]
PUBLISHED = {  # text_encoder/config.json of Tongyi-MAI/Z-Image-Turbo
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}
SMALL = PUBLISHED | {
    "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_window_layers": 3,
    "eos_token_id": 258, "bos_token_id": 258,
}
WIDE = SMALL | {  # one layer that is read
    "hidden_size": 2560, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 512,
}


def torch_model(published):
    config = transformers.Qwen3Config(**published)
    return transformers.Qwen3ForCausalLM(config).float().eval()


@functools.cache
def small():
    return both(SMALL)


def both(published):
    """A PyTorch model with every weight random, our config and the same weights as ours."""
    torch.manual_seed(0)
    model = torch_model(published)
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                fan_in = weight.shape[-1] if "embed" not in name else 1
                weight.normal_(0, fan_in**-0.5)
    config = Config.from_published(published)
    return model, config, oracles.converted(model, NETWORK, config)


def theirs(model, ids, mask):
    with torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        ).hidden_states[-2]
    return states.numpy()


def test_a_batch_of_different_lengths():
    model, config, params = small()
    ids, mask = oracles.prompts(config.vocab, (1, 23, 40), 40)
    oracles.assert_states(NETWORK, config, params, ids, mask, theirs(model, ids, mask))
    oracles.assert_padding_is_not_seen(NETWORK, config, params, ids, mask)


def test_a_layer_at_full_width():
    model, config, params = both(WIDE)
    ids, mask = oracles.prompts(config.vocab, (5, 12), 12)
    oracles.assert_states(NETWORK, config, params, ids, mask, theirs(model, ids, mask))


def test_the_table_has_the_published_names():
    config = Config.from_published(PUBLISHED)
    assert config == Config()
    leaves = names.flatten(NETWORK.abstract(config)[0])
    table = text_encoder.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    with torch.device("meta"):
        model = torch_model(PUBLISHED)
    tensors = dict(model.named_parameters())  # tied ones once, as files have them
    assert len(tensors) == 398
    assert sum(tensor.numel() for tensor in tensors.values()) == 4_022_468_096
    carried = {key for key in tensors if table.is_carried(key)}
    last = {key for key in tensors if key.startswith("model.layers.35.")}
    assert carried == last | {"model.norm.weight"}
    assert {k: tuple(v.shape) for k, v in tensors.items() if k not in carried} == shapes
    body = [key.removeprefix("model.") for key in tensors]  # of Qwen3Model
    assert {table.published(key) for key in body} == tensors.keys()


def test_logical_axes():
    axes = oracles.logical_axes(NETWORK, Config())
    assert axes["layers/attention/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/attention/key_norm/scale"] == ("layers", None)


def test_a_folder_that_transformers_writes(tmp_path):
    torch_model(SMALL).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert Config.from_published(written) == Config.from_published(SMALL)


def test_a_config_that_computes_something_else():
    with pytest.raises(UserError) as error:
        Config.from_published(PUBLISHED | {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_bias": True,
            "use_sliding_window": True, "num_key_value_heads": 3, "num_hidden_layers": 1,
            "layer_types": ["sliding_attention"], "rope_scaling": {"rope_type": "yarn"},
        })
    for part in ("model_type", "architectures", "attention_bias", "use_sliding_window",
                 "num_key_value_heads", "num_hidden_layers is 1", "layer_types", "'yarn'"):
        assert part in str(error.value)


# Prompts.

PROMPTS = ["Generate an image.", "two cats,\n one of them 猫 in a {box}", "", "1 " * 30]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = prompt.load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.filterwarnings("ignore:prompt")
def test_embeddings_are_the_pipelines(tokenizer):
    model, config, params = small()
    pipeline = diffusers.ZImagePipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=model, tokenizer=tokenizer
    )
    long = [*PROMPTS, "long " * 300]
    for prompts, length, limit in ((PROMPTS, 128, None), (long, 512, None), (long, 64, 64)):
        ids, mask = prompt.tokenize(tokenizer, prompts, limit, negative=True)
        assert ids.shape == mask.shape == (len(prompts), length)
        run = oracles.compiled(NETWORK, config)
        tokens, mask = np.asarray(run(params, ids, mask)), np.asarray(mask)
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(
                list(prompts), "cpu", False, max_sequence_length=limit or 512
            )
        assert mask.sum(1).tolist() == [len(rows) for rows in theirs]
        assert oracles.relative_error(tokens[mask], np.concatenate(theirs)) < 2e-5


def test_the_whole_template_counts(tokenizer):
    _, mask = prompt.tokenize(tokenizer, ["", "Generate an image."], negative=True)
    assert mask.shape == (2, 32) and mask.sum(1).tolist() == [8, 12]
    for letters, bucket in ((24, 32), (25, 64), (505, 512)):
        cut = pytest.warns(UserWarning, match="makes 513 tokens: only the first 512")
        with cut if letters == 505 else warnings.catch_warnings():
            assert prompt.tokenize(tokenizer, ["1" * letters])[0].shape == (1, bucket)
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        prompt.tokenize(tokenizer, ["a", " "])


def test_another_tokenizer_is_warned_of(tmp_path):
    save_tokenizer(tmp_path, words=())
    with pytest.warns(UserWarning, match="is not Z-Image's: the template's start is 6 tokens"):
        prompt.load_tokenizer(tmp_path)
