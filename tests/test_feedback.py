"""Properties and edges of votes, agreement, consensus and labeler reports."""
import html
import math
import random
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from cai_course.errors import CourseError
from cai_course import world
from cai_course.feedback import (AnswerForm, LabelDesk, accuracy_from_agreement, cohen_kappa, collect_rankings,
                                 consensus_right, dawid_skene, fleiss_kappa, gold_report, instruct, kendall_w,
                                 label_agreement, majority, mean_agreement, outlier_labelers,
                                 outlier_study, pairwise_agreement, rankings_to_votes, single_labels, truth_gap,
                                 truth_pairs, vague_crowd, vote_table, written_sets)

HOUSE = ["nothing to do", "air conditioning", "not too hot"]


def house(**ranks): return [dict(prompt="hot", completions=HOUSE, labeler=k, ranks=v) for k, v in ranks.items()]


class Coin:
    "A labeler who is right with probability `skill` on every contest of two replies; the reply 'good...' is better."
    def __init__(self, name, skill): self.name, self.skill = name, skill
    def rank(self, prompt, replies, rng):
        right = rng.random() < self.skill
        return [1 if r.startswith("good") == right else 2 for r in replies]


def crowd(skills, n=300, seed=0):
    prompts = [f"p{i}" for i in range(n)]
    rng = random.Random(seed)
    replies = [rng.sample([f"good {i}", f"{rng.choice('az')} bad {i}"], 2) for i in range(n)]
    return rankings_to_votes(collect_rankings(prompts, replies, [Coin(f"L{i}", s) for i, s in enumerate(skills)], seed))


def share_right(consensus): return np.mean(np.where(consensus.probability == .5, .5, (consensus.probability > .5)
                                                    == consensus.a.str.startswith("good")))


def test_house_by_hand():
    votes = rankings_to_votes(house(H1=[2, 1, 3], H2=[2, 1, 3], H3=[2, 3, 1]))
    assert len(votes) == 9 and votes.task.nunique() == 3
    table = vote_table(votes)
    assert (table.H1 == table.H2).all() and (table.H1 == 1 - table.H3).all()
    assert mean_agreement(votes).value == pytest.approx(1 / 3)
    assert kendall_w([[2, 1, 3], [2, 1, 3], [2, 3, 1]]) == pytest.approx(24 / 216)
    wins = {t: 0. for t in HOUSE}
    for r in majority(votes).itertuples(): wins[r.a] += r.probability; wins[r.b] += 1 - r.probability
    assert sorted(wins, key=lambda t: -wins[t]) == [HOUSE[1], HOUSE[0], HOUSE[2]]


def test_order_of_display_does_not_matter():
    one = rankings_to_votes(house(H1=[2, 1, 3]))
    two = rankings_to_votes([dict(prompt="hot", completions=HOUSE[::-1], labeler="H1", ranks=[3, 1, 2])])
    key = lambda v: sorted(map(tuple, v[["a", "b", "vote"]].to_numpy().tolist()))
    assert key(one) == key(two)


def test_ties_and_identical_replies():
    votes = rankings_to_votes([dict(prompt="p", completions=["x", "y", "x"], labeler="A", ranks=[1, 1, 1])])
    assert set(votes.vote) == {.5} and len(votes) == 2
    with pytest.raises(CourseError, match="no contest"):
        rankings_to_votes([dict(prompt="p", completions=["x", "x"], labeler="A", ranks=[1, 2])])


@pytest.mark.parametrize("bad, words", [(dict(ranks=[1, 2]), "3 completions"),
                                        (dict(ranks=[1, 2, math.nan]), "finite"), (dict(ranks="abc"), "one number"),
                                        (dict(completions="text"), "completions are 'text'; a list of strings")])
def test_bad_rankings(bad, words):
    good = house(H1=[1, 2, 3])[0]
    with pytest.raises(CourseError, match=words) as caught: rankings_to_votes([good, good | bad])
    assert "ranking 1" in str(caught.value)


