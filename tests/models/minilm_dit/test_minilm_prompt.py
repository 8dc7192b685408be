"""Prompts as token ids: pieces, ends, padding and what is cut."""

import json

import numpy as np
import pytest

from twinflow_jax.errors import UserError
from twinflow_jax.models.minilm_dit import prompt, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    file = folder / "tokenizer.json"
    # The published file asks for this itself; it is not what a prompt gets.
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "truncation": {
            "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
        },
        "padding": {
            "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
        },
    }))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return prompt.load_tokenizer(folder)


def pieces(tokenizer, ids, mask) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(row[keep]) for row, keep in zip(ids, mask, strict=True)]


def test_words_in_lower_case_between_the_ends(tokenizer):
    ids, mask = prompt.tokenize(tokenizer, ["A Fóx,", "a 東 b"])
    assert ids.shape == mask.shape == (2, 16) and ids.dtype == np.int32
    assert pieces(tokenizer, ids, mask) == [
        ["[CLS]", "a", "f", "##o", "##x", ",", "[SEP]"],
        ["[CLS]", "a", "[UNK]", "b", "[SEP]"],
    ]
    assert (ids[~mask] == tokenizer.pad_token_id).all()
    assert len(tokenizer) <= tiny.CONFIGS["text_encoder"]["vocab_size"]


def test_no_prompt_is_both_ends(tokenizer):
    ids, mask = prompt.tokenize(tokenizer, [""], negative=True)
    assert pieces(tokenizer, ids, mask) == [["[CLS]", "[SEP]"]]
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        prompt.tokenize(tokenizer, ["a", " "])


def test_buckets_and_cuts(tokenizer, recwarn):
    for length, bucket in ((14, 16), (15, 32), (254, 256)):
        ids, mask = prompt.tokenize(tokenizer, ["x" * min(length, 90) + " x" * (length - 90), "y"])
        assert ids.shape == (2, bucket) and mask.sum(axis=1).tolist() == [length + 2, 3]
    ids, mask = prompt.tokenize(tokenizer, ["abc"], tokens=300)
    assert ids.shape == (1, 300) and mask.sum() == 5
    assert not recwarn
    with pytest.warns(UserWarning, match="prompt 2 of 2 makes 7 tokens: only the first 4 are used"):
        ids, mask = prompt.tokenize(tokenizer, ["a", "abcde"], tokens=4)
    assert pieces(tokenizer, ids, mask)[1] == ["[CLS]", "a", "##b", "[SEP]"]
    with pytest.warns(UserWarning, match="only the first 256 are used"):
        ids, mask = prompt.tokenize(tokenizer, ["x " * 400])
    assert ids.shape == (1, 256) and mask.all() and ids[0, -1] == tokenizer.sep_token_id


def test_folders_without_a_tokenizer_of_this_kind(folder, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        prompt.load_tokenizer(tmp_path)
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    with pytest.raises(UserError, match="not like BERT's"):
        prompt.load_tokenizer(tmp_path)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        prompt.load_tokenizer(tmp_path)
