"""The key tables against the models they speak of: no layer that can take LoRA is missing, none is invented."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from finetune.adapters.keys import fill
from finetune.adapters.lora import weight_shapes
from finetune.families.key_layouts import KEY_MAPS, key_map_of
from tests.tiny_models.all import TINY

# Layers that no LoRA of these families sits on: built anew at every load, or shapes of their own.
NEVER_ADAPTED = re.compile(r"caption_projection\.\d+\.linear|.*\.gate|time_caption_embed.*|.*time_proj.*")


@pytest.mark.parametrize("family", TINY)
def test_every_layer_of_the_tiny_model_is_in_the_table_of_its_family(family):
    key_map = key_map_of(family)
    names = weight_shapes(TINY[family].build().transformer)
    unknown = [name for name in names if key_map.place(name, flat=False) is None and not NEVER_ADAPTED.fullmatch(name)]
    assert unknown == []
    flat = {name: name.replace(".", "_") for name in names}
    assert len(set(flat.values())) == len(flat)
    for name, flattened in flat.items():
        place = key_map.place(flattened, flat=True)
        assert place is None or place.modules == (name,) or NEVER_ADAPTED.fullmatch(name)


@pytest.mark.parametrize("family", TINY)
def test_every_target_preset_of_a_family_can_be_exported(family):
    from finetune.families import registry

    key_map = key_map_of(family)
    names = list(weight_shapes(TINY[family].build().transformer))
    for preset, pattern in registry.family(family).facts.targets.items():
        matched = [name for name in names if re.fullmatch(pattern, name)]
        assert matched, preset
        assert all(key_map.place(name, flat=False) and key_map.why_unusable(name) is None for name in matched), preset


@pytest.mark.parametrize("family", KEY_MAPS)
def test_a_table_contradicts_itself_nowhere(family):
    key_map = KEY_MAPS[family]
    own = {fill(name, ["7"] * name.count("{}")) for name in (*key_map.modules, *key_map.unusable)}
    for naming, rules in key_map.namings.items():
        foreign = [rule.foreign for rule in rules]
        assert len(set(foreign)) == len(foreign), naming
        for rule in rules:
            assert all(fill(module, ["7"] * module.count("{}")) in own for module in rule.modules), rule
            found = key_map.place(fill(rule.foreign, ["7"] * rule.foreign.count("{}")), flat=False)
            assert found is not None and found.rule.modules == rule.modules, rule
    assert set(key_map.layouts.values()) <= set(key_map.namings)


def test_the_tables_load_neither_torch_nor_diffusers():
    code = "import sys, finetune.families.key_layouts; print(sorted({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
