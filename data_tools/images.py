"""The only opener of pictures: regular files only, within limits, oriented, in sRGB, 8 bit, without hidden colours."""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageColor, ImageFile, ImageOps

from data_tools.buckets import Bucket, Placement, place
from data_tools.colours import eight_bit, flatten, is_empty_alpha, to_srgb
from data_tools.errors import DataError
from data_tools.records import shown_name

if TYPE_CHECKING:
    import numpy as np

# Pillow would try more than forty decoders, among them ones that start other programs (EPS).
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA"]
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .avif .jp2 .j2k .jpx .ico .ppm .pgm .pbm .pnm .tga .heic .heif .mpo .jxl".split()
)
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
USUAL_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # JPEG, PNG, WebP: nothing foreign begins so
# What people save by mistake under a picture's name, by how the file begins: (pattern, code, reason).
FOREIGN_CONTENT = (
    (rb"version https://git-lfs", "git_lfs_pointer", "a Git LFS pointer, not the picture; run `git lfs pull`"),
    (rb"\s*(<!doctype html|<html|<head|<body)", "html", "a web page, not a picture (a download that failed?)"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!doctype svg[^>]*>\s*)*<svg", "svg", "an SVG drawing; export it as PNG first"),
    (rb"%PDF-", "not_a_picture", "a PDF document"),
    (rb"%!PS", "not_a_picture", "a PostScript file"),
    (rb"8BPS", "not_a_picture", "a Photoshop file; export it as PNG first"),
    (rb"PK\x03\x04", "not_a_picture", "a zip archive"),
    (rb"....ftyp(?!avi[fs]|heic|heix|hevc|heim|heis|mif1|msf1)", "not_a_picture", "a video"),
    (rb"\x1aE\xdf\xa3", "not_a_picture", "a video"),
    (rb"(\xff\x0a|\x00\x00\x00\x0cJXL )", "needs_plugin", "a JPEG XL picture, which is not supported; convert it to PNG"),
)
BLANK_SPREAD = 2.0  # standard deviation in 8-bit steps under which a picture is one flat colour


class BadPicture(DataError):
    """A picture that cannot be used; `code` is the kind of reason."""

    # A worker process sends errors home by their `args`, which hold `what` alone; the rest follows.
    def __init__(self, what: str, code: str = "unreadable", *, where: str | None = None, fix: str | None = None):
        super().__init__(what, where=where, fix=fix)
        self.code = code


@dataclass(frozen=True)
class Limits:
    """What one picture may cost. Beyond any of these it is left out and listed.

    pixels: width x height.  file_bytes: size on disk.  seconds: time to read and decode one picture.
    memory_bytes: address space of a decoding process.  min_side: shortest side in pixels.  max_ratio: long side / short side.
    """

    pixels: int = 200_000_000
    file_bytes: int = 512 * 2**20
    seconds: float = 30.0
    memory_bytes: int = 8 * 2**30
    min_side: int = 8
    max_ratio: float = 20.0


@dataclass(frozen=True)
class PictureFacts:
    """What decoding told: size after orientation in pixels, the file's format, Pillow's mode before conversion, oddities."""

    width: int
    height: int
    format: str
    mode: str
    warnings: tuple[str, ...] = ()


def open_image(path: Path | str, *, background: str = "#ffffff", limits: Limits = Limits()) -> Image.Image:
    """The picture as 8-bit RGB in sRGB, upright, transparency laid on `background`. Raises BadPicture with the reason."""
    return decode(read_bytes(path, limits), shown_name(path), background=background, limits=limits)[0]


