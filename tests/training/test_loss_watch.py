"""A loss that blows up is noticed; an ordinary noisy one is not."""

import random

from finetune.training.loss_watch import LossWatch


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
