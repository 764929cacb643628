"""The reasoning trace beside its picture, and the record where people and programs find it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.lettering import wrapped
from data_tools.thinking import ThinkingRecord, thinking_path, write_record
from data_tools.thinking_text import trace_fields
from finetune.thinking.lettering import drawable, font_for

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS_NAME = "thinking"
PANEL_WIDTH, SMALLEST_HEIGHT = 460, 448  # pixels
PAPER, INK, FAINT, ACCENT = "#fbfaf7", "#1c1c1c", "#77726a", "#8a3b2a"
MARGIN, SIZE, LINE = 18, 14, 20
NOT_DRAWABLE = "(Chinese text; no font on this machine draws it, the .thinking.json beside the picture has it)"


def shown_record(record: ThinkingRecord) -> dict[str, Any]:
    """What `generate --json` says of a record: elements, relations, style, trace, enhanced, ok, and why not."""
    data = record.to_json()
    return {key: data[key] for key in ("elements", "relations", "style", "trace", "enhanced", "ok", "reason", "backend")}


def settings_with_record(settings: dict[str, Any], record: ThinkingRecord) -> dict[str, Any]:
    """The settings for `sampling.save_picture` with the whole record in them, so that the PNG carries it."""
    return settings | {SETTINGS_NAME: record.to_json()}


def store_beside(picture: Path | str, record: ThinkingRecord) -> Path:
    """Write the record next to its picture as `<stem>.thinking.json`; returns that path."""
    path = thinking_path(picture)
    write_record(path, record)
    return path


def _panel_lines(record: ThinkingRecord, width: int) -> list[tuple[str, str]]:
    """(line, colour) from top to bottom; an empty line is half a gap."""
    lines: list[tuple[str, str]] = []

    def paragraph(label: str, text: str, colour: str) -> None:
        lines.append((drawable(label, "Trace"), FAINT))
        shown = drawable(text, NOT_DRAWABLE)
        lines.extend((line, colour) for line in wrapped(shown, font_for(shown, SIZE), width))
        lines.append(("", INK))

    chinese = record.language == "zh"
    paragraph("提示词" if chinese else "Prompt", record.prompt, INK)
    for label, text in trace_fields(record):
        paragraph(label, text, INK)
    if record.ok:
        paragraph("绘图提示词" if chinese else "Drawn with", record.enhanced, ACCENT)
    else:
        paragraph("Drawn with the prompt itself", record.reason, ACCENT)
    return lines


def picture_with_trace(picture: Image, record: ThinkingRecord) -> Image:
    """The picture at the left (small ones enlarged by whole factors), its trace at the right, as one RGB image."""
    from PIL import Image as images
    from PIL import ImageDraw

    factor = max(1, -(-SMALLEST_HEIGHT // max(picture.height, 1)))
    shown = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), images.Resampling.NEAREST)
    lines = _panel_lines(record, PANEL_WIDTH - 2 * MARGIN)
    text_height = sum(LINE if line else LINE // 2 for line, _ in lines) + 2 * MARGIN
    page = images.new("RGB", (shown.width + PANEL_WIDTH, max(shown.height, text_height)), PAPER)
    page.paste(shown, (0, 0))
    pen, y = ImageDraw.Draw(page), MARGIN
    for line, colour in lines:
        if line:
            pen.text((shown.width + MARGIN, y), line, colour, font_for(line, SIZE) or font_for("", SIZE))
        y += LINE if line else LINE // 2
    return page
