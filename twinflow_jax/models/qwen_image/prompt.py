"""From prompts to the text encoder's tokens, and from its states to the image model's.

As in diffusers' QwenImagePipeline: every prompt stands in one chat template, whose fixed start is
encoded with it and then dropped.
"""

import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twinflow_jax.arrays import TextMask, TextTokens
from twinflow_jax.models import tokenizers

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX = 34  # the tokens of the template before the prompt
MAX_TOKENS = 1024  # of a prompt, and of the template after it
BUCKETS = (64, 128, 256, 512, MAX_TOKENS)
NULL_PROMPT = "Generate an image."  # TwinFlow's unconditional prompt


def load_tokenizer(folder: str | os.PathLike):
    """As `tokenizers.load`, of "tokenizer" of the published Qwen-Image. Warns where the template's
    start is not the 34 tokens that the published tokenizer makes of it."""
    return tokenizers.load_chat(folder, "Qwen-Image", TEMPLATE, PREFIX)


def tokenize(
    tokenizer, prompts: Sequence[str], tokens: int | None = None, negative: bool = False
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The prompts in the template as token ids and the mask of those that are no padding.

    L is PREFIX and `tokens`, or else the smallest of BUCKETS that holds the longest prompt. A
    prompt longer than that, or than MAX_TOKENS, is cut there, with a warning. Raises UserError
    for an empty prompt; negative: allow it (" " is what Qwen-Image uses as negative prompt).
    """
    return tokenizers.in_template(
        tokenizer, TEMPLATE, prompts, BUCKETS, tokens, negative, before=PREFIX
    )


def drop_prefix(
    states: TextTokens, mask: TextMask
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
    """The states of the prompts alone, S = L - PREFIX tokens, zero at padding; and their mask."""
    states, mask = states[:, PREFIX:], mask[:, PREFIX:]
    return jnp.where(mask[..., None], states, 0), mask
