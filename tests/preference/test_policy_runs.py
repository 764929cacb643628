"""Whole runs on tiny models: each method moves the reward, near the base, resumes exactly, and is stopped when it cheats."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from data_tools.errors import BadInput
from finetune.adapters import arithmetic, products
from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.exporting import export
from finetune.adapters.lora import inject_lora
from finetune.cli import main
from finetune.errors import Interrupted, RunFolderError, TrainingError
from finetune.families.base_models import locate_base
from finetune.families.key_layouts import KEY_MAPS
from finetune.generation import LoadedAdapter, draw_from_files
from finetune.objectives import LossWeighting
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.candidate_requests import Prompt, parse_variants, prompt_id
from finetune.preference.candidates import CandidateSettings, make_candidates
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.policy.denoiser import Denoiser
from finetune.preference.policy.grpo import GRPO
from finetune.preference.policy.paths import path_for
from finetune.preference.policy import run as run_module
from finetune.preference.policy.run import train_preference
from finetune.preference.policy.settings import build_settings
from finetune.preference.rewards.features import build_features
from finetune.preference.rewards.measures import Measure
from finetune.preference.rewards.preference_head import train_reward
from finetune.preference.rewards.reward_files import load_reward
from finetune.sampling import PictureRequest
from finetune.training.precision import PrecisionChoice
from tests.listening import Listening
from tests.preference.conftest import SIZE
from tests.preference.pictures import rate_all_pairs
from tests.tiny_models.all import TINY
from tests.tiny_models.text_adapters import write_text_adapter
from tests.training.loss_scaling import ScalingAccelerator
from tests.training.small_job import SignallingProgress

ROOT = Path(__file__).parents[2]
WORDS = ("a dog", "a cat", "a red apple", "a tree", "a car")


@pytest.fixture(scope="module")
def rated(bases, tmp_path_factory):
    """Candidates of each base with all pairs judged by warmth."""
    folders = {}
    for name, base in bases.items():
        folders[name] = CandidateFolder(tmp_path_factory.mktemp(f"{name}-candidates"))
        settings = CandidateSettings(per_prompt=3, steps=2, guidance=1.0, height=SIZE[name], width=SIZE[name])
        make_candidates(LoadedBase.named(str(base)), [Prompt(prompt_id(words), words) for words in WORDS], settings, folders[name].root)
        rate_all_pairs(folders[name])
    return folders


def settings_for(bases, rated, name, method, **changes):
    given = {"method": method, "data": str(rated[name].root), "base": str(bases[name]), "reward": "measure:warmth", "steps": 4, "check_every": 2, "learning_rate": 2e-3, "warmup": 1, "rank": 4,
             "sampler_steps": 4, "window": 2, "batch_size": 4, "micro_batch": 6, "prompts_per_round": 2, "group": 3, "check_seeds": 2, "held_out": 0.4, "max_kl": 1e6, "max_drift": 1e6, "beta": 50.0, "kl_weight": 0.01}
    return build_settings(given | changes)


@pytest.fixture(scope="module")
def finished(bases, rated, tmp_path_factory):
    """(name, method, steps) -> folder, result and messages of such a run, made once. To read, and to copy."""

    @functools.cache
    def run(name, method, steps=4):
        out, progress = tmp_path_factory.mktemp(f"{name}-{method}-{steps}") / "run", Listening()
        return out, train_preference(settings_for(bases, rated, name, method, steps=steps), out, progress=progress), progress.said

    return run


@pytest.mark.parametrize(("name", "method"), [("hunyuan_dit", "grpo"), ("hunyuan_dit", "draft"), ("hunyuan_dit", "refl"), ("sd3", "grpo"), ("sd3", "draft")])
def test_each_method_raises_the_reward_and_leaves_a_proven_adapter(finished, name, method):
    run, result, _ = finished(name, method)
    assert result.reward_after > result.reward_before and result.kl > 0 and result.stopped is None
    assert result.verified.changed and result.verified.placed == result.verified.keys and result.verified.restored
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["step"] for row in rows if "kl" in row] == [2, 4]
    assert {"reward", "kl", "diversity", "drift", "out_of_range", "kl_steps"} <= set(rows[-1])
    report = (run / "report.html").read_text()
    assert result.chosen_from == 2 and f"the same prompts, on other seeds, chose step {result.best_step} of 2 checks" in report
    assert "Reward on held-out prompts" in report and "sampler_steps = 4" in report and "Divergence from the base" in report and result.sheet.is_file()
    assert read_adapter(result.adapter).provenance["preference_method"] == method


@pytest.mark.parametrize("name", SIZE)
def test_dpo_learns_which_of_two_was_preferred(bases, rated, tmp_path, name):
    """An untrained model's pictures do not follow its denoising, so what can be asked here is the margin itself."""
    settings = settings_for(bases, rated, name, "dpo", steps=16, check_every=8, batch_size=9, learning_rate=1e-2, beta=2000.0)
    result = train_preference(settings, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert result.kl > 0 and result.verified.changed
    assert sum(row["train_pairs_right"] for row in rows[-8:]) / 8 > 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_ratio_of_a_round_is_exactly_one(bases, precision, monkeypatch):
    """Otherwise the first update would already be clipped or pushed by rounding, dropout or other noise."""
    monkeypatch.setattr("finetune.preference.loaded_base.choose_precision", lambda *_: PrecisionChoice(precision, "asked for"))
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=True)
    for name, base in bases.items():
        loaded = LoadedBase.named(str(base))
        objective = loaded.family.objective(loaded.pipeline, None, LossWeighting())
        inject_lora(loaded.transformer, loaded.family.facts.targets["attention"], 4, seed=0)
        for parameter in loaded.transformer.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        size = SIZE[name]
        denoiser = Denoiser(loaded, objective, path_for(objective, 4, torch.Size((1, *loaded.latent_shape(size, size)))), height=size, width=size, guidance=2.0, seed=0, micro_batch=4)
        method = GRPO(denoiser, Measure("warmth"), WORDS, build_settings({"method": "grpo", "data": "d", "base": "b", "reward": "r", "sampler_steps": 4, "window": 2, "group": 2, "prompts_per_round": 2, "kl_weight": 0.0, "micro_batch": 4}))
        update = next(method.updates(0))
        found: dict[int, set[float]] = {}
        for batch in update.micro_batches:
            with accelerator.autocast():
                losses = update.losses(batch).tolist()
            for transition, loss in zip(batch, losses, strict=True):
                found.setdefault(transition.sample, set()).add(loss)
        # At a ratio of 1 the loss of a transition is the picture's advantage, at every step of the window.
        assert len(found) == 4 and all(len(losses) == 1 for losses in found.values()), name
        assert method.numbers()["clipped"] == 0


