"""The plan: estimates from configurations alone, settings that fit, and the truth beside the estimate."""

import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from finetune.errors import BadInput
from finetune.families.base_models import locate_base
from finetune.families.registry import family
from finetune.training.allocator import heap_settings
from finetune.training.plan import Plan, estimate, fewest_checkpoints, plan, resolved_hold
from finetune.training.plan_ground import survey
from finetune.training.plan_allocator import heap_growth
from finetune.training.plan_fit import fitted
from finetune.adapters.kinds import AdapterSize
from finetune.training.plan_model import StepCost, Traced, adapter_parameters, build_on_meta, one_step, step_cost
from finetune.training.plan_mixed import AsAutocast
from finetune.training.plan_speed import Speed, probe_expansion, probe_speed
from finetune.training.plan_tracing import trace
from finetune.training.placement import Hold
from finetune.training.sharding import Sharding
from tests.training.small_job import small_recipe

META = torch.device("meta")


def test_a_trace_counts_products_and_the_most_memory_alive_at_once():
    left, right = torch.empty(32, 64, device=META), torch.empty(64, 16, device=META)
    counted = trace(lambda: (left @ right).relu(), [left, right])
    assert counted.flops == 2 * 32 * 64 * 16
    assert counted.peak_bytes == 2 * 32 * 16 * 4
    assert (counted.bytes_in_large(32 * 16 * 4), counted.bytes_in_large(32 * 16 * 4 + 1)) == (counted.moved_bytes, 0)


def test_attention_is_counted_without_the_matrix_of_scores():
    query = torch.empty(1, 2, 512, 8, device=META, requires_grad=True)
    counted = trace(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward(), [query])
    assert counted.flops == 6 * 2 * 512 * 512 * 8 * 2
    assert counted.peak_bytes < 512 * 512 * 4


def test_the_step_of_a_frozen_base_costs_at_most_twice_its_forward_pass():
    """Counted on the full-size HunyuanDiT's width: a base gradient that somebody lets through costs a third more."""
    from finetune.adapters.lora import inject_lora
    from finetune.families.example_text import example_conditioning
    from finetune.families.protocol import PictureGeometry
    from finetune.objectives import NoiseLevel

    config = {"_class_name": "HunyuanDiT2DModel", "num_attention_heads": 16, "attention_head_dim": 88, "hidden_size": 1408, "num_layers": 4, "in_channels": 4,
              "patch_size": 2, "sample_size": 128, "mlp_ratio": 4.3637, "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048, "pooled_projection_dim": 1024,
              "text_len": 77, "text_len_t5": 256, "use_style_cond_and_image_meta_size": False}
    dit = family("hunyuan_dit")
    model = build_on_meta("HunyuanDiT2DModel", config)
    inject_lora(model, dit.facts.targets["attention"], 16, seed=0)
    model.to(META)
    dit.prepare(model, 0)
    noisy = torch.empty(1, 4, 32, 32, device=META)
    arguments = (model, noisy, NoiseLevel(torch.tensor([0.5]), torch.tensor([500.0])), [example_conditioning("hunyuan_dit", model.config, META)], [PictureGeometry((256, 256), (256, 256))])
    there = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        forward = trace(lambda: dit.predict(*arguments), there).flops
    step = trace(lambda: dit.predict(*arguments).pow(2).mean().backward(), there).flops
    assert 1.5 < step / forward <= 2.0
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".lora_" not in name)


def test_the_trainable_numbers_are_those_that_training_trains(ground, tiny_base):
    from finetune.adapters.lora import inject_lora, lora_parameters

    base = locate_base(str(tiny_base))
    model = base.family.load(base.folder, frozenset({"transformer"}), torch.float32).transformer
    inject_lora(model, base.family.facts.targets["attention"], 4, seed=0)
    config = json.loads((base.folder / "transformer" / "config.json").read_text())
    counted = adapter_parameters(build_on_meta(config["_class_name"], config), base.family.facts.targets["attention"], AdapterSize(rank=4))
    assert counted == sum(parameter.numel() for _, parameter in lora_parameters(model))


