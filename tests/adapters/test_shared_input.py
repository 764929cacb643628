"""Layers on one input, computed as one product, are the layers themselves: values, gradients, and what must be left to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.adapters import lora, shared_input
from finetune.adapters.shared_input import project

WIDTHS = {"query": 24, "key": 8, "value": 24}


class Attention(nn.Module):
    """Three layers on one input; the value's has no bias."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(16, 24), nn.Linear(16, 8)
        self.value = nn.Linear(16, 24, bias=False)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.query, self.key, self.value]


def with_lora(**options: object) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    lora.inject_lora(model, "query|key|value", 4, alpha=2.0, seed=0, **options)
    for name, factor in lora.lora_parameters(model):
        if "lora_B" in name:
            factor.data.normal_(0, 0.1)
    return model


def found_with(model: Attention, x: torch.Tensor, together: bool, used: slice = slice(None)) -> tuple[list[torch.Tensor], list[torch.Tensor | None], torch.Tensor]:
    """Outputs, gradients of the factors, gradient of x."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = project(x, *model.layers) if together else [layer(x) for layer in model.layers]
    sum(output.sin().sum() for output in outputs[used]).backward()
    return outputs, [factor.grad.clone() if factor.grad is not None else None for _, factor in lora.lora_parameters(model)], x.grad


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (2, 16, 6)], ids=["rows", "batch", "transposed"])
def test_outputs_and_all_gradients_are_those_of_the_single_layers(shape: tuple[int, ...]) -> None:
    model = with_lora()
    x = torch.randn(shape)
    if shape[-1] != 16:
        x = x.transpose(1, 2)
    outputs, factors, gradient = found_with(model, x, together=True)
    expected, expected_factors, expected_gradient = found_with(model, x, together=False)
    for ours, theirs in zip([*outputs, *factors, gradient], [*expected, *expected_factors, expected_gradient], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_layer_whose_output_nobody_reads_gets_no_gradient() -> None:
    model = with_lora()
    x = torch.randn(5, 16)
    _, factors, gradient = found_with(model, x, together=True, used=slice(1, None))
    _, expected, expected_gradient = found_with(model, x, together=False, used=slice(1, None))
    assert [factor is None for factor in factors] == [factor is None for factor in expected] == [True, True, False, False, False, False]
    assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_an_input_without_gradient_still_trains_the_factors() -> None:
    model = with_lora()
    sum(output.sum() for output in project(torch.randn(5, 16), *model.layers)).backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for _, factor in lora.lora_parameters(model))
    assert all(layer.base_layer.weight.grad is None for layer in model.layers)


def _no_adapter(model: Attention) -> None:
    lora.remove(model)


def _second_adapter(model: Attention) -> None:
    lora.inject(model, {"r": 2, "lora_alpha": 2, "target_modules": ["key"]}, "other", trainable=True)
    for layer in model.layers:
        layer.set_adapter(list(layer.lora_A))


def _dropout(model: Attention) -> None:
    model.key.lora_dropout["default"] = nn.Dropout(0.5)


def _other_format(model: Attention) -> None:
    model.key.base_layer.to(torch.float64)


@pytest.mark.parametrize("change", [_no_adapter, _second_adapter, _dropout, _other_format], ids=lambda change: change.__name__.strip("_"))
def test_everything_but_one_plain_lora_is_left_to_the_layers(change, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora()
    change(model)
    layers = model.layers if change is not _other_format else [model.query, model.value]
    x = torch.randn(5, 16)
    if change is _other_format:
        assert shared_input._plain_lora(model.key, (x.dtype,)) is None
    torch.manual_seed(1)
    expected = [layer(x) for layer in layers]
    torch.manual_seed(1)
    found = project(x, *layers)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(found, expected, strict=True))
    assert change is _other_format or any(shared_input._plain_lora(layer, (x.dtype,)) is None for layer in layers)


def test_shapes_are_traced_on_the_meta_device() -> None:
    model = with_lora().to("meta")
    x = torch.empty(2, 3, 16, device="meta", requires_grad=True)
    outputs = project(x, *model.layers)
    sum(output.sum() for output in outputs).backward()
    assert [tuple(output.shape) for output in outputs] == [(2, 3, width) for width in WIDTHS.values()]
    assert x.grad.shape == x.shape and all(factor.grad is not None for _, factor in lora.lora_parameters(model))
