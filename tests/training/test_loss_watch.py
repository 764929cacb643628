"""A loss that blows up is noticed; an ordinary noisy one is not."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.errors import TrainingError
from finetune.training.batches import Sample
from finetune.training.loop import check_numbers
from finetune.training.loss_watch import LossWatch
from finetune.training.step import StepNumbers


def test_a_noisy_falling_loss_passes():
    draw, watch = random.Random(0), LossWatch()
    assert not any(watch.blew_up((0.1 + 1 / (step + 1)) * draw.uniform(0.2, 3)) for step in range(2000))


def test_a_growing_loss_is_noticed():
    watch = LossWatch()
    noticed = [step for step in range(200) if watch.blew_up(0.1 if step < 50 else 0.1 * 1.2 ** (step - 50))]
    assert noticed and 50 < noticed[0] < 80


def test_a_jump_in_the_first_steps_is_noticed_at_once():
    watch = LossWatch()
    assert [watch.blew_up(loss) for loss in (0.7, 35000.0)] == [False, True]


def test_pictures_that_count_little_beside_others_that_count_much_are_no_blow_up():
    """The loss is looked at without its weights; with them it would jump by a factor of 5000 from step to step."""
    weights, watch = (0.001, 5.0), LossWatch()
    pictures = [SimpleNamespace(weight=weight, record=SimpleNamespace(path=Path(f"{weight}.png"))) for weight in weights]
    job = SimpleNamespace(order=SimpleNamespace(micro_batches=lambda step: [[Sample(step % 2, 0)]]), training_set=SimpleNamespace(pictures=pictures), run=SimpleNamespace(path=Path("run")))
    for step in range(40):
        check_numbers(job, step, StepNumbers(0.2 * weights[step % 2], 1.0, True), watch)
    with pytest.raises(TrainingError, match="blew up at step 41: .*0.001.png"):
        check_numbers(job, 40, StepNumbers(2000.0 * weights[0], 1.0, True), watch)
