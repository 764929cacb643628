"""Which pictures are in step n."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.training.batches import BatchOrder

buckets_and_repeats = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=20)


def order_of(pictures, batch_size, accumulation=1, seed=0):
    return BatchOrder([bucket for bucket, _ in pictures], [repeats for _, repeats in pictures], batch_size, accumulation, seed)


@given(buckets_and_repeats, st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_every_picture_is_seen_as_often_as_it_repeats_in_each_epoch(pictures, batch_size, seed):
    order = order_of(pictures, batch_size, seed=seed)
    for epoch in range(2):
        steps = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        seen = Counter(sample.picture for step in steps for batch in order.micro_batches(step) for sample in batch)
        assert seen == {number: repeats for number, (_, repeats) in enumerate(pictures)}


@given(buckets_and_repeats, st.integers(1, 5), st.integers(1, 4), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_a_micro_batch_is_of_one_bucket_and_never_empty(pictures, batch_size, accumulation, step):
    batches = order_of(pictures, batch_size, accumulation).micro_batches(step)
    assert len(batches) == accumulation
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({pictures[sample.picture][0] for sample in batch}) == 1
    assert [sample.index for batch in batches for sample in batch] == list(range(sum(map(len, batches))))


@given(buckets_and_repeats, st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 40), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_a_step_does_not_depend_on_which_steps_were_asked_for_before(pictures, batch_size, accumulation, steps):
    used = order_of(pictures, batch_size, accumulation)
    for step in steps:
        assert used.micro_batches(step) == order_of(pictures, batch_size, accumulation).micro_batches(step)


def test_another_seed_gives_another_order():
    pictures = [("a", 1)] * 30
    assert order_of(pictures, 4, seed=0).micro_batches(0) != order_of(pictures, 4, seed=1).micro_batches(0)


def test_accumulation_cuts_the_same_stream_of_batches_into_longer_steps():
    pictures = [("a", 1)] * 7 + [("b", 1)] * 3
    short, long = order_of(pictures, 2, 1), order_of(pictures, 2, 2)
    single = [[sample.picture for sample in batch] for step in range(6) for batch in short.micro_batches(step)]
    double = [[sample.picture for sample in batch] for step in range(3) for batch in long.micro_batches(step)]
    assert single == double


with_regularisation = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans()), min_size=1, max_size=20).filter(lambda pictures: not all(p[2] for p in pictures))


def mixed_order(pictures, batch_size, seed=0):
    buckets, repeats, regularisation = zip(*pictures, strict=True)
    return BatchOrder(buckets, repeats, batch_size, 1, seed, regularisation)


@given(with_regularisation, st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_regularisation_pictures_are_as_many_as_own_ones_and_own_ones_are_seen_as_ever(pictures, batch_size, seed):
    order = mixed_order(pictures, batch_size, seed)
    seen = Counter(sample.picture for step in range(order.batches_per_epoch) for batch in order.micro_batches(step) for sample in batch)
    own = {number: repeats for number, (_, repeats, is_regularisation) in enumerate(pictures) if not is_regularisation}
    assert {number: seen[number] for number in own} == own
    others = sum(seen.values()) - sum(own.values())
    buckets = len({bucket for bucket, _, is_regularisation in pictures if is_regularisation})
    assert abs(others - sum(own.values())) <= buckets if buckets else others == 0
    assert order.micro_batches(7) == mixed_order(pictures, batch_size, seed).micro_batches(7)


def test_all_regularisation_pictures_are_used_equally_often_however_many_there_are():
    order = mixed_order([("a", 1, False)] * 3 + [("a", 1, True)] * 20, 2)
    steps = range(20 * order.batches_per_epoch)  # 20 epochs of 3: each of the 20 exactly three times
    seen = Counter(sample.picture for step in steps for batch in order.micro_batches(step) for sample in batch)
    assert {seen[number] for number in range(3, 23)} == {3}


def test_every_round_of_the_regularisation_pictures_has_an_order_of_its_own():
    order = mixed_order([("a", 1, False)] * 2 + [("a", 1, True)] * 12, 1)
    epochs = [sorted(sample.picture for step in range(4 * epoch, 4 * epoch + 4) for batch in order.micro_batches(step) for sample in batch if sample.picture >= 2) for epoch in range(18)]
    rounds = [epochs[start:start + 6] for start in (0, 6, 12)]  # two a time: twelve are through after six epochs
    assert all(sorted(sum(one, [])) == list(range(2, 14)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


def test_own_and_regularisation_pictures_meet_in_one_batch():
    order = mixed_order([("a", 1, False)] * 20 + [("a", 1, True)] * 20, 4)
    kinds = [{sample.picture < 20 for sample in order.micro_batches(step)[0]} for step in range(order.batches_per_epoch)]
    assert kinds.count({True, False}) > len(kinds) / 2


def test_without_regularisation_pictures_the_order_is_what_it_was():
    pictures = [("a", 2)] * 7 + [("b", 1)] * 3
    marked = BatchOrder([bucket for bucket, _ in pictures], [repeats for _, repeats in pictures], 3, 2, 5, [False] * 10)
    assert [marked.micro_batches(step) for step in range(9)] == [order_of(pictures, 3, 2, 5).micro_batches(step) for step in range(9)]
    assert [[sample.picture for sample in batch] for batch in marked.micro_batches(0)] == [[1, 5, 5], [7, 9, 8]]
