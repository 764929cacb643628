"""Rewards: what a head learns from comparisons, what it says of itself, and its files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import BadInput, BrushworkError, DataError
from finetune.preference.best_of import gain_over_one, rank_pictures
from finetune.preference.pairs import Pair, preference_pairs
from finetune.preference.rewards import fitting, references
from finetune.preference.rewards.features import PixelFeatures, build_features
from finetune.preference.rewards.fitting import calibration_error, fit_head
from finetune.preference.rewards.measures import PLAIN, Measure, gram, warmth
from finetune.preference.rewards.preference_head import pixels_of, train_reward
from finetune.preference.rewards.references import KINDS, MEASURES, check_reward
from finetune.preference.rewards.reward_files import BUILDERS, load_reward, witness_of
from tests.preference.pictures import colour_folder, rate_all_pairs


def simulated(prompts, per_prompt, mistakes, dimensions=12, seed=0):
    """Features with a hidden linear truth, and pairs labelled by it with mistakes."""
    chance = np.random.default_rng(seed)
    truth = chance.normal(size=dimensions)
    features = {f"{p}-{n}": chance.normal(size=dimensions) for p in range(prompts) for n in range(per_prompt)}
    pairs = []
    for p in range(prompts):
        for one in range(per_prompt):
            for other in range(one):
                a, b = f"{p}-{one}", f"{p}-{other}"
                better, worse = (a, b) if (features[a] - features[b]) @ truth > 0 else (b, a)
                if chance.random() < mistakes:
                    better, worse = worse, better
                pairs.append(Pair(better, worse, f"p{p}", "", "r"))
    return features, pairs, truth


def test_a_head_finds_the_truth_behind_wrong_answers():
    features, pairs, truth = simulated(30, 5, mistakes=0.15)
    head = fit_head(features, pairs)
    fresh = np.random.default_rng(9).normal(size=(2, 500, 12))
    right = (head.score(fresh[0]) > head.score(fresh[1])) == (fresh[0] @ truth > fresh[1] @ truth)
    assert right.mean() > 0.93
    assert 0.75 < head.held_out.accuracy < 0.92 and head.held_out.low < head.held_out.accuracy < head.held_out.high
    assert head.held_out.calibration_error < 0.15


def test_accuracy_is_measured_on_prompts_that_were_not_learned():
    """Pure noise: many features could explain the pairs they were fitted on; unseen prompts say chance."""
    features, pairs, _ = simulated(20, 4, mistakes=0.5, dimensions=60)
    held = fit_head(features, pairs).held_out
    assert held.low < 0.5 < held.high


def test_no_split_looks_at_pictures_of_the_prompts_it_is_tested_on(monkeypatch):
    """The directions were taken from all pictures, which made held-out prompts look easier than new ones."""
    looked_at, whole = [], fitting.fit_projection

    def noted(matrix, prompts, pairs):
        looked_at.append(set(prompts))
        return whole(matrix, prompts, pairs)

    monkeypatch.setattr(fitting, "fit_projection", noted)
    features, pairs, _ = simulated(12, 3, mistakes=0.1)
    everything = {pair.prompt_id for pair in pairs}
    fit_head(features, pairs)
    held_out = [everything - seen for seen in looked_at[:-1]]
    assert looked_at[-1] == everything and all(held_out)
    assert sorted(prompt for held in held_out for prompt in held) == sorted(everything)


def test_pictures_that_do_not_differ_are_no_stumbling_block():
    features, pairs, _ = simulated(3, 4, mistakes=0.0)
    alike = {name: row if name.startswith("0") else np.ones(12) for name, row in features.items()}
    assert 0 <= fit_head(alike, pairs).held_out.accuracy <= 1


def share_covered(draw, prompts, truth, tried=200):
    random, held = np.random.default_rng(3), 0
    for number in range(tried):
        interval = fitting.prompt_interval(draw(random, prompts, truth).ravel().astype(float), [f"p{prompt}" for prompt in range(prompts) for _ in range(6)], number, 1000)
        held += interval is not None and interval[0] - 1e-9 <= truth <= interval[1] + 1e-9
    return held / tried


@pytest.mark.parametrize("prompts", [5, 8, 20])
def test_the_interval_of_an_accuracy_holds_it_though_pairs_of_a_prompt_stand_and_fall_together(prompts):
    """With all prompts right it took each pair for a case of its own, and held the truth 68, 56 and 87 times in 100."""
    together = lambda random, count, truth: np.repeat(random.random((count, 1)) < truth, 6, axis=1)  # noqa: E731
    for truth in (0.8, 0.9):
        assert share_covered(together, prompts, truth) > 0.93


def test_few_prompts_have_an_accuracy_but_no_interval(tmp_path):
    """Wilson's, with each pair a case of its own, held the truth 42 times in 100 where the pairs of 4 prompts stand or fall together."""
    folder = colour_folder(tmp_path, prompts=4, per_prompt=4)
    rate_all_pairs(folder)
    report = train_reward(folder, PixelFeatures(), tmp_path / "reward.safetensors")
    assert 0 < report.accuracy <= 1 and report.accuracy_interval is None
    assert any("4 prompts are too few" in warning for warning in report.warnings)


