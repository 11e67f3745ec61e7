"""What a maintainer fears about `overoptimization`: closed forms that are off by one, ties, signs, curves fitted to nothing."""
import ast
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cai_course import overoptimization
from cai_course.errors import CourseError
from cai_course.overoptimization import (GaoFit, RewardEnsemble, best_of_n, best_of_n_curve, best_of_n_kl, best_of_n_probs,
                                         climb, early_stop, fall_from_peak, fit_gao, fit_linear_reward, gao_bon, gao_rl,
                                         gold_value, kl_divergence, make_arena, regressional_slope, small_proxy, tilt)


class Writer:
    "Reply j to any prompt is the number j, whatever n."
    def generate(self, prompts, max_new_tokens, temperature, n, seed):
        return ["0"] * len(prompts) if n == 1 else [[str(j) for j in range(n)] for _ in prompts]


def value(prompts, texts): return torch.tensor([float(t) % 3 for t in texts])


# -- best of n --------------------------------------------------------------------------------------
def test_best_of_n_keeps_the_first_of_the_best():
    out = best_of_n(Writer(), value, ["a", "b"], 6)
    assert out.texts == ["2", "2"] and out.scores.tolist() == [2., 2.] and out.all_scores.shape == (2, 6)
    assert best_of_n(Writer(), value, ["a"], 1).texts == ["0"]


def test_best_of_n_with_a_policy(tiny_t5):
    from cai_course.models import load_policy
    policy = load_policy(tiny_t5)
    length = lambda p, t: torch.tensor([float(len(x)) for x in t])
    few, many = (best_of_n(policy, length, ["bake bread", "how"], n, seed=3, max_new_tokens=8) for n in (2, 5))
    assert [row[:2] for row in many.all_texts] == few.all_texts and (many.scores >= few.scores).all()


@pytest.mark.parametrize("change, words", [
    (dict(n=0), "n is 0"), (dict(n=2.5), "n is 2.5"), (dict(n=True), "n is True"), (dict(prompts=[]), "prompts is empty"),
    (dict(temperature=0.), "all 3 replies would be the same"), (dict(reward_fn=lambda p, t: torch.zeros(2)), "returned shape"),
    (dict(reward_fn=lambda p, t: torch.full((len(t),), math.nan)), "not finite")])
def test_best_of_n_errors(change, words):
    with pytest.raises(CourseError, match=words):
        best_of_n(**{**dict(policy=Writer(), reward_fn=value, prompts=["a"], n=3), **change})


def test_curve_equals_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(0, 4, (3, 7)).astype(float), rng.standard_normal((3, 7))
    for row in best_of_n_curve(proxy, gold, [1, 2, 3, 6, 7]):
        golds, proxies = [], []
        for p, g in zip(proxy, gold):
            for subset in itertools.combinations(range(7), row["n"]):
                best = [i for i in subset if p[i] == max(p[list(subset)])]
                golds.append(np.mean(g[best])), proxies.append(p[best[0]])
        assert row["gold"] == pytest.approx(np.mean(golds)) and row["proxy"] == pytest.approx(np.mean(proxies))


def test_curve_does_not_change_its_input_and_checks_it():
    gold = np.array([[0., 4.]])
    best_of_n_curve([[1., 1.]], gold, [1])
    assert gold.tolist() == [[0., 4.]]
    for args, words in ((([[1., 2.]], [[1.]], [1]), "both must be"), (([[1., 2.]], [[1., 2.]], [3]), "n is 3"),
                        (([[1., 2.]], [[1., 2.]], [1.5]), "n is 1.5"), (([[1., math.nan]], [[1., 2.]], [1]), "NaN")):
        with pytest.raises(CourseError, match=words): best_of_n_curve(*args)


