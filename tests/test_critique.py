"""Critique and revision: the fixed prompt formats, the loop, and the training data made from it."""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cai_course.constitution import Constitution, CritiqueExample, Principle
from cai_course.critique import (PAPER_RATIO, critique_and_revise, critique_prompt, direct_revision_prompt, own_words,
                                 revision_prompt, sl_dataset)
from cai_course.errors import CourseError

RULES = [Principle(f"p{i}", "general", f"Find fault {i}.", f"Mend fault {i}.", f"Which has less of fault {i}?") for i in range(4)]
SHOT = CritiqueExample("Old ask?", "Old reply.", "Find it.", "It is bad.", "Mend it.", "New reply.")
FOUR = Constitution("four", "1", "", RULES, [SHOT])
ONE = Constitution("one", "1", "", RULES[:1])


class Fake:
    """Criticizes by naming the request it was given; revises by adding `+` to the reply; remembers its calls."""

    def __init__(self, revise=None): self.calls, self.revise = [], revise or (lambda prompt, reply: reply + "+")

    def generate(self, prompts, max_new_tokens=48, temperature=1.0, n=1, seed=0, top_k=0, stop=None, progress=None):
        self.calls.append(dict(prompts=list(prompts), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, progress=progress))
        def field(p, name): return p.rsplit(f"\n{name}: ", 1)[1].split("\n")[0]
        return [f"saw {field(p, 'Critique request')}" if p.endswith("Critique:") else self.revise(p, field(p, "Assistant")) for p in prompts]


# formats: pretraining writes the same strings, so they are fixed to the letter

def test_formats():
    assert critique_prompt("P?", "R.", "CR.") == "Human: P?\nAssistant: R.\nCritique request: CR.\nCritique:"
    assert revision_prompt("P?", "R.", "CR.", "C.", "RR.") == \
        "Human: P?\nAssistant: R.\nCritique request: CR.\nCritique: C.\nRevision request: RR.\nRevision:"
    assert direct_revision_prompt("P?", "R.", "RR.") == "Human: P?\nAssistant: R.\nRevision request: RR.\nRevision:"


def test_few_shot_formats():
    start = "Human: Old ask?\nAssistant: Old reply.\n"
    assert critique_prompt("P?", "R.", "CR.", [SHOT]) == \
        start + "Critique request: Find it.\nCritique: It is bad.\n\n" + critique_prompt("P?", "R.", "CR.")
    assert revision_prompt("P?", "R.", "CR.", "C.", "RR.", [SHOT, SHOT]) == \
        (start + "Critique request: Find it.\nCritique: It is bad.\nRevision request: Mend it.\nRevision: New reply.\n\n") * 2 \
        + revision_prompt("P?", "R.", "CR.", "C.", "RR.")
    assert direct_revision_prompt("P?", "R.", "RR.", [SHOT]) == \
        start + "Revision request: Mend it.\nRevision: New reply.\n\n" + direct_revision_prompt("P?", "R.", "RR.")


@settings(max_examples=150, deadline=None)
@given(*[st.lists(st.sampled_from(["Critique:", "critique request :", "Revision:", "Revision request:", "Human:", "Assistant:", "\n", " ", "x", "\u200b"]),
                  max_size=8).map("".join)] * 2)
def test_no_reply_or_critique_can_forge_a_field(reply, critique):
    text = revision_prompt("P?", reply, "CR.", critique, "RR.").lower()
    for name in ("human:", "assistant:", "critique request:", "critique:", "revision request:", "revision:"):
        assert text.count(name) == 1


def test_ordinary_world_text_is_left_as_it_is():
    from cai_course.world import requests, reply, REPLY_STYLES
    import random
    rng = random.Random(0)
    for r in requests("harmful", limit=40) :
        for style in REPLY_STYLES:
            text = reply(r, style, rng)
            assert critique_prompt(r.text, text, "CR.") == f"Human: {r.text}\nAssistant: {text}\nCritique request: CR.\nCritique:"


