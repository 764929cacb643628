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


def clip(length: int = 77) -> transformers.CLIPTokenizer:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in byte_characters():
        for token in (character, character + "</w>"):
            vocabulary.setdefault(token, len(vocabulary))
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


def qwen(length: int = 2048) -> transformers.Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*byte_characters(), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=length, extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma(length: int = 8192) -> transformers.GemmaTokenizer:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"])}
    for character in string.printable:
        vocabulary.setdefault(character, len(vocabulary))
    # As the released ones do: the empty caption is then one token and not none.
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=length, add_bos_token=True)


def llama(length: int = 8192) -> transformers.LlamaTokenizer:
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "\u2581"])}
    for character in string.printable:
        vocabulary.setdefault(character, len(vocabulary))
    tokenizer = transformers.LlamaTokenizer(vocab=vocabulary, merges=[], model_max_length=length)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "right"
    return tokenizer


def glm(length: int = 8192) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate([*byte_characters(), "<|endoftext|>", "[gMASK]", "<sop>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    marks = [(token, vocabulary[token]) for token in ("[gMASK]", "<sop>")]
    made.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=marks)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|endoftext|>", eos_token="<|endoftext|>", padding_side="left", model_max_length=length)
