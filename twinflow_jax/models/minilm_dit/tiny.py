"""The text encoder in small: a config in the published form, a tokenizer in the published format.

With random weights they go through the same code as the real ones: for tests, and for trying a
run without a download.
"""

import string

CONFIGS = {
    "text_encoder": {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 144, "hidden_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": 256,
    },
}
SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def save_tokenizer(folder) -> None:
    """Writes one like BERT's, whose pieces are single characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # both take seconds to import

    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
