"""Bring any picture to 8-bit RGB in sRGB without clipping, false colours or colours that transparency had hidden."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageCms

ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def eight_bit(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """16- and 32-bit grey scaled to 8 bit; Pillow's own `convert` would clip it to white. Other modes unchanged.

    Raises ValueError for values whose range is unknown (floats outside 0..1, not finite, 32-bit integers above 65535).
    """
    if image.mode not in ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"):
        return image, []
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if low < 0 or high > 1:
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}, not in 0..1")
        return _grey(values * 255, image), ["floating-point pixels, scaled to 8 bit"]
    if low < 0 or high > 65535:
        raise ValueError(f"integer pixels from {low:g} to {high:g}, beyond 16 bit")
    if image.mode == "I" and high <= 255:
        return _grey(values, image), []
    notes = ["16-bit grey, scaled to 8 bit"]
    if high in (1023, 4095):
        notes.append(f"brightest value is {high:g}: {'10' if high == 1023 else '12'}-bit data in a 16-bit file looks dark")
    return _grey(values * (255 / 65535), image), notes


def _grey(values, original: Image.Image) -> Image.Image:
    import numpy as np

    grey = Image.fromarray(np.rint(values).astype(np.uint8))
    grey.info = {key: value for key, value in original.info.items() if key != "transparency"}
    return grey


def has_alpha(image: Image.Image) -> bool:
    """Whether any form of transparency is declared (alpha band, palette or key colour)."""
    return image.mode in ALPHA_MODES or "transparency" in image.info


def is_empty_alpha(image: Image.Image) -> bool:
    """Whether every pixel is fully transparent."""
    return has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[1] == 0


def to_srgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """RGB or RGBA in sRGB. An embedded ICC profile is applied (relative colorimetric, black point compensation)."""
    profile = image.info.get("icc_profile")
    alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else None
    notes = []
    if image.mode in ("P", "PA", "1", "La", "RGBa") or alpha is not None:
        base = image.convert("RGBA").convert("RGB") if image.mode not in ("L", "LA") else image.convert("RGBA").getchannel("R")
    else:
        base = image
    colour = _apply_profile(base, profile, notes) if profile else None
    if colour is None:
        if base.mode == "CMYK" and not profile:
            notes.append("CMYK without a profile; colours are approximate")
        colour = base.convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
    return colour, notes


def _apply_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image | None:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in (ImageCms.getProfileDescription(source) or "").lower() and image.mode == "RGB":
            return None
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=flags)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        notes.append("the colour profile is broken or of another kind; ignored")
        return None
    notes.append("colour profile converted to sRGB")
    return converted


def flatten(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """RGB with transparency composited on `background`, so that colours under it never show."""
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    canvas = Image.new("RGBA", image.size, (*background[:3], 255))
    return Image.alpha_composite(canvas, image).convert("RGB")
