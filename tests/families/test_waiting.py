"""Inside a block nothing waits for the device: a GPU that is asked for a number, or sent one from host memory, stands still for
every block of the model. Which operations wait is told from the CPU, and what is sent from the device `meta`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families.battery import Specimen
from tests.families.test_devices import LOOK_AT_NUMBERS
from tests.tiny_models.all import TINY

ASKING = ("_local_scalar_dense", "nonzero", "masked_select")


class Waits(TorchDispatchMode):
    """What would wait while a block of `model` computes."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inside, self.found = 0, []
        for name, module in model.named_modules():
            if name.rpartition(".")[2].isdigit() and name.count(".") == 1:
                module.register_forward_pre_hook(lambda *_: self._step(1))
                module.register_forward_hook(lambda *_: self._step(-1))

    def _step(self, change: int) -> None:
        self.inside += change

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        sent = name == "_to_copy" and args[0].device != torch.device(kwargs.get("device") or args[0].device)
        masked = name in ("index", "index_put_") and any(place is not None and place.dtype == torch.bool for place in args[1])
        if self.inside and (sent or masked or name in ASKING):
            self.found.append(name)
        return operation(*args, **kwargs)


@pytest.fixture(scope="module", params=TINY)
def specimen(request, tmp_path_factory):
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def waits(specimen: Specimen, device: str) -> list[str]:
    model = specimen.fresh_transformer()
    specimen.family.prepare(model, 0)
    noisy, timesteps = specimen.noisy()
    with torch.no_grad(), Waits(model.to(device)) as watched:
        specimen.predict(model, noisy.to(device), timesteps, specimen.conditionings)
    return watched.found


def test_no_block_asks_for_a_number(specimen):
    if specimen.name == "hidream":
        pytest.skip("which expert a token goes to is known on the device alone")
    assert waits(specimen, "cpu") == []


def test_no_block_is_sent_what_lies_in_host_memory(specimen):
    if specimen.name in LOOK_AT_NUMBERS:
        pytest.skip("what this model does depends on numbers, which `meta` has not")
    assert waits(specimen, "meta") == []
