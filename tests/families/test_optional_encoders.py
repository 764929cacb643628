"""Bases whose makers let a text encoder be left out: SD3 draws without T5, with zeros in place of its states."""

from __future__ import annotations

import pytest
import torch

from tests.families.battery import PROMPTS, Specimen, close
from tests.tiny_models.all import TINY, TinyModel


@pytest.fixture
def without_t5(monkeypatch, tmp_path):
    monkeypatch.setitem(TINY, "sd3", TinyModel("sd3", {"t5": False}))
    return Specimen("sd3", tmp_path)


def test_without_t5_cached_text_predicts_what_the_pipeline_predicts_live(without_t5):
    pipeline = without_t5.tiny.build()
    assert pipeline.text_encoder_3 is None
    for index in range(len(PROMPTS)):
        step = without_t5.recorded_step(pipeline, index)
        found = without_t5.predict(without_t5.drawer.transformer, step.sample, torch.tensor([step.timestep]), [without_t5.conditionings[index]])
        assert close(found.detach(), step.output)


def test_without_t5_the_other_encoders_can_still_be_trained_and_tokens_are_counted_for_them_alone(without_t5):
    live = without_t5.family.encode_live(without_t5.text, PROMPTS, without_t5.conditionings)
    for before, now in zip(without_t5.conditionings, live, strict=True):
        assert all(torch.equal(now.tensors[key], before.tensors[key]) for key in before.tensors)
    assert list(without_t5.family.token_counts(without_t5.text, "a cat")) == ["CLIP"]
