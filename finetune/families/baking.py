"""Bake adapters into a copy of a base: any that is trained here, or a checkpoint that is only weights to us."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.bake_files import bake_pipeline
from finetune.families import hunyuan_image_3
from finetune.families.base_models import locate_base
from finetune.families.protocol import LicenceTerms

if TYPE_CHECKING:
    from data_tools.progress import Progress
    from finetune.adapters.arithmetic import Weighted


def bake_into(base: str, out: Path, parts: Sequence[Weighted], progress: Progress) -> tuple[int, LicenceTerms]:
    """Write the copy to `out`; returns how many layers changed, and the terms of the base's licence.

    Raises BaseModelError and AdapterError as locating and baking do.
    """
    folder = hunyuan_image_3.checkpoint_folder(base)
    if folder is not None:
        return hunyuan_image_3.bake(folder, out, parts, progress), hunyuan_image_3.LICENCE
    found = locate_base(base)
    return bake_pipeline(found.folder, out, parts, progress=progress), found.licence