def test_kl_closed_form():
    assert best_of_n_kl(1) == 0. and best_of_n_kl(2) == pytest.approx(math.log(2) - .5)
    assert best_of_n_kl(1000) == pytest.approx(5.91, abs=.005) and best_of_n_kl(60_000) == pytest.approx(10.0, abs=.01)  # as printed by Gao et al.
    with pytest.raises(CourseError): best_of_n_kl(.5)


def test_exact_distribution_by_enumeration():
    probs, scores, n = np.array([.1, .2, .3, .4]), np.array([2., 0., 2., 1.]), 3
    want = np.zeros(4)
    for draw in itertools.product(range(4), repeat=n):
        best = [i for i in draw if scores[i] == max(scores[list(draw)])]
        for i in best: want[i] += np.prod(probs[list(draw)]) / len(best)
    assert np.allclose(best_of_n_probs(probs, scores, n), want)


@pytest.mark.parametrize("n", [2, 5, 50])
def test_kl_without_ties_approaches_the_formula_and_ties_lower_it(n):
    even = np.full(4000, 1 / 4000)
    free = kl_divergence(best_of_n_probs(even, np.arange(4000), n), even)
    assert free == pytest.approx(best_of_n_kl(n), abs=.02) and free <= best_of_n_kl(n) + 1e-9
    tied = kl_divergence(best_of_n_probs(even, np.arange(4000) // 1000, n), even)
    assert tied < best_of_n_kl(n) and tied <= math.log(4) + 1e-9
    assert kl_divergence(best_of_n_probs(even, np.zeros(4000), n), even) == pytest.approx(0, abs=1e-12)


def test_probs_with_an_impossible_outcome():
    assert best_of_n_probs([0., 1.], [5., 1.], 4).tolist() == [0., 1.]
    assert kl_divergence([.5, .5], [1., 0.]) == math.inf
    for probs, scores, words in (([.5, .6], [0., 1.], "sum to 1"), ([.5, .5], [0.], "both must be"), ([.5, .5], [0., math.nan], "finite")):
        with pytest.raises(CourseError, match=words): best_of_n_probs(probs, scores, 2)


def test_tilt_is_the_maximum():
    rng = np.random.default_rng(0)
    p0, r, beta = rng.dirichlet(np.ones(6)), rng.standard_normal(6), .3
    best = tilt(p0, r, beta)
    def objective(p): return p @ r - beta * kl_divergence(p, p0)
    assert objective(best) == pytest.approx(beta * math.log((p0 * np.exp(r / beta)).sum()))
    assert all(objective(q) < objective(best) for q in rng.dirichlet(np.ones(6), 200))
    assert np.allclose(tilt(p0, r, 1e9), p0) and tilt(p0, r, 1e-3).argmax() == r.argmax()
    with pytest.raises(CourseError, match="beta is 0"): tilt(p0, r, 0)


def test_square_root_law():
    rng = np.random.default_rng(0)
    p0, r = rng.dirichlet(np.ones(50)), rng.standard_normal(50)
    p = tilt(p0, r, 200.)
    var = p0 @ r ** 2 - (p0 @ r) ** 2
    assert p @ r - p0 @ r == pytest.approx(math.sqrt(2 * var * kl_divergence(p, p0)), rel=.02)


# -- Gao's curves -----------------------------------------------------------------------------------
def test_gao_forms_by_hand():
    assert gao_bon(2., 3., 1.) == 2. and gao_rl(math.e, 3., 1.) == pytest.approx(2 * math.e)
    assert gao_rl(0., 3., 1.) == 0. and gao_bon([0., 1.], 1., .5).tolist() == [0., .5]


@pytest.mark.parametrize("form, curve", [("bon", gao_bon), ("rl", gao_rl)])
def test_fit_recovers_the_curve_and_its_form(form, curve):
    d = np.linspace(0, 4, 30)
    noise = np.random.default_rng(0).standard_normal(30) * .01
    fit = fit_gao(d, curve(d, 1.3, .4) + noise + 2., start=2.)
    assert fit.form == form and fit.a == pytest.approx(1.3, abs=.02) and fit.b == pytest.approx(.4, abs=.02)
    grid = np.linspace(.01, 20, 20_000)
    assert fit.peak == pytest.approx(grid[fit(grid).argmax()], abs=.01)


def test_fit_agrees_with_scipy_and_aic_by_hand():
    from scipy.optimize import curve_fit
    rng = np.random.default_rng(1)
    d = rng.uniform(.1, 3, 20)
    gold = rng.standard_normal(20)
    fit = fit_gao(d, gold, "rl")
    (a, b), _ = curve_fit(gao_rl, d, gold)
    assert fit.a == pytest.approx(a, abs=1e-5) and fit.b == pytest.approx(b, abs=1e-5)
    assert fit.aic == pytest.approx(20 * math.log(((gold - gao_rl(d, a, b)) ** 2).sum() / 20) + 6, abs=1e-4)
    assert fit_gao(d, gold).aic == min(fit_gao(d, gold, form).aic for form in ("bon", "rl"))


def test_peak_of_a_curve_that_never_falls():
    assert GaoFit("bon", 1., -.1, 0., 0., 3).peak == GaoFit("rl", 1., 0., 0., 0., 3).peak == math.inf
    assert GaoFit("bon", -1., .1, 0., 0., 3).peak == 0.


@pytest.mark.parametrize("args, words", [
    (([1., 2., 3.], [1., 2.]), "both must be"), (([1., 1., 2.], [0.] * 3), "at least 3"), (([-1., 1., 2., 3.], [0.] * 4), "sqrt"),
    (([1., 2., math.nan], [0.] * 3), "finite"), (([1., 2., 3.], [0.] * 3, "log"), "form is 'log'")])
def test_fit_errors(args, words):
    with pytest.raises(CourseError, match=words): fit_gao(*args)


# -- ensembles, noise, stopping ---------------------------------------------------------------------
def test_regressional_slope_is_the_regression():
    rng = np.random.default_rng(0)
    gold = 1.5 * rng.standard_normal(400_000)
    proxy = gold + 2 * rng.standard_normal(400_000)
    assert np.polyfit(proxy, gold, 1)[0] == pytest.approx(regressional_slope(2.25, 4.), abs=.005)
    assert regressional_slope(1., 0.) == 1.
    with pytest.raises(CourseError, match="var_gold is 0"): regressional_slope(0, 1)


def test_ensembles():
    members = [lambda p, t: torch.tensor([1., 5.]), lambda p, t: [3., 1.]]
    call = lambda *a: RewardEnsemble(members, *a)(["", ""], ["", ""]).tolist()
    assert call("mean") == [2., 3.] and call("min") == [1., 1.] and call("uncertainty", .5) == [1.5, 1.]
    assert RewardEnsemble(members).scores(["", ""], ["", ""]).shape == (2, 2)
    for args, words in (([[]], "members is empty"), ([members, "max"], "how is 'max'"), ([members, "mean", -1.], "penalty is -1")):
        with pytest.raises(CourseError, match=words): RewardEnsemble(*args)
    with pytest.raises(CourseError, match=r"members\[1\] returned shape"):
        RewardEnsemble([members[0], lambda p, t: torch.zeros(3)])(["", ""], ["", ""])


def rows(golds, kls=None): return [dict(step=i, gold=g, kl=float(i) if kls is None else kls[i], proxy=float(i)) for i, g in enumerate(golds)]


def test_early_stop():
    run = rows([0., 1., 2., 1., 1.5, 5.])
    assert early_stop(run, patience=3)["step"] == 5 and early_stop(run, patience=2)["step"] == 2
    assert early_stop(run, max_kl=1.)["step"] == 1 and early_stop(run, max_kl=3.5, key=None)["step"] == 3
    assert early_stop(rows([0., None, 2., None, 1., None]), patience=1)["step"] == 2
    assert early_stop(rows([None] * 3), max_kl=1.)["step"] == 1
    assert early_stop(rows([1., 1., 1.]))["step"] == 0  # no improvement: stay where it began
    for args, words in (((rows([None] * 3),), "nothing to decide by"), (([],), "history is empty"),
                        ((run, -1.), "above max_kl"), ((run, None, 0), "patience is 0")):
        with pytest.raises(CourseError, match=words): early_stop(*args)


# -- the arena --------------------------------------------------------------------------------------
def test_arena_is_centered_and_repeats():
    one, two, other = make_arena(3, replies=2000), make_arena(3, replies=2000), make_arena(4, replies=2000)
    assert np.array_equal(one.proxies, two.proxies) and not np.array_equal(one.proxies, other.proxies)
    assert one.gold.mean() == pytest.approx(0, abs=1e-9) and one.start.sum() == pytest.approx(1)
    assert np.allclose(one.proxies.mean(1), 0) and np.allclose(one.proxies.std(1), 1) and len(one.proxies) == 5
    def agreement(n): return np.corrcoef(make_arena(0, comparisons=n, replies=2000).proxies)[np.triu_indices(5, 1)].mean()
    assert agreement(30) < agreement(300) < agreement(3000)                    # more labels, less of their own noise


def test_linear_reward_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 300, 3))
    won = (rng.random(300) < 1 / (1 + np.exp(-(left - right) @ [1., -1., .5]))).astype(float)
    def loss(w): return np.log(1 + np.exp(-(2 * won - 1) * ((left - right) @ w))).sum() + .5 * w @ w
    w = fit_linear_reward(left, right, won)
    assert all(loss(w) < loss(w + step) for step in .05 * np.vstack([np.eye(3), -np.eye(3)]))
    assert np.allclose(fit_linear_reward(right, left, 1 - won), w)             # said the other way round