def test_checkpointed_blocks_are_traced_as_they_are_computed():
    dit = family("hunyuan_dit")
    config = {"_class_name": "HunyuanDiT2DModel", "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 10, "in_channels": 4,
              "patch_size": 2, "sample_size": 8, "mlp_ratio": 2.0, "cross_attention_dim": 32, "cross_attention_dim_t5": 24, "pooled_projection_dim": 16,
              "text_len": 77, "text_len_t5": 256, "use_style_cond_and_image_meta_size": False}
    wanted = Traced(dit, "HunyuanDiT2DModel", dit.facts.targets["attention"], AdapterSize(rank=4), 1, (64, 64), checkpointed=False)
    whole, checkpointed = one_step(wanted, config), one_step(replace(wanted, checkpointed=True), config)
    assert checkpointed.peak_bytes < whole.peak_bytes and checkpointed.flops > 1.3 * whole.flops
    cost = step_cost(dit, "HunyuanDiT2DModel", config, dit.facts.targets["attention"], AdapterSize(rank=4), 1, (64, 64), 4)
    assert cost.traced and cost.blocks == 10 and cost.flops == whole.flops
    assert cost.activation_bytes(0) == whole.peak_bytes
    assert cost.activation_bytes(10) == pytest.approx(checkpointed.peak_bytes)


def test_the_heap_is_asked_how_much_of_a_step_it_keeps():
    """Temporary tensors between kept ones leave holes that the next of the same size does not fit in (glibc 2.36)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc's heap")
    size, events = 1 << 20, []
    for _ in range(20):
        kept = len(events)
        events += [size, size, -1 - (kept + 1)]
    grown = heap_growth(events, heap_settings(short=False))
    assert 21 * size <= grown <= 80 * size
    # Where memory is short, nothing is kept that is not alive.
    assert 21 * size <= heap_growth(events, heap_settings(short=True)) <= 23 * size


@pytest.mark.parametrize("every", [0, 5])
def test_the_autoencoder_counts_while_pictures_are_drawn(ground, every):
    """The tests' own is tiny: here as large as real ones are."""
    surveyed, recipe = ground
    recipe = recipe.model_copy(update={"samples": recipe.samples.model_copy(update={"every": every})})
    large = replace(surveyed, surroundings=replace(surveyed.surroundings, vae_parameters=80_000_000))
    plain, made = (estimate(each, recipe, Hold("fp32", torch.float32, ""), 0, 1 << 40, encoded=True) for each in (surveyed, large))
    more = {phase: made.phases_bytes[phase] - plain.phases_bytes[phase] for phase in ("training", "drawing samples", "proof")}
    assert more == {"training": 0, "drawing samples": 4 * (80_000_000 - surveyed.surroundings.vae_parameters), "proof": more["drawing samples"]}
    beside_the_model = made.phases_bytes["drawing samples"] - made.memory_bytes["libraries"] - made.memory_bytes["weights"] - made.memory_bytes["adapter"] - made.memory_bytes["autoencoder"]
    assert (beside_the_model - surveyed.surroundings.decode_bytes >= made.memory_bytes["optimizer"]) is bool(every), "on the way the optimizer is there too"


@pytest.mark.parametrize(("busiest", "encoded", "every", "large"), [
    ("training", False, 0, {}), ("training", True, 5, {}), ("proof", True, 0, {"vae_parameters": 80_000_000, "decode_bytes": 0}),
    ("encoding captions", False, 0, {"text_parameters": 1 << 30}), ("drawing samples", True, 5, {"decode_bytes": 8e9}),
])
def test_the_parts_at_the_peak_add_up_to_it(ground, busiest, encoded, every, large):
    from finetune.cli.plan import _lines

    surveyed, recipe = ground
    recipe = recipe.model_copy(update={"samples": recipe.samples.model_copy(update={"every": every})})
    surveyed = replace(surveyed, surroundings=replace(surveyed.surroundings, later_bytes=65 << 20, **large))
    made = estimate(surveyed, recipe, Hold("fp32", torch.float32, ""), 0, 1 << 40, encoded=encoded)
    assert sum(made.peak_parts_bytes.values()) == made.memory_bytes["peak"] == made.phases_bytes[busiest]
    assert made.phases_bytes["training"] == sum(size for part, size in made.memory_bytes.items() if part not in ("autoencoder", "encoders", "peak"))
    lines = _lines(made)
    shown = lines[lines.index(next(line for line in lines if line.startswith("memory:"))) + 1:]
    parts = [line.split() for line in itertools.takewhile(lambda line: line.startswith("  "), shown)]
    assert sum(float(words[-2]) * {"MiB": 1, "GiB": 1024}[words[-1]] for words in parts) == pytest.approx(made.memory_bytes["peak"] / 2**20, abs=11)


