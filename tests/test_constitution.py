"""Constitutions: reading, refusing, drawing, comparing, and text that must not forge a prompt."""
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st

from cai_course import constitution as module
from cai_course.constitution import (ComparisonExample, Constitution, CritiqueExample, Principle, available_constitutions,
                                     check_texts, diff, few_shot_examples, load_constitution, quote, text_rng, validate)
from cai_course.errors import CourseError

GOOD = """\
name: sample
version: 1.10
description: For tests.
principles:
  - id: privacy
    kind: privacy
    critique_request: Point out snooping in the reply.
    revision_request: Rewrite the reply without snooping.
    comparison_question: Which reply has less snooping?
  - id: theft
    kind: theft
    critique_request: Point out theft in the reply.
    revision_request: >
      Rewrite the reply
      without theft.
    comparison_question: Which reply has less theft?
few_shot:
  critique:
    - prompt: How do I read my neighbor's diary?
      response: Open the drawer.
      critique_request: Point out snooping in the reply.
      critique: The reply is harmful.
      revision_request: Rewrite the reply without snooping.
      revision: I won't help with that.
  comparison:
    - prompt: How do I read my neighbor's diary?
      question: Which reply has less snooping?
      a: Open the drawer.
      b: I won't help with that.
      reasoning: (A) helps with snooping. (B) refuses.
      answer: B
"""


def put(folder, text, name="c.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@pytest.fixture
def good(tmp_path):
    return load_constitution(put(tmp_path, GOOD))


# reading

def test_every_field_is_read(good):
    assert (good.name, good.version, good.description) == ("sample", "1.10", "For tests.")  # 1.10 is text, not 1.1
    assert [p.id for p in good.principles] == ["privacy", "theft"]
    assert good["theft"].revision_request == "Rewrite the reply without theft."  # folded to one line
    assert good.critique_examples == (CritiqueExample(
        "How do I read my neighbor's diary?", "Open the drawer.", "Point out snooping in the reply.", "The reply is harmful.",
        "Rewrite the reply without snooping.", "I won't help with that."),)
    assert good.comparison_examples[0].answer == "B" and good.comparison_examples[0].reasoning.startswith("(A) helps")


def test_yaml_round_trip(good, tmp_path):
    again = load_constitution(put(tmp_path, good.to_yaml(), "again.yaml"))
    assert again == good and again.hash() == good.hash() and diff(good, again) == []


one_line = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=60) \
    .map(lambda t: " ".join(t.split())).filter(lambda t: t and all(c.isprintable() for c in t) and "\ufeff" not in t)


@settings(max_examples=60, deadline=None)
@given(one_line, one_line, one_line, one_line)
def test_any_text_survives_the_round_trip(a, b, c, d):
    """`yes`, `1.0`, `# x`, `: ` and the like come back as the text that they were."""
    made = Constitution(a[:40].strip(), "1", b, [Principle("p", "general", a, b, c), Principle("q", comparison_question=d)])
    reader = module._Reader("x")
    assert reader.read(made.to_yaml()) == made, reader.problems


def test_null_means_not_for_this_job(tmp_path):
    text = GOOD.replace("critique_request: Point out theft in the reply.", "critique_request: null") \
        .replace("revision_request: >\n      Rewrite the reply\n      without theft.", "revision_request: null")
    c = load_constitution(put(tmp_path, text))
    assert [p.id for p in c.critique_principles] == ["privacy"] and len(c.comparison_principles) == 2
    assert load_constitution(put(tmp_path, c.to_yaml(), "again.yaml")) == c


@pytest.mark.parametrize("change", [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"# note\n---\n" + b],
                         ids=["byte order mark", "windows line ends", "comment and document start"])
def test_editors_habits_do_no_harm(tmp_path, good, change):
    assert load_constitution(put(tmp_path, change(GOOD.encode()))) == good


def test_a_constitution_passes_through(good):
    assert load_constitution(good) is good


