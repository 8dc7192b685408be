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
# Of Qwen-Image-Edit's template and null prompt; first those that others are the ends of.
EDIT_WORDS = (
    "Ġuser", "ĠGenerate", *WORDS, "Ġkey", "Ġfeatures", "Ġinput", "Ġ(", "color", "Ġbackground",
    "),", "Ġthen", "Ġexplain", "Ġhow", "'s", "Ġinstruction", "Ġshould", "Ġalter", "Ġor", "Ġmodify",
    "Ġa", "Ġnew", "Ġthat", "Ġmeets", "Ġrequirements", "Ġwhile", "Ġmaintaining", "Ġconsistency",
    "Ġwith", "Ġoriginal", "Ġwhere", "Ġappropriate", "Edit", "Ġthis", "Picture",
)
EDIT_SPECIAL = (*SPECIAL, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each word from its left, one letter at a time."""
    pairs = ((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return list(dict.fromkeys(pairs))


SEEING_ENCODER = CONFIGS["text_encoder"] | {  # Qwen-Image-Edit's
    "vocab_size": 700, "rope_scaling": {"mrope_section": [2, 3, 3], "type": "mrope"},
    "image_token_id": 256 + len(merges_of(EDIT_WORDS)) + EDIT_SPECIAL.index("<|image_pad|>"),
    "vision_config": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    },
}


def save_tokenizer(
    folder, words: tuple[str, ...] = WORDS, special: tuple[str, ...] = SPECIAL
) -> None:
    """Writes it in both of the formats that there are: tokenizer.json; vocab.json, merges.txt."""
    from tokenizers import pre_tokenizers  # both take seconds to import
    from transformers import Qwen2Tokenizer

    merges = merges_of(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [a + b for a, b in merges] + list(special)
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab, merges, extra_special_tokens=list(special[1:]))
    tokenizer.save_pretrained(folder)
    folder = pathlib.Path(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def save_edit_tokenizer(folder) -> None:
    """Qwen-Image-Edit's, and beside it how pictures are looked at."""
    save_tokenizer(folder, EDIT_WORDS, EDIT_SPECIAL)
    processor = {"min_pixels": 3136, "max_pixels": 12845056}
    (pathlib.Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
