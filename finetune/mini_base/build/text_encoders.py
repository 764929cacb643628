"""Two small frozen text encoders and their tokenizers, computed from the emoji annotations, not trained.

Every emoji is a document of its English AND Chinese names and keywords. Factorising the word-document matrix puts words
of one meaning side by side in both languages, so Chinese captions and synonyms cost the transformer no training.
A random part keeps every word distinguishable from its neighbours.
"""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .subjects import Subject, load_annotations

WIDTH, MEANING_WIDTH = 96, 64
BERT_LENGTH, T5_LENGTH = 77, 256
WORD = re.compile(r"[a-z0-9]+|[\u4e00-\u9fff]")
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")
PUNCTUATION = list(",.!?:;'\"()-&/，。！？：；、“”’")
# Words that captions and style prompts use although no emoji is named by them.
COMMON = ("a an the of on in with and icon picture style art background drawing flat color colour lines line ink two tone "
          "duotone poster outline sketch brand palette sks white black gray grey red orange yellow green teal blue navy purple "
          "pink brown cream peach dark light small big left right top bottom print retro neon pastel paper pixel simple").split()
COMMON_CHINESE = list("的上背景一个图标风格色白黑灰红橙黄绿青蓝深紫粉棕米桃双调印刷线条画海报")
SKIPPED_GROUPS = (2, 9, None)    # skin-tone components and flags carry no meaning for pictures of things


def _documents(packages: Path) -> list[dict[str, float]]:
    documents: dict[str, dict[str, float]] = {}
    for language in ("en", "zh"):
        for row in load_annotations(packages, language).values():
            if row.get("group") in SKIPPED_GROUPS:
                continue
            document = documents.setdefault(row["hexcode"], {})
            for word in WORD.findall(row["label"].lower()):
                document[word] = document.get(word, 0) + 2.0
            for tag in row.get("tags", []):
                for word in WORD.findall(tag.lower()):
                    document[word] = document.get(word, 0) + 1.0
    return list(documents.values())


def word_meanings(packages: Path, subjects: list[Subject]) -> tuple[list[str], np.ndarray]:
    """All known words and a unit vector of meaning for each (zero where the annotations never use the word)."""
    documents = _documents(packages)
    frequency: dict[str, int] = {}
    for document in documents:
        for word in document:
            frequency[word] = frequency.get(word, 0) + 1
    known = set(COMMON) | set(COMMON_CHINESE) | {word for word, count in frequency.items() if count >= 6}
    for subject in subjects:
        for name in subject.english + subject.chinese:
            known |= set(WORD.findall(name.lower()))
        known |= {word for tag in subject.tags for word in WORD.findall(tag) if frequency.get(word, 0) >= 3}
    words = sorted(known)
    row_of = {word: row for row, word in enumerate(words)}
    counts = np.zeros((len(words), len(documents)))
    for column, document in enumerate(documents):
        for word, count in document.items():
            if word in row_of:
                counts[row_of[word], column] = count
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = np.where(joint > 0, np.log(np.maximum(joint, 1e-12) / np.maximum(independent, 1e-12)), 0).clip(0)
    left, values, _ = np.linalg.svd(information, full_matrices=False)
    meanings = left[:, :MEANING_WIDTH] * np.sqrt(values[:MEANING_WIDTH])
    meanings /= np.linalg.norm(meanings, axis=1, keepdims=True) + 1e-6
    return words, meanings.astype(np.float32)


def _embedding_table(tokens: list[str], words: list[str], meanings: np.ndarray, seed: int) -> torch.Tensor:
    """Per token: its meaning (or a random direction) beside a random identity."""
    random = np.random.default_rng(seed)
    row_of = {word: row for row, word in enumerate(words)}
    table = np.zeros((len(tokens), WIDTH), np.float32)
    for index, token in enumerate(tokens):
        identity = random.normal(size=WIDTH - MEANING_WIDTH)
        meaning = random.normal(size=MEANING_WIDTH)
        row = row_of.get(token.replace("\u2581", ""))
        if row is not None and np.linalg.norm(meanings[row]) > 0.1:
            meaning = meanings[row]
        parts = [meaning / np.linalg.norm(meaning) * 0.8, identity / np.linalg.norm(identity) * 0.6]
        table[index] = np.concatenate(parts) * WIDTH ** 0.5
    return torch.from_numpy(table)


