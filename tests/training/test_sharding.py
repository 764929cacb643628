"""A base divided over processes: what every family predicts and trains, and what is refused. Two real processes are in
`test_several_processes.py`; here one process holds every piece, and the machinery around each block is the same."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.errors import BadInput
from finetune.families import registry
from finetune.training.placement import Hold
from finetune.training.sharding import FSDP2, ZERO3, Sharding, check_launch, shard_base, shard_units, wanted_sharding, without_engine
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

    # Which DeepSpeed asks for.
    patch = pytest.MonkeyPatch()
    patch.setenv("LOCAL_RANK", "0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    patch.undo()


@pytest.mark.parametrize("name", NAMES)
def test_a_divided_base_predicts_and_trains_what_a_whole_one_does(name, group, tmp_path):
    same_divided(name, 1, FSDP2, tmp_path)


@pytest.mark.deepspeed
@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize("name", TINY)
def test_so_does_one_that_deepspeed_divides(name, checkpointed, group, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install -c constraints.txt -e '.[test,deepspeed]'")
    same_divided(name, checkpointed, ZERO3, tmp_path)


def same_divided(name, checkpointed, by, tmp_path):
    specimen = Specimen(name, tmp_path)
    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets["attention"], rank=2, seed=0)
    for key, parameter in lora_parameters(model):
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    specimen.family.prepare(model, checkpointed)
    noisy, timestep = specimen.noisy()
    found, whole = [], sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    for divided in (False, True):
        if divided:
            assert len(shard_units(model)) >= 2
            assert shard_base(model, Sharding(1, reshard_after_forward=True, offload=False, by=by), torch.device("cpu")) == whole
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


@pytest.fixture
def zero3(monkeypatch):
    """What `accelerate launch` sets, where DeepSpeed is installed."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    return monkeypatch


def settings_file(monkeypatch, folder, **zero):
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))


def test_zero_3_divides_the_base(zero3, tmp_path):
    check_launch()
    assert wanted(tmp_path) == Sharding(2, reshard_after_forward=True, offload=False, by=ZERO3)
    zero3.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    assert wanted(tmp_path).offload


def test_deepspeeds_own_file_is_read(zero3, tmp_path):
    settings_file(zero3, tmp_path, stage=3, offload_param={"device": "cpu"})
    check_launch()
    assert wanted(tmp_path).offload


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_that_divide_nothing_of_the_base_are_refused(zero3, tmp_path, stage):
    zero3.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    with pytest.raises(BadInput, match=f"ZeRO-{stage} does not divide the base") as refusal:
        check_launch()
    assert "deepspeed.yaml" in refusal.value.fix
    settings_file(zero3, tmp_path, stage=stage)
    with pytest.raises(BadInput, match=f"ZeRO-{stage}"):
        check_launch()


def test_pieces_on_a_disk_are_refused(zero3):
    zero3.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme")
    with pytest.raises(BadInput, match="nvme"):
        check_launch()


def test_deepspeed_that_is_not_there_is_named_with_its_extra(zero3):
    zero3.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(BadInput, match="not installed") as refusal:
        check_launch()
    assert ".[deepspeed]" in refusal.value.fix


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
def test_a_file_of_deepspeeds_that_cannot_be_read_is_named(zero3, tmp_path, content):
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_text(content)
    zero3.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(BadInput, match="cannot be read") as refusal:
        check_launch()
    assert "deepspeed_config_file" in refusal.value.where


def test_an_accelerator_is_made_as_if_deepspeed_had_not_been_asked_for(zero3):
    """Its own mode would hand model and optimizer to DeepSpeed's engine, and its backward pass would look for that."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with without_engine():
            assert Accelerator(cpu=True).deepspeed_plugin is None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