def test_too_few_pairs_are_an_error_that_says_how_many():
    features, pairs, _ = simulated(1, 4, 0.0)
    with pytest.raises(DataError, match="1 prompts"):
        fit_head(features, pairs)


def test_calibration_error_of_known_statements():
    assert calibration_error(np.array([20.0] * 10)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.array([20.0] * 5 + [-20.0] * 5)) == pytest.approx(0.5, abs=1e-6)


def test_a_reward_is_written_under_the_name_that_is_reported(tmp_path):
    """`--out judge.v2` was reported and judge.safetensors was written, over an earlier judge."""
    folder = colour_folder(tmp_path / "folder", prompts=4, per_prompt=4)
    rate_all_pairs(folder)
    for name in ("judge.v2", "picture.png"):
        with pytest.raises(BadInput, match="is a .safetensors file"):
            train_reward(folder, PixelFeatures(), tmp_path / name)
    assert train_reward(folder, PixelFeatures(), tmp_path / "judge").file == tmp_path / "judge.safetensors"
    assert (tmp_path / "judge.safetensors").is_file()


def test_the_whole_way_from_ratings_to_a_reward_file(tmp_path):
    folder = colour_folder(tmp_path, prompts=12, per_prompt=4)
    rate_all_pairs(folder, mistakes=0.1)
    report = train_reward(folder, PixelFeatures(), tmp_path / "reward.safetensors")
    assert report.pairs == 72 and report.accuracy > 0.75 and report.accuracy_interval[0] < report.accuracy < report.accuracy_interval[1]
    assert any("few" in warning for warning in report.warnings)
    for name in ("reward.safetensors", "reward.json"):
        reward = load_reward(tmp_path / name)
        warm, cold = torch.zeros(2, 3, 16, 16).unbind()
        warm[0], cold[2] = 0.8, 0.8
        scores = reward.score(torch.stack([warm, cold]), ["x", "x"])
        assert scores[0] > scores[1]
    assert witness_of(tmp_path / "reward.json") is not None
    described = json.loads((tmp_path / "reward.json").read_text())
    assert described["features"] == {"kind": "pixels"} and described["report"]["pairs"] == 72


def test_the_same_ratings_give_the_same_bytes_and_the_file_scores_as_the_head_did(tmp_path):
    folder = colour_folder(tmp_path, prompts=6, per_prompt=4)
    rate_all_pairs(folder, mistakes=0.1)
    for name in ("one", "other"):
        train_reward(folder, PixelFeatures(), tmp_path / name / "reward.safetensors")
    assert (tmp_path / "one/reward.safetensors").read_bytes() == (tmp_path / "other/reward.safetensors").read_bytes()
    first = load_reward(tmp_path / "one/reward.json")
    features = {item: PixelFeatures().extract(pixels_of([Image.open(folder.picture(item))]), [""])[0].numpy() for item in sorted(folder.candidates())}
    head = fit_head(features, preference_pairs(folder.judgements(), ties=True))
    scores = [float(first.score(pixels_of([Image.open(folder.picture(item))]), [""])[0]) for item in features]
    assert scores == pytest.approx(head.score(np.stack(list(features.values()))), rel=1e-4, abs=1e-4)


def test_a_reward_that_only_learned_brightness_says_so(tmp_path):
    folder = colour_folder(tmp_path, prompts=12, per_prompt=4)

    def brightness(folder, item):
        with Image.open(folder.picture(item)) as image:
            return float(np.asarray(image.convert("L"), dtype=float).mean())

    rate_all_pairs(folder, quality=brightness)
    report = train_reward(folder, PixelFeatures(), tmp_path / "reward.safetensors")
    assert report.shortcut == "more brightness" and any("shortcut" in warning for warning in report.warnings)