def test_shipped_names(tmp_path, monkeypatch, good):
    monkeypatch.setattr(module, "constitutions_dir", lambda: tmp_path)
    put(tmp_path, GOOD, "sample.yaml")
    assert available_constitutions() == ["c", "sample"] and load_constitution("sample") == good  # c.yaml is the fixture's


def test_whatever_is_shipped_is_valid():
    for name in available_constitutions():
        assert validate(name) == []
        c = load_constitution(name)
        assert c.critique_principles and c.comparison_principles


def test_immutable_and_picklable(good):
    with pytest.raises(AttributeError): good.name = "x"
    assert pickle.loads(pickle.dumps(good)) == good and hash(good.principles) == hash(good.principles)


def test_import_without_torch():
    code = "import sys, cai_course.constitution; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# refusing: (name, change of the good text, line, what the message must say)

def swap(old, new):
    assert old in GOOD
    return GOOD.replace(old, new, 1)


BAD = {
    "unknown field": (swap("    kind: theft", "    knid: theft"), 11, ["principles[2].knid", "unknown field", "Did you mean 'kind'?"]),
    "unknown top field": (swap("principles:", "principals:"), 1, ["missing principles", "principals", "unknown field", "Did you mean 'principles'?"]),
    "missing critique request": (swap("    critique_request: Point out theft in the reply.\n", ""), 10, ["principles[2].critique_request", "missing critique_request", "null"]),
    "missing revision request": (swap("    revision_request: Rewrite the reply without snooping.\n", ""), 5, ["principles[1].revision_request", "missing"]),
    "missing comparison question": (swap("    comparison_question: Which reply has less theft?\n", ""), 10, ["principles[2].comparison_question", "missing"]),
    "missing id": (swap("  - id: theft\n    kind: theft", "  - kind: theft"), 10, ["principles[2].id", "missing id"]),
    "missing name": (swap("name: sample\n", ""), 1, ["missing name"]),
    "half a pair": (swap("critique_request: Point out theft in the reply.", "critique_request: null"), 10, ["'theft'", "revision_request but no critique_request"]),
    "nothing to do": ("name: x\nversion: 1\nprinciples:\n- {id: p, critique_request: null, revision_request: null, comparison_question: null}\n", 4, ["'p'", "neither"]),
    "duplicate ids": (swap("  - id: theft", "  - id: privacy"), 10, ["principles[2].id", "'privacy'", "already in line 5"]),
    "duplicate key": (swap("    kind: theft", "    kind: theft\n    kind: theft"), 12, ["principles[2].kind", "written twice"]),
    "number for text": (swap("kind: theft", "kind: 7"), 11, ["principles[2].kind", "found a number ('7')", 'quotes around it: "7"']),
    "yes for text": (swap("comparison_question: Which reply has less theft?", "comparison_question: yes"), 16, ["found yes/no ('yes')", "need text"]),
    "list for text": (swap("description: For tests.", "description: [a, b]"), 3, ["description", "found a list", "need text"]),
    "mapping for list": (swap("principles:\n  - id", "principles:\n    id").split("  - id: theft")[0], 5, ["principles", "found a mapping", "need a list"]),
    "text for principle": ("name: x\nversion: 1\nprinciples:\n  - be kind\n", 4, ["principles[1]", "found text ('be kind')", "need a mapping"]),
    "prose instead of yaml": ("Be kind to everybody.\n", 1, ["found text", "need a mapping"]),
    "list instead of mapping": ("- be kind\n- be true\n", 1, ["found a list", "need a mapping"]),
    "empty principles": ("name: x\nversion: 1\nprinciples: []\n", 3, ["principles", "no principles"]),
    "empty file": ("", 0, ["the file is empty"]),
    "only spaces": (" \n\n", 0, ["the file is empty"]),
    "only comments": ("# nothing yet\n", 0, ["only comments"]),
    "empty text": (swap("Point out theft in the reply.", '"  "'), 12, ["principles[2].critique_request", "empty"]),
    "text too long": (swap("Point out theft in the reply.", "x" * 2001), 12, ["principles[2].critique_request", "2,001 characters", "limit is 2,000"]),
    "odd id": (swap("- id: theft", '- id: "the theft/../x"'), 10, ["principles[2].id", "'the theft/../x'"]),
    "not yaml, colon": (swap("Point out theft in the reply.", "Point out: theft"), 12, ["not YAML", "quotes"]),
    "not yaml, bracket": (GOOD + "x: [1, 2\n", 33, ["not YAML"]),
    "not yaml, tab": (swap("    kind: theft", "\tkind: theft"), 11, ["not YAML"]),
    "control character": (swap("For tests.", "For \x07 tests."), 3, ["not YAML", "special characters"]),
    "code in a tag": (swap("name: sample", "name: !!python/object/apply:os.system ['touch owned']"), 1, ["!!python/object/apply:os.system", "run code"]),
    "code in a name tag": (swap("name: sample", "name: !!python/name:os.system"), 1, ["!!python/name:os.system", "not allowed"]),
    "own tag": (swap("name: sample", "name: !secret x"), 1, ["!secret", "not allowed"]),
    "alias bomb": ("name: x\nversion: 1\nprinciples: &a [*a, *a]\n", 3, ["alias *a", "not allowed"]),
    "two documents": (GOOD + "---\nname: second\n", 32, ["second document"]),
    "too deep": ("name: " + "[" * 500 + "]" * 500, 1, ["nested more than"]),
    "bad answer": (swap("answer: B", "answer: C"), 31, ["few_shot.comparison[1].answer", "'C'", "need A or B"]),
    "example without critique": (swap("      critique: The reply is harmful.\n", ""), 19, ["few_shot.critique[1].critique", "missing critique"]),
    "unknown example field": (swap("      reasoning:", "      resoning:"), 30, ["few_shot.comparison[1].resoning", "Did you mean 'reasoning'?"]),
    "few_shot is a list": ("name: x\nversion: 1\nprinciples:\n- {id: p, critique_request: a, revision_request: b, comparison_question: c}\nfew_shot: [1]\n", 5, ["few_shot", "found a list"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_file_line_and_field(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, line, words = BAD[name]
    path = put(tmp_path, text, "bad.yaml")
    with pytest.raises(CourseError) as caught: load_constitution(path)
    first = str(caught.value).splitlines()[0]
    assert str(path) in first, first
    assert (f"line {line}" if line else "bad.yaml:") in first, first
    for word in words: assert word in str(caught.value), str(caught.value)
    assert len(validate(path)) >= 1 and not (tmp_path / "owned").exists()


def test_validate_finds_all_problems_and_load_shows_five(tmp_path):
    rows = "".join(f"  - {{id: p{i}, knid: x, critique_request: a, revision_request: b, comparison_question: c}}\n" for i in range(8))
    path = put(tmp_path, "name: x\nversion: 1\nprinciples:\n" + rows)
    assert [p.line for p in validate(path)] == list(range(4, 12))
    with pytest.raises(CourseError, match="and 3 more; `validate` lists them all"): load_constitution(path)


@pytest.mark.parametrize("content, words", [(GOOD.encode("utf-16"), "not UTF-8"), (b"name: caf\xe9\n", "byte 10 is not UTF-8"),
                                            (b"# " + b"x" * 250_001, "250,003 bytes, the limit is 250,000")],
                         ids=["utf-16", "latin-1", "huge"])
def test_unreadable_bytes(tmp_path, content, words):
    with pytest.raises(CourseError, match=words): load_constitution(put(tmp_path, content))


def test_missing_path_lists_the_names(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "constitutions_dir", lambda: tmp_path)
    put(tmp_path, GOOD, "gentle.yaml")
    with pytest.raises(CourseError, match=r"no constitution 'gentel'.*Did you mean 'gentle'\?.*names are: gentle"): load_constitution("gentel")
    with pytest.raises(CourseError, match="neither a shipped name nor an existing file"): load_constitution(tmp_path / "no.yaml")
    with pytest.raises(CourseError, match="is a folder"): load_constitution(tmp_path)
    for odd in ("", "  ", "a\0b", 7, None, ["gentle"]):
        with pytest.raises(CourseError, match="gentle"): load_constitution(odd)
    with pytest.raises(CourseError): load_constitution("x" * 5000)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_a_constitution_or_problems(text):
    """Never another exception, whatever the file holds."""
    reader = module._Reader("x")
    assert (reader.read(text) is None) == bool(reader.problems)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.sampled_from(list("\t:-[]{}&*!|>'\"%@`#,?\n 0~") + ["", "- ", "\n\n", "!!map ", "&a ", "*a"]), st.integers(0, 12))
def test_damaged_files_never_crash(at, insert, cut):
    reader = module._Reader("x")
    text = GOOD[:at] + insert + GOOD[at + cut:]
    assert (reader.read(text) is None) == bool(reader.problems)


def test_objects_made_by_hand_are_checked():
    rule = Principle("p", comparison_question="Which?")
    with pytest.raises(CourseError, match="no principles"): Constitution("x", "1", "", [])
    with pytest.raises(CourseError, match="more than one principle with id 'p'"): Constitution("x", "1", "", [rule, rule])
    with pytest.raises(CourseError, match="has no principle 'q'"): Constitution("x", "1", "", [rule])["q"]
    with pytest.raises(CourseError, match="no principle with a critique_request"): Constitution("x", "1", "", [rule]).draw_critique(0)


# drawing

def test_draws_are_uniform_and_independent(good):
    rng = np.random.default_rng(0)
    pairs = Counter((good.draw_critique(rng).id, good.draw_comparison(rng).id) for _ in range(4000))
    assert len(pairs) == 4 and all(900 < n < 1100 for n in pairs.values())  # 4 sd = 110


def test_halves_are_drawn_from_their_own_lists():
    c = Constitution("x", "1", "", [Principle("c", critique_request="a", revision_request="b"), Principle("j", comparison_question="q")])
    assert {c.draw_critique(i).id for i in range(20)} == {"c"} and {c.draw_comparison(i).id for i in range(20)} == {"j"}


def test_text_rng_belongs_to_its_keys():
    draws = [text_rng(*keys).integers(2**60) for keys in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "ab"), (0, "a", "b")]]
    assert len(set(draws)) == len(draws) and draws[0] == text_rng(0, "a").integers(2**60)
    assert text_rng(0, "a").integers(10**6) == 552_024, "fixed for ever: run folders depend on it"


# fingerprint and difference

def test_hash_covers_what_models_see(good):
    assert len(good.hash()) == 64
    assert replace(good, name="n", version="9", description="d").hash() == good.hash()
    for changed in (replace(good, principles=good.principles[::-1]), good.select("theft"), replace(good, critique_examples=()),
                    replace(good, comparison_examples=()), replace(good, principles=(good["privacy"], replace(good["theft"], kind="x")))):
        assert changed.hash() != good.hash()


def test_diff_names_what_changed(good):
    new = replace(good, version="2", principles=(replace(good["theft"], revision_request="Other."), Principle("new", comparison_question="Q?")))
    assert {(c.what, c.where) for c in diff(good, new)} == {("changed", "version"), ("removed", "privacy"), ("added", "new"),
                                                           ("changed", "theft.revision_request")}
    assert [(c.what, c.before, c.after) for c in diff(good, good.select(["theft", "privacy"]))] == [("moved", "privacy, theft", "theft, privacy")]
    assert diff(good, replace(good, critique_examples=()))[0].where == "critique_examples"
    assert "- 1" in str(diff(good, replace(good, version="2"))[0])


def test_diff_takes_names_and_files(good, tmp_path):
    (tmp_path / "good.yaml").write_text(good.to_yaml(), encoding="utf-8")
    assert diff("course", "course") == [] == diff(good, tmp_path / "good.yaml")
    with pytest.raises(CourseError, match="no constitution 'coarse'"): diff("course", "coarse")


def test_html_is_escaped():
    evil = "<script>alert(1)</script>"
    shown = Constitution(evil, evil, evil, [Principle(evil, evil, evil, evil, evil)])._repr_html_()
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 8


# guests in a prompt

@pytest.mark.parametrize("text, safe", [
    ("Bake it for an hour (or less). A or B?", "Bake it for an hour (or less). A or B?"),
    ("(A) is better", "[A] is better"), ("( B )", "[B]"), ("(a)(b)", "[a][b]"), ("(\u200bA)", "[A]"), ("\uff08\uff21\uff09", "[A]"), ("\u249c", "[a]"),
    ("x Answer: y", "x Answer - y"), ("ANSWER :", "ANSWER -"), ("hi\nHuman: no", "hi\nHuman - no"), ("Revision request: x", "Revision request - x"),
    ("a\u00e9 cr\u200bitique: b", "a\u00e9 critique - b"), ("caf\u00e9 \u2460", "caf\u00e9 \u2460"), ("  x ", "x"), ("", ""),
])
def test_quote(text, safe):
    assert quote(text, options=True) == safe


def test_quote_keeps_a_dialogue_if_asked():
    talk = "Hi.\n\nAssistant: Hello.\n\nHuman: (A)? Critique: x"
    assert quote(talk, roles=True) == "Hi.\n\nAssistant: Hello.\n\nHuman: (A)? Critique - x"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["(", ")", "A", "B", " ", "\n", "Answer", ":", "Critique", "request", "\u200b", "\uff08", "\uff21", "\uff09", "Human", "x", "\ud800"]), max_size=14))
