"""From prompts to the text encoder's tokens, and from its states to the image model's.

As in diffusers' SanaPipeline: one instruction stands before every prompt and is encoded with it;
of its states only the first and the last stay. A negative prompt stands alone.
"""

import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twinflow_jax.arrays import TextMask, TextTokens
from twinflow_jax.errors import UserError
from twinflow_jax.models import tokenizers

# The published text (complex_human_instruction), line by line.
INSTRUCTION = "\n".join((
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions "
    "suitable for image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, "
    "and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without "
    "overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
    "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
    "flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
    "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
    "double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any "
    "additional commentary or evaluations:",
    "User Prompt: ",
))
TOKENS = 300  # that the image model takes


def load_tokenizer(folder: str | os.PathLike):
    """As `tokenizers.load`, of "tokenizer" of a published SANA. Raises UserError where it is not
    like Gemma's."""
    tokenizer, empty = tokenizers.load(folder, "the local folder 'tokenizer' of SANA")
    if tokenizer.pad_token_id is None or empty != [tokenizer.bos_token_id]:
        raise UserError(
            f"the tokenizer in {folder} is not SANA's: it has no padding token, or does not begin "
            "every text with its token for that"
        )
    return tokenizer


def tokenize(
    tokenizer, prompts: Sequence[str], tokens: int | None = None, negative: bool = False
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The prompts, in lower case, as token ids and the mask of those that are no padding.

    L depends only on the tokenizer and on negative: whether these are negative prompts, which
    have no instruction and may be empty ("" is the usual one). A prompt too long is cut, with a
    warning. Raises UserError for an empty prompt, or other tokens than the image model takes.
    """
    if tokens not in (None, TOKENS):
        raise UserError(f"text of {tokens} tokens is asked for; SANA takes {TOKENS}")
    tokenizers.check(prompts, may_be_blank=negative)
    before = "" if negative else INSTRUCTION
    start = len(tokenizer(before)["input_ids"])
    length = TOKENS if negative else start + TOKENS - 2
    rows = tokenizer([before + prompt.lower().strip() for prompt in prompts])["input_ids"]
    rows = tokenizers.cut(rows, length - start, start)
    return tokenizers.padded(rows, length, tokenizer.pad_token_id)


def select(
    states: TextTokens, mask: TextMask
) -> tuple[Float[Array, "B 300 D"], Bool[Array, "B 300"]]:
    """The states that the image model takes, with their mask: the first and the last 299.

    Valid tokens stay the first ones, since the order does.
    """
    index = np.r_[0, states.shape[1] - TOKENS + 1 : states.shape[1]]
    return jnp.take(states, index, axis=1), jnp.take(mask, index, axis=1)