def test_every_checkpointed_block_saves_memory_and_costs_work():
    cost = StepCost(flops=100.0, attention_flops=10.0, moved_bytes=20.0, operations=1, whole_bytes=40, boundary_bytes=1, again_bytes=18, blocks=4, traced=True)
    assert [cost.activation_bytes(number) for number in range(5)] == [40, 31, 22, 21, 22]
    assert cost.work(0) == 100 < cost.work(2) < cost.work(4) == 150


def test_larger_pictures_batches_and_ranks_need_more_and_smaller_weights_less(ground):
    surveyed, recipe = ground
    hold = resolved_hold(recipe, surveyed.device)
    base = estimate(surveyed, recipe, hold, 0, 1 << 40)
    wider = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 4})})
    assert estimate(surveyed, wider, hold, 0, 1 << 40).memory_bytes["activations"] > 1.5 * base.memory_bytes["activations"]
    ranked = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": 32})})
    larger = estimate(surveyed, ranked, hold, 0, 1 << 40)
    assert larger.memory_bytes["optimizer"] == 8 * base.memory_bytes["optimizer"]
    # A checkpoint's files are copies of the adapter and its moments.
    assert larger.memory_bytes["checkpoint"] == larger.memory_bytes["adapter"] + larger.memory_bytes["optimizer"]
    assert larger.phases_bytes["training"] == sum(size for part, size in larger.memory_bytes.items() if part not in ("autoencoder", "encoders", "peak"))
    sizes = [estimate(surveyed, recipe, Hold(name, torch.float32, ""), 0, 1 << 40).memory_bytes["weights"] for name in ("fp32", "bf16", "int8", "nf4")]
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[3]


def test_every_size_of_a_picture_and_every_picture_to_be_drawn_is_on_the_disk_and_in_the_time(ground, tiny_base, pictures):
    surveyed, recipe = ground
    hold = resolved_hold(recipe, surveyed.device)
    several = survey(small_recipe(tiny_base, pictures, data__resolution=[32, 64], data__regularisation_prompt="a disc", data__regularisation_count=10))
    assert (surveyed.to_draw, several.to_draw) == (0, 10)
    # Four squares and two wide pictures at 64 and at 32 pixels, and ten squares at 64.
    assert several.pixels == surveyed.pixels + sum(picture.placement.bucket.height * picture.placement.bucket.width for picture in small_views(tiny_base, pictures)) + 10 * 64 * 64
    assert several.usual_share < 0.7 < surveyed.usual_share
    alone = estimate(surveyed, recipe, hold, 0, 1 << 40)
    several.speed = surveyed.speed
    more = estimate(several, several.recipe, hold, 0, 1 << 40)
    assert more.seconds_per_step < alone.seconds_per_step and more.disk_bytes["cache"] > alone.disk_bytes["cache"]
    assert any("10 regularisation pictures are drawn" in note for note in more.notes)


def small_views(tiny_base, pictures):
    from data_tools.progress import Progress
    from finetune.training.training_set import build_training_set

    facts = locate_base(str(tiny_base)).family.facts
    return [picture for picture in build_training_set(small_recipe(tiny_base, pictures, data__resolution=32), facts, Progress()).pictures]


def test_auto_checkpoints_as_few_blocks_as_fit(ground):
    surveyed, recipe = ground
    hold = resolved_hold(recipe, surveyed.device)
    whole = estimate(surveyed, recipe, hold, 0, 1 << 40).memory_bytes["peak"]
    assert fewest_checkpoints(surveyed, recipe, hold, whole).settings["checkpointed_blocks"] == 0
    two = estimate(surveyed, recipe, hold, 2, 1 << 40).memory_bytes["peak"]
    one = estimate(surveyed, recipe, hold, 1, 1 << 40).memory_bytes["peak"]
    assert two < one
    assert fewest_checkpoints(surveyed, recipe, hold, two).settings["checkpointed_blocks"] == 2