def test_climbing_raises_the_proxy_and_a_price_leads_to_the_tilt():
    arena = make_arena(1, comparisons=400, replies=1500)
    score = arena.proxies[0]
    free, priced = climb(arena, score, 60), climb(arena, score, 400, beta=1.)
    assert free[0]["kl"] == pytest.approx(0, abs=1e-12) and free[0]["proxy"] == pytest.approx(0, abs=1e-9)
    assert (np.diff([r["proxy"] for r in free]) > 0).all() and (np.diff([r["kl"] for r in free]) > 0).all()
    end = tilt(arena.start, score, 1.)                                         # a linear score: the tilt is in reach
    assert priced[-1]["kl"] == pytest.approx(kl_divergence(end, arena.start), rel=.02)
    assert priced[-1]["gold"] == pytest.approx(end @ arena.gold, abs=.02)


def test_fall_from_peak_is_fair():
    assert fall_from_peak([[0., 0.], [4., 4.], [1., 1.]], window=1) == 3.
    rng = np.random.default_rng(0)
    flat = [fall_from_peak(rng.standard_normal((20, 32))) for _ in range(400)] # nothing happens: no fall on average
    assert abs(np.mean(flat)) < 4 * np.std(flat) / 20
    naive = [x.mean(1).max() - x.mean(1)[-1] for x in rng.standard_normal((400, 20, 32))]
    assert np.mean(naive) > .2                                                 # the lucky peak would find one
    for bad in ([1., 2.], [[1.], [2.], [3.]], [[1., 2.]]):
        with pytest.raises(CourseError, match="rollouts"): fall_from_peak(bad)


