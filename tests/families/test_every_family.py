"""The acceptance of a family: it predicts what its own pipeline predicts, trains what it says, and draws from the cache."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch

from finetune import sampling
from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.attach import attach, bake, detach
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.errors import BaseModelError
from finetune.families import image_encoding, registry
from finetune.families.targets import keeps_full_precision, resolve_targets
from finetune.objectives import LossWeighting
from tests.families.battery import NEVER_TRAINED, PROMPTS, Specimen, close, stock_pipeline
from tests.tiny_models.all import TINY


@pytest.fixture(scope="module", params=list(TINY))
def specimen(request, tmp_path_factory) -> Specimen:
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def test_every_registered_family_has_a_tiny_pipeline():
    assert set(registry.names()) == set(TINY)


def test_the_folder_names_its_family(specimen):
    assert registry.family_of(specimen.folder) is specimen.family
    assert specimen.family.facts.name == specimen.name


def test_cached_text_predicts_what_the_pipeline_predicts_live(specimen):
    pipeline = stock_pipeline(specimen, specimen.tiny)
    for index in range(len(PROMPTS)):
        step = specimen.recorded_step(pipeline, index)
        found = specimen.predict(specimen.drawer.transformer, step.sample, torch.tensor([step.timestep]), [specimen.conditionings[index]])
        assert found.dtype == torch.float32 and found.shape == step.sample.shape
        assert close(found.detach(), step.output), (found - step.output).abs().max()


def test_a_batch_predicts_what_each_picture_predicts_alone(specimen):
    noisy, timestep = specimen.noisy()
    with torch.no_grad():
        together = specimen.predict(specimen.drawer.transformer, noisy, timestep, specimen.conditionings)
        alone = [specimen.predict(specimen.drawer.transformer, noisy[i : i + 1], timestep[i : i + 1], [specimen.conditionings[i]]) for i in range(2)]
    assert close(together, torch.cat(alone), 2e-6)


def test_a_caption_is_encoded_the_same_whatever_is_beside_it(specimen):
    prompts = [PROMPTS[1]]
    alone = specimen.family.encode_prompts(specimen.text, prompts)[0]
    assert prompts == [PROMPTS[1]]  # the caller's list is not written to
    for name, tensor in specimen.conditionings[1].tensors.items():
        assert torch.equal(tensor, alone.tensors[name]), name
        assert not tensor.requires_grad and tensor.device.type == "cpu"


def test_pictures_are_encoded_the_same_whatever_is_beside_them(specimen):
    height, width = specimen.tiny.picture
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = specimen.family.encode_images(specimen.drawer, pixels)
    alone = specimen.family.encode_images(specimen.drawer, pixels[1:])
    assert together.mean.shape == together.std.shape == (2, *specimen.latent_shape)
    assert together.mean.dtype == torch.float32 and (together.std >= 0).all()
    assert close(together.mean[1:], alone.mean, 1e-5) and close(together.std[1:], alone.std, 1e-5)


def test_large_pictures_are_encoded_in_tiles_that_make_the_whole_again(specimen, monkeypatch):
    family, vae = specimen.family, specimen.drawer.vae
    factor = specimen.tiny.picture[0] // specimen.latent_shape[1] // (2 if specimen.name.startswith("flux2") else 1)
    edge = max(128, 8 * factor)
    tile, stride = edge // 2, edge // 8 * 3
    blocks = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = torch.nn.functional.interpolate(blocks, edge)
    whole = family.encode_images(specimen.drawer, pixels).mean
    for place, divisor in (("sample", 1), ("latent", factor)):
        for what, size in (("min_size", tile), ("min_height", tile), ("min_width", tile), ("stride_height", stride), ("stride_width", stride)):
            if hasattr(vae, f"tile_{place}_{what}"):
                monkeypatch.setattr(vae, f"tile_{place}_{what}", size // divisor)
    monkeypatch.setattr(image_encoding, "TILED_ABOVE", edge**2 - 1)
    seen, watch = [], vae.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    tiles = family.encode_images(specimen.drawer, pixels).mean
    watch.remove()
    assert len(seen) == 9 and max(seen) == tile and not vae.use_tiling
    assert tiles.shape == whole.shape and torch.nn.functional.cosine_similarity(tiles.flatten(), whole.flatten(), dim=0) > 0.5  # tiles are normalised apart


def loss_of(specimen, model):
    noisy, timestep = specimen.noisy()
    return specimen.predict(model, noisy, timestep, specimen.conditionings).square().mean()


def counted(kept, tensor):
    """Adds the bytes that autograd keeps of a tensor to the last of `kept`."""
    kept[-1] += tensor.nbytes
    return tensor


def test_lora_on_every_preset_gets_gradients_and_checkpointing_does_not_change_them(specimen):
    for preset, targets in specimen.family.facts.targets.items():
        if preset == "self_attention":
            continue
        model = specimen.fresh_transformer()
        names = inject_lora(model, targets, rank=2, seed=0)
        parameters = dict(lora_parameters(model))
        for name, parameter in parameters.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        found, kept = [], []
        for checkpointed in (0, 1, 99) if preset == "attention" else (0,):
            model.zero_grad()
            specimen.family.prepare(model, checkpointed)
            kept.append(0)
            with torch.autograd.graph.saved_tensors_hooks(partial(counted, kept), lambda tensor: tensor):
                loss = loss_of(specimen, model)
            loss.backward()
            found.append({name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()})
        assert sorted(set(kept), reverse=True) == kept, "a checkpointed block keeps its activations"
        assert len(names) == len(set(names)) > 0
        assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
        excused = re.compile(NEVER_TRAINED.get(specimen.name, "(?!)"))
        for name, gradient in found[0].items():
            if gradient is None or not gradient.any():
                assert excused.match(name) or ".experts." in name, f"{name} gets no gradient"
                continue
            for other in found[1:]:
                assert torch.equal(gradient, other[name]), f"checkpointing changes the gradient of {name}"


def test_attention_with_feed_forward_trains_more_than_attention(specimen):
    targets = specimen.family.facts.targets
    names = [name for name, module in specimen.drawer.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    counts = {preset: sum(bool(re.fullmatch(expression, name)) for name in names) for preset, expression in targets.items()}
    assert counts["attention"] > 0
    assert "attention_ff" not in counts or counts["attention_ff"] > counts["attention"]
    assert not any("refiner_blocks" in name for name in names if re.fullmatch(targets["attention"], name))


def test_every_preset_can_be_narrowed_to_a_range_of_blocks(specimen):
    names = [name for name, module in specimen.drawer.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for preset, expression in specimen.family.facts.targets.items():
        whole = {name for name in names if re.fullmatch(expression, name)}
        first, all_of_them = (
            {name for name in names if re.fullmatch(resolve_targets(specimen.family.facts, f"{preset}[{numbers}]"), name)} for numbers in ("0-0", "0-99"))
        assert first and all_of_them == whole
        assert first == {name for name in whole if re.search(r"\.(\d+)\.", name)[1] == "0"}, preset


def test_what_must_not_be_quantised_is_there_and_leaves_the_targets_alone(specimen):
    model, facts = specimen.drawer.transformer, specimen.family.facts
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for entry in facts.never_quantise:
        assert any(fnmatchcase(name, entry) for name in names), f"{facts.name} has no {entry}"
    assert not [name for name in names if re.fullmatch(facts.targets["attention"], name) and keeps_full_precision(facts, name)]


def test_training_predicts_what_drawing_predicts(specimen):
    model = specimen.fresh_transformer()
    noisy, timestep = specimen.noisy()
    with torch.no_grad():
        drawing = specimen.predict(model.eval(), noisy, timestep, specimen.conditionings)
        specimen.family.prepare(model, 0)
        assert model.training
        training = specimen.predict(model, noisy, timestep, specimen.conditionings)
    assert close(training, drawing)


def test_an_adapter_trains_saves_loads_back_bakes_and_detaches(specimen, tmp_path):
    model = specimen.fresh_transformer()
    noisy, timestep = specimen.noisy()
    with torch.no_grad():
        before = specimen.predict(model, noisy, timestep, specimen.conditionings)
    inject_lora(model, specimen.family.facts.targets["attention"], rank=4, alpha=8, seed=0)
    specimen.family.prepare(model, 0)
    optimizer = torch.optim.AdamW([p for _, p in lora_parameters(model)], lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss_of(specimen, model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        trained = specimen.predict(model, noisy, timestep, specimen.conditionings)
    file = write_adapter(tmp_path / "pytorch_lora_weights.safetensors", collect_lora(model))
    fresh = specimen.fresh_transformer().eval()
    with torch.no_grad():
        attach(fresh, read_adapter(file), "style")
        assert close(specimen.predict(fresh, noisy, timestep, specimen.conditionings), trained, 1e-6)
        detach(fresh)
        assert torch.equal(specimen.predict(fresh, noisy, timestep, specimen.conditionings), before)
        attach(fresh, read_adapter(file), "style")
        bake(fresh)
        assert close(specimen.predict(fresh, noisy, timestep, specimen.conditionings), trained, 2e-6)
    check_own_loader(specimen, tmp_path, noisy, timestep, trained)


def check_own_loader(specimen, folder, noisy, timestep, trained):
    """The file also loads by the pipeline's own loader where it has one."""
    pipeline = specimen.family.load(specimen.folder, frozenset({"transformer"}), torch.float32)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    elif hasattr(pipeline.transformer, "load_lora_adapter"):
        pipeline.transformer.load_lora_adapter(str(folder), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    else:
        assert specimen.name in ("hunyuan_dit", "pixart_sigma")
        return
    with torch.no_grad():
        assert close(specimen.predict(pipeline.transformer, noisy, timestep, specimen.conditionings), trained, 1e-6)


def test_pictures_are_drawn_without_encoders_and_independent_of_the_batch(specimen):
    assert all(value is None for slot, value in specimen.drawer.components.items() if slot.startswith(("text_encoder", "tokenizer")))
    height, width = specimen.tiny.picture
    requests = [sampling.PictureRequest(prompt, seed, height, width, steps=2, guidance=3.0) for seed, prompt in enumerate(PROMPTS)]
    encoded = dict(zip((*PROMPTS, ""), (*specimen.conditionings, specimen.empty), strict=True))
    together = sampling.draw(specimen.family, specimen.drawer, requests, encoded, output_type="pt")
    alone = sampling.draw(specimen.family, specimen.drawer, requests[1:], encoded, output_type="pt")
    assert together[1].shape == (3, height, width)
    assert (together[1] - alone[0]).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 1e-3
    picture = sampling.draw(specimen.family, specimen.drawer, requests[:1], encoded)[0]
    assert picture.size == (width, height)
    high = sampling.PictureRequest(PROMPTS[0], 0, width, height, steps=2, guidance=1.0)
    assert sampling.draw(specimen.family, specimen.drawer, [high], encoded)[0].size == (height, width)


def test_guidance_reaches_the_pipeline(specimen):
    height, width = specimen.tiny.picture
    encoded = dict(zip((*PROMPTS, ""), (*specimen.conditionings, specimen.empty), strict=True))
    drawn = [sampling.draw(specimen.family, specimen.drawer, [sampling.PictureRequest(PROMPTS[1], 0, height, width, steps=2, guidance=g)], encoded,
                           output_type="pt")[0] for g in (1.0, 6.0)]
    if specimen.name == "flux_schnell":  # has none
        assert torch.equal(*drawn)
    else:
        assert (drawn[0] - drawn[1]).abs().max() > 1e-5


def test_only_the_wanted_parts_are_loaded(specimen):
    assert specimen.text.transformer is None and specimen.text.vae is None
    assert specimen.text.scheduler is not None
    only = specimen.family.load(specimen.folder, frozenset({"transformer"}), torch.bfloat16)
    assert only.vae is None and not any(p.requires_grad for p in only.transformer.parameters())
    assert torch.bfloat16 in {p.dtype for p in only.transformer.parameters()}


def test_a_bfloat16_model_predicts_with_float32_timesteps(specimen):
    model = specimen.family.load(specimen.folder, frozenset({"transformer"}), torch.bfloat16).transformer
    noisy, timestep = specimen.noisy()
    with torch.no_grad():
        rough = specimen.predict(model, noisy, timestep, specimen.conditionings)
        exact = specimen.predict(specimen.drawer.transformer, noisy, timestep, specimen.conditionings)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.2 * exact.abs().mean()


def test_the_shape_is_told_from_the_configuration_alone(specimen):
    shape = specimen.family.shape(dict(specimen.drawer.transformer.config))
    assert shape.parameters == sum(p.numel() for p in specimen.drawer.transformer.parameters())
    assert shape.latent_channels == specimen.latent_shape[0]
    assert sum(shape.blocks.values()) > 0 and shape.hidden_size % shape.heads == 0


def test_noise_levels_come_from_the_bases_own_scheduler(specimen):
    objective = specimen.family.objective(specimen.drawer, None, LossWeighting())
    levels = objective.level(torch.tensor([0.01, 0.3, 0.7, 0.99]), torch.zeros(4, *specimen.latent_shape))
    assert (levels.timestep.diff() > 0).all() and 0 <= levels.timestep.min() and levels.timestep.max() <= 1000


def test_long_prompts_are_counted(specimen):
    for tokens, limit in specimen.family.token_counts(specimen.text, "word " * 700).values():
        assert tokens > limit
    assert all(tokens <= limit for tokens, limit in specimen.family.token_counts(specimen.text, "a cat").values())


def test_thinking_tokens_have_a_place_among_the_text_states(specimen):
    stream = specimen.family.facts.text_stream
    if stream is not None:
        tensors = specimen.conditionings[0].tensors
        assert tensors[stream.states].ndim == 2
        assert stream.mask is None or tensors[stream.mask].shape == tensors[stream.states].shape[:1]


def test_a_base_saved_with_an_adapter_attached_is_refused(specimen, tmp_path):
    from diffusers import ModelMixin

    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets["attention"], rank=2, seed=0)
    ModelMixin.save_pretrained(model, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_bytes((specimen.folder / "model_index.json").read_bytes())
    for slot in ("scheduler", "vae", "guider", "ocr_guider"):
        if (specimen.folder / slot).is_dir():
            (tmp_path / slot).symlink_to(specimen.folder / slot)
    with pytest.raises(BaseModelError, match="saved with an adapter attached"):
        specimen.family.load(tmp_path, frozenset({"transformer"}), torch.float32)
