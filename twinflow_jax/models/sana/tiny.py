"""The family in small: configs in the published form and a tokenizer in the published format.

With random weights they make a pipeline of a few megabytes, which goes through the same code as
the real one: for tests, and for trying a run without a download.
"""

import json

from twinflow_jax.models.sana.prompt import INSTRUCTION

CONFIGS = {
    "transformer": {
        "_class_name": "SanaTransformer2DModel", "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 32, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
        "cross_attention_dim": 64, "caption_channels": 48, "sample_size": 4,
    },
    "text_encoder": {
        "architectures": ["Gemma2Model"], "model_type": "gemma2", "vocab_size": 592,
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
        "intermediate_size": 96,
    },
    "vae": {
        "_class_name": "AutoencoderDC", "attention_head_dim": 32, "latent_channels": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [8, 16, 32, 32, 64, 64],
        "decoder_block_out_channels": [8, 16, 32, 32, 64, 64],
        "encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6,
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
}

TOKENS = CONFIGS["text_encoder"]["vocab_size"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


def save_tokenizer(folder) -> None:
    """Writes a byte-pair encoding like Gemma's, of bytes and of pieces of INSTRUCTION."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # both take seconds to import

    first = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    spaces = normalizers.Replace(" ", "▁")
    learner = Tokenizer(models.BPE())
    learner.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=first, show_progress=False)
    learner.train_from_iterator([INSTRUCTION], trainer)

    learned = json.loads(learner.to_str())["model"]  # anew, or the bytes would be special tokens
    tokenizer = Tokenizer(models.BPE(
        learned["vocab"], [tuple(pair) for pair in learned["merges"]], unk_token="<unk>",
        fuse_unk=True, byte_fallback=True,
    ))
    tokenizer.normalizer = spaces
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", learned["vocab"]["<bos>"])]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
