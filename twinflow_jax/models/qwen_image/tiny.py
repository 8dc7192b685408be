"""The family in small: configs in the published form and a tokenizer in the published format.

With random weights they make a pipeline of a few megabytes, which goes through the same code as
the real one: for tests, and for trying a run without a download.
"""

import json
import pathlib

CONFIGS = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 32, "joint_attention_dim": 64, "axes_dims_rope": [8, 12, 12],
    },
    "text_encoder": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 400,
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage", "base_dim": 8, "z_dim": 16, "num_res_blocks": 1,
    },
}

# Beyond bytes, one token for each word of the template and of TwinFlow's null prompt: so that
# these have as many tokens as with the published tokenizer. "Ġ" is a space.
WORDS = (
    "system", "user", "assistant", "Describe", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcolor",
    "Ġshape", "Ġsize", "Ġtexture", "Ġquantity", "Ġtext", "Ġspatial", "Ġrelationships", "Ġof",
    "Ġobjects", "Ġand", "Ġbackground", "Generate", "Ġan",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_tokenizer(folder, words: tuple[str, ...] = WORDS) -> None:
    """Writes it in both of the formats that there are: tokenizer.json; vocab.json, merges.txt."""
    from tokenizers import pre_tokenizers  # both take seconds to import
    from transformers import Qwen2Tokenizer

    pairs = ((word[:end], word[end]) for word in words for end in range(1, len(word)))
    merges = list(dict.fromkeys(pairs))  # each word from its left, one letter at a time
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [a + b for a, b in merges] + list(SPECIAL)
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab, merges, extra_special_tokens=list(SPECIAL[1:]))
    tokenizer.save_pretrained(folder)
    folder = pathlib.Path(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
