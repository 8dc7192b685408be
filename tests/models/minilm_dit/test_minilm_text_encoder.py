"""The text encoder against transformers' BertModel, and its names against the published ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.models import oracles
from tests.qwen_folder import randomise
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.minilm_dit import NETWORKS, text_encoder, tiny

NETWORK = NETWORKS["text_encoder"]
PUBLISHED = {  # config.json of all-MiniLM-L6-v2
    "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02,
    "intermediate_size": 1536, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 6, "pad_token_id": 0,
    "position_embedding_type": "absolute", "transformers_version": "4.8.2",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}
SMALL = PUBLISHED | tiny.CONFIGS["text_encoder"]
WIDE = PUBLISHED | {"vocab_size": 592, "num_hidden_layers": 2}


def torch_model(published):
    return transformers.BertModel(transformers.BertConfig(**published)).eval()


@pytest.mark.parametrize("published", [SMALL, WIDE])
def test_a_batch_of_different_lengths(published):
    model = randomise(torch_model(published), 3)
    config = text_encoder.Config.from_published(published)
    params = oracles.converted(model, NETWORK, config)
    ids, mask = oracles.prompts(config.vocab, (2, 23, 40), 40)
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    oracles.assert_states(NETWORK, config, params, ids, mask, expected)
    oracles.assert_padding_is_not_seen(NETWORK, config, params, ids, mask)
    states = oracles.compiled(NETWORK, config)(params, ids, mask)
    assert np.abs(np.asarray(states) - expected)[mask].max() < 1e-5 * np.abs(expected).max()


def test_more_tokens_than_positions():
    config = text_encoder.Config.from_published(SMALL | {"max_position_embeddings": 8})
    with pytest.raises(UserError, match="9 tokens is longer than the text encoder's 8"):
        NETWORK.module(config).apply(
            {"params": NETWORK.abstract(config)[0]},
            *map(jnp.asarray, oracles.prompts(config.vocab, (3,), 9)),
        )


def test_the_table_has_the_published_names():
    config = text_encoder.Config()
    assert text_encoder.Config.from_published(PUBLISHED) == config
    leaves = names.flatten(NETWORK.abstract(config)[0])
    table = text_encoder.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 22_565_376
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    with torch.device("meta"):
        state = torch_model(PUBLISHED).state_dict()
    theirs = {key: tuple(value.shape) for key, value in state.items() if "pooler" not in key}
    assert shapes == theirs
    carried = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
    assert all(map(table.is_carried, carried)) and not any(map(table.is_carried, shapes))


def test_logical_axes():
    axes = oracles.logical_axes(NETWORK, text_encoder.Config())
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["layers/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/out/kernel"] == ("layers", "heads", "embed")
    assert axes["layers/up/kernel"] == ("layers", "embed", "mlp")
    assert axes["layers/mlp_norm/scale"] == ("layers", None)


def test_a_config_that_computes_something_else():
    with pytest.raises(UserError) as error:
        text_encoder.Config.from_published(PUBLISHED | {
            "model_type": "roberta", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu_new",
            "position_embedding_type": "relative_key", "is_decoder": True, "hidden_size": None,
            "quantization_config": {},
        })
    for part in ("model_type is 'roberta'", "architectures", "'gelu_new'", "'relative_key'",
                 "is_decoder", "hidden_size is None", "quantization_config"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="no multiple of num_attention_heads"):
        text_encoder.Config.from_published(PUBLISHED | {"num_attention_heads": 5})
