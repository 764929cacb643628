"""What a picture becomes is what its own pipeline decodes: encoded, scaled and packed here, undone by the pipeline's own call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.families import packing
from tests.families.battery import Specimen, close
from tests.tiny_models.all import TINY


class Decoded(Exception):
    """Ends a pipeline's call where it decodes: nothing after that is of interest."""


def laid_out_as(sample: Tensor, latents: Tensor) -> Tensor:
    """(1, C, h, w) as the pipeline keeps its latents while it draws, told by the shape of one of its own."""
    if sample.ndim == 5:
        return latents.unsqueeze(2)
    if sample.ndim == 3:
        tokens = latents.shape[-2] * latents.shape[-1]
        return packing.flatten_grid(latents) if sample.shape[1] == tokens else packing.pack(latents)
    return latents


def decoded_by_the_pipeline(specimen: Specimen, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the pipeline hands to its autoencoder when its last step has come to `latents` (1, C, h, w)."""
    pipeline, seen = specimen.drawer, []

    def last(output: Tensor, timestep: Tensor, sample: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
        return (laid_out_as(sample, latents).to(sample),)

    def decode(states: Tensor, *args: object, **kwargs: object) -> None:
        seen.append(states)
        raise Decoded

    monkeypatch.setattr(pipeline.scheduler, "step", last)
    monkeypatch.setattr(pipeline.vae, "decode", decode)
    height, width = specimen.tiny.picture
    with pytest.raises(Decoded):
        pipeline(height=height, width=width, num_inference_steps=1,
                 **specimen.family.pipeline_inputs(pipeline, specimen.conditionings[:1], [specimen.empty], torch.zeros_like(latents), 1.0))
    return seen[0]


@pytest.mark.parametrize("name", TINY)
def test_the_pipeline_decodes_from_our_latents_what_its_autoencoder_encoded(name, tmp_path, monkeypatch):
    specimen = Specimen(name, tmp_path)
    height, width = specimen.tiny.picture
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = specimen.family.encode_images(specimen.drawer, pixels)
    # One deviation away from the mean, so that the noise of a latent has the right size too.
    decoded = decoded_by_the_pipeline(specimen, found.mean + found.std, monkeypatch)
    with torch.no_grad():
        encoded = specimen.drawer.vae.encode(pixels.unsqueeze(2) if decoded.ndim == 5 else pixels)
    if found.std.any():
        expected = encoded.latent_dist.mean + encoded.latent_dist.std
    else:
        expected = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    assert close(decoded, expected, 1e-5)
