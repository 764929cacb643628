"""From the recipe to what is put into the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.recipe import Recipe

if TYPE_CHECKING:
    from finetune.adapters.kinds import AdapterSize


def adapter_size(recipe: Recipe) -> AdapterSize:
    """The `[adapter]` section as `adapters.kinds.inject_adapter` takes it."""
    from finetune.adapters.kinds import AdapterSize

    settings = recipe.adapter
    return AdapterSize(settings.kind, settings.rank, settings.alpha, settings.dropout, settings.rank_pattern or {}, settings.alpha_pattern or {})
