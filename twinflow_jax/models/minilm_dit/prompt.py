"""From prompts to the text encoder's tokens: [CLS], the words in pieces, [SEP]."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from twinflow_jax.errors import UserError
from twinflow_jax.models import tokenizers

MAX_TOKENS = 256  # that all-MiniLM-L6-v2 is meant for
BUCKETS = (16, 32, 64, 128, MAX_TOKENS)


def load_tokenizer(folder: str | os.PathLike):
    """As `tokenizers.load`, of all-MiniLM-L6-v2's folder. Raises UserError where it is not like
    BERT's."""
    tokenizer, empty = tokenizers.load(folder, "the folder of all-MiniLM-L6-v2")
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    if tokenizer.pad_token_id is None or None in ends or empty != ends:
        raise UserError(
            f"the tokenizer in {folder} is not like BERT's: it has no padding token, or does not "
            "put every text between [CLS] and [SEP]"
        )
    return tokenizer


def tokenize(
    tokenizer, prompts: Sequence[str], tokens: int | None = None, negative: bool = False
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The prompts as token ids and the mask of those that are no padding.

    L is `tokens`, or else the smallest of BUCKETS that holds the longest prompt. A prompt longer
    than that, or than MAX_TOKENS, is cut before its [SEP], with a warning. Raises UserError for
    an empty prompt; negative: allow it.
    """
    tokenizers.check(prompts, may_be_blank=negative)
    rows = tokenizer(list(prompts))["input_ids"]
    rows = tokenizers.cut(rows, min(tokens or MAX_TOKENS, MAX_TOKENS))
    for row in rows:
        row[-1] = tokenizer.sep_token_id
    longest = max(map(len, rows))
    length = tokens or min(bucket for bucket in BUCKETS if bucket >= longest)
    return tokenizers.padded(rows, length, tokenizer.pad_token_id)
