"""Opening pictures: upright, sRGB, eight bit, without hidden colours; the same pixels whatever the file's form."""

from __future__ import annotations

import base64
import copy
import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools.buckets import Bucket
from data_tools.convert import convert
from data_tools.images import BadPicture, Limits, apply_placement, decode, fit_to_bucket, open_image, to_array
from data_tools.buckets import place
from data_tools.scan import scan_folder
from tests.data_tools.pictures import draw


def stored(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(content: bytes, **options) -> np.ndarray:
    return to_array(decode(content, "x", **options)[0]).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation):
    upright = draw(40, 24)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that stores the picture turned
    turned = upright if undo[orientation] is None else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(turned, "PNG", exif=exif)
    assert (to_array(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))) == to_array(upright)).all()
    image, facts = decode(content, "x")
    assert (facts.width, facts.height) == (40, 24)
    assert (to_array(image) == to_array(upright)).all()


def linear_profile() -> bytes:
    """An ICC profile (version 2, matrix and curves) with sRGB's primaries and gamma 1, by the specification ICC.1:2001-04."""

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    def xyz(*values):
        return b"XYZ \x00\x00\x00\x00" + fixed(*values)

    text = b"linear test\x00"
    curve = b"curv" + bytes(4) + struct.pack(">I", 1) + struct.pack(">H", 256) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text" + bytes(4) + b"none\x00", b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971), b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }
    body, table, offset = b"", struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s12s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp") + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\x00") + table + body


@pytest.mark.parametrize("stored_value", [0, 40, 128, 200, 255])
def test_an_embedded_profile_changes_the_colours_by_the_srgb_curve(stored_value):
    content = stored(Image.new("RGB", (32, 32), (stored_value,) * 3), icc_profile=linear_profile())
    light = stored_value / 255
    wanted = 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)
    assert abs(opened(content)[0, 0] - wanted).max() <= 2


def test_a_grey_picture_with_a_colour_profile_is_used_without_it():
    image, facts = decode(stored(draw(32, 32).convert("L"), icc_profile=linear_profile()), "x")
    assert image.mode == "RGB" and any("profile is broken or of another kind" in text for text in facts.warnings)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    values = opened(stored(Image.fromarray(ramp)))[..., 0]
    assert abs(values.mean() - 127.5) < 1 and values.min() == 0 and values.max() == 255


def test_colours_hidden_under_transparency_never_show():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 32))
    values = opened(stored(image), background="#00ff00")
    assert (values[:, :16] == (0, 0, 255)).all() and (values[:, 16:] == (0, 255, 0)).all()


@pytest.mark.parametrize("mode", ["P", "LA", "RGB key", "L key"])
def test_every_kind_of_transparency_is_laid_on_the_background(mode):
    if mode == "P":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(1, (0, 0, 16, 32))
        content = stored(image, "PNG", transparency=0)
    elif mode == "LA":
        image = Image.new("LA", (32, 32), (10, 0))
        image.paste((200, 255), (0, 0, 16, 32))
        content = stored(image)
    else:
        grey = mode.startswith("L")
        image = Image.new("L" if grey else "RGB", (32, 32), 7 if grey else (7, 7, 7))
        image.paste(200 if grey else (200, 200, 200), (0, 0, 16, 32))
        content = stored(image, "PNG", transparency=7 if grey else (7, 7, 7))
    assert (opened(content)[:, 16:] == 255).all()


def test_formats_without_loss_give_the_same_pixels():
    picture = draw(40, 32)
    wanted = to_array(picture)
    for format, options in {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}, "PPM": {}, "TGA": {}, "JPEG2000": {}}.items():
        assert (opened(stored(picture, format, **options)) == wanted).all(), format


# 64 x 48 pixels, red left and blue right, with an Exif orientation that HEIC readers must leave alone. Made by pillow-heif 1.8.1 (x265).
HEIC = (
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAb5tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAAAAAERAAAIAAQAAAAAB4gABAAAAAAAAAGUAAgAAAAACRwABAAAA"
    "AAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAA"
    "DwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAA"
    "AAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAABppcmVmAAAAAAAAAA5jZHNjAAIAAQABAAAAkW1k"
    "YXQAAABhKAGvCeA5IyS///kEf//4xG5D+BRlwX/8dOH3+HZx//v1f1EY1iyx/grc5vmLaCrEY5jqnylfKZwNS1vfHs2lIVmkCBLwHTTlLJuPeue88RqKpgD/tcwkb6tE7nAx4a4MYAAAAAZFeGlmAABNTQAqAAAA"
    "CAABARIAAwAAAAEABgAAAAAAAA=="
)


def test_a_heic_picture_is_decoded_upright_here_and_in_a_scan(tmp_path):
    pytest.importorskip("pi_heif", reason="needs the extra heic")
    image, facts = decode(base64.b64decode(HEIC), "phone.heic")
    assert image.size == (64, 48) and (facts.width, facts.height, facts.format, facts.warnings) == (64, 48, "HEIF", ())
    left, right = image.getpixel((5, 5)), image.getpixel((58, 42))
    assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "phone.HEIC").write_bytes(base64.b64decode(HEIC))
    (tmp_path / "set" / "phone.txt").write_text("a flag")
    (record,) = scan_folder(tmp_path / "set", workers=1).records
    assert record.size == (48, 64) and record.caption == "a flag" and record.warnings == ()
    (copy,) = scan_folder(convert([record], tmp_path / "out", "metadata").open_at, workers=1).records
    assert copy.content_hash == record.content_hash and copy.path.suffix == ".heic"


def test_heic_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    with pytest.raises(BadPicture) as caught:
        decode(b"\x00\x00\x00\x18ftypheic" + bytes(100), "a.heic")
    assert caught.value.code == "needs_plugin" and "brushwork[heic]" in caught.value.fix


def test_a_half_picture_is_refused_even_where_another_library_switched_that_off():
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        content = stored(draw(200, 200), "JPEG")
        with pytest.raises(BadPicture) as caught:
            decode(content[: len(content) // 2], "x")
        assert caught.value.code == "truncated"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.mark.parametrize(("limits", "code"), [(Limits(pixels=100), "too_many_pixels"), (Limits(min_side=64), "too_small"), (Limits(max_ratio=1.1), "extreme_ratio")])
def test_limits_hold(limits, code):
    with pytest.raises(BadPicture) as caught:
        decode(stored(draw(48, 32)), "x", limits=limits)
    assert caught.value.code == code


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(BadPicture, match="No such file"):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("upscale", [False, True])
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (20, 20), (64, 300), (64, 64)])
def test_a_fitted_picture_has_exactly_the_buckets_size(fit, upscale, size):
    image = draw(size[1], size[0])
    result = fit_to_bucket(image, Bucket(64, 96), fit, upscale=upscale)
    assert result.size == (96, 64) and result.mode == "RGB"


def test_a_small_picture_keeps_its_pixels_and_gets_a_border_of_the_background():
    image = draw(20, 10)
    result = to_array(apply_placement(image, place((10, 20), Bucket(16, 32)), background="#010203"))
    assert (result[3:13, 6:26] == to_array(image)).all()
    assert (result[:3] == (1, 2, 3)).all() and (result[:, :6] == (1, 2, 3)).all()


def test_a_refusal_comes_whole_out_of_another_process():
    sent = copy.copy(BadPicture("cut short", "truncated", where="a.png", fix="copy it again"))  # takes an exception apart as a worker process does
    assert (sent.what, sent.code, sent.where, sent.fix) == ("cut short", "truncated", "a.png", "copy it again")
