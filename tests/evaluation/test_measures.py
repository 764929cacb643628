"""Each measure gives the known answer where the answer is known, and stays within its range."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.errors import BadInput
from finetune.evaluation import pixel_features
from finetune.evaluation.evidence import Evidence, NamedPicture
from finetune.evaluation.measure import BUILT_IN, WITH_WEIGHTS, choose_measures, load_measure
from finetune.evaluation.intervals import bootstrap_set
from finetune.evaluation.measures import kid, near_copies, structure_kept
from finetune.evaluation.prompts import EvaluationPrompt

RED, BLUE, GREY = (250, 10, 10), (10, 10, 250), (128, 128, 128)


def flat(colour, size=(32, 32)):
    return np.full((*size, 3), colour, np.uint8)


def noise(seed, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def stripes(direction, strength=120, size=32):
    line = (np.arange(size) // 4 % 2 * strength + 60).astype(np.uint8)
    plane = np.tile(line, (size, 1))
    return np.stack([plane.T if direction == "down" else plane] * 3, -1)


def evidence(pictures, base=None, references=(), training=(), splits=None, seeds=None, ids=None):
    splits, ids = splits or ["style"] * len(pictures), ids or [f"p{index}" for index in range(len(pictures))]
    prompts = [EvaluationPrompt(name, f"a {name}", (), split) for name, split in zip(ids, splits, strict=True)]
    named = [tuple(NamedPicture(f"{index}.png", pixels) for index, pixels in enumerate(some)) for some in (references, training)]
    return Evidence(prompts, seeds or [0] * len(pictures), pictures, base or pictures, *named)


def values(name, *arguments, **options):
    return load_measure(name).values(evidence(*arguments, **options))


def test_palette_is_0_for_the_same_colours_1_for_none_in_common_and_half_between():
    half = flat(RED)
    half[:16] = BLUE
    assert values("palette", [flat(RED), flat(BLUE), half], references=[flat(RED)]).tolist() == [0, 1, 0.5]


def test_colour_statistics_counts_in_the_references_own_spread():
    found = values("colour_statistics", [flat(GREY), flat((150, 150, 150)), flat((255, 255, 255))], references=[flat(GREY)])
    assert found[0] == 0 and 0 < found[1] < found[2]
    wide = values("colour_statistics", [flat((150, 150, 150))], references=[flat(GREY), flat((10, 10, 10)), flat((250, 250, 250))])
    assert wide[0] < found[1]


def test_edges_see_direction_and_strength_but_not_colour():
    across, down = stripes("across"), stripes("down")
    tinted = across.copy()
    tinted[..., 0] = across[..., 0]
    found = values("edges", [across, down, flat(GREY)], references=[across])
    assert found[0] == 0 and found[1] > 0.3 and found[2] > 0.3
    assert values("edges", [stripes("across", 12)], references=[across])[0] > 0.3


def test_structure_kept_is_1_for_itself_also_when_lighter_and_minus_for_the_negative():
    picture = stripes("across")
    assert structure_kept.structure_similarity(picture, picture) == pytest.approx(1)
    assert structure_kept.structure_similarity(picture, picture + 40) == pytest.approx(1, abs=1e-6)
    assert structure_kept.structure_similarity(picture, 255 - picture) < -0.5
    assert np.isnan(values("structure_kept", [picture], base=[flat(RED, (16, 16))])[0])


def test_diversity_is_the_distance_between_seeds_of_one_prompt():
    black, white = flat((0, 0, 0)), flat((255, 255, 255))
    found = values("diversity", [black, white, black, black, white], ids=["a", "a", "b", "b", "c"], seeds=[0, 1, 0, 1, 0])
    # Black and white differ by 1 in one of three OKLab channels.
    assert found[:2] == pytest.approx([3**-0.5] * 2, abs=1e-3)
    assert found[2:4].tolist() == [0, 0] and np.isnan(found[4])


def test_drift_is_0_without_change_and_1_from_black_to_white():
    black, white = flat((0, 0, 0)), flat((255, 255, 255))
    assert values("drift", [black, white], base=[black, black]) == pytest.approx([0, 1], abs=1e-3)


def test_colourfulness_and_sharpness_have_their_known_values():
    assert values("colourfulness", [flat(GREY), flat((255, 0, 0))]) == pytest.approx([0, 0.3 * np.hypot(255, 127.5)])
    found = values("sharpness", [flat(GREY), stripes("across"), noise(0)])
    assert found[0] == pytest.approx(0) and found[0] < found[1] < found[2]


def test_oklab_of_known_colours():
    lab = pixel_features.oklab(np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0]]], np.uint8))[0]
    assert lab[0] == pytest.approx([1, 0, 0], abs=1e-3) and lab[1] == pytest.approx([0, 0, 0], abs=1e-6)
    assert lab[2] == pytest.approx([0.628, 0.225, 0.126], abs=1e-3)


def test_perceptual_hash_survives_scaling_and_tells_pictures_apart():
    blob = np.zeros((64, 64, 3), np.uint8)
    blob[10:40, 20:50] = 200
    larger = np.asarray(Image.fromarray(blob).resize((128, 128)))
    distance = lambda one, other: (pixel_features.perceptual_hash(one) ^ pixel_features.perceptual_hash(other)).bit_count()
    assert distance(blob, larger) <= 4
    assert distance(blob, stripes("across", size=64)) > 15


def test_a_copied_training_picture_is_flagged_and_named_and_others_are_not():
    training = [noise(seed) for seed in range(6)]
    copied = np.asarray(Image.fromarray(training[3]).resize((48, 48)).resize((32, 32)))
    looked = evidence([training[2], copied, noise(99)], training=training)
    found = near_copies.of_evidence(looked)
    assert found.flagged.tolist() == [True, True, False]
    assert found.index[:2].tolist() == [2, 3]
    assert load_measure("near_copies").values(looked).tolist() == [1, 1, 0]


def test_the_same_shape_in_other_colours_is_no_copy():
    blob = flat((240, 240, 240), (64, 64))
    blob[16:48, 16:48] = RED
    other = flat((240, 240, 240), (64, 64))
    other[16:48, 16:48] = BLUE
    assert near_copies.of_evidence(evidence([other], training=[blob, noise(1, (64, 64))])).flagged.tolist() == [False]


def test_style_gain_is_0_for_the_base_and_1_at_the_style():
    base, style = [stripes("down"), stripes("down", 40)], stripes("across")
    own = values("style_gain", base, base=base, references=[style])
    assert own.mean() == pytest.approx(0)
    # Pictures of unrelated prompts, which may be anything, do not count as the base's usual distance.
    assert values("style_gain", [*base, flat(RED)], base=[*base, flat(RED)], references=[style], splits=["style", "style", "unrelated"])[:2] == pytest.approx(own)
    assert values("style_gain", [style, style], base=base, references=[style]) == pytest.approx([1, 1])


def test_kid_is_unbiased_around_0_for_one_distribution_and_positive_for_two():
    random = np.random.default_rng(0)
    same = [kid.unbiased_mmd(*(kid.polynomial_kernel(one, other) for one, other in ((a, a), (a, b), (b, b))), np.arange(30))
            for a, b in ((random.normal(size=(30, 8)), random.normal(size=(30, 8))) for _ in range(60))]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5
    a, b = random.normal(size=(30, 8)), random.normal(size=(30, 8)) + 1
    assert kid.unbiased_mmd(*(kid.polynomial_kernel(one, other) for one, other in ((a, a), (a, b), (b, b))), np.arange(30)) > 1


def test_a_repeated_picture_does_not_make_a_set_look_denser():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(40, 8)), random.normal(size=(40, 8))
    kernels = [kid.polynomial_kernel(one, other) for one, other in ((a, a), (a, b), (b, b))]
    drawn = np.mean([kid.unbiased_mmd(*kernels, np.arange(40), random.integers(0, 40, 40)) for _ in range(200)])
    assert drawn == pytest.approx(kid.unbiased_mmd(*kernels, np.arange(40)), abs=0.15)


@pytest.mark.parametrize(("prompts", "seeds"), [(10, 2), (10, 4)])
def test_kid_and_its_interval_hold_the_truth_though_seeds_of_a_prompt_are_alike(prompts, seeds):
    """Pairs within a prompt made the number larger, and resampling counted them twice: the interval held the truth 58 and 16 times in 100."""
    def drawn(random, count, each):
        return (random.normal(0.3, 1, (count, 1, 8)) + random.normal(0, 0.4, (count, each, 8))).reshape(-1, 8)

    references = np.random.default_rng(5).normal(0, 1.16**0.5, (200, 8))

    def statistic(pictures, prompt):
        kernels = [kid.polynomial_kernel(one, other) for one, other in ((pictures, pictures), (pictures, references), (references, references))]
        return lambda chosen: kid.unbiased_mmd(*kernels, prompt, chosen)

    truth, held, values = statistic(drawn(np.random.default_rng(9), 3000, 1), np.arange(3000))(None), 0, []
    ids = np.repeat(np.arange(prompts), seeds)
    for number in range(40):
        found = bootstrap_set(statistic(drawn(np.random.default_rng(number), prompts, seeds), ids), np.ones(len(ids), bool), [str(one) for one in ids])
        held += found.low <= truth <= found.high
        values.append(found.value)
    assert held >= 37 and abs(np.mean(values) - truth) < 3 * np.std(values) / 40**0.5


PICTURES = st.integers(0, 10_000).map(noise) | st.tuples(*[st.integers(0, 255)] * 3).map(flat)


@settings(max_examples=25, deadline=None)
@given(st.lists(PICTURES, min_size=1, max_size=3), st.lists(PICTURES, min_size=1, max_size=3))
def test_values_stay_within_the_stated_range(pictures, references):
    looked = evidence(pictures, base=[references[0]] * len(pictures), references=references, training=references)
    for name in BUILT_IN:
        measure = load_measure(name)
        if measure.values is None or "judge" in measure.needs:
            continue
        found = measure.values(looked)
        found = found[np.isfinite(found)]
        assert ((found >= measure.low - 1e-9) & (found <= measure.high + 1e-9)).all(), name


@pytest.mark.parametrize("name", BUILT_IN + WITH_WEIGHTS)
def test_every_measure_says_where_it_comes_from_and_which_way_is_better(name):
    measure = load_measure(name)
    assert measure.name == name and measure.source and measure.meaning and measure.low < measure.high
    assert measure.better in ("higher", "lower", "none")
    assert (measure.values is None) != (measure.of_set is None)


def test_what_cannot_be_measured_is_listed_or_refused_by_name():
    chosen, left_out = choose_measures(None, evidence([flat(RED)]).at_hand)
    assert "structure_kept" in [measure.name for measure in chosen]
    assert "references" in left_out["palette"] and "--weights clip=FOLDER" in left_out["clip_text"]
    assert {measure.name for measure in chosen} | set(left_out) == set(BUILT_IN + WITH_WEIGHTS)
    with pytest.raises(BadInput, match="palette cannot be measured: no reference pictures"):
        choose_measures(["palette"], evidence([flat(RED)]).at_hand)
    with pytest.raises(BadInput, match="no measure called 'fid'"):
        choose_measures(["fid"], evidence([flat(RED)]).at_hand)
