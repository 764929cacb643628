"""From what a model said to a caption: openings, remarks and mark-up away, refusals and loops told apart."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from data_tools.layouts.caption_files import clean_line
from data_tools.records import CHINESE, LETTER
from data_tools.thinking_reply import parse_reply

LEAST_LETTERS = 3
LOOP_TIMES = 4  # the same four words this often is a model that got stuck
LOOP_RATIO = 0.25  # compressed size / size under which a text of some length repeats itself
LOOP_LENGTH = 200  # characters; shorter texts compress badly anyway
MARKUP = re.compile(r"^\s*(?:```\w*|#{1,6}\s+|[-*•]\s+|\d+[.)]\s+|>\s+)|```\s*$|\*\*|__", re.MULTILINE)
LABEL = re.compile(r"^\s*(?:image |picture )?(?:caption|description|answer|output|描述|图片描述|说明|答案)\s*[:：]\s*", re.IGNORECASE)
POLITE = re.compile(r"^\s*(?:sure|certainly|of course|okay|ok|absolutely)?\s*[,!.]?\s*(?:here(?:'s| is| are)|below is|this is)\s[^:：\n]{0,80}[:：]\s*", re.IGNORECASE)
AFFIRM = re.compile(r"^\s*(?:sure|certainly|of course|absolutely|好的|当然|当然可以)\s*[!,.，。！]\s*", re.IGNORECASE)
OPENING = re.compile(
    r"^\s*(?:(?:in|within) (?:this|the) (?:image|picture|photo|photograph|illustration|drawing|scene)\s*,?\s*(?:we (?:can )?see|there (?:is|are))?"
    r"|(?:this|the|an?) (?:image|picture|photo|photograph|illustration|drawing|artwork|scene) (?:shows|depicts|features|displays|presents|portrays|captures|contains|is of|of)"
    r"|(?:这张|这幅|该|此)?(?:图片|图像|照片|插图|画面|图)(?:中|里)?(?:展示|描绘|显示|呈现|描述|是)(?:了|的是)?|(?:这张|这幅)?(?:图片|图|画面)(?:中|里)(?:有)?)\s*[:：,，]?\s*",
    re.IGNORECASE,
)
CLOSING = re.compile(
    r"(?:(?<=[.!?。！？])|^)\s*(?:let me know\b|i hope\b|feel free\b|overall,|the overall (?:mood|atmosphere|style|tone|effect)\b|in summary,|总的来说|总体而言|整体(?:氛围|风格)|希望).*$",
    re.IGNORECASE | re.DOTALL,
)
REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am) (?:sorry|unable|not able)|sorry,|i can(?:no|')t\b|i can't\b|i cannot\b|as an ai\b|unfortunately, i\b|抱歉|对不起|很抱歉|我无法|我不能|无法(?:识别|描述|协助|查看))"
    r"|\bcannot (?:assist|help|identify|comply)\b|\bunable to (?:see|view|assist)\b|\bno image (?:was|is) (?:provided|attached)\b",
    re.IGNORECASE,
)
SERVER_TEXT = re.compile(r"<!doctype html|<html|\brate limit\b.{0,40}\bexceeded\b|\binternal server error\b|\bbad gateway\b|^\s*\{\s*\"error\"", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?。！？](?=\s|$|[^\x00-\x7f])")


@dataclass(frozen=True)
class Cleaned:
    """The caption, or "" with the `problem` that makes the answer unusable."""

    text: str
    problem: str = ""


def clean_answer(raw: str, *, cut: bool = False) -> Cleaned:
    """A caption from a model's answer. cut: the model ran into its limit, so an unfinished last sentence is dropped."""
    reply = parse_reply(raw)
    if reply.prompt is None:
        return Cleaned("", reply.reason or "empty answer")
    text = MARKUP.sub("", reply.prompt)
    for pattern in (AFFIRM, POLITE, LABEL):
        text = pattern.sub("", text, count=1)
    if SERVER_TEXT.search(text):
        return Cleaned("", "an error message instead of a caption")
    if REFUSAL.search(text[:200]):
        return Cleaned("", "a refusal")
    text = clean_line(_unquoted(text))
    text, opened = OPENING.subn("", text, count=1)
    text = CLOSING.sub("", text).strip()
    if cut:
        text = _whole_sentences(text)
    if opened and text[:1].islower():
        text = text[0].upper() + text[1:]
    problem = _problem(text)
    return Cleaned("" if problem else text, problem)


def _unquoted(text: str) -> str:
    text = text.strip()
    for opening, closing in (('"', '"'), ("“", "”"), ("「", "」"), ("'", "'")):
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing) and opening not in text[1:-1] and closing not in text[1:-1]:
            return text[1:-1]
    return text


def _whole_sentences(text: str) -> str:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def _problem(text: str) -> str:
    if len(LETTER.findall(text)) < LEAST_LETTERS and not CHINESE.search(text):
        return "empty answer"
    words = text.lower().split()
    fours = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
    if fours and max(map(fours.count, set(fours))) >= LOOP_TIMES:
        return "an answer that repeats itself"
    encoded = text.encode()
    if len(encoded) >= LOOP_LENGTH and len(zlib.compress(encoded)) < LOOP_RATIO * len(encoded):
        return "an answer that repeats itself"
    return ""


STYLE_WORDS = {
    "en": "watercolor watercolour oil-painting acrylic pencil-drawing ink-drawing line-art lineart sketch illustration cartoon anime manga pixel-art vector flat-design minimalist minimalistic photorealistic realistic surreal impressionist cubist abstract vintage retro painterly hand-drawn digital-art digital-painting concept-art 3d-render low-poly stylized stylised brushstrokes palette monochrome pastel vibrant".split(),
    "zh": "水彩 油画 国画 水墨 素描 插画 卡通 动漫 漫画 像素 矢量 扁平 极简 写实 写意 超现实 印象派 抽象 复古 手绘 数字艺术 笔触 色调 风格".split(),
}


def style_words(text: str) -> list[str]:
    """Words about how a picture is made, found in a caption; for a style set they belong to the trigger instead."""
    lowered = text.lower()
    found = [word for word in STYLE_WORDS["en"] if re.search(rf"\b{word.replace('-', '[ -]')}\b", lowered)]
    return found + [word for word in STYLE_WORDS["zh"] if word in text]
