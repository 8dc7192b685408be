"""The family in small: configs in the published form and tokenizers in the published formats.

With random weights they make a pipeline of a few megabytes, which goes through the same code as
the real one: for tests, and for trying a run without a download.
"""

import json
import pathlib
import string

CONFIGS = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel", "num_layers": 4, "num_attention_heads": 2,
        "attention_head_dim": 32, "joint_attention_dim": 64, "caption_projection_dim": 64,
        "pooled_projection_dim": 40, "pos_embed_max_size": 24, "sample_size": 16,
        "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
    },
    "text_encoder": {
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
        "vocab_size": 544, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "projection_dim": 16, "eos_token_id": 2,
    },
    "text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
        "vocab_size": 544, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 48, "projection_dim": 24, "eos_token_id": 2, "hidden_act": "gelu",
    },
    "text_encoder_3": {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 128, "d_model": 64,
        "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": [32, 32, 32, 64],
        "layers_per_block": 1, "latent_channels": 16, "scaling_factor": 1.5305,
        "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("generate", "an", "image", "the")  # one token each; "</w>" ends a word


def save_clip_tokenizer(folder, pad: str = END) -> None:
    """Writes one like CLIP's: bytes, a few words, and both ends."""
    from tokenizers import pre_tokenizers  # takes a second to import

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    parts = [[*word[:-1], f"{word[-1]}</w>"] for word in WORDS]
    pairs = [("".join(part[:i]), part[i]) for part in parts for i in range(1, len(part))]
    merges = list(dict.fromkeys(pairs))
    tokens = letters + [f"{a}</w>" for a in letters] + [a + b for a, b in merges] + [START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START,
        "eos_token": END, "unk_token": END, "pad_token": pad,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_second_tokenizer(folder) -> None:
    """CLIP-G's pads with a letter."""
    save_clip_tokenizer(folder, "!")


def save_t5_tokenizer(folder) -> None:
    """Writes one like T5's, whose pieces are single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # both take seconds to import

    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((a, -3.0) for a in letters)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
