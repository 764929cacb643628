"""Tokenizers made in memory from a character vocabulary, one for every kind that a family uses."""

from __future__ import annotations

import string

import transformers

CHARACTERS = string.ascii_lowercase + string.digits + ".,-"


def byte_characters() -> list[str]:
    """The 256 characters by which byte-level tokenizers write bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = dict(zip(printable, printable, strict=True))
    spare = 256
    for byte in range(256):
        if byte not in names:
            names[byte], spare = spare, spare + 1
    return [chr(code) for code in names.values()]


def bert(length: int = 77) -> transformers.BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *("##" + c for c in CHARACTERS)]
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=length)


def t5(length: int = 512) -> transformers.T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