def test_missing_keys_and_double_votes():
    with pytest.raises(CourseError, match="needs prompt"): rankings_to_votes([dict(prompt="p")])
    with pytest.raises(CourseError, match="no contest"): rankings_to_votes([])
    with pytest.raises(CourseError, match="voted twice"): vote_table(rankings_to_votes(house(A=[1, 2, 3]) * 2))
    with pytest.raises(CourseError, match="make them with"): vote_table(pd.DataFrame(dict(task=[1])))


@pytest.mark.parametrize("seed", range(4))
def test_cohen_against_the_formula(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    observed = (a == b).mean()
    chance = sum((a == c).mean() * (b == c).mean() for c in range(3))
    assert cohen_kappa(a, b) == pytest.approx((observed - chance) / (1 - chance))
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa(b, a))
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa([f"c{x}" for x in a], [f"c{x}" for x in b]))
    assert cohen_kappa(a, a) == pytest.approx(1)


def test_kappa_edges():
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    for a, b in (([], []), ([1], [1, 2]), ([math.nan], [1.]), ([None], [1]), ([[1]], [[1]])):
        pytest.raises(CourseError, cohen_kappa, a, b)
    perfect = crowd([1., 1., 1.], 40)
    assert fleiss_kappa(perfect) == pytest.approx(1)
    assert abs(fleiss_kappa(crowd([.5] * 4, 500))) < .06
    with pytest.raises(CourseError, match="two labelers"): fleiss_kappa(rankings_to_votes(house(A=[1, 2, 3])))


@pytest.mark.parametrize("seed", range(4))
def test_fleiss_against_the_formula(seed):
    votes = crowd([.9, .7, .6, .8], 50, seed)
    counts = np.array([[(row == v).sum() for v in (0, 1)] for row in vote_table(votes).to_numpy()])
    n = counts.sum(1)[0]
    observed = ((counts**2).sum(1) - n).mean() / (n * (n - 1))
    chance = ((counts.sum(0) / counts.sum())**2).sum()
    assert fleiss_kappa(votes) == pytest.approx((observed - chance) / (1 - chance))
    assert mean_agreement(votes).value == pytest.approx(observed)


@pytest.mark.parametrize("seed", range(6))
def test_kendall_w_against_scipy(seed):
    from scipy.stats import friedmanchisquare, spearmanr
    rng = np.random.default_rng(seed)
    table = rng.integers(1, 5, (4, 6)) if seed % 2 else np.array([rng.permutation(6) + 1 for _ in range(4)])
    chi2 = friedmanchisquare(*table.T).statistic                       # = m (n - 1) W, tie-corrected
    assert kendall_w(table) == pytest.approx(chi2 / (4 * 5))
    # without ties W is the mean rank correlation, rescaled
    if not seed % 2:
        mean_rho = np.mean([spearmanr(a, b).statistic for a, b in combinations(table, 2)])
        assert kendall_w(table) == pytest.approx((1 + 3 * mean_rho) / 4)
    assert kendall_w(table[:, ::-1]) == pytest.approx(kendall_w(table)) == pytest.approx(kendall_w(table[::-1]))


def test_kendall_w_edges():
    assert kendall_w([[1, 2, 3]] * 5) == pytest.approx(1) and kendall_w([[1, 2], [2, 1]]) == 0
    assert math.isnan(kendall_w([[1, 1], [1, 1]]))
    for bad in ([[1, 2, 3]], [1, 2], [[1], [1]], [[1, math.nan], [1, 2]], [[1, 2], [1]], [["x", "y"], ["x", "y"]]):
        pytest.raises(CourseError, kendall_w, bad)


@pytest.mark.parametrize("skill", [.6, .8, .95])
def test_accuracy_from_agreement(skill):
    assert accuracy_from_agreement(skill**2 + (1 - skill)**2) == pytest.approx(skill)
    assert accuracy_from_agreement(mean_agreement(crowd([skill] * 3, 2000)).value) == pytest.approx(skill, abs=.03)


def test_accuracy_from_agreement_edges():
    assert accuracy_from_agreement(.5) == .5 and accuracy_from_agreement(1) == 1
    for bad in (.49, 1.01, math.nan, "a", True, None): pytest.raises(CourseError, accuracy_from_agreement, bad)


