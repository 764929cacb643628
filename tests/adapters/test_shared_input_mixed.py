"""Layers on one input as one product under autocast: the layers' own numbers to the format's digits, with fewer operations and less kept."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from finetune.adapters import lora
from finetune.adapters.shared_input import project
from finetune.training.plan_mixed import AsAutocast
from tests.adapters.test_shared_input import Attention, with_lora

# Largest error of one rounding, as a share of the number.
ROUNDING = 2.0**-8
VIEWS = frozenset({"view", "t", "transpose", "detach", "split", "expand", "_unsafe_view", "alias", "empty_like", "new_empty", "empty"})


class Kernels(TorchDispatchMode):
    """What a GPU would launch: every operation that is no view."""

    launched = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.launched += operation.overloadpacket.__name__ not in VIEWS
        return operation(*args, **(kwargs or {}))


def layer_by_layer(x: Tensor, *layers: torch.nn.Module) -> list[Tensor]:
    return [layer(x) for layer in layers]


def half_precision(weights: torch.dtype) -> Attention:
    """The base in this format, its LoRA in float32."""
    model = with_lora()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(weights)
    return model


def step(model: Attention, x: Tensor, compute: Callable[..., list[Tensor]]) -> tuple[list[Tensor], list[Tensor], int]:
    """Outputs; gradients of the factors and of x; bytes kept for the backward pass beside the parameters. Under autocast where x is not float64."""
    model.zero_grad()
    source, kept = x.clone().requires_grad_(), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Behind something, as in a model: autocast keeps the casts of leaves.
        outputs = compute(source.clone(), *model.layers)
    torch.autograd.backward(outputs, [torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output) for output in outputs])
    return outputs, [*(factor.grad for _, factor in lora.lora_parameters(model)), source.grad], sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["weights_bf16", "weights_fp32"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=["input_bf16", "input_fp32"])
def test_autocast_gives_the_numbers_of_the_single_layers_to_the_digits_of_the_format(given: torch.dtype, weights: torch.dtype) -> None:
    model, x = half_precision(weights), torch.randn(2, 7, 16).to(torch.bfloat16).to(given)
    outputs, gradients, kept = step(model, x, project)
    expected, expected_gradients, expected_kept = step(model, x, layer_by_layer)
    truth, true_gradients, _ = step(deepcopy(model).double(), x.double(), layer_by_layer)
    assert [output.dtype for output in outputs] == [output.dtype for output in expected]
    assert [gradient.dtype for gradient in gradients] == [gradient.dtype for gradient in expected_gradients]
    for ours, theirs, true in zip([*outputs, *gradients], [*expected, *expected_gradients], [*truth, *true_gradients], strict=True):
        size = true.norm()
        assert (ours.double() - true).norm() <= max(1.5 * (theirs.double() - true).norm(), ROUNDING * size)
        assert (theirs.double() - true).norm() < 4 * ROUNDING * size, "the comparison itself is of the same function"
    assert kept < expected_kept


def test_autocast_launches_half_of_what_the_single_layers_launch() -> None:
    model, launched = half_precision(torch.bfloat16), {}
    for compute in (project, layer_by_layer):
        with Kernels() as kernels:
            step(model, torch.randn(5, 16), compute)
        launched[compute] = kernels.launched
    assert launched[project] < 0.65 * launched[layer_by_layer]


def test_a_repeated_forward_pass_takes_the_same_way() -> None:
    model, x = half_precision(torch.bfloat16), torch.randn(5, 16)
    again = lambda *given: checkpoint(project, *given, use_reentrant=False)  # noqa: E731
    for ours, theirs in zip(step(model, x, again)[1], step(model, x, project)[1], strict=True):
        assert torch.equal(ours, theirs)


def test_a_large_sum_is_scaled_before_it_is_rounded() -> None:
    """Of fp16: alpha / rank is often a half, and a sum just beyond 65504 is then no infinity."""
    model = with_lora()
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    for _, factor in lora.lora_parameters(model):
        factor.data.fill_(1.0)
    outputs = project(torch.full((100, 16), 16.0, dtype=torch.float16), *model.layers)
    torch.autograd.backward(outputs, [torch.full_like(output, 3.0) for output in outputs])
    # 100 rows of 3 x 256, times the scale of a half.
    assert all(torch.equal(factor.grad, torch.full_like(factor, 100 * 3 * 256 / 2)) for name, factor in lora.lora_parameters(model) if "lora_B" in name)


def test_the_plan_counts_what_is_kept() -> None:
    model, x = half_precision(torch.bfloat16), torch.randn(2, 7, 16)
    kept = step(model, x, project)[2]
    model.to("meta")
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with AsAutocast(torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = project(x.to("meta").requires_grad_().clone(), *model.layers)
    assert sum(storage.nbytes() for key, storage in storages.items() if key not in own) == kept
    assert all(output.dtype == torch.bfloat16 for output in outputs)