def test_the_ceiling_comes_from_annotators(tmp_path):
    folder = colour_folder(tmp_path, prompts=8, per_prompt=4)
    for name in ("ada", "bo"):
        rate_all_pairs(folder, mistakes=0.15, rater=name)
    report = train_reward(folder, PixelFeatures(), tmp_path / "reward.safetensors")
    assert 0.75 < report.ceiling < 0.98


@pytest.mark.parametrize("damage", ["absent", "tensors gone", "tensors changed", "not json", "other version", "other kind", "field gone", "empty sum"])
def test_a_damaged_reward_file_is_one_clear_error(tmp_path, damage):
    folder = colour_folder(tmp_path, prompts=4, per_prompt=4)
    rate_all_pairs(folder)
    train_reward(folder, PixelFeatures(), tmp_path / "reward.safetensors")
    path, tensors = tmp_path / "reward.json", tmp_path / "reward.safetensors"
    described = json.loads(path.read_text())
    actions = {
        "absent": lambda: path.unlink(), "tensors gone": lambda: tensors.unlink(), "tensors changed": lambda: tensors.write_bytes(tensors.read_bytes()[:-8] + b"\0" * 8),
        "not json": lambda: path.write_text("reward"), "other version": lambda: path.write_text(json.dumps(described | {"v": 2})),
        "other kind": lambda: path.write_text(json.dumps(described | {"kind": "pickle"})), "field gone": lambda: path.write_text(json.dumps({"v": 1, "kind": "preference_head", "tensors": "reward.safetensors"})),
        "empty sum": lambda: path.write_text('{"v": 1, "kind": "sum", "parts": []}'),
    }
    actions[damage]()
    with pytest.raises(BrushworkError) as caught:
        load_reward(path)
    assert caught.value.exit_code == 2 and caught.value.where


def test_rewards_add_up_by_weight(tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps({"v": 1, "kind": "sum", "parts": [{"reward": "measure:warmth", "weight": 2}, {"kind": "measure", "measure": "contrast", "weight": -1}]}))
    pixels = torch.rand(3, 3, 8, 8)
    expected = 2 * PLAIN["warmth"](pixels) - PLAIN["contrast"](pixels)
    assert load_reward(tmp_path / "mix.json").score(pixels, ["x"] * 3) == pytest.approx(expected, abs=1e-6)


def test_rewards_are_weighted_on_the_command_line(tmp_path):
    (tmp_path / "cold.json").write_text('{"v": 1, "kind": "measure", "measure": "warmth", "target": -1.0}')
    pixels = torch.rand(3, 3, 8, 8)
    expected = 2 * PLAIN["contrast"](pixels) - 0.5 * load_reward(tmp_path / "cold.json").score(pixels, ["x"] * 3)
    check_reward(f"2*measure:contrast + -0.5*{tmp_path / 'cold.json'}")
    assert load_reward(f"2*measure:contrast + -0.5*{tmp_path / 'cold.json'}").score(pixels, ["x"] * 3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reference", ["2*", "x*measure:warmth", "nan*measure:warmth", "2*measure:warmth+measure:contrast", "2*measure:beauty", "1*absent.json", "measure:beauty", "absent.json", "hpsv2"])
def test_a_reward_that_cannot_be_is_named_before_pictures_are_drawn(reference):
    with pytest.raises(BrushworkError) as caught:
        check_reward(reference)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("fields", ['"processor": "someone/other"', '"model": 5', '"model": "someone/model", "revision": 3'])
@pytest.mark.parametrize("whole", ['{"v": 1, "kind": "clip_score", %s}', '{"v": 1, "kind": "sum", "parts": [{"kind": "clip_score", "weight": 1, %s}]}'], ids=["alone", "in a sum"])
def test_a_clip_score_without_a_usable_name_of_its_model_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch, fields, whole):
    monkeypatch.setattr(references, "require_model", lambda *_, **__: pytest.fail("the Hub was asked"))
    file = tmp_path / "reward.json"
    file.write_text(whole % fields)
    with pytest.raises(DataError, match="`model` of a clip_score"):
        check_reward(file)


