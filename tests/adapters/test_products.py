"""Products with frozen weights are the same function in either library; which is taken depends on processor and shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters import products
from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.adapters.shared_input import project

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
IN, OUT, ROWS = 512, 800, 96


@pytest.fixture(params=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    return request.param


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that oneDNN was given, in a process whose processor suits it."""
    seen: list[tuple[int, ...]] = []
    suits: Callable[[Tensor, Tensor], bool] = products._by_onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)

    def noted(x: Tensor, weight: Tensor) -> bool:
        is_taken = suits(x, weight)
        seen.extend([tuple(weight.shape)] * is_taken)
        return is_taken

    monkeypatch.setattr(products, "_by_onednn", noted)
    return seen


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Feeding(nn.Module):
    """A frozen layer, one with LoRA, another frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(IN, OUT), nn.Linear(OUT, IN), nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(project(F.gelu(self.first(x)), self.middle)[0]))


def model_with_lora() -> Feeding:
    torch.manual_seed(0)
    model = Feeding().requires_grad_(False)
    inject_lora(model, "middle", 4, seed=0)
    for _, parameter in lora_parameters(model):
        parameter.data.normal_(std=0.05)
    return model


def gradients(model: Feeding, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    output = model(x)
    output.backward(numbers(*output.shape))
    return [output.detach(), x.grad, *(parameter.grad for _, parameter in lora_parameters(model))]


@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS)], ids=["rows", "batch"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_and_its_gradient_are_the_weights(library: str, shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, gradient = numbers(*shape, IN), numbers(OUT, IN), numbers(*shape, OUT)
    bias = numbers(OUT) if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative(products.product(x, weight, bias).double(), exact) < 1e-6
    assert relative(products.input_gradient(gradient, weight).double(), gradient.double() @ weight.double()) < 1e-6


def test_a_gradient_is_added_onto_the_one_before(library: str) -> None:
    gradient, weight, before = numbers(ROWS, OUT), numbers(OUT, IN), numbers(ROWS, IN)
    onto = before.clone()
    assert products.input_gradient(gradient, weight, onto=onto) is onto
    assert relative(onto, before + gradient @ weight) < 1e-6


def test_a_gradient_that_lies_turned_in_memory_is_read_rightly(library: str) -> None:
    turned, weight = numbers(OUT, ROWS).t(), numbers(OUT, IN)
    assert relative(products.input_gradient(turned, weight), turned.contiguous() @ weight) < 1e-6


def test_a_model_trains_by_either_library_alike(library: str) -> None:
    plain, faster = model_with_lora(), model_with_lora()
    products.take_faster_products(faster)
    for found, expected in zip(gradients(faster, numbers(2, ROWS, IN)), gradients(plain, numbers(2, ROWS, IN)), strict=True):
        assert relative(found, expected) < 2e-6


def test_the_same_product_twice_has_the_same_bits(library: str) -> None:
    model = model_with_lora()
    products.take_faster_products(model)
    again = copy.deepcopy(model)
    assert all(map(torch.equal, gradients(model, numbers(ROWS, IN)), gradients(again, numbers(ROWS, IN))))


def test_all_large_frozen_layers_of_a_model_in_training_go_to_onednn(asked: list[tuple[int, ...]]) -> None:
    model = model_with_lora()
    products.take_faster_products(model)
    gradients(model, numbers(ROWS, IN))
    # Forward and back, of which the layer with LoRA is one product of its own.
    assert {shape: asked.count(shape) >= 2 for shape in [(OUT, IN), (IN, OUT)]} == {(OUT, IN): True, (IN, OUT): True}


@pytest.mark.parametrize(("rows", "width", "dtype"), [(8, IN, torch.float32), (ROWS, 64, torch.float32), (ROWS, IN, torch.bfloat16), (ROWS, IN, torch.float64)])
def test_few_rows_small_weights_and_other_formats_stay_where_they_were(asked: list[tuple[int, ...]], rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = numbers(rows, width).to(dtype), numbers(OUT, width).to(dtype)
    assert torch.equal(products.product(x, weight), F.linear(x, weight))
    assert asked == []


def test_under_autocast_a_frozen_layer_is_autocasts(asked: list[tuple[int, ...]]) -> None:
    model = model_with_lora()
    products.take_faster_products(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(numbers(ROWS, IN)).dtype == torch.bfloat16
    assert asked == []


def test_a_layer_that_is_trained_keeps_its_own_forward(asked: list[tuple[int, ...]]) -> None:
    model = Feeding()
    products.take_faster_products(model)
    model(numbers(ROWS, IN)).sum().backward()
    assert asked == []
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_intels_processors_stay_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(capability: str, intel: bool) -> bool:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(products, "is_intel", lambda: intel)
        return products.onednn_is_faster.__wrapped__()

    assert [faster("AVX512", False), faster("AVX512", True), faster("AVX2", False)] == [True, False, False]


def test_a_model_that_went_to_a_device_without_autocast_still_computes_shapes(asked: list[tuple[int, ...]]) -> None:
    model = model_with_lora()
    products.take_faster_products(model)
    assert model.to("meta")(numbers(ROWS, IN).to("meta")).shape == (ROWS, OUT) and asked == []
