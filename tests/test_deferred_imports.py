"""Names of a library can be taken without loading it, and behave as the real ones from their first use on."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.deferred_imports import COMPILER, FORMULAS, PLAIN_ANSWERS, SIZES, defer_compiler, defer_formulas, defer_part, names_later, one_process_only

PACKAGE = """
import importlib, sys, types
class _Lazy(types.ModuleType):
    def __getattr__(self, name):
        if name not in self._class_to_module:
            raise AttributeError(name)
        return getattr(importlib.import_module(f"shelf_of_models.{self._class_to_module[name]}"), name)
module = _Lazy(__name__)
module.__path__, module.__spec__ = __path__, __spec__
module._class_to_module = {"Model": "heavy", "make": "heavy"}
sys.modules[__name__] = module
"""
HEAVY = """
class Model:
    kind = "real"
    def __init__(self, size=1): self.size = size
def make(): return Model()
NAMES = {"one": Model}
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "shelf_of_models"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    for name in ("heavy", "other"):
        (folder / f"{name}.py").write_text(HEAVY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("shelf_of_models")]:
        del sys.modules[name]


def loaded() -> list[str]:
    return [name for name in sys.modules if name.startswith("shelf_of_models.")]


@pytest.mark.usefixtures("shelf")
def test_a_class_is_loaded_by_its_first_use() -> None:
    with names_later("shelf_of_models"):
        from shelf_of_models import Model  # type: ignore[import-not-found]
    assert not isinstance(3, Model) and not isinstance(Path(), (Model, str))
    assert not loaded(), "to say that something is none of them needs nothing"
    assert Model(4).size == 4 and Model.kind == "real"
    real = importlib.import_module("shelf_of_models.heavy").Model
    assert isinstance(real(), Model) and issubclass(type("Kind", (real,), {}), Model)


@pytest.mark.usefixtures("shelf")
def test_outside_the_block_and_for_functions_everything_comes_as_ever() -> None:
    with names_later("shelf_of_models"):
        from shelf_of_models import make  # type: ignore[import-not-found]
    assert loaded() == ["shelf_of_models.heavy"] and make().kind == "real"
    with names_later("shelf_of_models"):
        from shelf_of_models import Model  # type: ignore[import-not-found]
    assert Model is type(make()), "a class that is there already is given itself"


@pytest.mark.usefixtures("shelf")
def test_names_can_be_taken_from_a_module_that_is_not_there_yet() -> None:
    with names_later("shelf_of_models", "shelf_of_models.other"):
        from shelf_of_models.other import NAMES  # type: ignore[import-not-found]
    assert not loaded()
    assert NAMES["one"].kind == "real" and "two" not in NAMES
    assert loaded() == ["shelf_of_models.other"]


@pytest.mark.usefixtures("shelf")
def test_deriving_from_such_a_name_and_writing_it_in_a_hint_load_nothing() -> None:
    with names_later("shelf_of_models"):
        from shelf_of_models import Model  # type: ignore[import-not-found]

        class Own(Model):
            hint: Model | None = None
    assert not loaded() and Own.__bases__ == (object,)


@pytest.mark.usefixtures("shelf")
def test_a_part_that_nobody_imported_can_be_named_until_it_is_imported() -> None:
    package = importlib.import_module("shelf_of_models")
    defer_part("shelf_of_models.other")
    assert not isinstance(3, package.other.Model) and not loaded()
    real = importlib.import_module("shelf_of_models.other")
    assert package.other is real and isinstance(real.Model(), package.other.Model)
    defer_part("shelf_of_models.other")
    assert package.other is real


def test_a_compiler_that_is_there_stays() -> None:
    real = importlib.import_module(COMPILER)
    defer_compiler()
    assert sys.modules[COMPILER] is real


# What libraries take from torch's compiler without compiling; then something is compiled after all.
NAMED_AND_USED = """
import sys
from finetune.deferred_imports import defer_compiler
import torch
defer_compiler()
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

@torch._dynamo.assume_constant_result
def constant():
    return 3

assert constant._dynamo_marked_constant and not torch._dynamo.is_compiling() and not isinstance(torch.nn.Linear(1, 1), torch._dynamo.eval_frame.OptimizedModule)
settings = torch._dynamo.config
with settings.patch(error_on_nested_fx_trace=False):
    assert not torch._dynamo.config.error_on_nested_fx_trace
assert settings.error_on_nested_fx_trace
assert "torch._dynamo.convert_frame" not in sys.modules, "nothing was compiled"
with TransformGetItemToIndex():
    assert "torch._dynamo.convert_frame" in sys.modules
assert torch._dynamo.config is settings, "what was set before is the compiler's own"
import torch._dynamo._trace_wrapped_higher_order_op as real
assert hasattr(real, "__file__") and isinstance(torch.compile(torch.nn.Linear(1, 1), backend="eager"), torch._dynamo.eval_frame.OptimizedModule)
"""