def test_a_clip_score_is_looked_for_at_the_revision_that_it_names(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(references, "require_model", lambda name, fix, *, revision=None, **_: asked.append((name, revision)))
    file = tmp_path / "reward.json"
    file.write_text('{"v": 1, "kind": "clip_score", "model": "someone/model", "revision": "v2", "processor": "someone/other"}')
    check_reward(file)
    assert asked == [("someone/model", "v2"), ("someone/other", None)]


@pytest.mark.parametrize("name", MEASURES)
def test_measures_carry_gradients_and_notice_their_quality(name):
    settings = {"palette": {"colours": ["#ff0000"]}, "style": {"gram": gram(torch.full((1, 3, 8, 8), 0.5))[0].tolist()}}.get(name, {})
    measure = Measure(name, settings=settings)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = measure.score(pixels, ["x", "x"])
    score.sum().backward()
    assert score.shape == (2,) and torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0
    moved = measure.score((pixels + 0.01 * pixels.grad.sign()).clamp(0, 1), ["x", "x"])
    assert (moved > score).all()


def test_measures_by_wrong_names_or_settings_are_refused():
    for arguments in (("beauty",), ("palette",), ("style",)):
        with pytest.raises(BadInput):
            Measure(*arguments)
    with pytest.raises(BadInput, match="#rrggbb"):
        Measure("palette", settings={"colours": ["red"]}).score(torch.rand(1, 3, 4, 4), ["x"])
    with pytest.raises(BadInput, match="smell"):
        build_features("smell")


def test_best_of_n_keeps_the_best_and_reports_the_gain(tmp_path):
    folder = colour_folder(tmp_path, prompts=6, per_prompt=8)
    groups = [(group[0].prompt, [Image.open(folder.picture(candidate)) for candidate in group]) for group in folder.by_prompt().values()]
    ranked = rank_pictures("measure:warmth", groups)
    for one, (_, pictures) in zip(ranked, groups, strict=True):
        truth = warmth(pixels_of(pictures))
        assert one.best == int(truth.argmax()) and list(one.order) == sorted(range(8), key=lambda place: -truth[place])
        assert one.gain == pytest.approx(float(truth.max() - truth.mean()), abs=1e-6)
    gain = gain_over_one(ranked)
    assert gain.n == 8 and 0 < gain.low < gain.mean < gain.high and gain.most_nats == pytest.approx(1.204, abs=0.001)
    with pytest.raises(BadInput):
        rank_pictures("measure:warmth", [("x", [])])


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP with random weights in transformers' layout."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    from tests.tiny_models import tokenizers

    tokenizers.bert().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 16}}))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(tokenizers.bert())
    transformers.CLIPModel(transformers.CLIPConfig(**{key: config[key] for key in ("text_config", "vision_config", "projection_dim")})).save_pretrained(folder)
    return folder


def test_a_clip_model_gives_features_and_scores_with_gradients(tiny_clip, tmp_path):
    features = build_features("clip", model=str(tiny_clip))
    pixels = torch.rand(2, 3, 24, 32).requires_grad_()
    found = features.extract(pixels, ["a dog", "a cat"])
    found.sum().backward()
    assert found.shape == (2, 16) and pixels.grad.abs().sum() > 0
    (tmp_path / "score.json").write_text(json.dumps({"v": 1, "kind": "clip_score", "model": str(tiny_clip), "scaled": False}))
    scores = load_reward(tmp_path / "score.json").score(pixels, ["a dog", "a cat"])
    assert scores.shape == (2,) and (scores.abs() <= 1).all()


def test_a_head_on_clip_features_comes_back_from_its_file(tiny_clip, tmp_path):
    folder = colour_folder(tmp_path, prompts=4, per_prompt=4)
    rate_all_pairs(folder)
    train_reward(folder, build_features("clip", model=str(tiny_clip)), tmp_path / "reward.safetensors")
    assert load_reward(tmp_path / "reward.json").score(torch.rand(2, 3, 16, 16), ["x", "y"]).shape == (2,)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(BrushworkError, match="CLIP or SigLIP"):
        build_features("clip", model=str(tmp_path))


def test_the_names_that_are_checked_early_are_those_that_can_be_built():
    assert set(KINDS) == set(BUILDERS) and set(MEASURES) == {*PLAIN, "palette", "style"}
