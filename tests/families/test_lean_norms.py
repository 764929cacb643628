"""The lean norm is the library's: same numbers forward to the bit, same gradient, and no copy of its input kept in float32."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from finetune.families import lean_norms

FORMATS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


def norms(of_weight: torch.dtype, affine: bool = True) -> tuple[nn.Module, nn.Module]:
    """The library's norm and the same one made lean."""
    library, lean = (RMSNorm(48, eps=1e-5, elementwise_affine=affine) for _ in range(2))
    for norm in (library, lean):
        norm.requires_grad_(False).to(of_weight)
        if affine:
            norm.weight.copy_(torch.linspace(0.5, 1.5, 48))
    lean_norms.install(nn.Sequential(lean))
    return library, lean


def passed(norm: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient of the input, and bytes kept for the way back beside the input itself."""
    x, kept = x.clone().requires_grad_(True), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = norm(x)
    output.backward(gradient.to(output.dtype))
    return output.detach(), x.grad, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("of_input", "of_weight"), FORMATS)
@pytest.mark.parametrize("affine", [True, False])
def test_same_output_and_gradient_as_the_library_s(of_input: torch.dtype, of_weight: torch.dtype, affine: bool) -> None:
    library, lean = norms(of_weight, affine)
    x, gradient = torch.randn(2, 7, 4, 48).to(of_input), torch.randn(2, 7, 4, 48)
    expected, expected_gradient, _ = passed(library, x, gradient)
    found, found_gradient, _ = passed(lean, x, gradient)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert found_gradient.dtype == of_input
    tolerance = 1e-5 if of_input == of_weight == torch.float32 else 0.03
    assert torch.allclose(found_gradient.float(), expected_gradient.float(), rtol=tolerance, atol=tolerance)


def test_the_gradient_is_the_function_s() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    # The mean is taken in float32, as the library takes it: coarser steps than for numbers in float64 throughout.
    assert torch.autograd.gradcheck(lambda numbers: lean_norms._RootMeanSquare.apply(numbers, weight, 1e-3), x, eps=1e-2, atol=2e-3)


def test_what_is_kept_is_one_number_a_row() -> None:
    library, lean = norms(torch.bfloat16)
    x, gradient = torch.randn(64, 48, dtype=torch.bfloat16), torch.randn(64, 48)
    weight_and_rows = 48 * 2 + 64 * 4
    assert passed(lean, x, gradient)[2] == weight_and_rows
    assert passed(library, x, gradient)[2] >= weight_and_rows + x.numel() * 4, "a float32 copy of the input"


def test_norms_that_are_trained_stay_the_library_s() -> None:
    trained = RMSNorm(8, eps=1e-5)
    lean_norms.install(nn.Sequential(trained))
    trained(torch.randn(2, 8)).sum().backward()
    assert trained.weight.grad is not None and "forward" not in vars(trained)
