"""The family in small: configs in the published form and a tokenizer in the published format.

With random weights they make a pipeline of a few megabytes, which goes through the same code as
the real one: for tests, and for trying a run without a download.
"""

from twinflow_jax.models.openuni.prompt import QUERIES
from twinflow_jax.models.qwen_image import tiny as qwen
from twinflow_jax.models.sana import tiny as sana

CONFIGS = sana.CONFIGS | {
    "text_encoder": {
        "architectures": ["OpenUniTextEncoder"], "num_queries": QUERIES,
        "caption_channels": sana.CONFIGS["transformer"]["caption_channels"],
        "llm_config": {
            "model_type": "qwen2", "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        },
        "connector": {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96},
    },
}


def save_tokenizer(folder) -> None:
    """As Qwen-Image's, with the token that begins a picture."""
    qwen.save_tokenizer(folder, special=(*qwen.SPECIAL, "<img>"))