def test_gold_value_and_the_small_proxy():
    from cai_course import world
    from random import Random
    asked = world.requests("harmful", "heldout", limit=6, seed=0)
    kinds = [gold_value([r.text for r in asked], [world.reply(r, style, Random(0)) for r in asked]).mean().item()
             for style in ("refuse", "evasive", "comply")]
    assert kinds == sorted(kinds, reverse=True)
    model = small_proxy(0, requests=10)
    assert model(["a"], ["b"]).shape == (1,) and model.scale.item() != 1.


# -- messages ---------------------------------------------------------------------------------------
ONE, RUN = (lambda p, t: torch.zeros(len(t))), [dict(step=0, kl=2., gold=None)]
MESSAGES = { # what was found: (a wrong call, what to do next)
    "n is 0;": (lambda: best_of_n(Writer(), value, ["a"], 0), "Use for example n=4"),
    "prompts is empty;": (lambda: best_of_n(Writer(), value, [], 2), "Pass a list of strings"),
    "temperature is 0:": (lambda: best_of_n(Writer(), value, ["a"], 2, temperature=0), "use temperature=1.0"),
    "reward_fn returned shape (2,) for 3 replies, with 1 numbers": (lambda: best_of_n(Writer(), lambda p, t: [1., math.nan], ["a"], 3), "Call reward_fn"),
    "proxy has shape (1, 2) and gold (1, 1);": (lambda: best_of_n_curve([[1., 2.]], [[1.]], [1]), "Score the same replies twice"),
    "proxy holds 1 and gold 2 numbers": (lambda: best_of_n_curve([[1., math.nan]], [[math.inf, math.nan]], [1]), "Mend the reward function"),
    "n is 3;": (lambda: best_of_n_curve([[1., 2.]], [[1., 2.]], [3]), "Write more replies"),
    "n is 0.5;": (lambda: best_of_n_kl(.5), "Use n=1"),
    "beta is 0;": (lambda: tilt([1.], [1.], 0), "use a small price"),
    "probs has shape (2,) and scores (1,);": (lambda: tilt([.5, .5], [1.], 1), "Give one score to each"),
    "probs go down to -0.5 and sum to 1, and 1 scores": (lambda: tilt([-.5, 1.5], [1., math.nan], 1), "Divide probs by their sum"),
    "form is 'log';": (lambda: fit_gao([1., 2., 3.], [0.] * 3, "log"), "Leave it out"),
    "d has shape (2,) with 1 numbers that are not finite, gold (3,) with 0;": (lambda: fit_gao([1., math.nan], [0.] * 3), "Give one gold reward for each"),
    "d goes down to -1;": (lambda: fit_gao([-1., 2., 3.], [0.] * 3), "Drop negative KL"),
    "2 different distances above 0;": (lambda: fit_gao([1., 2., 2.], [0.] * 3), "Measure more points"),
    "var_gold is 0, var_noise is 1;": (lambda: regressional_slope(0, 1), "Pass variances"),
    "members is empty;": (lambda: RewardEnsemble([]), "Pass a list"),
    "how is 'max';": (lambda: RewardEnsemble([ONE], "max"), "Choose one"),
    "penalty is -1;": (lambda: RewardEnsemble([ONE], penalty=-1), "leave yours out"),
    "members[1] returned shape (3,) for 1 replies;": (lambda: RewardEnsemble([ONE, lambda p, t: torch.zeros(3)])([""], [""]), "Mend this member"),
    "golds has shape (2,);": (lambda: fall_from_peak([1., 2.]), "use a smaller window"),
    "patience is 0;": (lambda: early_stop(RUN, patience=0), "Use patience=1"),
    "history is empty;": (lambda: early_stop([]), "Pass the rows of a run"),
    "the first row has KL 2, above max_kl 1;": (lambda: early_stop(RUN, max_kl=1), "Raise max_kl"),
    "no row holds 'gold' and there is no max_kl,": (lambda: early_stop(RUN), "Give one of them"),
}


@pytest.mark.parametrize("found", MESSAGES)
def test_a_message_names_what_was_found_and_what_to_do(found):
    wrong, next_step = MESSAGES[found]
    with pytest.raises(CourseError) as caught: wrong()
    assert found in str(caught.value) and next_step in str(caught.value)


def test_no_message_is_left_out():
    tree = ast.parse(Path(overoptimization.__file__).read_text(encoding="utf-8"))
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    assert len(raised) == len(MESSAGES)