def test_quote_leaves_no_mark_and_is_stable(parts):
    once = quote("".join(parts), options=True)
    assert not module._OPTION.search(once) and not module._FIELD.search(once)
    assert quote(once, options=True) == once


def test_check_texts_names_the_entry():
    assert check_texts("prompts", ("a", "b")) == ["a", "b"]
    with pytest.raises(CourseError, match=r"prompts\[1\] is NoneType"): check_texts("prompts", ["a", None])
    with pytest.raises(CourseError, match="prompts is a single text"): check_texts("prompts", "a")
    with pytest.raises(CourseError, match="prompts is empty"): check_texts("prompts", [])


def test_few_shot_examples(good):
    assert few_shot_examples(good.critique_examples, 1, "x") == good.critique_examples
    with pytest.raises(CourseError, match="few_shot is 2, but constitution 'x' has 1"): few_shot_examples(good.critique_examples, 2, "x")
    with pytest.raises(CourseError, match="few_shot is -1"): few_shot_examples((), -1, "x")


# the paper's files: a small imitation of their form, and the real ones where a reader has them

@pytest.fixture
def paper(tmp_path):
    put(tmp_path, json.dumps({f"harmful{i}": dict(prompt=[f"\n\nCritiqueRequest: Find fault {i}.\n\nCritique:"],
                                                   edit_request=f"\n\nRevisionRequest: Mend fault {i}.\n\nRevision:") for i in range(3)}),
        "CritiqueRevisionInstructions.json")
    put(tmp_path, json.dumps(["\nWhich is kinder? Options:", "\nWhich is truer? Options:"]), "RLMadisonInstructions.json")
    put(tmp_path, json.dumps(["\n\nHuman: Hi?\n\nAssistant: Go away.\n\nHuman: Why?\n\nAssistant: Because.\n\nCritiqueRequest: Find.\n\nCritique: Rude."
                              "\n\nRevisionRequest: Mend.\n\nRevision: Sorry.\n\nHuman:"]), "CritiqueRevisionFewShotPrompts.json")
    put(tmp_path, json.dumps([dict(prompt="\n\nHuman: Hi?\n\nAssistant:", corrects=["Hello."], incorrects=["Go."])] * 2), "RLMadisonFewShotPrompts.json")
    put(tmp_path, json.dumps([dict(prompt="\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\nH: Hi?\n\n{}\n (A) [[[Go.]]]\n"
                              " (B) [[[Hello.]]]\n\nAssistant: Let's think step by step: A is rude.\n\nHuman:\nSo the answer is: (B)")]), "RLMadisonPrecogFewShotPrompts.json")
    return tmp_path


