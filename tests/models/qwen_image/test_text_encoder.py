"""The text encoder against transformers' Qwen2.5-VL, and its names against the published ones."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.models import oracles
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.qwen_image import NETWORKS, text_encoder

NETWORK = NETWORKS["text_encoder"]
PUBLISHED = {  # text_encoder/config.json of Qwen/Qwen-Image, the flat layout
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584,
    "image_token_id": 151655, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.53.1",
    "use_cache": True, "use_sliding_window": False, "video_token_id": 151656,
    "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
    "vision_end_token_id": 151653, "vision_start_token_id": 151652, "vision_token_id": 151654,
    "vocab_size": 152064,
}
SMALL = PUBLISHED | {
    "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "eos_token_id": 258, "bos_token_id": 258,
    "rope_scaling": {"mrope_section": [2, 3, 3], "type": "mrope"},
    "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                      "out_hidden_size": 64},
}
WIDE = SMALL | {
    "hidden_size": 3584, "num_hidden_layers": 1, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 512,
    "rope_scaling": PUBLISHED["rope_scaling"],
    "vision_config": SMALL["vision_config"] | {"out_hidden_size": 3584},
}


def torch_model(published):
    config = transformers.Qwen2_5_VLConfig(**published)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()


def both(published):
    """A PyTorch model with every weight random, our config and the same weights as ours."""
    torch.manual_seed(0)
    model = torch_model(published)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                fan_in = weight.shape[-1] if weight.ndim == 2 and "embed" not in name else 1
                weight.normal_(0, fan_in**-0.5)
    config = text_encoder.Config.from_published(published)
    return model, config, oracles.converted(model, NETWORK, config)


def theirs(model, ids, mask):
    with torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        ).hidden_states[-1]
    return states.numpy()


def test_a_batch_of_different_lengths():
    model, config, params = both(SMALL)
    ids, mask = oracles.prompts(config.vocab, (1, 23, 40), 40)
    oracles.assert_states(NETWORK, config, params, ids, mask, theirs(model, ids, mask))
    oracles.assert_padding_is_not_seen(NETWORK, config, params, ids, mask)


def test_a_layer_at_full_width():
    model, config, params = both(WIDE)
    ids, mask = oracles.prompts(config.vocab, (5, 12), 12)
    oracles.assert_states(NETWORK, config, params, ids, mask, theirs(model, ids, mask))


def test_the_table_has_the_published_names():
    config = text_encoder.Config()
    leaves = names.flatten(NETWORK.abstract(config)[0])
    table = text_encoder.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert len(shapes) == 338
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 7_070_619_136
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())

    with torch.device("meta"):
        model = torch_model(PUBLISHED)
    tensors = {table.published(key): value for key, value in model.state_dict().items()}
    assert len(tensors) == 729
    assert {k: tuple(v.shape) for k, v in tensors.items() if not table.is_carried(k)} == shapes


def test_logical_axes():
    axes = oracles.logical_axes(NETWORK, text_encoder.Config())
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["norm/scale"] == (None,)
    assert axes["layers/attention_norm/scale"] == ("layers", None)
    assert axes["layers/attention/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/attention/key/bias"] == ("layers", "kv_heads")
    assert axes["layers/attention/out/kernel"] == ("layers", "heads", "embed")
    assert axes["layers/mlp/gate/kernel"] == ("layers", "embed", "mlp")
    assert axes["layers/mlp/down/kernel"] == ("layers", "mlp", "embed")


def test_a_folder_that_transformers_writes(tmp_path):
    model = torch_model(SMALL)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in written
    config = text_encoder.Config.from_published(written)
    assert config == text_encoder.Config.from_published(SMALL)
    assert text_encoder.Config.from_published(PUBLISHED) == text_encoder.Config()


def test_a_config_that_computes_something_else():
    text_encoder.Config.from_published(PUBLISHED | {"_attn_implementation": "sdpa"})
    with pytest.raises(UserError) as error:
        text_encoder.Config.from_published(PUBLISHED | {
            "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
            "hidden_act": "gelu", "use_sliding_window": True, "num_key_value_heads": 3,
            "head_dim": 64, "layer_types": ["sliding_attention"],
            "rope_scaling": {"type": "yarn", "factor": 4.0}, "quantization_config": {},
        })
    for part in ("model_type", "architectures", "hidden_act", "use_sliding_window", "layer_types",
                 "num_key_value_heads", "head_dim", "'yarn'", "factor, quantization_config"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="hidden_size is '3584', not a positive int"):
        text_encoder.Config.from_published(PUBLISHED | {"hidden_size": "3584"})