def read_bytes(path: Path | str, limits: Limits = Limits()) -> bytes:
    """The bytes of a regular file of reasonable size. Raises BadPicture; never waits for a pipe or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unopenable(path, error) from None
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BadPicture("not a regular file", "not_regular", where=shown_name(path))
        if found.st_size == 0:
            raise BadPicture("the file is empty", "empty_file", where=shown_name(path))
        if found.st_size > limits.file_bytes:
            raise BadPicture(f"{found.st_size:,} bytes, more than the limit of {limits.file_bytes:,}", "too_many_bytes", where=shown_name(path))
        try:
            return file.read()
        except OSError as error:
            raise _unopenable(path, error) from None


def _unopenable(path: Path | str, error: Exception) -> BadPicture:
    codes = {errno.ENOENT: "missing", errno.EACCES: "no_permission", errno.ELOOP: "link_loop", errno.ENXIO: "not_regular", errno.EISDIR: "not_regular"}
    code = codes.get(getattr(error, "errno", None), "unreadable")
    return BadPicture(getattr(error, "strerror", None) or str(error), code, where=shown_name(path))


def decode(content: bytes, name: str, *, background: str = "#ffffff", limits: Limits = Limits()) -> tuple[Image.Image, PictureFacts]:
    """The picture in `content` (see `open_image`) and its facts. `name` is for messages. Raises only BadPicture."""
    _refuse_foreign(content, name)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a process-wide switch that other libraries turn on: half pictures would pass
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image, facts = _decode(content, name, background, limits)
        except BadPicture:
            raise
        except MemoryError:
            raise BadPicture("needs more memory than a decoder may take", "too_much_memory", where=name) from None
        except Exception as error:  # decoders leak SyntaxError, struct.error, ValueError and more
            raise _undecodable(error, name) from None
    odd = [*facts.warnings, *dict.fromkeys(_first_line(w.message) for w in caught if w.category is not DeprecationWarning)]
    return image, PictureFacts(facts.width, facts.height, facts.format, facts.mode, tuple(odd))


def _decode(content: bytes, name: str, background: str, limits: Limits) -> tuple[Image.Image, PictureFacts]:
    odd = []
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked below, before any pixel is decoded
    Image.init()  # without it only the commonest formats are known
    heif = content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS
    if heif:
        _register_heif(name)
    with Image.open(BytesIO(content), formats=["HEIF"] if heif else FORMATS) as opened:
        format, mode = opened.format or "", opened.mode
        check_size(opened.width, opened.height, name, limits)
        if getattr(opened, "n_frames", 1) > 1 and format != "MPO":
            odd.append(f"{opened.n_frames} frames or pages; the first is used")
        opened.load()
        image = opened.copy()
    if limits.pixels and image.width * image.height > limits.pixels:
        check_size(image.width, image.height, name, limits)
    extension = Path(name).suffix.lower()
    if extension in EXTENSIONS and not _fits_extension(format, extension):
        odd.append(f"named {extension} but is {format}")
    ImageOps.exif_transpose(image, in_place=True)
    image, notes = eight_bit(image)
    odd += notes
    if is_empty_alpha(image):
        raise BadPicture("wholly transparent", "empty_alpha", where=name)
    image, notes = to_srgb(image)
    odd += notes
    image = flatten(image, ImageColor.getrgb(background))
    if _is_blank(image):
        odd.append("one flat colour")
    return image, PictureFacts(image.width, image.height, format, mode, tuple(odd))


def check_size(width: int, height: int, name: str, limits: Limits) -> None:
    """Raise BadPicture when a size is beyond the limits."""
    if width * height > limits.pixels:
        raise BadPicture(f"{width} x {height} pixels, more than the limit of {limits.pixels:,}", "too_many_pixels", where=name)
    if min(width, height) < limits.min_side:
        raise BadPicture(f"{width} x {height} pixels, the shorter side is under {limits.min_side}", "too_small", where=name)
    if max(width, height) > limits.max_ratio * min(width, height):
        raise BadPicture(f"{width} x {height} pixels, more than {limits.max_ratio:g} times as long as wide", "extreme_ratio", where=name)


def _refuse_foreign(content: bytes, name: str) -> None:
    if content.startswith(USUAL_BEGINNINGS):
        return
    head = content[:1024]
    for pattern, code, reason in FOREIGN_CONTENT:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise BadPicture(reason, code, where=name)


def _register_heif(name: str) -> None:
    try:
        import pi_heif
    except ImportError:
        raise BadPicture("a HEIC picture", "needs_plugin", where=name, fix='pip install "brushwork[heic]"') from None
    pi_heif.register_heif_opener()


def _undecodable(error: Exception, name: str) -> BadPicture:
    text = _first_line(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return BadPicture("not a picture in a known format, or broken at its beginning", "unidentified", where=name)
    if isinstance(error, (Image.DecompressionBombError,)) or "Decompressed data too large" in text:
        return BadPicture(f"expands beyond all measure: {text}", "decompression_bomb", where=name)
    if "truncated" in text or "not enough image data" in text or "broken data stream" in text:
        return BadPicture(f"cut short or damaged: {text}", "truncated", where=name)
    return BadPicture(f"cannot be decoded: {text or type(error).__name__}", "undecodable", where=name)


def _first_line(message: object) -> str:
    """A library's message on one line without memory addresses."""
    return re.sub(r"<_io\.\S+ object at 0x[0-9a-f]+>", "it", " ".join(str(message).split()))[:200]


def _fits_extension(format: str, extension: str) -> bool:
    families = {"JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"}, "MPO": {".jpg", ".jpeg", ".mpo"}, "BMP": {".bmp", ".dib"}, "TIFF": {".tif", ".tiff"}, "PNG": {".png", ".apng"}, "HEIF": {".heic", ".heif"}}
    families |= {"PPM": {".ppm", ".pgm", ".pbm", ".pnm"}, "JPEG2000": {".jp2", ".j2k", ".jpx"}}
    return extension in families.get(format, {f".{format.lower()}"})


def _is_blank(image: Image.Image) -> bool:
    """Whether a picture is one flat colour, seen from afar."""
    from PIL import ImageStat

    small = image.resize((64, 64), Image.Resampling.BOX) if min(image.size) > 64 else image
    # Two pixels of n that lie `widest` apart make a deviation of at least widest / sqrt(2 n): then there is nothing to add up.
    widest = max(high - low for low, high in small.getextrema())
    if widest**2 >= BLANK_SPREAD**2 * 2 * small.width * small.height:
        return False
    return max(ImageStat.Stat(small).stddev) < BLANK_SPREAD


def fit_to_bucket(image: Image.Image, bucket: Bucket, fit: str = "crop", *, upscale: bool = False, background: str = "#ffffff") -> Image.Image:
    """The picture at exactly the bucket's size, centred. fit: "crop" covers it, "pad" adds a border of `background`."""
    return apply_placement(image, place((image.height, image.width), bucket, fit=fit, upscale=upscale), background=background)


def apply_placement(image: Image.Image, placement: Placement, *, background: str = "#ffffff") -> Image.Image:
    """Resize (Lanczos) and crop or pad as `placement` says; the result has exactly the bucket's size."""
    (height, width), (top, left) = placement.resized, placement.crop
    bucket = placement.bucket
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if top >= 0 and left >= 0 and height - top >= bucket.height and width - left >= bucket.width:
        return image.crop((left, top, left + bucket.width, top + bucket.height))
    canvas = Image.new("RGB", (bucket.width, bucket.height), ImageColor.getrgb(background))
    canvas.paste(image, (-left, -top))
    return canvas


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [height, width, 3], 0..255, contiguous, owned by the caller."""
    import numpy as np

    return np.array(image.convert("RGB"), dtype=np.uint8)