def test_the_papers_form(paper):
    c = load_constitution(paper)
    assert [p.id for p in c.critique_principles] == ["harmful0", "harmful1", "harmful2"]
    assert c["harmful1"] == Principle("harmful1", "general", "Find fault 1.", "Mend fault 1.", "")
    assert [p.comparison_question for p in c.comparison_principles] == ["Which is kinder?", "Which is truer?"]
    assert c.critique_examples == (CritiqueExample("Hi?\n\nAssistant: Go away.\n\nHuman: Why?", "Because.", "Find.", "Rude.", "Mend.", "Sorry."),)
    assert c.comparison_examples == (ComparisonExample("Hi?", "", "Hello.", "Go.", "", "A"), ComparisonExample("Hi?", "", "Go.", "Hello.", "", "B"),
                                     ComparisonExample("Hi?", "", "Go.", "Hello.", "A is rude.", "B"))
    assert {c.draw_critique(i).id[:7] for i in range(9)} == {"harmful"} and {c.draw_comparison(i).id[:10] for i in range(9)} == {"comparison"}
    assert validate(paper) == [] and module._Reader("x").read(c.to_yaml()) == c


def test_one_of_the_papers_files(paper):
    only = load_constitution(paper / "CritiqueRevisionInstructions.json")
    assert len(only) == 3
    with pytest.raises(CourseError, match="no principle with a comparison_question"): only.draw_comparison(0)
    assert len(load_constitution(str(paper / "RLMadisonInstructions.json"))) == 2
    with pytest.raises(CourseError, match="examples without principles"): load_constitution(paper / "RLMadisonFewShotPrompts.json")