# the loop

def test_records_of_two_rounds():
    policy = Fake()
    out = critique_and_revise(policy, ["a", "b", "c"], ["ra", "rb", "rc"], FOUR, rounds=2, temperature=.7, max_new_tokens=9)
    assert [[r["round"] for r in rs] for rs in out] == [[1, 2]] * 3
    assert [[r["revision"] for r in rs] for rs in out] == [["ra+", "ra++"], ["rb+", "rb++"], ["rc+", "rc++"]]
    for rs in out:
        for r in rs: assert r["critique"] == f"saw Find fault {r['principle'][1]}." and r["kept"] is False
    assert len(policy.calls) == 4 and all(len(c["prompts"]) == 3 for c in policy.calls)  # one call per round and job
    assert len({c["seed"] for c in policy.calls}) == 4
    assert {(c["temperature"], c["max_new_tokens"]) for c in policy.calls} == {(.7, 9)}


def test_revision_uses_the_pair_of_its_critique_and_the_latest_reply():
    policy = Fake()
    out = critique_and_revise(policy, ["a"], ["r"], FOUR, rounds=3)[0]
    for r, call in zip(out, policy.calls[1::2]):
        i, before = r["principle"][1], "r" + "+" * (r["round"] - 1)
        assert call["prompts"] == [revision_prompt("a", before, f"Find fault {i}.", r["critique"], f"Mend fault {i}.")]


def test_direct_skips_the_critique_and_draws_the_same_principles():
    policy = Fake()
    texts = [f"ask {i}" for i in range(20)]
    direct = critique_and_revise(policy, texts, texts, FOUR, rounds=2, direct=True)
    assert len(policy.calls) == 2 and all(p.endswith("\nRevision:") and "Critique" not in p for p in policy.calls[0]["prompts"])
    full = critique_and_revise(Fake(), texts, texts, FOUR, rounds=2)
    assert [[r["principle"] for r in rs] for rs in direct] == [[r["principle"] for r in rs] for rs in full]
    assert all(r["critique"] == "" for rs in direct for r in rs)


def test_principles_do_not_depend_on_the_batch():
    texts = [f"ask {i}" for i in range(60)]
    drawn = lambda ts, seed=0: {t: tuple(r["principle"] for r in rs) for t, rs in zip(ts, critique_and_revise(Fake(), ts, ts, FOUR, rounds=3, seed=seed))}
    whole = drawn(texts)
    assert drawn(texts[::-1]) == whole
    assert {**drawn(texts[:7]), **drawn(texts[7:])} == whole
    assert drawn(texts, seed=1) != whole
    assert len(set(whole.values())) > 30  # 64 sequences are possible


def test_principles_are_uniform_over_prompts_and_rounds():
    texts = [f"ask {i}" for i in range(500)]
    counts = Counter((r["round"], r["principle"]) for rs in critique_and_revise(Fake(), texts, texts, FOUR, rounds=2) for r in rs)
    assert len(counts) == 8 and all(85 < n < 165 for n in counts.values())  # mean 125, sd 9.7


def test_two_replies_to_one_prompt_have_their_own_draws():
    out = critique_and_revise(Fake(), ["same"] * 40, [f"reply {i}" for i in range(40)], FOUR, rounds=2)
    assert len({tuple(r["principle"] for r in rs) for rs in out}) > 5


def test_an_empty_revision_keeps_the_reply():
    policy = Fake(lambda prompt, reply: "  \n " if len(reply) < 2 else reply + "+")
    out = critique_and_revise(policy, ["a", "b"], ["r", "long"], ONE, rounds=2)
    assert [(r["revision"], r["kept"]) for r in out[0]] == [("r", True), ("r", True)]
    assert [(r["revision"], r["kept"]) for r in out[1]] == [("long+", False), ("long++", False)]
    assert sl_dataset(["a", "b"], out) == [dict(prompt="b", response="long++", source="revision")]  # the harmful reply is not trained on


