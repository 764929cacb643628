"""What a captioner is told, in English and Chinese, for training a style or a subject, in words or as a thinking record.

What a caption says is explained by the caption; what it leaves out goes into the adapter. So for a style the captions
say what is in the picture and never how it is drawn; for a subject they say everything but the subject's own traits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from data_tools.thinking_schema import RELATIONS, THOUGHT_SCHEMA

PURPOSES = ("style", "subject", "everything")

SYSTEM = {
    ("style", "en"): "You write captions for training an image model on a drawing style. Describe only what is visible: subjects, actions, objects, their positions, the background, readable text in quotes. Do not name or describe the art style, medium, technique, line work, palette, quality or mood. Do not begin with words such as 'The image shows'. One paragraph, 30 to 60 words, present tense.",
    ("style", "zh"): "你在为图像模型的画风训练写图片说明。只描述画面里看得见的内容：主体、动作、物体、位置、背景、可读文字（加引号）。不要提及画风、媒介、技法、笔触、色调、画质或情绪。不要以“这张图片”开头。一段话，30到80字。",
    ("subject", "en"): "You write captions for training an image model on one subject. Describe the scene, the action, the view, the lighting, the background and the style of the picture. Name the subject only as '{subject}' and do not describe its own fixed traits such as shape, colours or markings. Do not begin with words such as 'The image shows'. One paragraph, 30 to 60 words, present tense.",
    ("subject", "zh"): "你在为图像模型的主体训练写图片说明。描述场景、动作、视角、光线、背景和画面风格。主体只称为“{subject}”，不要描述它本身固定的特征，如形状、颜色、花纹。不要以“这张图片”开头。一段话，30到80字。",
    ("everything", "en"): "You write captions for training an image model. Describe everything that is visible: subjects, actions, objects, positions, background, readable text in quotes, lighting, colours and style. Do not begin with words such as 'The image shows'. One paragraph, 40 to 80 words, present tense.",
    ("everything", "zh"): "你在为图像模型训练写图片说明。描述看得见的一切：主体、动作、物体、位置、背景、可读文字（加引号）、光线、色彩和风格。不要以“这张图片”开头。一段话，40到100字。",
}
QUESTION = {"en": "Describe this picture.", "zh": "描述这张图片。"}
# Asked after an answer that could not be used: shorter, so that a model that refused or rambled has less to stumble over.
AGAIN = {"en": "Say in one plain sentence what can be seen in this picture.", "zh": "用一句简单的话说出画面里有什么。"}
THINKING = {
    "en": 'Look at the picture and answer with one JSON object and nothing else. Keys: "elements": list of {{"id": "e1", "name": noun, "count": whole number, "attributes": [words]}}; "relations": list of {{"a": id, "relation": one of {relations}, "b": id}}; "composition", "environment", "lighting": short texts; "palette", "style", "text", "details": lists of short texts, "text" being what is written in the picture; "enhanced": the whole picture in 40 to 80 words, every element and quoted text in it. Write in English.',
    "zh": '看图，只回答一个 JSON 对象。键："elements"：列表 {{"id": "e1", "name": 名词, "count": 整数, "attributes": [词]}}；"relations"：列表 {{"a": id, "relation": {relations} 之一, "b": id}}；"composition"、"environment"、"lighting"：短文本；"palette"、"style"、"text"、"details"：短文本列表，"text" 是画面里的文字；"enhanced"：用40到100字描述整个画面，包含每个元素和引号内的文字。用中文书写。',
}


@dataclass(frozen=True)
class CaptionPrompt:
    """What is asked. schema: the shape of a thinking answer, or None for words. `identifier` names it in logs."""

    system: str
    question: str
    again: str
    language: str
    schema: dict | None = None

    @property
    def identifier(self) -> str:
        """Twelve hex digits that change when any word of the prompt does."""
        return hashlib.sha256(json.dumps([self.system, self.question, self.again, self.schema], ensure_ascii=False).encode()).hexdigest()[:12]


def caption_prompt(purpose: str = "style", language: str = "en", *, subject: str = "the subject", question: str | None = None) -> CaptionPrompt:
    """The prompt for plain captions. question: words of the user's own instead of the usual ones."""
    return CaptionPrompt(SYSTEM[purpose, language].format(subject=subject), question or QUESTION[language], question or AGAIN[language], language)


def thinking_prompt(language: str = "en") -> CaptionPrompt:
    """The prompt for thinking records: a JSON object in the shape of `thinking_schema.THOUGHT_SCHEMA`."""
    words = THINKING[language].format(relations=", ".join(RELATIONS))
    return CaptionPrompt("", words, words, language, THOUGHT_SCHEMA)
