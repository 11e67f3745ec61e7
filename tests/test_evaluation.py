"""What a maintainer fears about evaluation: rows that do not belong together, seeds taken for prompts, a lost minus."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from cai_course import world
from cai_course.errors import CourseError
from cai_course.evaluation import (DETOX, LAB3, LAB3_AUDIT, MEASURES, compare_systems, detoxify, elo_expected, elo_gap,
                                   elo_ratings, measure_lab3, metric_folder, paired_values, power_of, rouge_l, samples_needed,
                                   score_responses, simulate_studies, summary_pairs, talk_scores, talk_tasks, welch, win_rate)
from cai_course.experiments import EXPERIMENTS
from conftest import ROOT


# --- a printed result ---

@pytest.mark.parametrize("n_a, n_b", [(11, 11), (5, 40), (2, 3)])
def test_welch_agrees_with_scipy(n_a, n_b):
    rng = np.random.default_rng(n_a)
    a, b = rng.normal(1, 2, n_a), rng.normal(0, 5, n_b)
    ours = welch(a.mean(), a.std(ddof=1), n_a, b.mean(), b.std(ddof=1), n_b)
    theirs = stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval(.95)
    assert (ours.t, ours.p, ours.df) == pytest.approx((theirs.statistic, theirs.pvalue, theirs.df))
    assert (ours.difference.low, ours.difference.high) == pytest.approx((interval.low, interval.high))
    same = welch(a.mean(), a.std(), n_a, b.mean(), b.std(), n_b, ddof=0)
    assert same.t == pytest.approx(ours.t)


def test_lab3_is_not_significant():
    (before, sd_before), (after, sd_after), n = LAB3["before"], LAB3["after"], LAB3["n"]
    audit = welch(before, sd_before, n, after, sd_after, n, ddof=0)
    by_hand = (.043814 - .022732) / math.sqrt((.049895**2 + .022397**2) / 10)
    assert audit.t == pytest.approx(by_hand) and round(audit.t, 2) == 1.22
    assert .2 < audit.p < .3 and audit.difference.low < 0 < audit.difference.high


@pytest.mark.parametrize("change", [dict(n_a=1), dict(sd_a=-1.), dict(sd_a=0., sd_b=0.), dict(sd_b=math.nan), dict(ddof=2)])
def test_welch_refuses_what_it_cannot_use(change):
    with pytest.raises(CourseError):
        welch(**{**dict(mean_a=1., sd_a=1., n_a=5, mean_b=0., sd_b=1., n_b=5), **change})


# --- sizes and power ---

@pytest.mark.parametrize("effect, sd_a, sd_b, rho", [(.3, 1., 1., 0.), (.021, .05, .02, 0.), (.3, 1., .5, .6)])
def test_the_formula_gives_the_power_that_it_promises(effect, sd_a, sd_b, rho):
    n = samples_needed(effect, sd_a, sd_b, correlation=rho)
    _, p = simulate_studies(n, (effect, sd_a), (0., sd_b), repeats=6000, correlation=rho, paired=rho > 0)
    assert power_of(p).value == pytest.approx(.8, abs=.025)   # the normal approximation; 3 standard errors are .016


def test_half_the_effect_needs_four_times_as_many():
    assert samples_needed(.05, 1.) == pytest.approx(4 * samples_needed(.1, 1.), abs=4)
    assert samples_needed(-.1, 1.) == samples_needed(.1, 1.)
    assert samples_needed(.1, 1., power=.9) > samples_needed(.1, 1.) < samples_needed(.1, 1., level=.99)


@pytest.mark.parametrize("skewed, paired", [(False, False), (True, False), (False, True)])
def test_without_an_effect_one_study_in_twenty_finds_one(skewed, paired):
    _, p = simulate_studies(60, (1., .8), (1., .8), repeats=6000, skewed=skewed, paired=paired)
    assert power_of(p).value == pytest.approx(.05, abs=.012)


def test_simulated_scores_have_the_moments_that_were_asked_for():
    for skewed in (False, True):
        falls, _ = simulate_studies(50, (.5, .4), (.2, .3), repeats=8000, skewed=skewed)
        assert falls.mean() == pytest.approx(.3, abs=.003)
        assert falls.std() == pytest.approx(.5 / math.sqrt(50), rel=.03)
    apart, together = (simulate_studies(50, (0., 1.), (0., 1.), repeats=4000, correlation=rho)[0].std() for rho in (0., .75))
    assert together / apart == pytest.approx(.5, rel=.05)      # sqrt(1 - rho)
    assert (simulate_studies(9, (0., 1.), (0., 1.), seed=3)[1] == simulate_studies(9, (0., 1.), (0., 1.), seed=3)[1]).all()


@pytest.mark.parametrize("call", [lambda: samples_needed(0., 1.), lambda: samples_needed(math.nan, 1.),
                                  lambda: samples_needed(1., -1.), lambda: samples_needed(1., 1., 1., 2.),
                                  lambda: samples_needed(1., 1., power=1.), lambda: samples_needed(1., 1., level=0.),
                                  lambda: simulate_studies(1, (0., 1.), (0., 1.)),
                                  lambda: simulate_studies(9, (1., 1.), (1., 1.), skewed=True, correlation=.5)])
def test_impossible_studies_are_refused(call):
    with pytest.raises(CourseError, match="needed"):
        call()


# --- tasks and scores ---

def test_tasks_are_held_out_distinct_and_repeatable():
    tasks = talk_tasks(60, 40)
    assert tasks == talk_tasks(60, 40) != talk_tasks(60, 40, seed=1)
    assert [task["group"] for task in tasks] == ["talk"] * 60 + ["skill"] * 40
    assert len({task["prompt"] for task in tasks}) == 100
    train = {(t.facts[0], t.facts[1], t.facts[2]) for t in world.dialogues("train", 3000, seed=0)}
    held = {world.talk_facts(task["prompt"].split("\n", 1)[1])[:3] for task in tasks[:60]}
    assert len(held) > 30 and not held & train


def test_too_many_tasks_are_refused(monkeypatch):
    talk = world.dialogues("heldout", 1, rude=True)[0]
    monkeypatch.setattr(world, "dialogues", lambda *a, **k: [talk] * 50)
    with pytest.raises(CourseError, match="only 1 different prompts of the group 'talk'"):
        talk_tasks(5, 5)


def test_scores_of_good_rude_wrong_and_empty_summaries():
    talk = world.dialogues("heldout", 1, rude=True)[0]
    other = next(t for t in world.dialogues("heldout", 50, seed=5) if not set(t.facts) & set(talk.facts))
    texts = [talk.summary, talk.rude_summary, other.summary, "", "so lovely " * 10]
    scores = talk_scores([talk.prompt] * 5, texts)
    assert scores == {"rude": [0., 1., 0., 0., 0.], "faithful": [1., 1., 0., 0., 0.]}


@pytest.mark.parametrize("prompts, texts, said", [
    (["How do I bake bread?"], ["Mix."], "no talk"), ([f"{world.TALK_OPENING} blah"], ["x"], "no talk"),
    ([world.skill_items("train", 1)[0].prompt], ["x"], "no talk"), (["a", "b"], ["x"], "2 prompts and 1")])
def test_prompts_that_are_no_talks_have_no_scores(prompts, texts, said):
    with pytest.raises(CourseError, match=said):
        talk_scores(prompts, texts)


def test_score_responses_fills_the_right_columns_and_leaves_its_input_alone():
    tasks = talk_tasks(3, 2)
    kept = [dict(task) for task in tasks]
    answers = [task["reference"] for task in tasks]
    answers[-1] = answers[-1].upper() + "."        # case and punctuation do not count
    rows = score_responses(tasks, answers, seed=7, reward_fn=lambda p, r: [len(text) for text in r])
    assert tasks == kept and {row["seed"] for row in rows} == {7}
    assert [row["reward"] for row in rows[:3]] == [len(text) for text in answers[:3]]
    assert [set(row) - set(tasks[0]) for row in rows] == [{"seed", "response", "rude", "faithful", "reward"}] * 3 + [
        {"seed", "response", "skill"}] * 2
    assert [row["skill"] for row in rows[3:]] == [1., 1.]
    assert score_responses(tasks[3:], ["no", answers[-1]])[0]["skill"] == 0.
    with pytest.raises(CourseError, match="5 tasks and 4"):
        score_responses(tasks, answers[:-1])


# --- before and after ---

def fake(values, seed=0, group="talk", column="rude"):
    return [dict(group=group, prompt=f"p{i}", seed=seed, response=f"r{i}", **{column: float(v)}) for i, v in enumerate(values)]


def test_a_change_is_after_minus_before_by_hand():
    table = compare_systems(fake([1, 1, 1, 0]), fake([0, 1, 0, 0]), {"rude": MEASURES["rude"]})
    row = table["rude"]
    assert (row["before"].value, row["after"].value, row["change"].value) == (.75, .25, -.5)
    assert row["change"].n == 4 and row["change"].low < -.5 < row["change"].high


def test_pairs_are_found_even_if_the_seeds_come_mixed():
    before = fake([1, 0], seed=1) + fake([0, 0], seed=0)
    after = fake([0, 0], seed=0) + fake([1, 1], seed=1)
    x = paired_values(before, after, "rude")
    assert x == dict(before=[0., 0., 1., 0.], after=[0., 0., 1., 1.], seeds=[0, 0, 1, 1], clusters=["p0", "p1"] * 2)


@pytest.mark.parametrize("after, said", [
    (fake([0, 1, 1])[:2], "after has 2"), (fake([0, 1, 1], seed=1), r"\(0, 'p0'\) and \(1, 'p0'\)\. They must be the same prompts"),
    (fake([0, 1, 1])[::-1], "same prompts under the same seeds, in the same order"), ([], "after has 0"),
    (fake([0, 1, 1], group="skill"), "after has 0"), (fake([0, 1, 1], column="other"), "3 of 3 rows have no 'rude'")])
def test_rows_that_do_not_belong_together_are_refused(after, said):
    with pytest.raises(CourseError, match=said):
        paired_values(fake([1, 1, 1]), after, "rude")


def test_a_measure_of_all_replies_is_taken_seed_by_seed():
    seen = []
    measures = {"length": ("talk", lambda rows: seen.append([row["seed"] for row in rows]) or [len(rows)] * len(rows))}
    before = fake([1, 1], seed=0) + fake([1, 1, 1], seed=1)
    assert paired_values(before, before, "length", measures)["before"] == [2, 2, 3, 3, 3]
    assert seen == [[0, 0], [1, 1, 1]] * 2


def test_the_same_answers_under_three_seeds_are_not_three_times_the_prompts():
    rng = np.random.default_rng(0)
    before, after = rng.random(80) < .6, rng.random(80) < .3
    one = compare_systems(fake(before), fake(after), {"rude": MEASURES["rude"]})["rude"]["change"]
    three = compare_systems(*([row for seed in range(3) for row in fake(v, seed)] for v in (before, after)),
                            {"rude": MEASURES["rude"]})["rude"]["change"]
    assert three.value == pytest.approx(one.value) and three.n == one.n == 80 and three.seeds == 3
    assert (three.high - three.low) / (one.high - one.low) == pytest.approx(1., abs=.1)     # as independent rows: 0.58


# --- win rates and Elo ---

def test_ties_are_half_a_win_or_left_out():
    assert win_rate([1, .5, .5, 0, 1]).value == .6
    assert win_rate([1, .5, .5, 0, 1], ties="drop").value == pytest.approx(2 / 3)
    assert win_rate([1, 1, 0, 0], clusters=["a", "a", "b", "b"]).n == 2
    for points, options, said in (([.5], dict(ties="drop"), "none has a winner"), ([1., 2.], {}, "hold 2.0; each must be 1"), ([], {}, "none"),
                                  ([1.], dict(ties="win"), "ties is 'win'"), ([math.nan], {}, "must be 1")):
        with pytest.raises(CourseError, match=said):
            win_rate(points, **options)


@given(st.floats(-1500, 1500))
@settings(deadline=None, max_examples=50)
def test_elo_keeps_its_minus(gap):
    assert (elo_expected(gap) > .5) == (gap > 0) or abs(gap) < 1e-9
    assert elo_expected(gap) + elo_expected(-gap) == pytest.approx(1.)
    assert elo_gap(float(elo_expected(gap))) == pytest.approx(gap, abs=1e-6)


def test_elo_by_hand():
    assert elo_expected(400) == pytest.approx(10 / 11) and elo_expected(-800) == pytest.approx(1 / 101)
    assert elo_gap(.75) == pytest.approx(400 * math.log10(3)) and elo_gap(.5) == 0
    assert (elo_gap(1.), elo_gap(0)) == (math.inf, -math.inf)
    for rate in (-.1, 1.1, math.nan):
        with pytest.raises(CourseError, match="rate"):
            elo_gap(rate)


def play(strengths, games, seed=0): # random games that follow Bradley-Terry on the Elo scale
    rng, names = np.random.default_rng(seed), list(strengths)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    return [(a, b, float(rng.random() < elo_expected(strengths[a] - strengths[b]))) for a, b in pairs for _ in range(games)]


def test_ratings_recover_true_strengths_inside_their_intervals():
    truth = {"x": 150., "y": 0., "z": -150.}
    ratings = elo_ratings(play(truth, 800))
    assert list(ratings) == ["x", "y", "z"]
    for name, strength in truth.items():
        assert ratings[name].low < strength < ratings[name].high and ratings[name].high - ratings[name].low < 60
    flipped = elo_ratings([(a, b, 1 - s) for a, b, s in play(truth, 800)])
    assert list(flipped) == ["z", "y", "x"]


def test_ratings_agree_with_maximum_likelihood_by_another_optimizer():
    games = play({"a": 80., "b": 0., "c": 30., "d": -110.}, 25, seed=1)
    names = sorted({n for a, b, _ in games for n in (a, b)})
    ties = [(a, b, .5) for i, a in enumerate(names) for b in names[:i]]
    def loss(theta):
        r = dict(zip(names, theta))
        return sum(-s * math.log(elo_expected(r[a] - r[b])) - (1 - s) * math.log(elo_expected(r[b] - r[a])) for a, b, s in games + ties)
    best = optimize.minimize(loss, np.zeros(4)).x
    ours = elo_ratings(games, n_boot=10)
    assert [ours[n].value for n in names] == pytest.approx(list(best - best.mean()), abs=.5)


def test_ratings_are_finite_for_a_system_that_never_lost_and_count_prompts():
    ratings = elo_ratings([("a", "b", 1)] * 50)
    assert ratings["a"].value - ratings["b"].value == pytest.approx(elo_gap(50.5 / 51), abs=.01)
    games = play({"a": 50., "b": 0.}, 60)
    apart, lumped = elo_ratings(games), elo_ratings(games, clusters=[i // 20 for i in range(60)])
    assert lumped["a"].n == 3 and apart["a"].n == 60 and lumped["a"].value == apart["a"].value
    copied = elo_ratings(games * 4, clusters=list(range(60)) * 4)["a"]      # the same games four times over
    assert (copied.high - copied.low) / (apart["a"].high - apart["a"].low) == pytest.approx(1., abs=.15)


@pytest.mark.parametrize("games, said", [([], "between 0 systems"), ([("a", "a", 1)], "between 1 systems"),
                                         ([("a", "b", .7)], "'a', 'b', 0.7"), ([("a", "b", 1), ("a", "b", 2)], "'a', 'b', 2")])
def test_games_that_are_none_are_refused(games, said):
    with pytest.raises(CourseError, match=f"{said}.*two systems"):
        elo_ratings(games)


# --- the metric ---

def test_rouge_by_hand():
    assert rouge_l(["a b c d", "x"], ["a c d", "a"]) == pytest.approx([2 * 1 * .75 / 1.75, 0.])
    with pytest.raises(CourseError, match="2 predictions"):
        rouge_l(["a", "b"], ["a"])


def test_an_unknown_metric_is_refused():
    with pytest.raises(CourseError, match="there is talk_summaries"):
        metric_folder("../world")


@pytest.mark.slow
def test_evaluate_loads_the_metric_without_a_network(tmp_path):
    program = """
