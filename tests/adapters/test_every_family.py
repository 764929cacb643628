"""For every family: an adapter on its attention layers is verified on a base from disk and bakes into it."""

from __future__ import annotations

import pytest

from data_tools.progress import Progress
from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.arithmetic import Weighted
from finetune.adapters.bake_files import bake_pipeline
from finetune.adapters.base_weights import BaseWeights
from finetune.adapters.verify import verify_adapter
from finetune.cli.adapter_probe import load_for_probe
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.test_stock_loading import attention_adapter
from tests.tiny_models.all import TINY


@pytest.mark.parametrize("family", TINY)
def test_an_adapter_is_proven_on_its_base_and_bakes_into_it(family, tmp_path):
    pipeline = TINY[family].build()
    pipeline.save_pretrained(tmp_path / "base")
    path = write_adapter(tmp_path / "a.safetensors", attention_adapter(family, pipeline.transformer))
    adapter = read_adapter(path, KEY_MAPS)
    _, pipeline, _, run = load_for_probe(str(tmp_path / "base"), None, Progress())
    transformer = pipeline.transformer
    result = verify_adapter(path, transformer, run, KEY_MAPS)
    assert result.placed == result.keys == 2 * len(adapter.modules) and result.restored and result.baked_equals_attached
    assert bake_pipeline(tmp_path / "base", tmp_path / "baked", [Weighted(adapter, 1.0)]) == len(adapter.modules)
    with BaseWeights(tmp_path / "base") as before, BaseWeights(tmp_path / "baked") as after:
        changed = {key for key in before.keys if not before.read(key).equal(after.read(key))}
    assert changed == {f"{module}.weight" for module in adapter.modules}
