"""A base divided over processes: what every family predicts and trains, and what is refused. Two real processes are in
`test_several_processes.py`; here one process holds every piece, and the machinery around each block is the same."""

from types import SimpleNamespace

import pytest
import torch

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.errors import BadInput
from finetune.families import registry
from finetune.training.placement import Hold
from finetune.training.sharding import Sharding, check_launch, shard_base, shard_units, wanted_sharding
from tests.families.battery import Specimen
from tests.tiny_models.all import TINY
from tests.training.small_job import small_recipe

ALWAYS = "hidream"  # blocks with experts, a list of projections beside them; all families with `pytest -m thorough`
NAMES = [name if name == ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in TINY]
WHOLE, QUANTISED = Hold("bf16", torch.bfloat16, ""), Hold("nf4", torch.bfloat16, "")
TWO = SimpleNamespace(num_processes=2, mixed_precision="no", device=torch.device("cuda"))


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_a_divided_base_predicts_and_trains_what_a_whole_one_does(name, group, tmp_path):
    specimen = Specimen(name, tmp_path)
    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets["attention"], rank=2, seed=0)
    for key, parameter in lora_parameters(model):
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    specimen.family.prepare(model, 1)
    noisy, timestep = specimen.noisy()
    found, whole = [], sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    for divided in (False, True):
        if divided:
            assert len(shard_units(model)) >= 2
            assert shard_base(model, Sharding(1, reshard_after_forward=True, offload=False), torch.device("cpu")) == whole
        model.zero_grad()
        model.train()
        loss = specimen.predict(model, noisy, timestep, specimen.conditionings).square().mean()
        loss.backward()
        with torch.no_grad():
            drawn = specimen.predict(model.eval(), noisy, timestep, specimen.conditionings)
        found.append([loss.detach(), drawn, *(p.grad.clone() for _, p in lora_parameters(model) if p.grad is not None)])
    for whole, divided in zip(*found, strict=True):
        assert (whole - divided).abs().max() <= 1e-5 * whole.abs().max()


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


def wanted(tmp_path, name="sd3", accelerator=TWO, hold=WHOLE, **changes):
    return wanted_sharding(accelerator, small_recipe("mini", tmp_path, **changes), registry.family(name).facts, hold)


def test_nothing_is_divided_unless_accelerates_configuration_asks_for_it(tmp_path):
    assert wanted(tmp_path) is None


def test_one_process_has_nobody_to_share_with(asked, tmp_path):
    assert wanted(tmp_path, accelerator=SimpleNamespace(num_processes=1)) is None


def test_accelerates_settings_are_taken_over(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert wanted(tmp_path) == Sharding(2, reshard_after_forward=False, offload=True)


def test_weights_that_would_have_to_be_converted_are_not_divided(asked, tmp_path):
    with pytest.raises(BadInput, match="nf4") as refusal:
        wanted(tmp_path, hold=QUANTISED)
    assert refusal.value.where == "base.hold"


def test_a_family_that_computes_as_often_as_there_are_text_lengths_takes_one_picture_at_a_time(asked, tmp_path):
    with pytest.raises(BadInput, match="equally often") as refusal:
        wanted(tmp_path, "cogview4")
    assert "batch_size = 1" in refusal.value.fix
    assert wanted(tmp_path, "cogview4", training__batch_size=1) is not None


def test_an_adapter_that_could_not_be_proven_is_refused_before_it_is_trained(asked, tmp_path):
    """The main process proves it on a streamed base, whose weights DoRA would look at on another device."""
    with pytest.raises(BadInput, match="dora does not go with a base that is streamed") as refusal:
        wanted(tmp_path, adapter__kind="dora")
    assert "in one process" in refusal.value.what and refusal.value.where == "base.hold"


def test_fp16_is_refused(asked, tmp_path):
    with pytest.raises(BadInput, match="fp16"):
        wanted(tmp_path, accelerator=SimpleNamespace(num_processes=2, mixed_precision="fp16"))


def test_a_launch_that_asks_for_nothing_is_let_through(monkeypatch):
    for name in ("DEEPSPEED", "FSDP"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
    check_launch()
