"""Drawing with `offload`: the same pictures, and at no time two parts of the base on the device.

There is no second device here. A CPU by another name ("cpu:0") stands for it: what is sent there counts as placed, what is sent to
"cpu" as gone, and the moves that the real libraries make are watched.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from finetune import generation, offload
from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.lora import weight_shapes
from finetune.families.base_models import BaseModel, locate_base
from finetune.generation import LoadedAdapter, draw_from_files, encode_texts
from finetune.offload import bring, place_encoders
from finetune.sampling import PictureRequest
from tests.tiny_models.all import TINY

DEVICE = torch.device("cpu", 0)


class Watch:
    """placed: models on the device.  together: which kinds of part were there, after each arrival.  worked: kinds that computed there."""

    def __init__(self) -> None:
        self.placed: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.owners: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()
        self.together: list[set[str]] = []
        self.worked: set[str] = set()

    def moved(self, module: torch.nn.Module, target: torch.device) -> None:
        if not hasattr(module, "save_pretrained"):
            return
        if target != DEVICE:
            self.placed.discard(module)
            return
        if any(kind_of(part) != kind_of(module) for part in self.placed):
            gc.collect()  # what nobody holds any more is on no device either
        self.placed.add(module)
        self.together.append({kind_of(part) for part in self.placed})
        self.owners.update((child, weakref.ref(module)) for child in module.modules() if child is not module)  # a model may come when it is called

    def works(self, module: torch.nn.Module, _inputs: object) -> None:
        owner = self.owners[module]() if module in self.owners else None
        if owner is not None:
            assert owner in self.placed, f"{kind_of(owner)} computes while it is not on the device"
            self.worked.add(kind_of(owner))


def kind_of(part: torch.nn.Module) -> str:
    if isinstance(part, PreTrainedModel):
        return "text"
    return "vae" if hasattr(part, "decode") else "transformer"


@pytest.fixture
def watch(monkeypatch) -> Iterator[Watch]:
    found, move = Watch(), torch.nn.Module.to

    def to(module: torch.nn.Module, *arguments, **options):
        for value in (*arguments, *options.values()):
            if isinstance(value, torch.device):
                found.moved(module, value)
        return move(module, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(generation, "best_device", lambda: DEVICE)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(found.works)
    yield found
    handle.remove()


def small_lora(base: BaseModel) -> AdapterFile:
    model = base.family.load(base.folder, frozenset({"transformer"}), torch.float32).transformer
    name, shape = next((name, shape) for name, shape in weight_shapes(model).items() if "to_q" in name or "attn" in name)
    generator = torch.Generator().manual_seed(0)
    return AdapterFile({f"{name}.lora_A.weight": torch.randn(2, shape[1], generator=generator), f"{name}.lora_B.weight": torch.randn(shape[0], 2, generator=generator)})


def test_who_rewrites_prompts_has_the_device_alone(watch, tmp_path):
    TINY["sana"].build().save_pretrained(tmp_path)
    there: list[int] = []

    def rewrite(prompt, counts):
        there.append(len(watch.placed))
        assert counts(prompt)
        return prompt + " at night"

    drawn = draw_from_files(locate_base(str(tmp_path)), {}, [{}], [PictureRequest("a cat", 1, *TINY["sana"].picture, 1, 1.0)], rewrite=rewrite)
    assert drawn[0].request.prompt == "a cat at night" and there == [0] and "text" in watch.worked


@pytest.mark.parametrize("name", ["hunyuan_dit", "flux_dev", "sd3", "sana"])
def test_parts_take_turns_on_the_device_and_the_pictures_stay_the_same(name, watch, tmp_path):
    TINY[name].build().save_pretrained(tmp_path)
    base = locate_base(str(tmp_path))
    adapters = {"style": LoadedAdapter(small_lora(base), tmp_path)}
    height, width = TINY[name].picture
    requests = [PictureRequest(prompt, seed, height, width, 2, 3.0) for prompt, seed in (("a cat", 1), ("a dog", 2), ("a cat", 3))]

    def draw(offload: bool) -> list[np.ndarray]:
        watch.together.clear(), watch.placed.clear(), watch.worked.clear()
        return [np.asarray(each.image) for each in draw_from_files(base, adapters, [{"style": 1.0}, {"style": 0.0}], requests, batch_size=2, offload=offload)]

    plain = draw(False)
    assert {"transformer", "vae"} in watch.together, "without it both are there at once, or this test sees nothing"
    turns = draw(True)
    assert all(len(kinds) == 1 for kinds in watch.together) and watch.worked == {"text", "transformer", "vae"}
    assert len(watch.together) >= 1 + 2 * 4, "each of the four batches is denoised and then decoded"
    assert len(plain) == 6 and all(np.array_equal(a, b) for a, b in zip(plain, turns, strict=True))
    assert not np.array_equal(plain[0], plain[3]), "the adapter did nothing"


@pytest.mark.parametrize("name", TINY)
def test_text_encoders_that_do_not_fit_pass_through_layer_by_layer(name, tmp_path, monkeypatch):
    TINY[name].build().save_pretrained(tmp_path)
    base = locate_base(str(tmp_path))
    whole, = encode_texts(base, ["a cat", ""], torch.float32, DEVICE)
    monkeypatch.setattr(offload, "free_bytes", lambda device: 1)  # the only thing that a test cannot make real is a small card
    passed, = encode_texts(base, ["a cat", ""], torch.float32, DEVICE)
    assert all(torch.equal(tensor, passed[text].tensors[key]) for text, found in whole.items() for key, tensor in found.tensors.items())


def test_only_encoders_that_do_not_fit_wait(tmp_path, monkeypatch):
    TINY["flux_dev"].build().save_pretrained(tmp_path)
    base = locate_base(str(tmp_path))
    pipeline = base.family.load(base.folder, frozenset({"text"}), torch.float32)
    sizes = {slot: sum(parameter.nbytes for parameter in getattr(pipeline, slot).parameters()) for slot in ("text_encoder", "text_encoder_2")}
    small, large = (getattr(pipeline, slot) for slot in sorted(sizes, key=sizes.__getitem__))
    monkeypatch.setattr(offload, "free_bytes", lambda device: min(sizes.values()) / offload.FOR_WEIGHTS + 4096)
    assert place_encoders(pipeline, torch.device("cpu")) >= max(sizes.values()) > min(sizes.values()) + 4096

    def waits(encoder: torch.nn.Module) -> set[bool]:
        return {module.weight.untyped_storage().nbytes() == module.weight.itemsize for module in encoder.modules() if type(module) is torch.nn.Linear}

    assert waits(small) == {False} and waits(large) == {True}
    base.family.encode_prompts(pipeline, ["a cat"])
    assert waits(large) == {True}


def test_a_gpu_is_sent_pinned_memory_without_waiting_and_others_are_not(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sent.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking=False: sent.append((device.type, non_blocking)) or tensor)
    for device in ("cuda", "mps", "cpu"):
        bring(torch.ones(2), torch.device(device))
    bring(torch.empty(2, device="meta"), torch.device("cuda"))  # what is on a device has no memory to pin
    assert sent == ["pinned", ("cuda", True), ("mps", False), ("cpu", False), ("cuda", False)]
