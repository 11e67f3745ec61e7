"""What a maintainer fears about intervals: zero width, wrong clusters, silent NaN, dishonest coverage."""
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from cai_course.errors import CourseError
from cai_course.stats import Estimate, as_table, equivalence, estimate, over_seeds, paired_difference, verdict, wilson


def table(S=3, P=300):
    return np.repeat(np.arange(S), P), np.tile(np.arange(P), S)


def test_wilson_against_hand_numbers_and_symmetry():
    # 95% Wilson of 10 of 20, by hand: center .5, half width 1.959964 sqrt(.25/20 + z^2/1600) / (1 + z^2/20)
    e = wilson(10, 20)
    assert e.value == .5 and e.low == pytest.approx(.29929, abs=1e-5) and e.high == pytest.approx(.70071, abs=1e-5)
    assert wilson(3, 20).low == pytest.approx(1 - wilson(17, 20).high)
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1


def test_wilson_agrees_with_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for k, n, level in [(0, 7, .95), (3, 50, .9), (50, 50, .99), (2, 3, .95)]:
        low, high = proportion.proportion_confint(k, n, 1 - level, method="wilson")
        assert (wilson(k, n, level).low, wilson(k, n, level).high) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("k,n", [(-1, 5), (6, 5), (0, 0), (float("nan"), 5), (1, float("nan"))])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(CourseError, match="0 <= successes <= n"):
        wilson(k, n)


def test_value_is_the_mean_and_lies_inside():
    rng = np.random.default_rng(0)
    for y in (rng.random(50), rng.normal(5, 2, 50), rng.exponential(size=9) ** 3, (rng.random(40) < .05) * 1.):
        e = estimate(y)
        assert e.value == pytest.approx(y.mean()) and e.low <= e.value <= e.high and e.low < e.high


def test_same_rng_same_interval_and_order_of_rows_hardly_matters():
    seeds, prompts = table(3, 60)
    y = np.random.default_rng(1).random(180)
    assert estimate(y, seeds, prompts) == estimate(y, seeds, prompts)
    order = np.random.default_rng(2).permutation(180)
    a, b = estimate(y, seeds, prompts), estimate(y[order], seeds[order], prompts[order])
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))     # labels, not positions, decide
    assert estimate(y, [f"s{s}" for s in seeds], [f"p{p:03d}" for p in prompts]).low == pytest.approx(a.low)


def test_shift_and_scale():
    y = np.random.default_rng(1).normal(size=80)
    a, b = estimate(y), estimate(10 * y + 100)
    assert (b.value, b.low, b.high) == pytest.approx((10*a.value + 100, 10*a.low + 100, 10*a.high + 100))


def test_large_sample_agrees_with_the_normal_formula():
    y = np.random.default_rng(3).normal(3, 2, 2000)
    e = estimate(y)
    half = 1.96 * y.std(ddof=1) / math.sqrt(2000)
    assert (e.high - e.low) / 2 == pytest.approx(half, rel=.06)      # Monte Carlo error of 2000 resamples


def test_copies_of_a_prompt_add_nothing():
    y = (np.random.default_rng(4).random(100) < .4) * 1.
    one, ten = estimate(y), estimate(np.repeat(y, 10), clusters=np.repeat(np.arange(100), 10))
    assert ten.n == 100 and (ten.low, ten.high) == pytest.approx((one.low, one.high), abs=.01)
    naive = estimate(np.repeat(y, 10))                               # broken on purpose: clusters forgotten
    assert naive.high - naive.low < .5 * (ten.high - ten.low)


@pytest.mark.parametrize("value", [0., 1.])
@pytest.mark.parametrize("S", [1, 3])
def test_all_zero_or_all_one_is_wilson_over_prompts(value, S):
    seeds, prompts = table(S, 40)
    e, w = estimate(np.full(40 * S, value), seeds, prompts), wilson(40 * value, 40)
    assert (e.value, e.n, e.seeds) == (value, 40, S)
    assert (e.low, e.high) == pytest.approx((w.low, w.high))


def test_no_interval_of_zero_width():
    assert estimate([.98] * 50).low < .98 < estimate([.98] * 50).high
    same = paired_difference([1., 0., 1., 1.] * 20, [1., 0., 1., 1.] * 20)
    assert same.value == 0 and same.low < 0 < same.high
    constant = estimate([7.] * 5)
    assert (constant.low, constant.high) == (-math.inf, math.inf)
    assert json.loads(json.dumps(constant.as_dict(), allow_nan=False))["low"] is None
    assert Estimate.from_dict(constant.as_dict()) == constant
    assert estimate([7.] * 5, bounds=(0, 10)).low > 0
    assert estimate([7.] * 6, seeds=[0, 0, 1, 1, 2, 2]).high == math.inf


def test_one_value_and_one_prompt_work():
    assert 0 <= estimate([.4]).low < .4 < estimate([.4]).high <= 1
    e = estimate([1., 2., 3.], clusters=["a"] * 3)
    assert e.n == 1 and e.high == math.inf                            # one prompt tells nothing about other prompts