def test_collect_is_reproducible_and_labelers_do_not_disturb_each_other():
    prompts, replies, people = ["p", "q", "p"], [["good", "z"]] * 3, [Coin("A", .5), Coin("B", .5)]
    once = collect_rankings(prompts, replies, people, seed=3)
    assert once == collect_rankings(prompts, replies, people, seed=3)
    assert [r for r in once if r["labeler"] == "B"] == collect_rankings(prompts, replies, people[1:], seed=3)
    many = [collect_rankings(["p"] * 30, [["good", "z"]] * 30, people, seed=s) for s in (0, 1)]
    assert many[0] != many[1]


def test_collect_errors():
    one, two = [Coin("A", 1)], [["a", "b"]]
    for args in ((["p"], [], one), ([], [], one), (["p"], two, []), (["p"], two, one * 2), ("p", two, one),
                 (["p"], [["a"]], one)):
        pytest.raises(CourseError, collect_rankings, *args)


@pytest.mark.parametrize("seed", range(3))
def test_dawid_skene_beats_majority_when_skills_differ(seed):
    votes = crowd([.95, .6, .55, .55, .1], 400, seed)
    consensus, skill = dawid_skene(votes)
    assert share_right(consensus) > share_right(majority(votes)) + .05
    assert skill.to_numpy() == pytest.approx([.95, .6, .55, .55, .1], abs=.12)


def test_dawid_skene_is_majority_when_skills_are_equal():
    votes = crowd([.8, .8, .8], 300)
    assert ((dawid_skene(votes)[0].probability > .5) == (majority(votes).probability > .5)).mean() > .97


def test_dawid_skene_full_and_edges():
    votes = crowd([.9, .8, .7, .6], 300)
    assert share_right(dawid_skene(votes, one_coin=False)[0]) > .85
    with pytest.raises(CourseError, match="tie"): dawid_skene(votes.assign(vote=.5))
    some = votes.assign(vote=votes.vote.where(votes.task != 0, .5))
    consensus, _ = dawid_skene(some)
    assert consensus.probability[0] == .5 and len(consensus) == 300
    one_sided, _ = dawid_skene(votes.assign(vote=1.))
    assert (one_sided.probability > .5).all()
    assert consensus.probability.between(0, 1).all() and list(consensus.columns) == list(majority(votes).columns)


def test_consensus_becomes_pairs():
    from cai_course.pairs import consensus_to_pairs
    votes = crowd([.9, .8, .7], 50)
    rows = consensus_to_pairs(majority(votes), source="crowd")
    assert len(rows) == 50 and all(r["label"] >= .5 and r["source"] == "crowd" for r in rows)
    assert np.mean([r["chosen"].startswith("good") for r in rows]) > .8
    assert {r["label"] for r in consensus_to_pairs(dawid_skene(votes)[0], hard=True)} == {1.}


@pytest.mark.parametrize("seed", range(3))
def test_outliers_are_found_and_good_people_are_not(seed):
    report = outlier_labelers(crowd([.95, .9, .9, .55, .1], 300, seed))
    assert list(report.verdict) == ["ok", "ok", "ok", "careless", "reversed"]


def test_false_alarms_are_rare():
    flagged = [(outlier_labelers(crowd([.75] * 5, 60, s)).verdict != "ok").sum() for s in range(20)]
    # 100 honest people; a 95 % interval and a gap on top
    assert sum(flagged) <= 5


def test_outlier_edges():
    with pytest.raises(CourseError, match="fewer than three"):
        outlier_labelers(rankings_to_votes(house(A=[1, 2, 3], B=[1, 2, 3])))
    stranger = rankings_to_votes([dict(prompt="x", completions=["a", "b"], labeler="Z", ranks=[1, 2])])
    alone = pd.concat([crowd([.9, .9, .9], 20), stranger.assign(task=99)])
    assert outlier_labelers(alone).verdict["Z"] == "unknown"


def test_pairwise_agreement_is_symmetric():
    table = pairwise_agreement(crowd([.9, .6, .2], 100))
    assert (table == table.T).all().all() and (np.diag(table) == 1).all()


