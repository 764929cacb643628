"""Bad pictures, captions and layouts: each is listed with a reason or used with a warning; none ends in a traceback, a hang or silence."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from data_tools.images import Limits
from data_tools.records import ImageRecord
from data_tools.scan import ScanReport, scan_folder
from tests.data_tools.pictures import draw, encoded, half, save

LIMITS = Limits(seconds=20, pixels=50_000_000, file_bytes=2_000_000)


def png(width: int, height: int, body: bytes = b"", bits: int = 8, colour: int = 2) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)) + chunk(b"IDAT", body or zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb_text_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 80_000_000, zip=True)
    return encoded("PNG", pnginfo=info)


def broken_checksum() -> bytes:
    content = bytearray(encoded("PNG"))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    return bytes(content)


def floats(values) -> bytes:
    import numpy as np

    return encoded("TIFF", Image.fromarray(np.array(values, dtype=np.float32).reshape(16, 16)))


# name, bytes, the code it must be left out with
LEFT_OUT = [
    ("empty.png", b"", "empty_file"),
    ("header-cut.png", encoded("PNG")[:20], None),
    ("half.png", half(encoded("PNG")), "truncated"),
    ("half.jpg", half(encoded("JPEG")), "truncated"),
    ("half.webp", half(encoded("WEBP")), None),
    ("half.avif", half(encoded("AVIF")), None),
    ("half.jp2", half(encoded("JPEG2000")), None),
    ("half.tif", half(encoded("TIFF")), None),
    ("half.gif", encoded("GIF")[:40], None),
    ("half.bmp", half(encoded("BMP")), "truncated"),
    ("half.ico", encoded("ICO")[:30], None),
    ("half.tga", encoded("TGA")[:30], None),
    ("half.ppm", half(encoded("PPM")), None),
    ("checksum.png", broken_checksum(), None),
    ("no-data.png", png(64, 64), None),
    ("nothing.png", png(0, 0), None),
    ("odd-bits.png", png(16, 16, bits=3), None),
    ("html.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "html"),
    ("spaced-html.jpg", b"  \n<html>not found</html>", "html"),
    ("drawing.png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "svg"),
    ("plain-drawing.png", b"<svg></svg>", "svg"),
    ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git_lfs_pointer"),
    ("text.png", b"this is only text, saved under the wrong name", "unidentified"),
    ("document.jpg", b"%PDF-1.7\n...", "not_a_picture"),
    ("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_a_picture"),
    ("layers.png", b"8BPS\x00\x01" + bytes(100), "not_a_picture"),
    ("archive.jpg", b"PK\x03\x04" + bytes(100), "not_a_picture"),
    ("film.jpg", b"\x00\x00\x00\x18ftypmp42" + bytes(100), "not_a_picture"),
    ("clip.png", b"\x1aE\xdf\xa3" + bytes(100), "not_a_picture"),
    ("new.jxl", b"\xff\x0a" + bytes(100), "needs_plugin"),
    ("boxed.jxl", b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(100), "needs_plugin"),
    ("fake.heic", b"\x00\x00\x00\x18ftypheic" + bytes(100), None),
    ("zeros.jpg", bytes(5000), "unidentified"),
    ("noise.jpg", bytes(range(256)) * 40, "unidentified"),
    ("soi-only.jpg", b"\xff\xd8\xff\xe0", "unidentified"),
    ("magic-only.gif", b"GIF89a", None),
    ("magic-only.webp", b"RIFF\x10\x00\x00\x00WEBPVP8 ", None),
    ("huge.png", png(60000, 60000), "too_many_pixels"),
    ("wide-header.png", png(2**31 - 1, 1), "too_many_pixels"),
    ("expands.png", encoded("PNG", Image.new("L", (9000, 9000))), "too_many_pixels"),
    ("text-bomb.png", bomb_text_png(), "decompression_bomb"),
    ("bytes.bmp", encoded("BMP", Image.new("RGB", (1000, 1000))), "too_many_bytes"),
    ("dot.png", encoded("PNG", Image.new("RGB", (1, 1))), "too_small"),
    ("strip.png", encoded("PNG", draw(8, 1000)), "extreme_ratio"),
    ("invisible.png", encoded("PNG", Image.new("RGBA", (32, 32), (255, 0, 0, 0))), "empty_alpha"),
    ("invisible-palette.gif", encoded("GIF", Image.new("P", (32, 32), 0), transparency=0), "empty_alpha"),
    ("float-range.tif", floats([i - 100.0 for i in range(256)]), "undecodable"),
    ("not-a-number.tif", floats([float("nan")] * 256), "undecodable"),
    ("infinite.tif", floats([float("inf")] * 256), "undecodable"),
]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """All cases of the tables below scanned at once, each in a numbered folder of its own with a good picture: {folder: report of it}."""
    root = tmp_path_factory.mktemp("cases")
    for table, cases in TABLES.items():
        for number, files in enumerate(cases):
            inside = root / f"{table}-{number:03d}"
            save(inside / "good.png", seed=number)
            for name, content in files.items():
                (inside / name).write_bytes(content)
    report = scan_folder(root, limits=LIMITS, workers=2, use_cache=False)
    assert report.found == len(report.records) + len(report.left_out)
    found: dict[str, ScanReport] = {}
    for item in [*report.records, *report.left_out]:
        part = found.setdefault(item.path.relative_to(root).parts[0], ScanReport(""))
        (part.records if isinstance(item, ImageRecord) else part.left_out).append(item)
    return found


@pytest.mark.parametrize("number", range(len(LEFT_OUT)), ids=[case[0] for case in LEFT_OUT])
def test_a_bad_picture_is_listed_with_its_reason_and_the_good_one_beside_it_is_used(scanned, number):
    name, _, code = LEFT_OUT[number]
    report = scanned[f"left-{number:03d}"]
    assert [record.path.name for record in report.records] == ["good.png"]
    (item,) = report.left_out
    assert item.path.name == name and item.reason and "Traceback" not in item.reason
    assert code is None or item.code == code


def with_exif(orientation: int) -> bytes:
    image, exif = draw(64, 48), Image.Exif()
    exif[0x0112] = orientation
    return encoded("JPEG", image, exif=exif)


def grey16(most: int) -> bytes:
    import numpy as np

    return encoded("PNG", Image.fromarray((np.arange(48 * 64).reshape(48, 64) % (most + 1)).astype(np.uint16)))


def hidden_colour() -> bytes:
    image = draw(32, 32).convert("RGBA")
    image.putalpha(Image.new("L", (32, 32), 128))
    return encoded("PNG", image)


# name, bytes, part of the warning it must carry ("" for none)
WARNED = [
    ("really-png.jpg", encoded("PNG"), "named .jpg but is PNG"),
    ("really-jpeg.png", encoded("JPEG"), "named .png but is JPEG"),
    ("moving.gif", encoded("GIF", draw(seed=1), save_all=True, append_images=[draw(seed=2)]), "2 frames or pages"),
    ("moving.webp", encoded("WEBP", draw(seed=1), save_all=True, append_images=[draw(seed=2)]), "2 frames or pages"),
    ("moving.png", encoded("PNG", draw(seed=1), save_all=True, append_images=[draw(seed=2)]), "2 frames or pages"),
    ("pages.tif", encoded("TIFF", draw(seed=1), save_all=True, append_images=[draw(seed=2)]), "2 frames or pages"),
    ("phone.mpo.jpg", encoded("MPO", draw(seed=1), save_all=True, append_images=[draw(seed=2)]), ""),
    ("profile.jpg", encoded("JPEG", icc_profile=b"garbage" * 30), "colour profile is broken"),
    ("flat.png", encoded("PNG", Image.new("RGB", (32, 32), (9, 9, 9))), "one flat colour"),
    ("print.jpg", encoded("JPEG", draw(64, 48).convert("CMYK")), "CMYK without a profile"),
    ("deep.png", grey16(65535), "16-bit grey"),
    ("ten-bit.png", grey16(1023), "10-bit data"),
    ("orientation-9.jpg", with_exif(9), ""),
    ("broken-exif.jpg", encoded("JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"), "EXIF"),
    ("tail.jpg", encoded("JPEG") + b"PK\x03\x04 something behind the end", ""),
    ("lower.tif", encoded("TIFF", draw(64, 48).convert("1")), ""),
    ("palette.png", encoded("PNG", draw(64, 48).convert("P")), ""),
    ("half-seen.png", hidden_colour(), ""),
    ("modern.avif", encoded("AVIF"), ""),
    ("UPPER.JPG", encoded("JPEG"), ""),
    ("no-extension", encoded("PNG"), ""),
    ("picture.dat", encoded("JPEG"), ""),
    (" spaces and (brackets) & 'quotes'.png", encoded("PNG"), ""),
    ("-starts-with-a-dash.png", encoded("PNG"), ""),
    ("новое 画像 🦊.png", encoded("PNG"), ""),
    ("line\nbreak.png", encoded("PNG"), ""),
    ("a" * 251 + ".png", encoded("PNG"), ""),
    ("<img src=x onerror=alert(1)>.png", encoded("PNG"), ""),
    ("\u202egnp.exe.png", encoded("PNG"), ""),
]


@pytest.mark.parametrize("number", range(len(WARNED)), ids=[ascii(case[0])[:40] for case in WARNED])
def test_an_odd_picture_is_used_and_what_is_odd_is_said(scanned, number):
    name, _, warning = WARNED[number]
    report = scanned[f"odd-{number:03d}"]
    (texts,) = [record.warnings for record in report.records if record.path.name == name]
    assert report.left_out == []
    assert any(warning in text for text in texts) if warning else not texts, texts


CAPTIONS = [
    ("utf-8 with mark", b"\xef\xbb\xbfbrndx, a fox", "brndx, a fox", ""),
    ("utf-16", "brndx, a fox".encode("utf-16"), "brndx, a fox", ""),
    ("gb18030", "一只狐狸坐在长椅上".encode("gb18030"), "一只狐狸坐在长椅上", ""),
    ("latin-1", "a café table".encode("latin-1"), None, "not UTF-8 at byte 5"),
    ("zero bytes", b"a\x00b\x00", None, "zero bytes"),
    ("broken utf-16", b"\xff\xfea\x00\x00\xd8", None, "broken UTF-16"),
    ("empty", b"", None, "is empty"),
    ("blank", b" \n\t\r\n ", None, "is empty"),
    ("lines", b"a fox\r\non a bench\n", "a fox on a bench", ""),
    ("control characters", b"a \x07fox\x1b[31m", "a fox[31m", ""),
    ("bidi override", "a \u202efox\u200b".encode(), "a fox", ""),
    ("decomposed", "cafe\u0301".encode(), "café", ""),
    ("very long", b"word " * 2000, ("word " * 2000).strip(), "a caption of 9,999 characters"),
    ("too large", b"x" * (2**20 + 1), None, "more than the limit"),
]


@pytest.mark.parametrize("number", range(len(CAPTIONS)), ids=[case[0] for case in CAPTIONS])
def test_a_caption_file_is_read_or_its_picture_says_why_not(scanned, number):
    _, _, text, warning = CAPTIONS[number]
    (record,) = scanned[f"caption-{number:03d}"].records
    assert record.caption == text
    assert any(warning in said for said in record.warnings) if warning else not record.warnings, record.warnings


BESIDE = [
    ("good.json", b"{broken", "not valid JSON"),
    ("good.json", b"[" * 100_000, "not valid JSON"),
    ("good.png.thinking.json", b"[]", "is ignored"),
    ("good.png.thinking.json", b"not json", "is ignored: not JSON"),
]


@pytest.mark.parametrize("number", range(len(BESIDE)))
def test_a_broken_file_beside_a_picture_is_named(scanned, number):
    (record,) = scanned[f"beside-{number:03d}"].records
    assert any(BESIDE[number][2] in said for said in record.warnings)


ROWS = [
    ("not json", "{oops"),
    ("a list", "[1, 2]"),
    ("no picture", '{"text": "a fox"}'),
    ("missing file", '{"file_name": "gone.png", "text": "x"}'),
    ("out of the folder", '{"file_name": "../a.png"}'),
    ("absolute", '{"file_name": "/etc/passwd"}'),
    ("address", '{"file_name": "http://example.com/a.png"}'),
    ("zero byte", '{"file_name": "a\\u0000.png"}'),
    ("repeats", '{"file_name": "a.png", "repeats": "many"}'),
    ("negative repeats", '{"file_name": "a.png", "repeats": -1}'),
]


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[case[0] for case in ROWS])
def test_a_bad_row_is_listed_with_its_line_and_the_others_are_used(scanned, number):
    report = scanned[f"row-{number:03d}"]
    assert [(record.path.name, record.caption) for record in report.records] == [("good.png", "fine")]
    (item,) = report.left_out
    assert "metadata.jsonl:3" in item.reason


TABLES = {
    "left": [{name: content} for name, content, _ in LEFT_OUT],
    "odd": [{name: content} for name, content, _ in WARNED],
    "caption": [{"good.txt": content} for _, content, _, _ in CAPTIONS],
    "beside": [{name: content} for name, content, _ in BESIDE],
    "row": [{"metadata.jsonl": b'{"file_name": "good.png", "text": "fine"}\n\n' + line.encode() + b"\n"} for _, line in ROWS],
}


def test_there_are_at_least_eighty_five_bad_inputs():
    assert sum(map(len, (LEFT_OUT, WARNED, CAPTIONS, BESIDE, ROWS))) >= 85