def test_one_value_for_each_seed_is_a_t_interval():
    y = np.array([2., 4., 9.])
    e = estimate(y, seeds=[0, 1, 2])
    half = 4.302653 * y.std(ddof=1) / math.sqrt(3)                    # t quantile, 2 degrees of freedom
    assert (e.high - e.low) / 2 == pytest.approx(half, rel=.02)


def test_seeds_that_disagree_widen_the_interval():
    seeds, prompts = table(3, 200)
    y = np.random.default_rng(5).normal(2, 1, 600)
    apart = y + np.array([-1., 0., 1.])[seeds]
    assert estimate(apart, seeds, prompts).high - estimate(apart, seeds, prompts).low > 4
    alone = estimate(apart, None, prompts)                            # seeds forgotten: far too sure
    assert alone.high - alone.low < .5


def test_ragged_tables_and_prompts_that_differ_between_seeds():
    seeds, prompts = table(3, 50)
    y = (np.random.default_rng(6).random(150) < .5) * 1.
    keep = np.ones(150, bool)
    keep[[3, 70, 71]] = False
    full, ragged = estimate(y, seeds, prompts), estimate(y[keep], seeds[keep], prompts[keep])
    assert ragged.n == 50 and ragged.high - ragged.low == pytest.approx(full.high - full.low, rel=.4)
    nested = estimate(y, seeds)                                       # no prompt shared
    assert nested.n == 150 and math.isfinite(nested.high) and nested.low < nested.value < nested.high


def covered(S, between, rate, repeats=250, P=80):
    rng, logit = np.random.default_rng(11), math.log(rate / (1 - rate))
    true = (1 / (1 + np.exp(-logit - math.hypot(1, between) * rng.standard_normal(200_000)))).mean()
    seeds, prompts = table(S, P)
    hits = 0
    for _ in range(repeats):
        chance = 1 / (1 + np.exp(-logit - between * rng.standard_normal((S, 1)) - rng.standard_normal(P)))
        e = estimate((rng.random((S, P)) < chance).ravel(), seeds, prompts, n_boot=200, rng=rng)
        hits += e.low <= true <= e.high
    return hits / repeats


@pytest.mark.parametrize("S,between,rate", [(1, 0., .3), (3, 0., .5), (3, .5, .5), (3, .4, .03), (5, .5, .2)])
def test_coverage_is_close_to_nominal(S, between, rate):
    # 250 repeats: standard error .014; nominal .95
    assert .89 <= covered(S, between, rate) <= .995


def test_difference_is_paired_and_signed():
    rng, hard = np.random.default_rng(7), np.random.default_rng(8).random(100)
    a, b = hard + .1 + .01 * rng.normal(size=100), hard + .01 * rng.normal(size=100)
    d = paired_difference(a, b)
    assert d.value == pytest.approx(.1, abs=.01) and d.high - d.low < .02
    back = paired_difference(b, a)
    assert back.value == pytest.approx(-d.value) and verdict(d, 1) == "agrees" == verdict(back, -1)


def test_verdict_table():
    above, holds, below = Estimate(1, .5, 2, 9), Estimate(1, -.5, 2, 9), Estimate(-1, -2, -.5, 9)
    assert [verdict(e, 1) for e in (above, holds, below)] == ["agrees", "inconclusive", "disagrees"]
    assert [verdict(e, -1) for e in (above, holds, below)] == ["disagrees", "inconclusive", "agrees"]
    assert verdict(above, 1, than=.6) == "inconclusive"
    for sign in (0, 2, "+", True):
        with pytest.raises(CourseError, match="sign"):
            verdict(above, sign)


def test_equivalence_needs_data_not_only_a_small_difference():
    d = np.random.default_rng(9).normal(0, .1, 400)
    assert equivalence(d, .05)[0] == "equivalent"
    assert equivalence(d[:5], .05)[0] == "inconclusive"
    assert equivalence(d + .3, .05)[0] == "different" and equivalence(d - .3, .05)[0] == "different"
    assert equivalence(np.zeros(400), .05)[0] == "equivalent" and equivalence(np.zeros(20), .05)[0] == "inconclusive"
    assert equivalence(d, .05)[1].level == pytest.approx(.9)
    for margin in (0, -1, float("nan"), "small", None):
        with pytest.raises(CourseError, match="margin"):
            equivalence(d, margin)


def test_equivalence_at_the_margin_has_its_error_rate():
    rng, wrong = np.random.default_rng(10), 0
    for _ in range(300):
        wrong += equivalence(rng.normal(.1, 1, 60) , .1, n_boot=200, rng=rng)[0] == "equivalent"
        wrong += equivalence(rng.normal(.4, .6, 60), .4, n_boot=200, rng=rng)[0] == "equivalent"
    assert wrong / 300 < .10                                          # nominal .05, standard error .013


