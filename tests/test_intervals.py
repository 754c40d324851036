"""Coverage of every interval that tables use, in a simulation of its own design.

The simulation is another one than the chapter's: answers are drawn from a logistic
model, so that neither the intervals nor the chapter know its form.
"""

import numpy as np
import pytest

from mla_nb.intervals import as_share, crossed_interval, holm, interval, t_interval
from mla_nb.tools import InputError

STUDIES = 400  # the count has a standard error of 1.1 points
LEAST, MOST = 91, 98.9  # 92 to 98, and what 400 studies may be off


def logistic(x):
    return 1 / (1 + np.exp(-x))


def answers(rng, level, seeds, samples, spread, shared=True):
    "(S,N) right or wrong, and the chance that stands behind the mean"
    rows = 1 if shared else seeds
    ease = rng.normal(0, 1.5, (rows, samples))
    luck = rng.normal(0, spread, (seeds, 1))
    return (rng.random((seeds, samples)) < logistic(level + ease + luck)).astype(float)


def truth(level, spread):
    rng = np.random.default_rng(0)
    n = 2_000_000
    x = level + rng.normal(0, 1.5, n) + rng.normal(0, spread, n)
    return logistic(x).mean()


def coverage(one, true):
    found = [one() for _ in range(STUDIES)]
    return 100 * np.mean([f["low"] <= true <= f["high"] for f in found])


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("spread", [0.05, 0.3])
@pytest.mark.parametrize("shared", [True, False])
def test_an_accuracy(seeds, spread, shared):
    rng, level = np.random.default_rng(1), 1.5

    def one():
        rows = answers(rng, level, seeds, 250, spread, shared)
        return interval(list(rows), shared, share=True)

    assert LEAST < coverage(one, truth(level, spread)) < MOST


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("spread", [0.05, 0.3])
@pytest.mark.parametrize("shared", [True, False])
def test_a_difference(seeds, spread, shared):
    rng, levels = np.random.default_rng(2), (1.5, 1.8)

    def one():
        state = rng.integers(1 << 30)
        # the same samples and the same luck: a paired comparison
        a, b = (
            answers(np.random.default_rng(state), v, seeds, 250, spread, shared)
            for v in levels
        )
        return interval(list(a - b), shared)

    true = truth(levels[0], spread) - truth(levels[1], spread)
    assert LEAST < coverage(one, true) < MOST


@pytest.mark.parametrize("speakers", [5, 6, 10])
def test_speakers(speakers):
    "t over speakers, for accuracies and for differences"
    rng, level, spread = np.random.default_rng(3), 1.5, 0.6
    n = 2_000_000
    many = np.random.default_rng(4)
    hard = many.normal(0, 1.5, n) + many.normal(0, spread, n)
    true = logistic(level + hard).mean()
    better = logistic(level + 0.4 + hard + many.normal(0, 0.3, n)).mean()

    def means():
        voices = rng.normal(0, spread, speakers)
        own = rng.normal(0, 0.3, speakers)
        pairs = ((level + v, level + 0.4 + v + d) for v, d in zip(voices, own))
        return np.array(
            [[answers(rng, v, 3, 100, 0.1).mean() for v in two] for two in pairs]
        )

    def share():
        return as_share(t_interval(means()[:, 0]), 100)

    def apart():
        both = means()
        return t_interval(both[:, 0] - both[:, 1])

    assert LEAST < coverage(share, true) < MOST
    assert LEAST < coverage(apart, true - better) < MOST


def test_a_single_run_has_the_interval_of_its_samples():
    x = np.r_[np.ones(80), np.zeros(20)]
    found = interval([x], shared=True, share=True)
    assert (round(found["low"], 3), round(found["high"], 3)) == (0.711, 0.867)  # Wilson
    assert interval([x], shared=False)["n"] == 1


def test_rows_and_columns_that_do_not_vary():
    same = np.tile(np.arange(10) % 2, (4, 1))
    assert crossed_interval(same)["low"] < 0.5 < crossed_interval(same)["high"]
    nothing = crossed_interval(np.zeros((3, 5)))
    assert (nothing["low"], nothing["high"], nothing["p"]) == (0.0, 0.0, 1.0)


def test_holm_is_never_below_the_p_value_and_keeps_the_order():
    rng = np.random.default_rng(0)
    p = {str(k): float(v) for k, v in enumerate(rng.random(12))}
    adjusted = holm(p)
    assert list(adjusted) == list(p)
    assert all(p[k] <= adjusted[k] <= 1 for k in p)
    order = sorted(p, key=p.get)
    assert [adjusted[k] for k in order] == sorted(adjusted.values())


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: interval([], True), "no run"),
        (lambda: t_interval([1.0]), "needs two"),
        (lambda: interval([np.ones(3), np.ones(4)], True), "shared=False"),
    ],
)
def test_what_is_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        wrong()
