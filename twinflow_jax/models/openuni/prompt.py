"""From prompts to the text encoder's tokens, as in OpenUni's text-to-image.

An instruction stands in InternVL3's chat template, and after it the token that begins a picture.
"""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from twinflow_jax.errors import UserError
from twinflow_jax.models import tokenizers

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
PREFIX = 3  # the tokens of the template before the instruction
INSTRUCTION = "Generate an image: {}"
NO_INSTRUCTION = "Generate an image."  # stands for no prompt
MAX_TOKENS = 512  # of a prompt with its template
BUCKETS = (32, 64, 128, 256, MAX_TOKENS)
QUERIES = 256  # tokens that the image model takes, of every prompt


def load_tokenizer(folder: str | os.PathLike):
    """As `tokenizers.load_chat`, of an assembled OpenUni.

    Raises:
      UserError: as well where it does not know the token that begins a picture.
    """
    tokenizer = tokenizers.load_chat(folder, "OpenUni", TEMPLATE, PREFIX)
    if len(tokenizer("<img>")["input_ids"]) != 1:
        raise UserError(f"the tokenizer in {folder} is not InternVL3's: <img> is not one token")
    return tokenizer


def tokenize(
    tokenizer, prompts: Sequence[str], tokens: int | None = None, negative: bool = False
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The prompts in the template as token ids and the mask of those that are no padding.

    L is the smallest of BUCKETS that holds the longest prompt. A prompt longer than MAX_TOKENS is
    cut there, with a warning. negative: prompts may be empty, which asks for any picture. Raises
    UserError for an empty prompt, or other `tokens` than QUERIES.
    """
    if tokens not in (None, QUERIES):
        raise UserError(f"text of {tokens} tokens is asked for; OpenUni takes {QUERIES}")
    tokenizers.check(prompts, may_be_blank=negative)
    stripped = [prompt.strip() for prompt in prompts]
    asked = [INSTRUCTION.format(prompt) if prompt else NO_INSTRUCTION for prompt in stripped]
    return tokenizers.in_template(tokenizer, TEMPLATE, asked, BUCKETS)