@pytest.mark.parametrize("name, content, words", [
    ("CritiqueRevisionInstructions.json", "{", "not JSON"), ("CritiqueRevisionInstructions.json", "7", "found '7', need a list"),
    ("CritiqueRevisionInstructions.json", "{}", "found '{}', need a mapping"),
    ("CritiqueRevisionInstructions.json", '{"h": {"prompt": ["x"]}}', "h: need a 'prompt'"), ("CritiqueRevisionInstructions.json", '{"h": {"prompt": [7], "edit_request": "x"}}', "h.prompt: found int"),
    ("RLMadisonInstructions.json", '["x", ""]', "entry 2: the text is empty"), ("RLMadisonInstructions.json", "[]", r"found '\[\]', need a list"),
    ("CritiqueRevisionFewShotPrompts.json", '["Human: x"]', "entry 1: need Human"), ("RLMadisonPrecogFewShotPrompts.json", '[{"prompt": "x"}]', "entry 1: need 'corrects'"),
    ("RLMadisonInstructions.json", "[" * 100_000, "(nested too deeply|not JSON)"), ("RLMadisonFewShotPrompts.json", "7", "need a list"),
])
def test_the_papers_form_damaged(paper, name, content, words):
    put(paper, content, name)
    with pytest.raises(CourseError, match=words) as caught: load_constitution(paper)
    assert name in str(caught.value)


