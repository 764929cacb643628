"""How adapters of each family are named in other tools' files. Data only: nothing here loads torch or diffusers."""

from __future__ import annotations

from finetune.adapters.keys import KeyMap
from finetune.families.key_layouts.auraflow import AURAFLOW
from finetune.families.key_layouts.cross_attention import PIXART_SIGMA, SANA
from finetune.families.key_layouts.flux import CHROMA, FLUX
from finetune.families.key_layouts.flux2 import FLUX2
from finetune.families.key_layouts.hunyuan_dit import HUNYUAN_DIT
from finetune.families.key_layouts.hunyuan_image_2 import HUNYUAN_IMAGE_2
from finetune.families.key_layouts.hunyuan_image_3 import HUNYUAN_IMAGE_3
from finetune.families.key_layouts.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from finetune.families.key_layouts.own_names import COGVIEW4, HIDREAM, QWEN_IMAGE
from finetune.families.key_layouts.sd3 import SD3
from finetune.families.key_layouts.z_image import LUMINA2, Z_IMAGE

# The order settles ties between families whose names and widths agree.
KEY_MAPS: dict[str, KeyMap] = {key_map.family: key_map for key_map in (
    HUNYUAN_DIT, FLUX, SD3, QWEN_IMAGE, HUNYUAN_IMAGE_2, SANA, Z_IMAGE, FLUX2, CHROMA, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15,
    LUMINA2, PIXART_SIGMA, AURAFLOW, HIDREAM, COGVIEW4, HUNYUAN_IMAGE_3,
)}


def key_map_of(family: str) -> KeyMap | None:
    """The names of a family of the registry; its variants (dev, schnell ...) share one table. None for an unknown one."""
    from finetune.families.registry import FAMILIES

    return KEY_MAPS.get(FAMILIES[family].module if family in FAMILIES else family)
