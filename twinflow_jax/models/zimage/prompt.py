"""From prompts to the text encoder's tokens, as in diffusers' ZImagePipeline.

Every prompt stands in one chat template, all of whose tokens the image model reads.
"""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from twinflow_jax.models import tokenizers

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PREFIX = 3  # the tokens of the template before the prompt
MAX_TOKENS = 512  # of a prompt with its template
BUCKETS = (32, 64, 128, 256, MAX_TOKENS)


def load_tokenizer(folder: str | os.PathLike):
    """As `tokenizers.load_chat`, of "tokenizer" of the published Z-Image."""
    return tokenizers.load_chat(folder, "Z-Image", TEMPLATE, PREFIX)


def tokenize(
    tokenizer, prompts: Sequence[str], tokens: int | None = None, negative: bool = False
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The prompts in the template as token ids and the mask of those that are no padding.

    L is `tokens`, or else the smallest of BUCKETS that holds the longest prompt. A prompt longer
    than that, or than MAX_TOKENS, is cut there, with a warning. Raises UserError for an empty
    prompt; negative: allow it ("" is what stands for none).
    """
    return tokenizers.in_template(tokenizer, TEMPLATE, prompts, BUCKETS, tokens, negative)