def test_names_of_the_compiler_are_taken_without_it_and_work_when_they_are_used() -> None:
    subprocess.run([sys.executable, "-c", NAMED_AND_USED], check=True)


UNDIVIDED = """
import sys
from finetune.deferred_imports import one_process_only
one_process_only()
from transformers import BertConfig, BertModel
model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8))
model.save_pretrained(sys.argv[1])
again = BertModel.from_pretrained(sys.argv[1], local_files_only=True)
assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
assert not hasattr(sys.modules["transformers.distributed.sharding_utils"], "DTensor"), "it took no notice of what divides models"
import torch
assert torch.distributed.is_available(), "torch itself is as it was"
"""


def test_models_of_one_process_are_loaded_without_what_divides_them(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", UNDIVIDED, str(tmp_path)], check=True)


def test_models_that_are_loaded_already_keep_what_they_were_told() -> None:
    importlib.import_module("transformers.modeling_utils")
    told = importlib.import_module("transformers.utils.import_utils").is_torch_distributed_available
    one_process_only()
    assert importlib.import_module("transformers.utils.import_utils").is_torch_distributed_available is told


# Models are built on the meta device and computed with there; then a size is a formula after all.
PLAIN_AND_FORMULA = """
import sys
import torch
from finetune.deferred_imports import defer_compiler, defer_formulas
defer_compiler()
defer_formulas()

def shapes():
    with torch.device("meta"):
        left = torch.randn(4, 1, 8) / 3**0.5 + torch.rand(5, 8) * torch.ones(8)
        left.normal_()
        return [tuple(tensor.shape) for tensor in (left, torch.nn.Embedding(7, 3, padding_idx=0).weight, left.reshape(2, -1), left.expand(6, 4, 5, 8))]

before = shapes()
assert "sympy.core" not in sys.modules and "torch.utils._sympy.functions" not in sys.modules
try:
    torch.ones(3, 2, device="meta") + torch.ones(2, 3, device="meta").div(2)
except RuntimeError as problem:
    assert "size" in str(problem) or "shape" in str(problem), problem
else:
    raise SystemExit("shapes that do not fit were added")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, expect_true, sym_eq
formula = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(5, 7), static_shapes=False)
assert isinstance(formula.shape[0], torch.SymInt) and tuple((formula + formula).shape) == (5, 7)
assert isinstance(formula.shape[0] > 3, torch.SymBool) and expect_true(formula.shape[0] > 3) and sym_eq(formula.shape[0], 5)
import sympy
assert sympy.sqrt(4) == 2 and isinstance(sympy.Integer(2), sympy.Basic) and shapes() == before
"""


def test_models_are_built_without_formulas_for_sizes_which_are_understood_when_there_are_some() -> None:
    subprocess.run([sys.executable, "-c", PLAIN_AND_FORMULA], check=True)


def test_stand_ins_answer_about_plain_sizes_as_the_real_one_does() -> None:
    real = importlib.import_module(SIZES)
    for name, plain in PLAIN_ANSWERS.items():
        for asked in ([(2, 3), [2, 3]], [(2, 3), [2]], [4, 4], [4, 5]) if name == "sym_eq" else ([7],) if name == "is_nested_int" else ([True], [False]):
            assert plain(*asked) is getattr(real, name)(*asked), (name, asked)
    defer_formulas()
    assert sys.modules[SIZES] is real and hasattr(sys.modules[FORMULAS], "Integer"), "what is there stays"


# Values are put into a part of a tensor: of plain sizes and of formulas.
SCATTERED = """
import sys
import torch
from finetune.deferred_imports import defer_formulas
defer_formulas()
whole, part = torch.ones(5, 7, device="meta"), torch.ones(2, 7, device="meta")
assert torch.slice_scatter(whole, part, 0, 1, 3).stride() == (7, 1)
assert torch.slice_scatter(whole[:1].expand(5, 7), part, 0, 1, 3).stride() == (7, 1), "memory that elements share becomes their own"
assert "sympy.core" not in sys.modules
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
formula = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(5, 7), static_shapes=False)
assert not free_unbacked_symbols(formula) and "sympy.core" in sys.modules
unknown = ShapeEnv().create_unbacked_symint()
assert len(free_unbacked_symbols(unknown)) == 1
"""


def test_values_are_put_into_a_part_without_formulas_for_sizes() -> None:
    subprocess.run([sys.executable, "-c", SCATTERED], check=True)