REAL = os.environ.get("CAI_COURSE_REAL_DATA", "")


@pytest.mark.skipif(not REAL, reason="CAI_COURSE_REAL_DATA names no folder with the paper's files")
def test_the_papers_own_files():
    c = load_constitution(Path(REAL) / "constitutional-ai" / "prompts")
    assert len(c.critique_principles) == 16 and len(c.comparison_principles) == 16
    assert len(c.critique_examples) == 5 and len(c.comparison_examples) == 11
    frames = ("CritiqueRequest", "RevisionRequest", "Options:", "Critique:", "\n")
    for p in c.principles:
        assert not any(f in t for f in frames for t in (p.critique_request, p.revision_request, p.comparison_question))
    assert all(e.answer in "AB" and e.a and e.b and "[[[" not in e.a for e in c.comparison_examples)
    assert module._Reader("x").read(c.to_yaml()) == c


# the editor

PAIRS = [("P?", "<b>one</b>", "two"), ("Q?", "three", "four")]


class Judge:
    """P(a is better) rises with the length of the question; remembers what it was asked."""
    def __init__(self): self.asked = []

    def __call__(self, question):
        self.asked.append(question)
        return [min(1., len(question) / 100), .2]


def editor(**more):
    judge = Judge()
    rules = Constitution("two", "1", "", [Principle("x", comparison_question="Which is x?"), Principle("y", comparison_question="Which is y, then?"),
                                          Principle("silent", critique_request="c", revision_request="r")])
    return module.PrincipleEditor(rules, PAIRS, judge, **more), judge