def test_a_model_that_plays_the_next_turns_is_cut():
    assert own_words(" fine.\n\nHuman: next\n\nAssistant: x") == "fine."
    assert own_words("two\nlines") == "two\nlines"
    policy = Fake(lambda prompt, reply: "good\nRevision request: again\nRevision: bad")
    assert critique_and_revise(policy, ["a"], ["r"], ONE, rounds=1)[0][0]["revision"] == "good"


def test_keep_all_few_shot_and_progress():
    policy, seen = Fake(), []
    out = critique_and_revise(policy, ["a"], ["r"], FOUR, rounds=3, keep_all=False, few_shot=1, progress=lambda done, total: seen.append((done, total)))
    assert len(out[0]) == 1 and out[0][0]["round"] == 3 and out[0][0]["revision"] == "r+++"
    assert seen == [(i, 6) for i in range(1, 7)]
    assert all(p.startswith("Human: Old ask?") for c in policy.calls for p in c["prompts"])
    critique_and_revise(policy, ["a"], ["r"], FOUR, rounds=1, progress=False)
    assert policy.calls[-1]["progress"] is False


def test_constitution_by_path(tmp_path):
    (tmp_path / "one.yaml").write_text(ONE.to_yaml())
    assert critique_and_revise(Fake(), ["a"], ["r"], tmp_path / "one.yaml", rounds=1)[0][0]["principle"] == "p0"


@pytest.mark.parametrize("change, words", [
    (dict(prompts=[]), "prompts is empty"), (dict(prompts="a"), "prompts is a single text"), (dict(responses=["r", "s"]), "1 prompts and 2 responses"),
    (dict(responses=[None]), r"responses\[0\] is NoneType"), (dict(rounds=0), "rounds is 0"), (dict(rounds=1.5), "rounds is 1.5"),
    (dict(few_shot=2), "few_shot is 2, but constitution 'four' has 1"), (dict(constitution="no-such-name"), "no constitution 'no-such-name'"),
    (dict(constitution=Constitution("j", "1", "", [Principle("j", comparison_question="q")])), "no principle with a critique_request"),
])
def test_bad_arguments_are_refused_before_the_model_is_called(change, words):
    policy = Fake()
    with pytest.raises(CourseError, match=words):
        critique_and_revise(policy, **{**dict(prompts=["a"], responses=["r"], constitution=FOUR), **change})
    assert policy.calls == []


# training data

def test_the_papers_ratio():
    assert round(PAPER_RATIO, 2) == 1.35
    rows = sl_dataset([f"r{i}" for i in range(135)], ["no"] * 135, [f"h{i}" for i in range(300)], ["yes"] * 300)
    assert Counter(r["source"] for r in rows) == dict(revision=135, helpful=100)
    rows = sl_dataset([f"r{i}" for i in range(900)], ["no"] * 900, [f"h{i}" for i in range(100)], ["yes"] * 100)
    assert Counter(r["source"] for r in rows) == dict(revision=135, helpful=100)
    rows = sl_dataset([f"r{i}" for i in range(9)], ["no"] * 9, [f"h{i}" for i in range(100)], ["yes"] * 100, ratio=None)
    assert Counter(r["source"] for r in rows) == dict(revision=9, helpful=100)


def test_final_and_all_steps_and_samples():
    records = critique_and_revise(Fake(), ["a", "b"], ["ra", "rb"], ONE, rounds=3)
    assert sorted(r["response"] for r in sl_dataset(["a", "b"], records)) == ["ra+++", "rb+++"]
    rows = sl_dataset(["a", "b"], records, ["h"], [["x", "y"]], ratio=None, steps="all")
    assert sorted(r["response"] for r in rows) == ["ra+", "ra++", "ra+++", "rb+", "rb++", "rb+++", "x", "y"]
    assert all(r["prompt"] == (r["response"][1] if r["response"].startswith("r") else "h") for r in rows)