def test_a_run_with_a_scaled_loss_learns_and_resumes_as_any_other(bases, rated, tmp_path, monkeypatch):
    """On a GPU without bf16. Four steps: a scaler that is not told of the first refuses the second."""
    monkeypatch.setattr("accelerate.Accelerator", ScalingAccelerator)
    settings = settings_for(bases, rated, "hunyuan_dit", "draft")
    whole = train_preference(settings, tmp_path / "whole")
    assert whole.verified.changed
    train_preference(settings.model_copy(update={"steps": 2}), tmp_path / "broken")
    (tmp_path / "broken" / "result.json").unlink()
    state = json.loads((tmp_path / "broken" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["scaler"]["scale"] > 0
    assert _tensors(train_preference(settings, tmp_path / "broken", resume=True).adapter) == _tensors(whole.adapter)


@pytest.mark.parametrize("method", ["dpo", "grpo", "draft"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(bases, rated, finished, tmp_path, method):
    unbroken, whole, _ = finished("hunyuan_dit", method)
    shutil.copytree(finished("hunyuan_dit", method, steps=2)[0], tmp_path / "broken")
    (tmp_path / "broken" / "result.json").unlink()
    resumed = train_preference(settings_for(bases, rated, "hunyuan_dit", method), tmp_path / "broken", resume=True)
    assert resumed.resumed_from == 2
    assert resumed.adapter.read_bytes() != b"" and _tensors(resumed.adapter) == _tensors(whole.adapter)
    timeless = [[{name: value for name, value in json.loads(line).items() if name not in ("seconds", "peak_memory_bytes")} for line in (run / "log.jsonl").read_text().splitlines()] for run in (unbroken, tmp_path / "broken")]
    assert timeless[0] == timeless[1]


def _tensors(path):
    return {name: tensor.numpy().tobytes() for name, tensor in read_adapter(path).tensors.items()}


def test_other_settings_are_refused_on_resume_and_a_run_is_not_overwritten(bases, rated, finished, tmp_path):
    settings = settings_for(bases, rated, "hunyuan_dit", "draft", steps=2)
    shutil.copytree(finished("hunyuan_dit", "draft", steps=2)[0], tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds a run"):
        train_preference(settings, tmp_path / "run")
    with pytest.raises(RunFolderError, match="kl_weight"):
        train_preference(settings.model_copy(update={"kl_weight": 9.0}), tmp_path / "run", resume=True)


def test_a_start_or_a_reward_that_holds_something_else_than_before_is_refused_on_resume(bases, rated, tmp_path):
    """Their paths are the same; what was learned would be continued against another reference, or another judge."""
    first = train_preference(settings_for(bases, rated, "hunyuan_dit", "draft", steps=2), tmp_path / "first")
    start, part, whole = tmp_path / "start.safetensors", tmp_path / "part.json", tmp_path / "sum.json"
    start.write_bytes(first.adapter.read_bytes())
    part.write_text('{"v": 1, "kind": "measure", "measure": "warmth"}')
    whole.write_text('{"v": 1, "kind": "sum", "parts": [{"weight": 1.0, "reward": "part.json"}, {"weight": 0.5, "reward": "measure:contrast"}]}')
    settings = settings_for(bases, rated, "hunyuan_dit", "draft", steps=2, start=str(start), reward=f"1*{whole}+1*measure:warmth", witness=str(part))
    train_preference(settings, tmp_path / "run")
    more = settings.model_copy(update={"steps": 4})
    write_adapter(start, arithmetic.rescale(read_adapter(start), 0.5))
    with pytest.raises(RunFolderError, match=f"other contents of start {start}\n"):
        train_preference(more, tmp_path / "run", resume=True)
    start.write_bytes(first.adapter.read_bytes())
    part.write_text('{"v": 1, "kind": "measure", "measure": "contrast"}')
    with pytest.raises(RunFolderError, match="other contents of reward .*; witness "):
        train_preference(more, tmp_path / "run", resume=True)
    part.write_text('{"v": 1, "kind": "measure", "measure": "warmth"}')
    assert train_preference(more, tmp_path / "run", resume=True).resumed_from == 2
    start.unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        train_preference(more, tmp_path / "run", resume=True)


def test_several_processes_are_refused_before_anything_is_written(bases, rated, tmp_path, monkeypatch):
    """Under `accelerate launch`; a run would otherwise be written twice over."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="one process, not in 2"):
        train_preference(settings_for(bases, rated, "hunyuan_dit", "draft", steps=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_guard_stops_a_wrecking_run_and_keeps_the_last_healthy_adapter(bases, rated, tmp_path):
    settings = settings_for(bases, rated, "hunyuan_dit", "draft", kl_weight=0.0, learning_rate=0.05, steps=60, check_every=1, max_kl=5.0)
    try:
        result = train_preference(settings, tmp_path / "run")
    except TrainingError as error:
        assert "no check was healthy" in error.what
        return
    assert result.stopped and result.steps < 60 and result.kl <= 5.0 and result.best_step < result.steps


def test_a_starting_adapter_is_part_of_the_reference_and_of_the_result(bases, rated, finished, tmp_path):
    _, first, _ = finished("hunyuan_dit", "draft", steps=2)
    # Under the names of Tencent's own code, as a file from elsewhere would come.
    foreign = export(read_adapter(first.adapter), "tencent", tmp_path / "foreign", KEY_MAPS["hunyuan_dit"]).path
    second = train_preference(settings_for(bases, rated, "hunyuan_dit", "draft", steps=2, start=str(foreign)), tmp_path / "second")
    assert set(read_adapter(second.adapter).ranks.values()) == {8}
    check = json.loads((tmp_path / "second" / "result.json").read_text())["checks"][0]
    assert check["kl"] == 0


def test_a_starting_adapter_that_trains_text_encoders_is_used_whole_and_kept_whole(bases, tmp_path):
    """Candidates are drawn as generate draws them; what is learned is learned behind the encoders as trained; both reach the file."""
    base, words = locate_base(str(bases["sd3"])), ("a dog", "a cat")
    start = write_text_adapter(TINY["sd3"].build(), base.family, tmp_path / "start")
    rated, settings = CandidateFolder(tmp_path / "candidates"), CandidateSettings(2, 0, parse_variants([str(start), "base"]), 2, 1.0, 32, 32)
    report = make_candidates(LoadedBase(base), [Prompt(prompt_id(text), text) for text in words], settings, rated.root)
    loaded = {"start": LoadedAdapter(read_adapter(start, KEY_MAPS), start)}
    requests = [PictureRequest(text, seed, 32, 32, 2, 1.0) for text in words for seed in (0, 1)]
    wanted = [drawn.image.tobytes() for drawn in draw_from_files(base, loaded, [{"start": 1.0}, {}], requests)]
    assert [Image.open(rated.picture(candidate)).tobytes() for candidate in report.candidates] == wanted and len(set(wanted)) == 8
    rate_all_pairs(rated)
    changes = {"steps": 2, "start": str(start), "max_kl": 1e9, "max_drift": 1e9}
    result = train_preference(settings_for(bases, {"sd3": rated}, "sd3", "draft", **changes), tmp_path / "run")
    learned, kept = read_adapter(result.adapter, KEY_MAPS), loaded["start"].file.text_encoders
    assert result.verified.changed and {slot: set(part) for slot, part in learned.text_encoders.items()} == {slot: set(part) for slot, part in kept.items()}
    assert all(torch.equal(value, learned.text_encoders[slot][key]) for slot, part in kept.items() for key, value in part.items())
    assert json.loads((tmp_path / "run" / "result.json").read_text())["checks"][0]["kl"] == 0


def test_a_signal_while_a_step_is_saved_stops_after_the_next_which_is_saved_too(bases, rated, tmp_path):
    """Progress is reported when the step is saved or not to be saved: a signal that comes then finds its step past saving."""
    run, settings = tmp_path / "run", settings_for(bases, rated, "hunyuan_dit", "draft", check_every=4)
    with pytest.raises(Interrupted, match="stopped at step 2 of 4; everything is saved") as stopped:
        train_preference(settings, run, progress=SignallingProgress(1, signal.SIGINT, phase="draft"))
    assert stopped.value.exit_code == 130 and "--resume" in stopped.value.fix
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000002"]
    whole, resumed = train_preference(settings, tmp_path / "whole"), train_preference(settings, run, resume=True)
    assert resumed.resumed_from == 2 and _tensors(resumed.adapter) == _tensors(whole.adapter)


def test_ctrl_c_saves_and_tells_of_resume(bases, rated, tmp_path):
    command = [sys.executable, "-m", "finetune", "prefer", "train", "--data", str(rated["hunyuan_dit"].root), "--method", "draft", "--reward", "measure:warmth", "--out", str(tmp_path / "run"),
               "--steps", "100000", "--set", "sampler_steps=4", "--set", "window=2", "--set", "check_seeds=2", "--set", "max_kl=1e9", "--set", "max_drift=1e9", "--set", "rank=2", "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, give_up = tmp_path / "run" / "log.jsonl", time.monotonic() + 600
    while process.poll() is None and not (log.exists() and log.stat().st_size) and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "--resume" in json.loads(out)["error"]["fix"]
    assert any((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))


def test_rewards_on_latents_and_hidden_states_learn_and_reload(bases, rated, tmp_path):
    for kind in ("latents", "dit"):
        base = LoadedBase.named(str(bases["hunyuan_dit"]))
        report = train_reward(rated["hunyuan_dit"], build_features(kind, base=base), tmp_path / f"{kind}.safetensors")
        pixels = torch.rand(2, 3, 32, 32).requires_grad_()
        scores = load_reward(report.file, base).score(pixels, ["a dog", "a cat"])
        scores.sum().backward()
        assert report.pairs == 15 and pixels.grad.abs().sum() > 0
        assert torch.allclose(load_reward(report.file).score(pixels.detach(), ["a dog", "a cat"]), scores.detach(), atol=1e-4)


@pytest.mark.parametrize("kind", ["pixels", "dit"])
def test_the_trained_model_is_gone_before_a_fresh_one_is_loaded(bases, rated, tmp_path, monkeypatch, kind):
    """Also where the reward looks at hidden states of the base, which are then the fresh one's."""
    reward = train_reward(rated["hunyuan_dit"], build_features(kind, base=LoadedBase.named(str(bases["hunyuan_dit"]))), tmp_path / "reward.safetensors").file
    trained, prepare, finish, alive = [], run_module._prepare, run_module.finish, []

    def prepared(*arguments):
        job = prepare(*arguments)
        trained.append(weakref.ref(job.loaded.transformer))
        return job

    monkeypatch.setattr(run_module, "_prepare", prepared)
    monkeypatch.setattr(run_module, "finish", lambda *arguments: alive.append(trained[0]() is not None) or finish(*arguments))
    result = train_preference(settings_for(bases, rated, "hunyuan_dit", "grpo", steps=2, reward=str(reward)), tmp_path / "run")
    assert alive == [False] and result.reward_before is not None


def test_generate_draws_with_the_adapter_of_a_preference_run(bases, finished, tmp_path, capfd):
    run, _, _ = finished("hunyuan_dit", "draft", steps=2)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--base", str(bases["hunyuan_dit"]), "--adapter", str(run / "adapter"), "--prompt", "a dog", "--best-of", "3", "--reward", "measure:warmth",
              "--steps", "2", "--size", "32x32", "--out", str(tmp_path / "pictures"), "--json"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, out + err
    [picture] = [one for one in json.loads(out)["pictures"] if Path(one["path"]).is_file()][:1]
    assert isinstance(picture["score"], float)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_frozen_layers_of_a_policy_take_the_faster_products(bases, rated, tmp_path, monkeypatch):
    """As on a processor that has them, with layers of a real size."""
    frozen, taken, inject, suits = set(), set(), run_module._inject, products._by_onednn

    def injected(*arguments):
        model = inject(*arguments)
        frozen.update(layer.weight.data_ptr() for name, layer in model.transformer.named_modules() if ".ff." in name and isinstance(layer, torch.nn.Linear))
        return model

    def noted(x, weight):
        is_taken = suits(x, weight)
        taken.update({weight.data_ptr()} if is_taken else ())
        return is_taken

    for name, value in {"onednn_is_faster": lambda: True, "LEAST_ROWS": 1, "LEAST_NUMBERS": 1, "_by_onednn": noted}.items():
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(run_module, "_inject", injected)
    train_preference(settings_for(bases, rated, "hunyuan_dit", "draft", steps=1, check_every=1), tmp_path / "run")
    assert frozen and frozen <= taken


def test_a_run_says_what_it_does(finished):
    _, _, said = finished("hunyuan_dit", "draft", steps=2)
    assert any("held out" in text for text in said)
