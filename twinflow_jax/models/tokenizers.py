"""Tokenizers of published folders, read without looking a name up or running a folder's code."""

import os
import pathlib

from twinflow_jax.errors import UserError, reason


def from_json(folder: str | os.PathLike, of: str):
    """`(tokenizer, the tokens of an empty text)` of a local folder with a tokenizer.json.

    of: which folder is expected, for messages.
    Raises:
      UserError: there is no tokenizer, or it cannot be read.
    """
    folder = pathlib.Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json): give {of}")
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    try:  # a relative path could also be the name of a repository
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.resolve(), local_files_only=True)
        return tokenizer, tokenizer("")["input_ids"]
    except Exception as error:  # of whatever kind: the parser's are plain Exceptions
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason(error)}") from error