def _bert_tokens(words: list[str]) -> list[str]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + PUNCTUATION
    tokens += [word for word in words if word not in tokens]
    return tokens + [letter for letter in LETTERS if letter not in words] + ["##" + letter for letter in LETTERS]


def _t5_pieces(words: list[str]) -> list[tuple[str, float]]:
    """Unigram pieces: whole English words, bare Chinese characters, and unlikely single letters for any other word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + word, -3.0) for word in words if word.isascii()]
    pieces += [(word, -3.0) for word in words if not word.isascii()]
    present = {piece for piece, _ in pieces}
    return pieces + [(mark, -8.0) for mark in LETTERS + PUNCTUATION if mark not in present]


def _new_bert(token_count: int, table: torch.Tensor) -> BertModel:
    bert = BertModel(BertConfig(
        vocab_size=token_count, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=BERT_LENGTH, type_vocab_size=2, pad_token_id=0))
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.copy_(table)
        bert.embeddings.position_embeddings.weight.normal_(0, 0.25)
        bert.embeddings.token_type_embeddings.weight.zero_()
    return bert


def _new_t5(token_count: int, table: torch.Tensor) -> T5EncoderModel:
    t5 = T5EncoderModel(T5Config(
        vocab_size=token_count, d_model=WIDTH, d_kv=24, num_heads=4, d_ff=192, num_layers=1,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, tie_word_embeddings=False))
    with torch.no_grad():
        table[0] = 0
        t5.shared.weight.copy_(table)
        for parameter in t5.encoder.block.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5)
        # Without a relative bias and with a zero pad embedding every pad slot has the same output: one stands for all.
        t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    return t5


def build_text_encoders(packages: Path, subjects: list[Subject], seed: int, out: Path) -> None:
    """Writes tokenizer, text_encoder, tokenizer_2 and text_encoder_2 below `out`."""
    words, meanings = word_meanings(packages, subjects)
    bert_tokens, t5_pieces = _bert_tokens(words), _t5_pieces(words)
    torch.manual_seed(seed)
    bert = _new_bert(len(bert_tokens), _embedding_table(bert_tokens, words, meanings, seed + 1))
    t5 = _new_t5(len(t5_pieces), _embedding_table([piece for piece, _ in t5_pieces], words, meanings, seed + 2))
    for model, name in ((bert, "text_encoder"), (t5, "text_encoder_2")):
        model.half().float().eval().save_pretrained(out / name)    # the values that fp16 will keep
    vocabulary = {token: index for index, token in enumerate(bert_tokens)}
    BertTokenizer(vocab=vocabulary, model_max_length=BERT_LENGTH).save_pretrained(out / "tokenizer")
    T5Tokenizer(vocab=t5_pieces, extra_ids=0, model_max_length=T5_LENGTH).save_pretrained(out / "tokenizer_2")


class CaptionEncoder:
    """Captions to the encoders' outputs, cut to the tokens that are there (pads are all alike)."""

    def __init__(self, folder: Path):
        self.tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
        self.bert = BertModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        self.tokenizer_2 = T5Tokenizer.from_pretrained(folder / "tokenizer_2")
        self.t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """bert [n, a, width] and its mask; t5 [n, b, width] and its mask, where the LAST slot of t5 is always a pad."""
        first = self.tokenizer(captions, padding=True, truncation=True, max_length=BERT_LENGTH, return_tensors="pt")
        second = self.tokenizer_2(captions, padding=True, truncation=True, max_length=T5_LENGTH - 1, return_tensors="pt")
        ids, mask = F.pad(second.input_ids, (0, 1)), F.pad(second.attention_mask, (0, 1))
        return {"bert": self.bert(first.input_ids, attention_mask=first.attention_mask)[0],
                "bert_mask": first.attention_mask, "t5": self.t5(ids, attention_mask=mask)[0], "t5_mask": mask}
