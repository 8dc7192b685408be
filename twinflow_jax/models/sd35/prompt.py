"""From prompts to the text encoders' ids, as in diffusers' StableDiffusion3Pipeline.

Each encoder has its own number of tokens, and reads padding as it reads all else. The image model
reads a vector of the whole text, CLIP's tokens and T5's.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from twinflow_jax.errors import UserError
from twinflow_jax.models.family import Prompts
from twinflow_jax.models.tokenizers import check, cut, load, padded

LENGTHS = {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}
TOKENS = 1 + 77 + 256  # that the image model takes; those of the first two are one


def load_clip(folder: str | os.PathLike):
    """As `tokenizers.load`, of "tokenizer" or "tokenizer_2". Raises UserError where it is not like
    CLIP's."""
    tokenizer, empty = load(
        folder, "'tokenizer' of Stable Diffusion 3, or 'tokenizer_2'", "CLIPTokenizerFast"
    )
    end = tokenizer.eos_token_id
    highest = end == len(tokenizer) - 1  # by which the encoder finds it
    if tokenizer.pad_token_id is None or empty != [tokenizer.bos_token_id, end] or not highest:
        raise UserError(
            f"the tokenizer in {folder} is not like CLIP's: it has no padding token, or does not "
            "put every text between its two tokens for that, the second of which is its last one"
        )
    return tokenizer


def load_t5(folder: str | os.PathLike):
    """As `tokenizers.load`, of "tokenizer_3". Raises UserError where it is not like T5's."""
    tokenizer, empty = load(folder, "'tokenizer_3' of Stable Diffusion 3")
    if tokenizer.pad_token_id is None or empty != [tokenizer.eos_token_id]:
        raise UserError(
            f"the tokenizer in {folder} is not like T5's: it has no padding token, or does not end "
            "every text with its token for that"
        )
    return tokenizer


def tokenize(
    tokenizers: Mapping[str, Any], prompts: Sequence[str], tokens: int | None = None,
    negative: bool = False,
) -> Prompts:
    """The prompts as token ids of each encoder and the masks of those that are no padding.

    A prompt longer than an encoder's tokens is cut before its last one, with a warning where no
    encoder reads all of it. Raises UserError for an empty prompt (negative: allow it), or other
    tokens than the image model takes.
    """
    if tokens not in (None, TOKENS):
        raise UserError(f"text of {tokens} tokens is asked for; Stable Diffusion 3 takes {TOKENS}")
    check(prompts, may_be_blank=negative)
    made, last = {}, max(tokenizers)  # T5's, where it is there
    for name, tokenizer in tokenizers.items():
        rows, length = tokenizer(list(prompts))["input_ids"], LENGTHS[name]
        rows = cut(rows, length) if name == last else [row[:length] for row in rows]
        for row in rows:
            row[-1] = tokenizer.eos_token_id  # as of those that are not cut
        made[name] = padded(rows, length, tokenizer.pad_token_id)
    return made
