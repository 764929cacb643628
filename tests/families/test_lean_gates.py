"""The lean gated layers are the library's: same numbers forward to the bit, same gradient, and less kept for the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import LuminaFeedForward
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowFeedForward
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageFeedForwardSwiGLU
from diffusers.models.transformers.transformer_z_image import FeedForward
from torch import Tensor, nn

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.families import lean_gates

WIDTH = 32
Install = Callable[[nn.Module], None]
# Library layer, how it is made lean, and a regular expression for its linear layers.
KINDS: dict[str, tuple[Callable[[], nn.Module], Install, str]] = {
    "z_image": (lambda: FeedForward(WIDTH, 48), lambda m: lean_gates.install(m, "FeedForward", "w1", "w3", "w2"), r"0\.w[123]"),
    "hidream": (lambda: HiDreamImageFeedForwardSwiGLU(WIDTH, 48), lambda m: lean_gates.install(m, "HiDreamImageFeedForwardSwiGLU", "w1", "w3", "w2"), r"0\.w[123]"),
    "auraflow": (lambda: AuraFlowFeedForward(WIDTH, 48), lambda m: lean_gates.install(m, "AuraFlowFeedForward", "linear_1", "linear_2", "out_projection"),
                 r"0\.(linear_[12]|out_projection)"),
    "lumina2": (lambda: LuminaFeedForward(WIDTH, 48), lambda m: lean_gates.install(m, "LuminaFeedForward", "linear_1", "linear_3", "linear_2"), r"0\.linear_[123]"),
    "flux2": (Flux2SwiGLU, lambda m: lean_gates.install_on_halves(m, "Flux2SwiGLU"), ""),
    "sana": (lambda: GLUMBConv(WIDTH, WIDTH, 2.5, norm_type="rms_norm"), lean_gates.install_on_convolutions, ""),
}


def both(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The library's layer and the same one made lean, in a model."""
    torch.manual_seed(0)
    library = nn.Sequential(KINDS[kind][0]()).requires_grad_(False).to(dtype)
    lean = copy.deepcopy(library)
    KINDS[kind][1](lean)
    assert lean[0].forward.__func__ is not library[0].forward.__func__, "nothing was made lean"
    return library, lean


def numbers(kind: str) -> Tensor:
    return torch.randn(2, WIDTH, 6, 5) if kind == "sana" else torch.randn(2, 7, WIDTH)


def passed(model: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, and bytes of activations kept for the way back."""
    x, kept = x.clone().requires_grad_(True), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights | {x.untyped_storage().data_ptr()}:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    torch.manual_seed(1)
    output.backward(torch.randn_like(output))
    return output.detach(), x.grad, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_same_numbers_as_the_library_s_and_less_is_kept(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    library, lean = both(kind, dtype)
    x = numbers(kind).to(dtype)
    output, gradient, kept = passed(library, x, autocast)
    found, found_gradient, found_kept = passed(lean, x, autocast)
    assert found.dtype == output.dtype and torch.equal(found, output)
    assert found_gradient.dtype == gradient.dtype
    tolerance = 1e-6 if dtype == torch.float32 and not autocast else 0.02
    assert torch.allclose(found_gradient, gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))
    # Under autocast both keep copies of the weights beside.
    assert found_kept < kept if autocast else found_kept <= 0.8 * kept


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
def test_adapters_on_the_layers_learn_the_same(kind: str) -> None:
    gradients = []
    for model in both(kind):
        inject_lora(model, KINDS[kind][2], 4, seed=0)
        for name, parameter in lora_parameters(model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        torch.manual_seed(2)
        x = numbers(kind)
        model(x).pow(2).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in lora_parameters(model)})
    library, lean = gradients
    assert len(library) == 6 and library.keys() == lean.keys()
    for name, gradient in library.items():
        assert torch.allclose(lean[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("function", [lambda x: lean_gates.gated(x, x.flip(-1)), lean_gates._HalvesGated.apply,
                                      lambda x: lean_gates._FrozenConvolution.apply(x.view(1, 3, 2, 2), WEIGHT, None, ((1, 1), (1, 1), (1, 1), 1))])
def test_gradients_are_the_functions(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(3)
    assert torch.autograd.gradcheck(function, torch.randn(2, 6, dtype=torch.float64, requires_grad=True))


WEIGHT = torch.linspace(-1, 1, 2 * 3 * 9, dtype=torch.float64).view(2, 3, 3, 3)


def test_a_convolution_that_learns_or_is_of_another_kind_is_left_to_the_library() -> None:
    x = torch.randn(1, 4, 5, 5)
    for layer in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular").requires_grad_(False), nn.Conv2d(4, 4, 3, padding="same").requires_grad_(False)):
        found = lean_gates.convolved(layer, x)
        assert torch.equal(found, layer(x))
        if layer.weight.requires_grad:
            found.sum().backward()
            assert layer.weight.grad is not None
