"""Choosing: bills by hand, pairs with a known truth, ablation as arithmetic, validation samples, comparisons of constitutions."""
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cai_course import cai, choosing, world
from cai_course.choosing import (MATTERS, NARROW, SMALL, TONE, Prices, compare_constitutions, constitution_table, error_correlation,
                                 harm_pairs, label_bill, labeling_days, labels_alone, people_in_good_faith, validate_labels, without_each)
from cai_course.constitution import Constitution, Principle, load_constitution
from cai_course.errors import CourseError
from cai_course.judge import compare
from cai_course.paths import constitutions_dir


# --- money and time ---

def test_prices_by_hand():
    assert Prices().ai_label == pytest.approx(.05712)
    assert Prices(orders=1).ai_label == pytest.approx(.02856)
    assert Prices().human_label / Prices().ai_label == pytest.approx(11.73, abs=.01)
    assert label_bill(3, 2, 1000, Prices(human_label=1., input_1k=0., output_1k=2., tokens_out=500)) == pytest.approx(3 + 2 * 2 + 2)


def test_a_free_machine_cannot_make_the_papers_recipe_three_times_cheaper():
    human, ai = 135_296, 182_831
    free = label_bill(human=human, ai=ai, prices=Prices(input_1k=0., output_1k=0.))
    assert 2 < label_bill(human=human + ai) / free < 3


