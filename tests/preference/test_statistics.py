"""Agreement, transitivity, Bradley-Terry, choice of pairs: against known answers."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.preference.agreement import krippendorff_alpha, transitivity, trust, wilson_interval
from finetune.preference.bradley_terry import posterior, rank_items, rank_players
from finetune.preference.comparisons import Judgement
from finetune.preference.pair_choice import balanced_sets, informative_pairs
from finetune.preference.pairs import Pair, preference_pairs

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units.
TEXTBOOK = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = {unit: {str(rater): float(row[unit]) for rater, row in enumerate(TEXTBOOK) if row[unit] is not None} for unit in range(12)}


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_textbook(level, alpha):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=0.001)


def test_alpha_without_overlap_is_not_a_number_made_up():
    assert krippendorff_alpha({1: {"a": 1.0}, 2: {"b": 2.0}}) is None


def pair(better, worse, prompt="p", **more):
    return Pair(better, worse, prompt, "", "r", **more)


def pair_judgement(rater, choice, items=("a", "b"), shown=None, **more):
    return Judgement(rater, "pair", "p", "x", items, shown or items, choice=choice, **more)


def test_circles_are_counted():
    assert transitivity([pair("a", "b"), pair("b", "c"), pair("c", "a")]) == (1, 1)
    assert transitivity([pair("a", "b"), pair("b", "c"), pair("a", "c")]) == (1, 0)
    # Brute force over a random tournament of seven.
    chance, items = random.Random(1), "abcdefg"
    wins = {frozenset(two): two if chance.random() < 0.5 else two[::-1] for two in itertools.combinations(items, 2)}
    circles = sum(len({wins[frozenset(two)][0] for two in itertools.combinations(three, 2)}) == 3 for three in itertools.combinations(items, 3))
    assert transitivity([pair(*two) for two in wins.values()]) == (35, circles)


def test_trust_reads_sides_repeats_and_the_ceiling():
    judgements = [pair_judgement("ada", "a"), pair_judgement("bo", "a", shown=("b", "a")), pair_judgement("ada", "a", shown=("b", "a"), repeat=True)]
    judgements += [pair_judgement("ada", "c", ("c", "d")), pair_judgement("bo", "d", ("c", "d"))]
    found = trust(judgements)
    assert found.pair_agreement.value == 0.5 and found.ceiling == 0.5
    assert found.left.value == pytest.approx(2 / 5) and found.consistency.value == 1.0
    assert trust([]).judgements == 0


def test_ties_do_not_lower_the_ceiling_of_choices():
    """Annotators who never choose differently, but whose ties differ, were said to allow 50 %."""
    judgements = [pair_judgement(rater, f"{number}a", (f"{number}a", f"{number}b")) for number in range(5) for rater in ("ada", "bo")]
    judgements += [pair_judgement("ada", f"{number}a", (f"{number}a", f"{number}b")) for number in range(5, 10)]
    judgements += [pair_judgement("bo", None, (f"{number}a", f"{number}b"), tie=True) for number in range(5, 10)]
    found = trust(judgements)
    assert found.pair_agreement.value == 0.5 and found.ceiling == 1.0
    assert trust(judgements[10:]).ceiling is None


def test_bradley_terry_finds_true_strengths_within_its_intervals():
    chance = random.Random(3)
    truth = {name: strength for name, strength in zip("abcdef", (-1.5, -1, -0.3, 0.3, 1, 1.5), strict=True)}
    pairs = []
    for one, other in itertools.combinations(truth, 2):
        for _ in range(60):
            wins = chance.random() < 1 / (1 + np.exp(truth[other] - truth[one]))
            pairs.append(pair(one, other) if wins else pair(other, one))
    standings = rank_items(list(truth), pairs)
    assert [one.item for one in standings] == list("fedcba")
    assert all(one.low <= truth[one.item] <= one.high for one in standings)
    assert sum(one.wins for one in standings) == len(pairs)


def test_never_compared_items_stay_in_the_middle_and_uncertain():
    standings = {one.item: one for one in rank_items("abc", [pair("a", "b")] * 10)}
    assert standings["c"].high - standings["c"].low > standings["a"].high - standings["a"].low
    assert standings["b"].strength < standings["c"].strength < standings["a"].strength


def test_adapters_are_ranked_by_their_pictures():
    pairs = [pair("x1", "y1"), pair("x2", "y2", "q"), pair("x1", "x2")]
    standings = rank_players(pairs, {"x1": "warm", "x2": "warm", "y1": "cold", "y2": "cold"})
    assert [one.item for one in standings] == ["warm", "cold"] and standings[0].comparisons == 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda two: two[0] != two[1]), max_size=30))
def test_strengths_are_finite_and_a_tie_moves_nothing(games):
    items = list("abcde")
    pairs = [pair(items[one], items[other]) for one, other in games]
    belief = posterior(items, pairs)
    assert np.isfinite(belief.mean).all() and (np.linalg.eigvalsh(belief.covariance) > 0).all()
    even = posterior(items, [pair("a", "b", probability=0.5)])
    assert even.mean == pytest.approx(np.zeros(5), abs=1e-9)


def test_rankings_and_scores_become_pairs_with_fair_weight():
    ranked = Judgement("ada", "rank", "p", "x", ("a", "b", "c", "d"), ranking=(1, 2, 2, 5))
    pairs = preference_pairs([ranked], ties=True)
    assert {(one.better, one.worse) for one in pairs if one.probability == 1} == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")}
    assert sum(one.weight for one in pairs) == pytest.approx(3)
    scores = [Judgement("ada", "score", "p", "x", (item,), axes={"alignment": points}, id=item) for item, points in (("a", 5), ("b", 4), ("c", 4))]
    assert {(one.better, one.worse) for one in preference_pairs(scores)} == {("a", "b"), ("a", "c")}


def test_repeats_teach_nothing_twice():
    assert len(preference_pairs([pair_judgement("ada", "a"), pair_judgement("ada", "a", repeat=True)])) == 1


def test_the_first_pairs_are_balanced_and_connected():
    chosen = informative_pairs({"p": list("abcdef"), "q": list("uvw")}, [], 9, seed=0)
    assert len({frozenset(items) for _, items in chosen}) == 9
    seen = [item for prompt, items in chosen if prompt == "p" for item in items]
    assert set(seen) == set("abcdef") and max(seen.count(item) for item in "abcdef") <= 3


def test_open_questions_come_before_settled_ones():
    known = [pair("a", "b")] * 20 + [pair("c", "d"), pair("d", "c")]
    [(_, items)] = informative_pairs({"p": list("abcd")}, known, 1, seed=0, asked=[frozenset("ac"), frozenset("ad"), frozenset("bc"), frozenset("bd")])
    assert set(items) == {"c", "d"}


def test_choosing_a_thousand_pairs_never_repeats_one():
    groups = {f"p{number}": [f"{number}-{item}" for item in range(8)] for number in range(50)}
    chosen = informative_pairs(groups, [], 1000, seed=1)
    assert len({frozenset(items) for _, items in chosen}) == 1000
    assert chosen == informative_pairs(groups, [], 1000, seed=1)


def test_ranking_sets_use_every_picture_equally():
    sets = balanced_sets({"p": list("abcdefgh")}, 4, 6, seed=0)
    counts = [sum(item in items for _, items in sets) for item in "abcdefgh"]
    assert len(sets) == 6 and set(counts) == {3}


def test_wilson_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=0.001), pytest.approx(0.943, abs=0.001))