def test_label_agreement():
    assert label_agreement([.9, .1, .5, .5], [.6, .6, 1, .5]).value == pytest.approx((1 + 0 + .5 + .5) / 4)
    e = label_agreement([1, 1, 0, 0] * 20, [1, 0, 0, 0] * 20, clusters=[i // 4 for i in range(80)])
    assert e.value == .75 and e.n == 20
    a, b = np.random.default_rng(0).random((2, 50))
    value = label_agreement(a, b).value
    assert value == label_agreement(b, a).value == label_agreement(1 - a, 1 - b).value
    assert value == pytest.approx(1 - label_agreement(a, 1 - b).value)
    for a, b in (([1.2], [1.]), ([math.nan], [1.]), ([], []), ([1.], [1., 0.])):
        pytest.raises(CourseError, label_agreement, a, b)


def test_world_labelers_fit():
    from cai_course.world import labelers, reply, requests
    asked = requests("benign", "train", limit=30, seed=0)
    sets = [[reply(r, style, random.Random(style)) for style in ("helpful", "evasive", "rude")] for r in asked]
    report = outlier_labelers(rankings_to_votes(collect_rankings([r.text for r in asked], sets, labelers(), seed=0)))
    assert report.verdict["Evan"] == "reversed" and (report.verdict.drop("Evan") != "reversed").all()


# ---- forms: rankings, ties, thumbs

def test_forms():
    prompts, sets = written_sets(20, seed=2)
    for person in world.labelers():
        ask = lambda form: [form.rank(p, t, random.Random(0)) for p, t in zip(prompts, sets)]
        plain, narrow = ask(person), ask(AnswerForm(person, width=0.))
        assert narrow == plain                                          # nothing is closer than nothing
        assert all(set(r) == {1} for r in ask(AnswerForm(person, width=math.inf)))
        for strict, loose in zip(plain, ask(AnswerForm(person, width=1.))):
            assert all((a < b) <= (x <= y) for a, x in zip(strict, loose) for b, y in zip(strict, loose))
        thumbs = ask(AnswerForm(person, "thumbs"))
        assert {x for r in thumbs for x in r} == {1, 2}
    careful, foe = world.Labeler("A", 50.), world.Labeler("B", 50., bad_faith=True)
    up = [AnswerForm(p, "thumbs").rank(prompts[0], sets[0], random.Random(1)) for p in (careful, foe)]
    worth = [careful.value(prompts[0], t) for t in sets[0]]
    assert up[0] == [1 if v > .2 else 2 for v in worth] and up[1] == [3 - x for x in up[0]]
    with pytest.raises(CourseError, match="stars"): AnswerForm(careful, "stars").rank("p", ["a"], random.Random(0))


def test_ties_do_not_chain():
    "Three values, each within the width of the next but the last not of the first: two ranks, not one."
    class Fixed(world.Labeler):
        def value(self, prompt, text): return float(text)
    class NoNoise(random.Random):
        def random(self): return math.exp(-1)                            # -log(-log(x)) = 0
    form = AnswerForm(Fixed("F", reliability=1.), width=1.)
    assert form.rank("p", ["0", "0.8", "1.6"], NoNoise()) == [3, 1, 1]
    assert form.rank("p", ["5", "0", "4.5", "-9"], NoNoise()) == [1, 3, 1, 4]


# ---- the truth, instructions, gold questions

def test_consensus_right_counts_as_the_reader_would():
    prompts, sets = written_sets(10, seed=3)
    votes = rankings_to_votes(collect_rankings(prompts, sets, [world.Labeler("sure", 1e6)]))
    tasks = majority(votes)
    gap = truth_gap(tasks)
    right, where = consensus_right(tasks)
    assert right.mean() > .99 and len(right) == len(where) == (abs(gap) > 1e-9).sum()
    assert consensus_right(tasks.assign(probability=1 - tasks.probability))[0].mean() < .01
    assert set(consensus_right(tasks.assign(probability=.5))[0]) == {.5}
    pairs = truth_pairs(prompts, sets)
    assert len(pairs) == (abs(gap) > 1e-9).sum()
    reader = world.Labeler("r")
    assert all(reader.value(p["prompt"], p["chosen"]) > reader.value(p["prompt"], p["rejected"]) for p in pairs)


def test_written_sets():
    prompts, sets = written_sets(8, "heldout", seed=4)
    assert len(prompts) == len(set(prompts)) == 8 and all(len(s) == 4 for s in sets)
    assert (prompts, sets) == written_sets(8, "heldout", seed=4) != written_sets(8, "heldout", seed=5)
    for bad in (0, 1, 7, -2): pytest.raises(CourseError, written_sets, bad)


def test_instructions_cure_one_misreading_each():
    people = vague_crowd(40, seed=1)
    assert any(p.bad_faith for p in people) and any(p.leniency for p in people) and any(p.length_bias for p in people)
    assert not any(p.bad_faith for p in instruct(people, "scale")) and instruct(people) == people
    both = instruct(people, "harm", "length")
    assert all(p.leniency == p.length_bias == 0 for p in both)
    assert [p.bad_faith for p in both] == [p.bad_faith for p in people]
    assert [p.reliability for p in instruct(people, "examples")] == [2 * p.reliability for p in people]
    with pytest.raises(CourseError, match="smile"): instruct(people, "smile", "harm")


def test_gold_questions_see_through_a_gang():
    votes = crowd([.9, .9, .1, .1, .1], 200)
    assert (outlier_labelers(votes).verdict[["L0", "L1"]] == "reversed").all()
    tasks = majority(votes)
    gold = {r.task: int(r.a.startswith("good")) for r in tasks.head(40).itertuples()}
    report = gold_report(votes, gold)
    assert report.low[["L0", "L1"]].min() > .5 > report.high[["L2", "L3", "L4"]].max()
    assert (report.contests == 40).all()
    mine = vote_table(votes).loc[list(gold), "L0"]
    assert report.right["L0"] == pytest.approx(np.mean([mine[t] == g for t, g in gold.items()]))
    for bad, words in (({}, "none of the 0"), ({-5: 1}, "none of the 1"), ({0: .5}, "gold answers are \\['0.5'\\]; each must be 1 .a is better. or 0")):
        with pytest.raises(CourseError, match=words): gold_report(votes, bad)


def test_single_labels_divide_the_work():
    prompts, sets = written_sets(60, seed=5)
    rows = single_labels(prompts, sets, world.labelers(), seed=1)
    assert [r["prompt"] for r in rows] == prompts and len({r["labeler"] for r in rows}) == 5
    assert rows == single_labels(prompts, sets, world.labelers(), seed=1) != single_labels(prompts, sets, world.labelers(), 2)


def test_outlier_study_drops_and_turns_only_the_flagged():
    study = outlier_study(0, shared=30, single=20)
    assert list(study["report"].index[study["report"].verdict == "reversed"]) == ["Evan"]
    everybody, dropped, turned = (study["arms"][k] for k in ("everybody", "dropped", "turned"))
    assert dropped == [p for p in everybody if p["source"] != "Evan"] and 0 < len(dropped) < len(everybody)
    key = lambda p: (p["prompt"], p["source"], frozenset([p["chosen"], p["rejected"]]))
    before, after = ({key(p): p["chosen"] for p in rows} for rows in (everybody, turned))
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]) == (k[1] != "Evan") for k in before)
    assert not {p["prompt"] for p in everybody} & {p["prompt"] for p in study["held_out"]}