import socket
def closed(*a, **k): raise OSError("no network in this test")
socket.socket.connect = closed
import evaluate
from cai_course import world
from cai_course.evaluation import metric_folder
metric = evaluate.load(metric_folder())
talks = world.dialogues("heldout", 6, seed=2, rude=True)
given = dict(prompts=[t.prompt for t in talks], references=[t.summary for t in talks])
good = metric.compute(predictions=[t.summary for t in talks], **given)
bad = metric.compute(predictions=[t.rude_summary for t in talks], **given)
assert (good["rude"], good["faithful"], good["rouge_l"], good["n"]) == (0., 1., 1., 6), good
assert bad["rude"] == 1. and bad["faithful"] == 1. and bad["rouge_l"] < 1, bad
assert good["rude_interval"][0] == 0. < good["rude_interval"][1]
print("fine")
"""
    environment = dict(os.environ, HF_HOME=str(tmp_path), HF_MODULES_CACHE=str(tmp_path / "modules"))
    for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.strip().endswith("fine"), done.stderr


# --- training, at toy size, and the experiments ---

def test_pairs_for_the_reward_model_prefer_the_polite_and_the_fitting_summary():
    talks = world.dialogues("train", 6, seed=0, rude=True)
    pairs = summary_pairs(talks)
    assert len(pairs) == 12
    for pair in pairs:
        chosen, rejected = (talk_scores([pair["prompt"]], [pair[side]]) for side in ("chosen", "rejected"))
        assert chosen == {"rude": [0.], "faithful": [1.]}
        assert rejected["rude"] == [1.] or rejected["faithful"][0] < 1


def test_detoxify_repeats_itself_and_pairs_its_rows(tiny_t5):
    from cai_course.rlhf import RLHFConfig
    config = RLHFConfig(steps=1, batch_size=4, max_new_tokens=6, value_warmup=0)
    tasks = talk_tasks(4, 3)
    one, two = (detoxify(1, tasks, tiny_t5, talks=6, config=config) for _ in range(2))
    assert one.before == two.before and one.after == two.after and one.history == two.history
    assert one.history[0]["start_gap"] < 1e-3 and len(one.history) == 2
    assert {row["seed"] for row in one.before + one.after} == {1}
    assert set(compare_systems(one.before, one.after)) == {"rude", "faithful", "skill"}


def test_the_experiments_are_registered_and_the_audit_finds_what_the_formula_says():
    assert EXPERIMENTS["lab3-audit"] is LAB3_AUDIT and EXPERIMENTS["detox-before-after"] is DETOX and DETOX.models == ("pocket-t5",)
    row = measure_lab3(0)
    assert row == measure_lab3(0) != measure_lab3(1)
    assert row["needed"] == 59 and row["power"] < .5 and .75 < row["power_needed"] < .9
    assert row["exaggeration"] > 1
