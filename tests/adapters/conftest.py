"""A stand-in Hub to which the real client of huggingface_hub talks, and trained adapters of every kind."""

from __future__ import annotations

import pytest

TOKEN = "hf_" + "s" * 30


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub on loopback; the client knows it as the Hub and has a token for it."""
    from huggingface_hub import constants

    from tests.adapters.hub_stand_in import Hub

    stand_in = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield stand_in
    stand_in.close()


@pytest.fixture(scope="module")
def results():
    """Kind -> (model, adapter, its output, losses) of `small_model.trained_kind`."""
    from finetune.adapters.kinds import KINDS
    from tests.adapters.small_model import trained_kind

    return {kind: trained_kind(kind) for kind in KINDS}