@pytest.mark.parametrize("kwargs,message", [
    (dict(values=[]), "empty"), (dict(values=[1., float("nan")]), "NaN"), (dict(values=[1., float("inf")]), "infinite"),
    (dict(values=[[1., 2.], [3., 4.]]), "one-dimensional"), (dict(values=["a", "b"]), "numbers"),
    (dict(values=None), "list"), (dict(values=3.), "one-dimensional|list"),
    (dict(values=[1., 2.], seeds=[0]), "seeds has 1 entries"),
    (dict(values=[1., 2.], clusters=[0, 1, 2]), "clusters has 3"),
    (dict(values=[1., 2.], clusters=[0, float("nan")]), "NaN"),
    (dict(values=[1., 2.], level=0), "level"), (dict(values=[1., 2.], level=1), "level"),
    (dict(values=[1., 2.], level=95), "level"), (dict(values=[1., 2.], level="95%"), "level"),
    (dict(values=[1., 2.], n_boot=10), "n_boot"), (dict(values=[1., 2.], bounds=(0, 1)), "bounds"),
])
def test_bad_input_says_what_is_wrong(kwargs, message):
    with pytest.raises(CourseError, match=message):
        estimate(**kwargs)


def test_pairs_of_different_length():
    with pytest.raises(CourseError, match="same rows"):
        paired_difference([1., 2.], [1.])


def test_accepts_bool_torch_pandas():
    y = [True, False, True, True]
    want = estimate(np.array(y, float))
    assert estimate(y) == want and estimate(np.array(y)) == want
    pandas = pytest.importorskip("pandas")
    assert estimate(pandas.Series(y, index=[5, 6, 7, 8])) == want


def test_text_and_html():
    assert str(Estimate(-.0001, -.2, 12.3456, 5)) == "0.000 [-0.200, 12.346]"
    assert f"{Estimate(.5, .25, .75, 5):.0%}" == "50% [25%, 75%]"
    rows = {"<b>harm</b>": {"base": Estimate(.5, .4, .6, 5), "x&y": Estimate(.1, 0., .2, 5).as_dict()},
            "help": {"base": Estimate(.25, .2, .3, 5)}}
    t = as_table(rows)
    lines = str(t).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[2].endswith("-") and "0.500 [0.400, 0.600]" in lines[1]
    html = t._repr_html_()
    assert "<b>harm" not in html and "&lt;b&gt;harm" in html and "x&amp;y" in html
    assert "value" in str(as_table({"harm": Estimate(.5, .4, .6, 5)}))
    for bad in ({}, [], {"a": 3}, {"a": {"b": 3}}, {"a": {"value": 1}}):
        with pytest.raises(CourseError):
            as_table(bad)


def test_fast():
    seeds, prompts = table(3, 300)
    y = (np.random.default_rng(0).random(900) < .3) * 1.
    estimate(y[:300])
    t = time.perf_counter()
    estimate(y, seeds, prompts)
    assert time.perf_counter() - t < .3


def test_imports_neither_torch_nor_scipy_stats():
    code = "import sys, cai_course.stats\nprint([m for m in ('torch', 'scipy.stats') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- one number for each seed ---

def test_over_seeds_is_student_inside_the_scale():
    from scipy import stats
    values = [.52, .47, .55, .44, .5]
    half = stats.t.ppf(.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    e = over_seeds(values, bounds=(-math.inf, math.inf))
    assert e.value == pytest.approx(np.mean(values)) and (e.n, e.seeds, e.level) == (5, 5, .95)
    assert (e.low, e.high) == pytest.approx((e.value - half, e.value + half), abs=.02 * half)
    assert over_seeds(values, level=.9).high < over_seeds(values).high
    assert over_seeds(values).low < e.low and e.high < over_seeds(values).high   # a scale with ends: a rare run may hide
    edge = over_seeds([.9, 1., .97, 1., .99])
    assert edge.high == 1 and edge.low < .97


def test_over_seeds_of_differences_may_fall_below_zero():
    values = [.01, .3, .02, .25, .05]
    assert over_seeds(values).low == 0                       # taken for rates
    assert -1 < over_seeds(values, bounds=(-1, 1)).low < 0   # known to be differences
    assert over_seeds(values, bounds=(-math.inf, math.inf)).low < 0


def test_over_seeds_of_equal_values_is_never_certain():
    e = over_seeds([0.] * 5)
    assert e.low == 0 and e.high == pytest.approx(wilson(0, 5).high)
    assert over_seeds([3.] * 5).high == math.inf              # no scale, no spread: nothing is known


@pytest.mark.parametrize("values, said", [([], "empty"), ([.5], "at least two seeds"), ([.5, math.nan], "NaN"),
                                          ([[.5, .6]], "one-dimensional")])
def test_over_seeds_refuses_what_it_cannot_use(values, said):
    with pytest.raises(CourseError, match=said):
        over_seeds(values)