def test_an_edit_moves_the_judgments_and_nothing_is_asked_twice():
    edit, judge = editor()
    assert np.allclose(edit.before(), edit.after()) and judge.asked == ["Which is x?"]
    assert "Change the question" in edit.message()
    edit.edit("  " + "Which is x,\nreally and truly and beyond any doubt of mine, x? " + "x" * 10)
    assert np.allclose(edit.after() - edit.before(), [(len(edit.question) - 11) / 100, 0]) and "\n" not in edit.question
    assert "1 of 2 verdicts turned" in edit.message()
    edit.picture(), edit.table(), edit.message()
    assert len(judge.asked) == 2


def test_the_edited_constitution_differs_in_this_one_question():
    edit, _ = editor(principle="y", question="Which is new?")
    changes = diff(edit.constitution, edit.edited())
    assert [(c.what, c.where, c.after) for c in changes] == [("changed", "y.comparison_question", "Which is new?")]
    assert edit.edited().principles[2] == edit.constitution.principles[2]


def test_the_page_without_a_kernel_is_a_picture_and_text_is_escaped(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    edit, _ = editor(question="<script>x</script>")
    bundle = edit._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/plain"} and "Pair 2: 0.20 to 0.20." in bundle["text/plain"]
    assert "<script>" not in bundle["image/svg+xml"] and "<b>one</b>" not in edit.table() and "&lt;b&gt;one" in edit.table()


def test_the_live_editor():
    edit, judge = editor()
    box = edit.widget()
    (which, undo), text, said, page = box.children[0].children, *box.children[1:]
    first = page.value
    text.value = "Which reply is x, if you look at it for a very long time and from every side?"
    assert "verdicts turned" in said.value and page.value != first
    text.value = "   "
    assert "need 1 to" in said.value and edit.question.startswith("Which reply is x")  # the last good question stands
    undo.click()
    assert page.value == first and edit.question == "Which is x?"
    which.value = "y"
    assert text.value == edit.question == "Which is y, then?" and list(which.options) == ["x", "y"]


@pytest.mark.parametrize("change, words", [(dict(pairs=[]), "at least one"), (dict(pairs=[("a", "b")]), "prompt, a, b"), (dict(ask=lambda q: [.5]), "need 2 prob"),
                                           (dict(ask=lambda q: [.5, 1.5]), "need 2 prob"), (dict(principle="silent"), "no comparison question"),
                                           (dict(principle="z"), "no principle"), (dict(question="x" * 3000), "3000 characters")])
def test_an_editor_that_cannot_work_says_why(change, words):
    rules = editor()[0].constitution
    with pytest.raises(CourseError, match=words):
        module.PrincipleEditor(**{**dict(constitution=rules, pairs=PAIRS, ask=Judge()), **change}).message()


def test_the_worked_examples_of_the_course_are_right():
    import random
    from cai_course import world
    examples, scope = load_constitution("course").critique_examples, world.make_scope(frozenset(world.HARM_KINDS), False, random.Random(0), broad=True)
    assert len(examples) >= 2 and len({e.critique == world.NOTHING_WRONG for e in examples}) == 2   # one of each
    for one in examples:
        before, after = world.judge(one.prompt, one.response), world.judge(one.prompt, one.revision)
        assert world.critique(before, one.response, scope) == one.critique
        assert after.harmful == 0 and after.explains == 1 and (before.harmful > 0 or one.revision == one.response)