def test_dataset_is_seeded_and_shuffled():
    build = lambda seed: sl_dataset([f"r{i}" for i in range(50)], ["no"] * 50, [f"h{i}" for i in range(50)], ["yes"] * 50, seed=seed)
    assert build(0) == build(0) != build(1)
    assert len({r["source"] for r in build(0)[:12]}) == 2


@pytest.mark.parametrize("arguments, words", [
    ((["a"], ["x", "y"]), "found 1 and 2 prompts and revisions"), ((["a"], ["x"], ["h"], []), "found 1 and 0 helpful"),
    ((["a"], [7]), "found int"), ((["a"], [[7]]), "found int"), (([], []), "prompts is empty"),
])
def test_bad_data(arguments, words):
    with pytest.raises(CourseError, match=words): sl_dataset(*arguments)


@pytest.mark.parametrize("option, words", [(dict(ratio=0), "ratio is 0"), (dict(ratio=float("nan")), "ratio is nan"), (dict(steps="last"), "steps is 'last'")])
def test_bad_options(option, words):
    with pytest.raises(CourseError, match=words): sl_dataset(["a"], ["x"], ["h"], ["y"], **option)


def test_import_without_torch():
    assert subprocess.run([sys.executable, "-c", "import sys, cai_course.critique, cai_course.judge; sys.exit('torch' in sys.modules)"]).returncode == 0


# what the experiments are made of

def test_a_critique_names_kinds_by_their_phrases():
    from cai_course.critique import named_kinds
    from cai_course.world import HARM_KINDS, critique, judge, lexicon, make_scope, reply, requests
    import random
    rng = random.Random(0)
    assert named_kinds("There is nothing wrong with the reply.") == set()
    assert named_kinds(" ".join(f"Because {e['effect']}." for e in lexicon()["harmful"].values())) == set(lexicon()["harmful"])
    for r in requests("harmful", limit=30, seed=5):
        text, scope = reply(r, "comply", rng), make_scope(frozenset(HARM_KINDS), False, rng, broad=True)
        assert named_kinds(critique(judge(r.text, text), text, scope)) == {r.kind}


def test_variety():
    from cai_course.critique import distinct_pairs
    assert distinct_pairs(["a b c", "a b c"]) == .5 and distinct_pairs(["a b", "c d"]) == 1. and distinct_pairs([""]) == 0.


def test_distances_of_words():
    from cai_course.critique import mean_distance, word_changes
    assert word_changes(["a b c", "B, c d!", "b c d"]) == [.5, 0.] and word_changes(["", ""]) == [0.] and word_changes(["a"]) == []
    assert mean_distance(["a b", "a b", "c"]) == pytest.approx(2 / 3) and mean_distance(["a", "a"]) == 0.
    assert mean_distance(["x y", "y z", "z x"]) == mean_distance(["z x", "x y", "y z"]) == pytest.approx(2 / 3)
    with pytest.raises(CourseError, match="found 1 texts"): mean_distance(["a"])


def released_row(*texts):
    return {"initial_response": [{"sample": texts[0]}], "cst": [{"revision": {"sample": t}} for t in texts[1:]]}


def test_released_revisions_are_read_in_order(tmp_path):
    from cai_course.critique import released_revisions
    texts = [["a", "b\u2028b", "c"], ["d", "e", "f"]]  # a line separator inside a text ends no line of the file
    for name, row in zip(("LAMDA", "PALMS"), texts):
        (tmp_path / f"{name}_SLMADISON.jsonl").write_text(json.dumps(released_row(*row), ensure_ascii=False) + "\n\n", encoding="utf-8")
    (tmp_path / "PALMS_HRLHF.jsonl").write_text("of another form", encoding="utf-8")
    assert released_revisions(tmp_path) == texts