# ---- the desk

def panel(n=4, names=(0, 2, 4)):
    prompts, sets = written_sets(n, seed=6)
    return collect_rankings(prompts, sets, [world.labelers()[i] for i in names], seed=1)


def test_desk_collects_ordinary_rankings():
    desk = LabelDesk(panel(), seed=1)
    assert not desk.done and desk.rankings == [] and "Prompt 1 of 4" in desk.message()
    assert sorted(desk.shown) == sorted(panel()[0]["completions"])
    assert desk.click(2) and not desk.click(2) and not desk.click(9) and not desk.click(-1)   # taken, or not there
    assert not desk.submit() and desk.rankings == []                                          # not all have a rank
    shown = desk.shown
    assert desk.click(0, same=True) and desk.click(3) and desk.click(1, same=True) and desk.submit()
    (row,) = desk.rankings
    given = dict(zip(row["completions"], row["ranks"]))
    assert [given[text] for text in shown] == [1, 3, 1, 3] and row["labeler"] == "you"
    assert "Prompt 2 of 4" in desk.message() and "%" in desk.message()
    desk.click(0), desk.clear()
    assert desk.click(0)
    votes = desk.votes()
    assert set(votes.labeler) == {"Asha", "Cleo", "Evan", "you"} and votes.prompt.nunique() == 1


