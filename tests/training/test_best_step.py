"""Which step is the best, when to end, and copies of weights."""

import pytest
import torch

from finetune.errors import DataError
from finetune.recipe import load_recipe
from finetune.training.best_step import BestStep, Measured
from finetune.training.gradient_noise import NoiseScale
from finetune.training.held_out import split_records
from finetune.training.held_out_loss import fixed_batches, fixed_positions
from finetune.training.loop_state import LoopState
from finetune.training.step import StepNumbers
from finetune.training.weight_copies import WeightAverage, WeightCopy
from data_tools.records import ImageRecord

WEIGHTS = [torch.nn.Parameter(torch.arange(4.0))]


def judged(best, losses):
    return [best.judge(step, Measured(held_out_loss=loss), WEIGHTS) for step, loss in enumerate(losses, 1)]


def test_the_step_of_the_lowest_loss_is_kept_and_patience_counts_from_there():
    best = BestStep(patience=2, keeps=True)
    assert judged(best, [3.0, 2.0, 2.5, 1.0, 1.0]) == [None] * 5
    assert (best.step, best.loss, best.waited) == (4, 1.0, 1)
    assert "for 2 evaluations" in best.judge(6, Measured(held_out_loss=1.1), WEIGHTS)
    assert judged(BestStep(patience=0, keeps=True), [1.0] + [2.0] * 50) == [None] * 51


def test_a_step_whose_sample_pictures_are_not_in_order_is_never_the_best():
    best = BestStep(patience=0, keeps=True)
    best.judge(1, Measured(held_out_loss=2.0), WEIGHTS)
    assert best.judge(2, Measured(held_out_loss=1.0, reason="it copies"), WEIGHTS) == "it copies"
    assert best.step == 1


def test_a_step_at_which_nothing_was_measured_changes_nothing():
    best = BestStep(patience=1, keeps=True, limits={"samples.stop_on_copies": True})
    best.judge(1, Measured(held_out_loss=1.0), WEIGHTS)
    assert best.judge(2, Measured(), WEIGHTS) is None and best.waited == 0


def test_a_copy_stands_in_for_the_weights_and_leaves_them_bit_for_bit():
    weights = [torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(5))]
    copy = WeightCopy(weights)
    with torch.no_grad():
        for weight in weights:
            weight.add_(1)
    before, storage = [weight.detach().clone() for weight in weights], [weight.data_ptr() for weight in weights]
    with pytest.raises(RuntimeError), copy.in_place_of(weights):
        assert all(torch.equal(weight + 1, moved) for weight, moved in zip(weights, before, strict=True))
        raise RuntimeError
    assert all(torch.equal(weight, own) for weight, own in zip(weights, before, strict=True))
    assert [weight.data_ptr() for weight in weights] == storage


def test_the_average_warms_up_and_then_decays_as_asked():
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    average = WeightAverage([weight], 0.9)
    expected = 0.0
    for n in range(200):
        weight.data = torch.tensor(float(n), dtype=torch.float64)
        average.update([weight])
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert average.tensors[0].item() == pytest.approx(expected)
    # Far from the start the average of a ramp lags by decay / (1 - decay) steps.
    assert average.tensors[0].item() == pytest.approx(199 - 9, abs=1e-4)


def record(tmp_path, name, content, split="train"):
    return ImageRecord(tmp_path / name, 8, 8, content, split=split)


def test_a_share_is_drawn_by_content_copies_go_together_and_names_do_not_count(tmp_path):
    records = [record(tmp_path, f"{number}.png", f"hash {number // 2}") for number in range(20)]
    trained, held, left_out = split_records(records, [], 0.3, seed=0)
    assert len(trained) == 14 and len(held) == 6 and left_out == []
    assert not {one.content_hash for one in trained} & {one.content_hash for one in held}
    renamed = [record(tmp_path, f"x{number}.png", f"hash {number // 2}") for number in range(20)]
    assert [one.content_hash for one in split_records(renamed, [], 0.3, seed=0)[1]] == [one.content_hash for one in held]
    assert split_records(records, [], 0.3, seed=1)[1] != held
    assert len(split_records(records, [], 0.001, seed=0)[1]) == 2 and len(split_records(records, [], 0.999, seed=0)[0]) == 2


def test_a_step_that_was_left_out_is_not_averaged():
    recipe = load_recipe({"base": {"model": "mini"}, "data": {"folder": "."}, "training": {"ema_decay": 0.9, "gradient_noise": True, "accumulation": 2}}, [])
    state = LoopState.at_start(recipe, [torch.nn.Parameter(torch.ones(3))])
    state.took(StepNumbers(1.0, float("nan"), False, "gradient", signal_and_noise=(1.0, 1.0)))
    assert state.average.updates == 0 and state.noise == NoiseScale()
    state.took(StepNumbers(1.0, 1.0, True, signal_and_noise=(1.0, 1.0)))
    assert state.average.updates == 1 and state.noise.samples == pytest.approx(1.0)


def test_what_is_held_out_is_not_trained_under_another_name(tmp_path):
    records = [record(tmp_path, "a.png", "one"), record(tmp_path, "b.png", "two"), record(tmp_path, "c.png", "three", "held_out"), record(tmp_path, "d.png", "three")]
    trained, held, left_out = split_records(records, [record(tmp_path, "elsewhere.png", "one")], 0.0, seed=0)
    assert [one.path.name for one in trained] == ["b.png"] and [one.path.name for one in held] == ["c.png", "elsewhere.png"]
    assert [(one.path.name, one.code) for one in left_out] == [("a.png", "held_out"), ("d.png", "held_out")]
    # A folder of held-out pictures inside the data folder is not counted twice.
    trained, held, left_out = split_records(records, [records[0]], 0.0, seed=0)
    assert [one.path.name for one in held] == ["c.png", "a.png"] and [one.path.name for one in left_out] == ["d.png"]
    with pytest.raises(DataError, match="nothing is left to train"):
        split_records(records[:1], [records[0]], 0.0, seed=0)
    with pytest.raises(DataError, match="cannot be split"):
        split_records(records[:1], [], 0.5, seed=0)


def test_noise_levels_are_even_for_each_picture_and_for_all_together():
    positions = fixed_positions(5, 4, seed=3)
    assert torch.allclose(positions.sort().values, (torch.arange(20) + 0.5) / 20)
    assert [sorted((row * 4).long().tolist()) for row in positions.view(5, 4)] == [[0, 1, 2, 3]] * 5
    batches = fixed_batches(["wide", "high", "wide", "high"], [1, 2, 3], 3, 2)
    assert sorted(sample.index for batch in batches for sample in batch) == list(range(6))
    assert [[sample.picture for sample in batch] for batch in batches] == [[1, 1, 3], [3], [2, 2]]
