"""Tokenizers of published folders, read without looking a name up or running a folder's code, and
what becomes of their rows."""

import os
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from twinflow_jax.errors import TextCut, UserError, reason


def load(folder: str | os.PathLike, of: str, kind: str | None = None):
    """`(tokenizer, the tokens of an empty text)` of a local folder.

    Reads files only: no name is looked up elsewhere, no code of the folder is run.
    of: which folder is expected, for messages. kind: transformers' class, where vocab.json and
    merges.txt will do as well as tokenizer.json, which says all by itself.
    Raises:
      UserError: there is no tokenizer, or it cannot be read.
    """
    folder = pathlib.Path(folder)
    forms = [("tokenizer.json",)] + ([("vocab.json", "merges.txt")] if kind else [])
    # transformers makes an empty tokenizer of a folder without these.
    if not any(all((folder / name).is_file() for name in names) for names in forms):
        known = ", or ".join(" and ".join(names) for names in forms)
        raise UserError(f"{folder} holds no tokenizer ({known}): give {of}")
    import transformers  # takes seconds to import

    try:  # a relative path could also be the name of a repository
        made = getattr(transformers, kind or "PreTrainedTokenizerFast")
        tokenizer = made.from_pretrained(folder.resolve(), local_files_only=True)
        return tokenizer, tokenizer("")["input_ids"]
    except Exception as error:  # of whatever kind: the parser's are plain Exceptions
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason(error)}") from error


def load_chat(folder: str | os.PathLike, of: str, template: str, tokens: int):
    """The Qwen tokenizer of a published model's folder, as `load`.

    of: the model. Warns where the start of the template, before "{}", is not so many tokens.
    """
    tokenizer, _ = load(folder, f"the local folder 'tokenizer' of {of}", "Qwen2TokenizerFast")
    start = len(tokenizer(template.split("{}")[0])["input_ids"])
    if start != tokens:
        warnings.warn(
            f"the tokenizer in {folder} is not {of}'s: the template's start is {start} tokens, "
            f"not {tokens}, so that prompts will not mean what they should",
            stacklevel=3,
        )
    return tokenizer


def check(prompts: Sequence[str], may_be_blank: bool, what: str = "what the image shows") -> None:
    """Raises UserError where one says nothing, or has what is no character, as bytes of a command
    line that are not UTF-8. what: that is to be written."""
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number} of {len(prompts)}"
        if not prompt.strip() and not may_be_blank:
            raise UserError(f"{which} is empty: write {what}")
        if prompt != prompt.encode("utf-8", "replace").decode():
            raise UserError(f"{which} is no text in UTF-8: write it again")


def cut(rows: Sequence[list[int]], limit: int, before: int = 0) -> list[list[int]]:
    """The first tokens of each row, `limit` of its prompt, warning of those that have more.

    before: tokens of a row that stand before its prompt.
    """
    for number, row in enumerate(rows, 1):
        if len(row) - before > limit:
            warnings.warn(
                f"prompt {number} of {len(rows)} makes {len(row) - before} tokens: only the first "
                f"{limit} are used",
                TextCut, stacklevel=3,
            )
    return [row[: before + limit] for row in rows]


def in_template(
    tokenizer, template: str, prompts: Sequence[str], buckets: Sequence[int],
    tokens: int | None = None, negative: bool = False, before: int = 0,
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The prompts in a template as token ids and the mask of those that are no padding.

    before: tokens of the template before the prompt, which are not counted. L is these and
    `tokens`, or else the smallest bucket that holds the longest row. A longer row, or one longer
    than the last bucket, is cut there, with a warning. negative: prompts may be empty.
    Raises:
      UserError: as `check`.
    """
    check(prompts, may_be_blank=negative)
    rows = tokenizer([template.format(prompt) for prompt in prompts])["input_ids"]
    rows = cut(rows, min(tokens or buckets[-1], buckets[-1]), before)
    longest = max(map(len, rows)) - before
    length = tokens or min(bucket for bucket in buckets if bucket >= longest)
    return padded(rows, before + length, tokenizer.pad_token_id)


def padded(
    rows: Sequence[list[int]], length: int, token: int
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """The rows as ids, `token` after what is shorter, and the mask of those that are no padding."""
    ids = np.full((len(rows), length), token, np.int32)
    for whole, row in zip(ids, rows, strict=True):
        whole[: len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return ids, np.arange(length) < lengths[:, None]