def test_somebody_who_copies_agrees_with_whom_he_copies():
    others = panel(10)
    desk = LabelDesk(others)
    asha = {r["prompt"]: dict(zip(r["completions"], r["ranks"])) for r in others if r["labeler"] == "Asha"}
    while not desk.done:
        ranks = asha[desk.prompts[desk.place]]
        for text in sorted(desk.shown, key=ranks.get): desk.click(desk.shown.index(text))
        assert desk.submit()
    assert pairwise_agreement(desk.votes()).loc["you", "Asha"] == 1 and not desk.submit() and not desk.click(0)
    assert "All prompts are done." in desk.message() and desk.shown == []
    assert desk.report().index.tolist() == ["Asha", "Cleo", "Evan", "you"]


def test_desk_refuses_what_it_cannot_use():
    with pytest.raises(CourseError, match="no rankings"): LabelDesk([])
    with pytest.raises(CourseError, match="another name"): LabelDesk(panel(), name="Asha")
    with pytest.raises(CourseError, match="nothing is ranked"): LabelDesk(panel()).votes()
    rows = house(A=[1, 2, 3]) + [house(B=[1, 2])[0] | dict(completions=HOUSE[:2])]
    with pytest.raises(CourseError, match="other replies"): LabelDesk(rows)
    with pytest.raises(CourseError, match="ranking 0"): LabelDesk([dict(prompt="p")])


def test_desk_with_one_other_has_no_majority_to_compare_with():
    desk = LabelDesk(house(A=[1, 2, 3]))
    for i in range(3): desk.click(i)
    assert desk.submit() and desk.message() == "All prompts are done."


def test_desk_without_a_kernel_is_a_table_with_escaped_text(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    rows = [r | dict(prompt="<script>x</script>", completions=["<b>1</b>", "two", "three"]) for r in house(A=[1, 2, 3])]
    bundle = LabelDesk(rows)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "?" in bundle["text/html"]
    assert "<script" not in bundle["text/html"] and "<b>" not in bundle["text/html"]
    assert "1 prompt" in bundle["text/plain"]


@pytest.mark.slow
def test_clicks_reach_the_desk(monkeypatch):
    pytest.importorskip("ipywidgets")
    desk = LabelDesk(panel(2), seed=3)
    asked, *rows, controls, said, before = desk.widget().children
    same, again, hand_in = controls.children
    buttons, texts = [r.children[0] for r in rows], [r.children[1] for r in rows]
    assert desk.prompts[0] in html.unescape(asked.value) and [html.unescape(t.value) for t in texts] == desk.shown
    assert hand_in.disabled
    buttons[1].click()
    assert buttons[1].description == "rank 1" and buttons[1].disabled
    same.value = True
    buttons[3].click()
    assert buttons[3].description == "rank 1" and same.value is False      # holds for one click
    again.click()
    assert {b.description for b in buttons} == {"choose"} and desk.clicked == []
    for b in buttons: b.click()
    assert not hand_in.disabled
    hand_in.click()
    assert len(desk.rankings) == 1 and sorted(desk.rankings[0]["ranks"]) == [1, 2, 3, 4]
    assert desk.prompts[1] in html.unescape(asked.value)
    assert "Prompt 2 of 2" in said.value and "role=\"status\"" in said.value
    assert desk.prompts[0] in html.unescape(before.value) and ">you</th>" in before.value and "?</td>" not in before.value
    for b in buttons: b.click()
    hand_in.click()
    assert desk.done and hand_in.disabled and all(r.layout.display == "none" for r in rows) and asked.value == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    monkeypatch.delenv("IN_TEST", raising=False)
    assert "application/vnd.jupyter.widget-view+json" in desk._repr_mimebundle_()