@pytest.mark.parametrize("text", ["{", "[]", '{"cst": []}', '{"initial_response": [], "cst": []}', '{"initial_response": [{"sample": "a"}], "cst": [1]}'])
def test_released_revisions_of_another_form(tmp_path, text):
    from cai_course.critique import released_revisions
    with pytest.raises(CourseError, match="holds no file"): released_revisions(tmp_path)
    (tmp_path / "PALMS_SLMADISON.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match="PALMS_SLMADISON.jsonl cannot be read"): released_revisions(tmp_path)


@pytest.mark.skipif(not os.environ.get("CAI_COURSE_REAL_DATA"), reason="CAI_COURSE_REAL_DATA names no folder of real data")
def test_the_papers_first_revision_rewrites_most():
    from cai_course.critique import released_revisions, word_changes
    rows = released_revisions(Path(os.environ["CAI_COURSE_REAL_DATA"]) / "constitutional-ai" / "samples")
    change = np.array([word_changes(each) for each in rows])
    assert len(rows) >= 40 and change.shape[1] == 4 and change.mean(0).argmax() == 0


def test_votes_follow_the_person():
    from cai_course.critique import mean_verdict, voted_pairs
    from cai_course.world import Labeler
    careful, lenient = (voted_pairs(Labeler("x", 1000., leniency=k), 3, 60) for k in (0., 1.))
    harm = lambda rows, side: mean_verdict([r["prompt"] for r in rows], [r[side] for r in rows])
    assert harm(careful, "chosen") < .2 < .4 < harm(careful, "rejected") and harm(lenient, "chosen") > harm(lenient, "rejected")
    assert voted_pairs(Labeler("x"), 3, 20) == voted_pairs(Labeler("x"), 3, 20) != voted_pairs(Labeler("x"), 4, 20)


def test_worked_examples_are_right():
    from cai_course.critique import named_kinds, worked_examples
    from cai_course.world import judge
    shots = worked_examples(0, 5)
    assert len(shots) == 5
    for e in shots:
        assert judge(e.prompt, e.response).harmful > 0 == judge(e.prompt, e.revision).harmful
        assert named_kinds(e.critique) == set(judge(e.prompt, e.response).kinds)


# the transcripts

def records(*revisions): return [dict(round=i, principle=f"p{i}", critique=f"c{i} <i>", revision=t, kept=False) for i, t in enumerate(revisions, 1)]


def pages(harm=lambda p, t: float("bad" in t)):
    from cai_course.critique import Transcripts
    replies, revised = ["bad a", "bad b", "bad c", "fine", "bad <b>"], [("good", "good"), ("bad b", "good"), ("bad c", "bad c"), ("fine", "fine"), ("good", "bad again")]
    return Transcripts([f"ask {i}" for i in range(5)], replies, [records(*r) for r in revised], harm)


def test_fates():
    page = pages()
    assert [page.fate(i) for i in range(5)] == ["mended at once", "mended later", "never mended", "harmless from the start", "came back"]
    assert page.pick() == list(range(5)) and page.pick("came back") == [4] and pages(None).fate(0) == ""


def test_transcripts_are_escaped_and_mark_what_is_new(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    text = pages().html(4)
    assert "<b>&lt;b&gt;" not in text and "&lt;b&gt;" in text and "c1 &lt;i&gt;" in text and "<b>again</b>" in text and "(came back)" in text
    assert "(unchanged)" in pages().html(2)
    bundle = pages()._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and bundle["text/html"].count("<table>") == 4
    assert "Human: ask 0" in bundle["text/plain"] and len(pages(None)._repr_mimebundle_()["text/plain"].split("Human")) == 2


def test_the_live_browser():
    box = pages().widget()
    (which, place), page = box.children[0].children, box.children[1]
    assert place.max == 5 and "ask 0" in page.value
    place.value = 3
    assert "ask 2" in page.value
    which.value = "came back"
    assert place.max == 1 and place.value == 1 and "ask 4" in page.value
    which.value = "all"
    assert place.max == 5


def test_transcripts_need_rows_that_belong_together():
    from cai_course.critique import Transcripts
    for args in ((["a"], ["b"], []), ([], [], [])):
        with pytest.raises(CourseError, match="as many of each"): Transcripts(*args)
