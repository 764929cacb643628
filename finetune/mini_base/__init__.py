"""The embedded model: a small, real HunyuanDiT pipeline, a folder in one style to learn, and its held-out pictures.

Nothing heavy is imported here; `build/` holds how all of it was made.
"""
from pathlib import Path

# Written before every caption of the style folder in training, and before every prompt that wants the style.
TRIGGER = "duotone print"


def weights_folder() -> Path:
    """A diffusers folder that `HunyuanDiTPipeline.from_pretrained` opens."""
    return Path(__file__).parent / "weights"


def style_folder() -> Path:
    """Pictures in one style, each with a caption in a .txt file of the same name."""
    return Path(__file__).parent / "style_folder"


def held_out_folder() -> Path:
    """True pictures of the same style, with captions, of subjects that the style folder does not show."""
    return Path(__file__).parent / "held_out"