def test_the_library_of_quantised_layers_is_counted_where_it_is_used(ground):
    surveyed, _ = ground
    surveyed = replace(surveyed, quantiser=50 << 20)
    sizes = {name: surveyed.library_bytes(Hold(name, torch.float32, ""), "adamw") - surveyed.surroundings.library_bytes for name in ("fp32", "bf16", "streamed", "int8", "nf4")}
    assert sizes == {"fp32": 0, "bf16": 0, "streamed": 0, "int8": 50 << 20, "nf4": 50 << 20}
    assert surveyed.library_bytes(Hold("fp32", torch.float32, ""), "adamw8bit") > surveyed.surroundings.library_bytes


def test_a_base_that_is_divided_between_processes_is_counted_by_what_each_of_them_holds(ground):
    surveyed, recipe = ground
    hold, model = resolved_hold(recipe, surveyed.device), surveyed.model
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    whole = sum(parameter.numel() for parameter in model.parameters())
    at_once = whole - sum(blocks) + min(2 * max(blocks), sum(blocks))
    alone = estimate(surveyed, recipe, hold, 0, 1 << 40)
    for processes in (2, 8):
        divided = estimate(replace(surveyed, sharding=Sharding(processes, True, False)), recipe, hold, 0, 1 << 40)
        assert divided.memory_bytes["weights"] == pytest.approx(4 * (whole / processes + at_once), abs=1)
        changed = {name for name, size in divided.memory_bytes.items() if size != alone.memory_bytes[name]}
        assert {"weights"} <= changed <= {"weights", "peak"}
        assert any(f"each of {processes} processes" in note for note in divided.notes) and len(divided.notes) == len(alone.notes) + 1
    kept = estimate(replace(surveyed, sharding=Sharding(8, False, False)), recipe, hold, 0, 1 << 40)
    assert kept.memory_bytes["weights"] == pytest.approx(4 * (whole / 8 + whole), abs=1)
    smallest = fitted(replace(surveyed, sharding=Sharding(2, True, False)), recipe, 1)
    assert not smallest.fits and "base.hold" not in {saving.setting for saving in smallest.savings}


def test_the_plan_refuses_to_divide_what_training_refuses_to_divide(tiny_base, pictures):
    with pytest.raises(BadInput, match="cannot be divided"):
        plan(small_recipe(tiny_base, pictures, base__hold="nf4"), processes=2)


