"""A micro-batch is whole on the device before the model computes: what is sent behind the prediction waits for all of it. The device
`meta` stands in for a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.families.protocol import Conditioning, LatentDistribution, PictureGeometry
from finetune.objectives import DDPMObjective, FlowObjective, LossWeighting
from finetune.recipe import load_recipe
from finetune.training.batches import Sample
from finetune.training.loop import micro_batch, sample_losses

OBJECTIVES = {
    "flow": FlowObjective(weighting=LossWeighting("min_snr")),
    "v": DDPMObjective(torch.linspace(0.999, 0.01, 1000), "v_prediction", weighting=LossWeighting("min_snr")),
}
POSITIONS, SAMPLES = torch.tensor([0.3, 0.8]), [Sample(0, 0), Sample(1, 1)]


class Moves(TorchDispatchMode):
    """Tensors that change their device."""

    moved = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.moved += operation.overloadpacket.__name__ == "_to_copy" and args[0].device != torch.device(kwargs.get("device") or args[0].device)
        return operation(*args, **kwargs)


def job(objective: Any, device: str) -> Any:
    latents = LatentDistribution(torch.linspace(-1, 1, 64).view(4, 4, 4), torch.full((4, 4, 4), 0.1))
    encodings = SimpleNamespace(latents=lambda _: latents, mask=lambda _: torch.linspace(0, 1, 16).view(4, 4), conditioning=lambda _: Conditioning({"states": torch.ones(3, 5)}))
    pictures = [SimpleNamespace(weight=weight, geometry=PictureGeometry((32, 32), (32, 32))) for weight in (1.0, 0.5)]
    # A prediction of a half everywhere, made of all that a model is told.
    family = SimpleNamespace(predict=lambda model, noisy, level, texts, _: noisy * 0 + 0.5 + 0 * (level.timestep + level.sigma).view(-1, 1, 1, 1) + 0 * texts[0].tensors["states"].sum())
    return SimpleNamespace(
        recipe=load_recipe({"base": {"model": "mini"}, "data": {"folder": "."}}, []), accelerator=SimpleNamespace(device=torch.device(device)), family=family, objective=objective,
        transformer=None, encodings=encodings, training_set=SimpleNamespace(pictures=pictures, captions=SimpleNamespace(at=lambda *_: "a cat")))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_nothing_is_sent_once_the_model_computes(objective: Any) -> None:
    there = job(objective, "meta")
    batch = micro_batch(there, 3, SAMPLES, POSITIONS)
    with Moves() as moves:
        losses = sample_losses(there, batch)
    assert losses.is_meta and losses.shape == (2,) and moves.moved == 0


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_losses_are_those_of_the_objective(objective: Any) -> None:
    here = job(objective, "cpu")
    batch = micro_batch(here, 3, SAMPLES, POSITIONS)
    level = objective.level(POSITIONS, batch.noisy)
    errors = ((0.5 - batch.target).pow(2) * batch.place_weights).mean((1, 2, 3))
    assert torch.allclose(sample_losses(here, batch), objective.weight(level) * torch.tensor([1.0, 0.5]) * errors)
    assert torch.equal(batch.level.timestep, level.timestep) and len(batch) == 2
