"""The text encoder against transformers' Gemma2Model, and its names against the published ones."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.models import oracles
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.attention import attention
from twinflow_jax.models.sana import NETWORKS, text_encoder, tiny

NETWORK = NETWORKS["text_encoder"]
PUBLISHED = {  # text_encoder/config.json of SANA
    "architectures": ["Gemma2Model"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.42.4",
    "use_cache": True, "vocab_size": 256000,
}
SMALL = PUBLISHED | tiny.CONFIGS["text_encoder"]
CAPPED = SMALL | {"attn_logit_softcapping": 1.5, "sliding_window": 40}  # so that the cap matters
WIDE = PUBLISHED | {"vocab_size": 592, "num_hidden_layers": 1, "intermediate_size": 512}


def torch_model(published, kind=transformers.Gemma2Model):
    config = transformers.Gemma2Config(**published, attn_implementation="eager")
    return kind(config).float().eval()


def both(published):
    """A PyTorch model with every weight random, our config and the same weights as ours."""
    torch.manual_seed(0)
    model = torch_model(published)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.5, 0.5)
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    config = text_encoder.Config.from_published(published)
    return model, config, oracles.converted(model, NETWORK, config)


def theirs(model, ids, mask):
    with torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state
    return states.numpy()


def test_a_batch_of_different_lengths():
    model, config, params = both(CAPPED)
    ids, mask = oracles.prompts(config.vocab, (1, 23, 40), 40)
    oracles.assert_states(NETWORK, config, params, ids, mask, theirs(model, ids, mask))
    oracles.assert_padding_is_not_seen(NETWORK, config, params, ids, mask)
    long = map(jnp.asarray, oracles.prompts(config.vocab, (3,), 41))
    with pytest.raises(UserError, match="41 tokens is longer than the text encoder's window of 40"):
        NETWORK.module(config).apply({"params": params}, *long)


def test_a_high_cap_changes_nothing():
    draw = np.random.default_rng(2).standard_normal
    query, key, value = (
        jnp.asarray(draw(shape, np.float32)) for shape in ((2, 5, 6, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    )
    for lengths, causal in ((None, False), (jnp.array([2, 7]), False), (jnp.array([2, 7]), True)):
        capped = attention(query, key, value, lengths, causal, softcap=1e4)
        plain = attention(query, key, value, lengths, causal)
        assert oracles.relative_error(capped, plain) < 2e-6


def test_a_layer_at_full_width():
    model, config, params = both(WIDE)
    ids, mask = oracles.prompts(config.vocab, (5, 12), 12)
    oracles.assert_states(NETWORK, config, params, ids, mask, theirs(model, ids, mask))


def test_the_table_has_the_published_names():
    config = text_encoder.Config()
    leaves = names.flatten(NETWORK.abstract(config)[0])
    table = text_encoder.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert len(shapes) == 288
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_614_341_888
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())

    with torch.device("meta"):
        bare = torch_model(PUBLISHED).state_dict()
        whole = torch_model(PUBLISHED, transformers.Gemma2ForCausalLM).state_dict()
    assert {key: tuple(value.shape) for key, value in bare.items()} == shapes
    tensors = {table.published(key): tuple(value.shape) for key, value in whole.items()}
    assert tensors == shapes | {"lm_head.weight": (256000, 2304)}
    assert [key for key in tensors if table.is_carried(key)] == ["lm_head.weight"]


def test_logical_axes():
    axes = oracles.logical_axes(NETWORK, text_encoder.Config())
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["norm/scale"] == (None,)
    assert axes["layers/mlp_out_norm/scale"] == ("layers", None)
    assert axes["layers/attention/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/attention/value/kernel"] == ("layers", "embed", "kv_heads")
    assert axes["layers/attention/out/kernel"] == ("layers", "heads", "embed")
    assert axes["layers/mlp/gate/kernel"] == ("layers", "embed", "mlp")
    assert axes["layers/mlp/down/kernel"] == ("layers", "mlp", "embed")


def test_a_folder_that_transformers_writes(tmp_path):
    torch_model(SMALL, transformers.Gemma2ForCausalLM).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    config = text_encoder.Config.from_published(written)
    assert config == text_encoder.Config.from_published(SMALL)
    assert config == text_encoder.Config.from_published(tiny.CONFIGS["text_encoder"])
    assert text_encoder.Config.from_published(PUBLISHED) == text_encoder.Config()


def test_a_config_that_computes_something_else():
    text_encoder.Config.from_published(PUBLISHED | {"_attn_implementation": "sdpa"})
    with pytest.raises(UserError) as error:
        text_encoder.Config.from_published(PUBLISHED | {
            "model_type": "gemma", "architectures": ["GemmaForCausalLM"],
            "hidden_activation": "silu", "attention_bias": True, "num_key_value_heads": 3,
            "use_bidirectional_attention": True, "query_pre_attn_scalar": 144,
            "layer_types": ["chunked_attention"], "quantization_config": {},
            "rope_scaling": {"type": "yarn", "factor": 4.0},
        })
    for part in ("model_type", "architectures", "hidden_activation", "attention_bias is set",
                 "num_key_value_heads", "use_bidirectional_attention is set", "'chunked_attention'",
                 "query_pre_attn_scalar", "'yarn'", "factor, quantization_config"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="attn_logit_softcapping is None, not a positive float"):
        text_encoder.Config.from_published(PUBLISHED | {"attn_logit_softcapping": None})