def test_a_plan_has_the_keys_that_scripts_read_and_loads_no_weights(tiny_base, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    # Without any weights file the plan must still come.
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    made = plan(small_recipe(bare, pictures))
    assert isinstance(made, Plan)
    data = json.loads(json.dumps(made.as_json()))
    assert set(data) >= {"fits", "memory_bytes", "seconds_per_step", "disk_bytes", "settings", "flops_per_step", "parameters"}
    assert {"weights", "adapter", "gradients", "optimizer", "activations", "encoders", "peak"} <= set(data["memory_bytes"])
    assert data["memory_bytes"]["peak"] >= data["memory_bytes"]["libraries"] and data["seconds_per_step"] > 0


def test_the_truth_stands_beside_the_estimate_after_a_run(tiny_base, pictures, encodings_folder, tmp_path, monkeypatch):
    from finetune.training.run import train

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    result = train(small_recipe(tiny_base, pictures, training__steps=4, training__checkpointed_blocks="auto"), tmp_path / "run", cache_folder=encodings_folder)
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["estimate"]["settings"]["hold"] == "fp32" and written["estimate"]["memory_bytes"]["peak"] > 0
    assert written["truth"]["peak_memory_bytes"] == result.peak_memory_bytes and written["truth"]["seconds_per_step"] > 0
    assert "checkpointed blocks" in result.reasons
    assert Path(result.run) == tmp_path / "run"


def test_a_step_takes_the_time_of_what_it_does():
    cost = StepCost(flops=100.0, attention_flops=20.0, moved_bytes=30.0, operations=0, whole_bytes=0, boundary_bytes=0, again_bytes=0, blocks=4, traced=True)
    quiet = Speed(products=10.0, attention=5.0, byte_seconds=0.1, busy=1.0)
    assert quiet.step_seconds(cost, 0) == 80 / 10 + 20 / 5 + 30 * 0.1
    assert quiet.step_seconds(cost, 4) == 1.5 * quiet.step_seconds(cost, 0)
    # Weights are expanded forward and back, and once more where blocks are computed a second time.
    assert quiet.step_seconds(cost, 0, 6, 0.5) - quiet.step_seconds(cost, 0) == 2 * 6 * 0.5
    assert quiet.step_seconds(cost, 4, 6, 0.5) - quiet.step_seconds(cost, 4) == 3 * 6 * 0.5
    assert replace(quiet, operation_seconds=0.25).step_seconds(replace(cost, operations=8), 0) - quiet.step_seconds(cost, 0) == 2
    # Memory that the heap does not keep is asked for again and again.
    assert replace(quiet, fresh_seconds=0.5).step_seconds(replace(cost, fresh_bytes=8.0), 0) - quiet.step_seconds(cost, 0) == 4
    assert replace(quiet, busy=3.0).step_seconds(cost, 2, 6, 0.5) == 3 * quiet.step_seconds(cost, 2, 6, 0.5)


def test_a_clock_of_processor_time_that_stands_still_now_and_then_is_no_endless_speed(ground, monkeypatch):
    surveyed, _ = ground
    clock = time.process_time
    monkeypatch.setattr(time, "process_time", lambda: clock() // 0.005 * 0.005)
    found = probe_speed(surveyed.base.family.shape(surveyed.config), 64, torch.device("cpu"), torch.float32)
    assert 0 < found.products < 1e14 and 0 < found.attention < 1e14 and found.byte_seconds > 0 and found.operation_seconds > 0


def test_the_machine_is_probed_for_products_and_for_the_weights_that_are_expanded(ground):
    surveyed, _ = ground
    found = probe_speed(surveyed.base.family.shape(surveyed.config), 64, torch.device("cpu"), torch.float32)
    assert 0 <= found.fresh_seconds < 1e-8 and 1e-7 < found.operation_seconds < 1e-3
    assert found.products > 0 and found.attention > 0 and found.byte_seconds > 0 and found.busy >= 1
    seconds = {hold: probe_expansion(Hold(hold, torch.float32, ""), torch.device("cpu")) for hold in ("fp32", "bf16", "int8", "nf4", "streamed")}
    assert seconds.pop("fp32") == 0 and all(0 < value < 1e-6 for value in seconds.values())


def test_what_autocast_adds_to_a_step_is_counted_for_a_gpu():
    """Norms hand on float32 and the factors of a LoRA are float32: a step in 16 bits is not half of one in 32."""
    tiny = dict(num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32, in_channels=16, axes_dims_rope=(16, 24, 24), guidance_embeds=True)
    config = dict(diffusers.FluxTransformer2DModel(**tiny).config)
    flux, attention = family("flux_dev"), torch.nn.functional.scaled_dot_product_attention

    def cost(mixed):
        return step_cost(flux, "FluxTransformer2DModel", config, flux.facts.targets["attention"], AdapterSize(rank=4), 1, (256, 256), 2.0, mixed=mixed)

    halved, mixed = cost(None), cost(torch.bfloat16)
    assert mixed.traced and 1.1 < mixed.whole_bytes / halved.whole_bytes < 2
    assert mixed.again_bytes > halved.again_bytes and mixed.boundary_bytes == halved.boundary_bytes and mixed.flops == halved.flops
    assert torch.nn.functional.scaled_dot_product_attention is attention, "put back"


def test_products_are_cast_as_autocast_casts_them():
    layer, norm, x = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.ones(2, 4, device="meta", dtype=torch.bfloat16)
    for module in (layer, norm):
        module.to("meta")
    with AsAutocast(torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16 and norm(x).dtype == torch.float32
        assert torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4)] * 3).dtype == torch.bfloat16
