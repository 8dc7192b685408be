"""A small tokenizer in the format of Qwen's, for tests without the published one.

Bytes, and one token for each word of Qwen-Image's template and of TwinFlow's null prompt: so that
these have as many tokens as with the published tokenizer.
"""

import json
import pathlib

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

WORDS = (
    "system", "user", "assistant", "Describe", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcolor",
    "Ġshape", "Ġsize", "Ġtexture", "Ġquantity", "Ġtext", "Ġspatial", "Ġrelationships", "Ġof",
    "Ġobjects", "Ġand", "Ġbackground", "Generate", "Ġan",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def merges_of(words) -> list[tuple[str, str]]:
    """Merges that build each word from its left, one letter at a time."""
    pairs = ((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return list(dict.fromkeys(pairs))


def save_tokenizer(folder, words=WORDS) -> None:
    """Writes it with both of the formats that there are: tokenizer.json; vocab.json, merges.txt.

    words: the tokens beyond bytes, "Ġ" for a space; under 400 ids with the default.
    """
    merges = merges_of(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [a + b for a, b in merges] + list(SPECIAL)
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab, merges, extra_special_tokens=list(SPECIAL[1:]))
    tokenizer.save_pretrained(folder)
    folder = pathlib.Path(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