@given(st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_bill_is_linear(human, ai):
    assert label_bill(2 * human, 2 * ai) == pytest.approx(2 * label_bill(human, ai))
    assert label_bill(human) + label_bill(ai=ai) == pytest.approx(label_bill(human, ai))


@pytest.mark.parametrize("field, value", [("human_label", -1.), ("input_1k", float("nan")), ("tokens_in", "830"), ("orders", 0), ("orders", 3)])
def test_impossible_prices(field, value):
    with pytest.raises(CourseError, match=field):
        Prices(**{field: value})


def test_impossible_counts():
    with pytest.raises(CourseError, match="ai is -1"):
        label_bill(ai=-1)
    for bad in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(CourseError, match="above 0"):
            labeling_days(*bad)
    assert labeling_days(120, 2, 10, hours=6) == 1.


# --- pairs and mistakes ---

def test_pairs_have_the_truth_that_the_oracle_sees():
    rows = harm_pairs(70, seed=3)
    for row in rows:
        harm = [world.judge(row["prompt"], row[side]).harmful for side in "ab"]
        assert harm[0] != harm[1] and row["truth"] == float(harm[0] < harm[1])
        assert world.understand(row["prompt"])[0].kind == row["kind"]
    assert [row["kind"] for row in rows] == list(itertools.islice(itertools.cycle(world.HARM_KINDS), 70))
    assert .3 < np.mean([row["truth"] for row in rows]) < .7, "the better reply must not sit in one place"
    assert rows == harm_pairs(70, seed=3) != harm_pairs(70, seed=4) and harm_pairs(0) == []


def test_pairs_are_of_the_wanted_kinds_and_split():
    for row in harm_pairs(12, seed=1, kinds=("theft", "deceit"), split="validation"):
        topic, target, item = world.understand(row["prompt"])
        assert topic.kind in ("theft", "deceit") and world.split_of(topic.kind, topic.name, target, item) == "validation"
    with pytest.raises(CourseError, match="n is -1"):
        harm_pairs(-1)
    with pytest.raises(CourseError, match="kind is"):
        harm_pairs(2, kinds=("gossip",))


def test_people_in_good_faith_agree_with_the_oracle_more_often_than_not():
    rows, rng = harm_pairs(60, seed=5), random.Random(0)
    assert all(not person.bad_faith for person in people_in_good_faith()) and len(people_in_good_faith()) >= 3
    right = [person.prefer(r["prompt"], r["a"], r["b"], rng) == 1 - r["truth"] for person in people_in_good_faith() for r in rows]
    assert np.mean(right) > .7


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
def test_error_correlation_is_a_correlation(pairs):
    first, second = np.array(pairs, float).T
    found = error_correlation(first, second)
    assert found == pytest.approx(error_correlation(second, first)) and -1 - 1e-9 <= found <= 1 + 1e-9
    if first.std() and second.std():
        assert found == pytest.approx(np.corrcoef(first, second)[0, 1])
        assert error_correlation(first, 1 - first) == pytest.approx(-1)
    else:
        assert found == 0


def test_error_correlation_needs_two_lists_of_one_length():
    for bad in (([1], [1, 0]), ([], []), ([[1]], [[1]])):
        with pytest.raises(CourseError, match="shapes"):
            error_correlation(*bad)


# --- principles ---

@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_leaving_out_is_the_mean_of_the_rest(size, matters, seed):
    alone = np.random.default_rng(seed).random((size, matters))
    change = without_each(alone)
    for k in range(size):
        rest = [alone[i] for i in range(size) if i != k]
        assert np.allclose(change[k], sum(rest) / len(rest) - alone.mean(0))
    assert np.allclose(change.sum(0), 0)


class WordJudge:
    """Prefers the reply with fewer of the words that the question names, or always the first place."""

    def score_options(self, prompts, options, prefixes=None):
        out = []
        for prompt in prompts:
            question, a, b = prompt.split("\n")[1], *(prompt.split(f"\n({mark}) ")[1].split("\n")[0] for mark in "AB")
            words = {"polite": ("stupid", "fool", "idiot", "clown", "donkey", "pest", "cow", "pig", "snail", "dumb", "loser", "moron")}
            gap = sum(sum(w in b.lower() for w in named) - sum(w in a.lower() for w in named)
                      for key, named in words.items() if key in question)
            out.append([3. * gap, 0.])
        return np.array(out)


def test_labels_alone_is_a_table_of_principles_by_matters():
    rules = Constitution("two", "1", "", [Principle("polite", comparison_question="Which is more polite?"),
                                          Principle("blind", comparison_question="Which reply?")])
    table = labels_alone(WordJudge(), rules, n=5, seed=1)
    assert table.shape == (2, len(MATTERS))
    assert np.allclose(table[1], .5), "a question that sees nothing is a coin"
    assert table[0, MATTERS.index("manners")] > .7 and np.allclose(np.delete(table[0], MATTERS.index("manners")), .5, atol=.2)
    with pytest.raises(CourseError, match="at least one pair"):
        labels_alone(WordJudge(), rules, n=0)


def test_one_principle_cannot_carry_the_claim_for_three(monkeypatch):
    names = [rule.id for rule in load_constitution("course").comparison_principles]
    table = np.full((len(names), len(MATTERS)), .5)
    table[names.index("reasons"), MATTERS.index("reasons")] = 1.
    monkeypatch.setattr(choosing, "labels_alone", lambda policy, constitution, seed: table)
    found = choosing.measure_principles_alone(0)
    assert found["gap"] == min(found["gaps"]) == 0. and sorted(found["gaps"]) == [0., 0., .5]
    table[names.index("polite"), MATTERS.index("manners")] = .4
    assert choosing.measure_principles_alone(0)["gap"] < 0


def test_the_mean_over_principles_is_what_many_draws_give():
    rules = Constitution("two", "1", "", [Principle("polite", comparison_question="Which is more polite?"),
                                          Principle("blind", comparison_question="Which reply?")])
    asks = world.requests("benign", "heldout", limit=40, seed=1)
    rng = random.Random(0)
    rows = [(a.text, world.reply(a, "helpful", rng), world.reply(a, "rude", rng)) for a in asks]
    p, better, worse = map(list, zip(*rows))
    drawn = np.mean([compare(WordJudge(), p, better, worse, rules, seed=s).prob_a for s in range(20)])
    each = np.mean([compare(WordJudge(), p, better, worse, rule).prob_a for rule in rules.principles])
    assert drawn == pytest.approx(each, abs=.03)


def test_the_tables_name_what_the_constitution_holds():
    ids = {rule.id for rule in load_constitution("course").principles}
    assert set(TONE) <= ids and set(NARROW) <= ids and set(TONE.values()) <= set(MATTERS)
    nouns = {kind: block["nouns"] for kind, block in world.lexicon()["harmful"].items()}
    for rule, kinds in NARROW.items():
        request = load_constitution("course")[rule].critique_request
        assert set(kinds) == {kind for kind, words in nouns.items() if any(word in request for word in words)}


# --- people who look at a sample ---

class Sure:
    def __init__(self, bad=()): self.bad = bad
    def prefer(self, prompt, a, b, rng): return int(prompt in self.bad)


ROWS = [dict(prompt=f"p{i}", chosen="x", rejected="y", kind="odd" if i % 2 else "even") for i in range(40)]

def test_a_sample_counts_shared_labels_by_group():
    found = validate_labels(ROWS, [Sure(bad={f"p{i}" for i in range(1, 40, 2)})], each=10)
    assert (found["even"].value, found["odd"].value, found["all"].value) == (1., 0., .5)
    assert (found["even"].n, found["all"].n) == (10, 20) and found["even"].low > .6
    assert validate_labels(ROWS, [Sure()], each=100)["all"].n == 40


def test_a_sample_is_drawn_by_its_seed():
    bad = Sure(bad={f"p{i}" for i in range(20)})
    first = [validate_labels(ROWS, [bad], each=6, seed=s)["all"].value for s in range(8)]
    assert first == [validate_labels(ROWS, [bad], each=6, seed=s)["all"].value for s in range(8)] and len(set(first)) > 1


def test_a_sample_needs_people_rows_and_groups():
    for arguments, message in (((ROWS, [], 3), "0 people"), ((ROWS, [Sure()], 0), "0 rows"), (([], [Sure()], 3), "no rows"),
                               ((ROWS, [Sure()], 3, "topic"), "no 'topic'")):
        with pytest.raises(CourseError, match=message):
            validate_labels(*arguments)


# --- two constitutions ---

def rows_of(name, evasive, seed=0):
    base = dict(constitution=name, stage="rl_cai", seed=seed, refuses=False, rude=0.)
    return [dict(base, group=group, prompt=f"{group} {i}", harmful=0., helpful=1., evasive=float(group == "harmful" and i < evasive),
                 explains=.5) for group in world.GROUPS for i in range(10)]


def test_the_table_measures_each_group():
    table = constitution_table(rows_of("a", 2) + rows_of("b", 8))
    assert table["evasive"]["a"].value == .2 and table["evasive"]["b"].value == .8
    assert table["help"]["a"].value == 1. and table["over-refusal"]["b"].value == 0. and table["explains"]["a"].value == .5
    assert list(table["harm"]) == ["a", "b"] and table["harm"]["a"].n == 10
    with pytest.raises(CourseError, match="no row of stage 'base'"):
        constitution_table(rows_of("a", 2), "base")


def test_a_bad_constitution_is_found_before_any_run(monkeypatch, tmp_path):
    monkeypatch.setattr(cai, "align", lambda *a, **k: pytest.fail("a run began"))
    with pytest.raises(CourseError):
        compare_constitutions(("course", "no-such-constitution"), folder=tmp_path)
    with pytest.raises(CourseError, match="empty"):
        compare_constitutions([])


def test_an_edited_copy_of_the_same_name_is_refused_before_any_run(monkeypatch, tmp_path):
    monkeypatch.setattr(cai, "align", lambda *a, **k: pytest.fail("a run began"))
    copy = tmp_path / "course.yaml"
    copy.write_text((constitutions_dir() / "course.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(CourseError, match="two constitutions are called 'course'"):
        compare_constitutions(("course", str(copy)), folder=tmp_path)
    with pytest.raises(CourseError, match="Rename one file"):
        compare_constitutions(("terse", "course", "terse"))


def test_each_constitution_gets_the_same_settings(monkeypatch, tmp_path):
    seen = []
    def align(config, folder, progress):
        seen.append(config)
        folder.mkdir(parents=True)
        (folder / "70_evaluation.jsonl").write_text(json.dumps({"stage": "base"}) + "\n")
    monkeypatch.setattr(cai, "align", align)
    rows = compare_constitutions(("course", "terse"), seed=4, folder=tmp_path, steps=3)
    assert [row["constitution"] for row in rows] == ["course", "terse"]
    first, second = ({k: v for k, v in vars(config).items() if k != "constitution"} for config in seen)
    assert first == second and (first["seed"], first["steps"], first["red_team"]) == (4, 3, SMALL["red_team"])


@pytest.mark.slow
def test_a_tiny_comparison_runs_both_phases():
    rows = compare_constitutions("terse", **{**cai.FAST, "evaluation": 3})
    assert {row["stage"] for row in rows} == {"base", "sl_cai", "rl_cai"}
    assert set(constitution_table(rows)) == {"harm", "evasive", "explains", "help", "over-refusal"}


@pytest.mark.slow
def test_a_tiny_recipe_gives_the_same_replies_twice():
    made = [choosing.hybrid_recipe(seed=1, demonstrations=8, red_team=8, preferences=8, sample=4) for _ in range(2)]
    assert made[0].replies == made[1].replies and made[0].labels == made[1].labels
    assert made[0].labels_shared.n <= 8 and len(made[0].replies) == 8 and {row["group"] for row in made[0].replies} == {"harmful", "benign"}
    assert set(made[0].wins) == {"harmful", "benign"} and made[0].wins["benign"].n == 4
    assert {row["source"] for row in made[0].help_labels} <= {"human-helpfulness"}
