"""Properties and edges of rankings, pairs, splits and files."""
import json, math

import numpy as np
import pytest
from scipy.special import comb

from cai_course.errors import CourseError
from cai_course.pairs import (from_trl, group_pairs, load_pairs, memory_score, noisy_pairs, pair_targets,
                              preferred_first, rankings_to_pairs, save_pairs, shared_prompts, split_by_prompt,
                              swap_pair, thumbs_to_pairs, to_dataset, to_trl, validate_pairs)

ROW = dict(prompt="p", chosen="a", rejected="b")


@pytest.mark.parametrize("n", range(2, 10))
def test_all_contests_once(n):
    ranks = np.random.default_rng(n).permutation(n) + 1
    rows = pair_targets(ranks)
    assert len(rows) == comb(n, 2) and len({(i, j) for i, j, _ in rows}) == len(rows)
    assert all(sum(t) == 1 and (t[0] == 1) == (ranks[i] < ranks[j]) for i, j, t in rows)
    wins = np.zeros(n)
    for i, j, (ti, tj) in rows: wins[i] += ti; wins[j] += tj
    assert (wins == n - ranks).all()                          # the best wins n - 1 contests, the worst none


def test_order_of_completions_does_not_matter():
    texts, ranks = list("abcde"), [3, 1, 2, 2, 5]
    flip = [4, 2, 0, 3, 1]
    as_set = lambda rows: {(r["chosen"], r["rejected"], r["label"]) for r in rows}
    flipped = rankings_to_pairs("p", [texts[i] for i in flip], [ranks[i] for i in flip])
    assert as_set(rankings_to_pairs("p", texts, ranks)) == as_set(flipped)


def test_ties():
    assert len(rankings_to_pairs("p", list("abc"), [1, 1, 1])) == 0
    rows = rankings_to_pairs("p", list("abc"), [1, 1, 1], ties="half")
    assert len(rows) == 3 and {r["label"] for r in rows} == {.5}
    with pytest.raises(CourseError, match="ties is 'keep'"): rankings_to_pairs("p", list("ab"), [1, 2], ties="keep")


def test_votes_and_missing_ranks():
    rows = rankings_to_pairs("p", list("ab"), [[1, 2], [1, 2], [2, 1], [1, math.nan]])
    assert rows[0]["chosen"] == "a" and rows[0]["label"] == pytest.approx(2 / 3)
    assert rankings_to_pairs("p", list("ab"), [[1, 2], [2, 1]]) == []
    assert rankings_to_pairs("p", list("ab"), [[1, math.nan], [1, math.nan]]) == []


@pytest.mark.parametrize("completions, ranks, words", [
    (["a", "b"], [1], "at least two"), (["a", "b"], [1, 2, 3], "2 completions"),
    (["a", "b"], [1, "x"], "list of numbers"),
    (["a", "b"], [1, math.nan], "finite"), (["a", "b"], [1, math.inf], "finite"), ("ab", [1, 2], "list of strings"),
    (["a", None], [1, 2], "list of strings"), (["a", "b"], [[1, 2], [1, 2, 3]], "equally long"),
    (["a"], [1], "at least two")])
def test_bad_rankings(completions, ranks, words):
    with pytest.raises(CourseError, match=words): rankings_to_pairs("p", completions, ranks)


@pytest.mark.parametrize("prompt", [None, "", "  ", 3])
def test_bad_prompt(prompt):
    with pytest.raises(CourseError, match="prompt"): rankings_to_pairs(prompt, ["a", "b"], [1, 2])


def test_thumbs():
    rows = thumbs_to_pairs("p", list("abcd"), [True, False, None, False], source="app")
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("a", "b"), ("a", "d")] and rows[0]["source"] == "app"
    with pytest.raises(CourseError, match="thumbs"): thumbs_to_pairs("p", ["a", "b"], [True])
    with pytest.raises(CourseError, match="thumbs"): thumbs_to_pairs("p", ["a", "b"], [True, "up"])


@pytest.mark.parametrize("bad, words", [
    (dict(label=math.nan), "row 1, column 'label': found NaN"), (dict(label=-.1), "must lie in"),
    (dict(label=1.1), "must lie in"),
    (dict(label="1"), "must be a number"), (dict(label=True), "must be a number"), (dict(margin=-1), "column 'margin'"),
    (dict(margin=math.inf), "column 'margin'"), (dict(weight=-2), "column 'weight'"),
    (dict(chosen=3), "column 'chosen'"),
    (dict(prompt=" "), "blank"), (dict(rejected="a"), "same text"), (dict(source=3), "column 'source'"),
    (dict(prompt=[dict(role="user", content="p")]), "from_trl")])
def test_bad_rows(bad, words):
    with pytest.raises(CourseError, match=words): validate_pairs([ROW, ROW | bad])


def test_bad_containers():
    for bad in ([], {}, "file.jsonl", None, 3): pytest.raises(CourseError, validate_pairs, bad)
    with pytest.raises(CourseError, match="'rejected' is missing"): validate_pairs([dict(prompt="p", chosen="a")])
    with pytest.raises(CourseError, match="row 0"): validate_pairs(["a"])


def test_identical_texts():
    tie, same = ROW | dict(rejected="a", label=.5), ROW | dict(rejected="a")
    assert len(validate_pairs([tie])) == 1
    assert [len(validate_pairs([ROW, same], identical=how)) for how in ("drop", "keep")] == [1, 2]
    with pytest.raises(CourseError, match="empty"): validate_pairs([same], identical="drop")


def test_identical_texts_in_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (ROW, ROW | dict(rejected="a"))))
    assert [len(load_pairs(path, how)) for how in ("drop", "keep")] == [1, 2]
    with pytest.raises(CourseError, match="line 2: chosen and rejected are the same text"): load_pairs(path)
    for read in (validate_pairs, load_pairs):
        with pytest.raises(CourseError, match="identical is 'dorp'"): read(path, identical="dorp")


def test_tables_are_accepted():
    import pandas as pd
    rows = [ROW | dict(label=.7, source="x"), ROW | dict(label=.2)]
    assert validate_pairs(to_dataset(rows)) == validate_pairs(rows)
    assert validate_pairs(pd.DataFrame(rows)) == validate_pairs(rows)


def test_swap_and_preferred_first():
    rows = preferred_first([ROW | dict(label=.2), ROW | dict(label=.5), ROW | dict(label=.9)])
    assert [r["chosen"] for r in rows] == ["b", "a", "a"] and [r["label"] for r in rows] == [.8, .5, .9]
    assert swap_pair(swap_pair(ROW | dict(label=.25))) == ROW | dict(label=.25)
    assert len(preferred_first([ROW, ROW | dict(label=.5)], ties="drop")) == 1


@pytest.mark.parametrize("seed", range(5))
def test_split_has_no_leak_and_loses_nothing(seed):
    rows = [dict(prompt=f"{'  ' * (i % 2)}Prompt {i % 37}" if i % 3 else f"prompt {i % 37}", chosen=f"a{i}",
                 rejected="b") for i in range(200)]
    train, test = split_by_prompt(rows, test=.3, seed=seed)
    assert shared_prompts(train, test) == [] and len(train) + len(test) == 200
    assert len(group_pairs(test)) == round(.3 * 37)
    again = split_by_prompt(rows[::-1], test=.3, seed=seed)
    assert again[1] == test[::-1]


def test_split_edges():
    assert [len(s) for s in split_by_prompt([ROW, ROW | dict(prompt="q")], test=.01)] == [1, 1]
    assert [len(s) for s in split_by_prompt([ROW, ROW | dict(prompt="q")], test=.99)] == [1, 1]
    with pytest.raises(CourseError, match="same prompt"): split_by_prompt([ROW, ROW])
    for test in (0, 1, -1, 5, "half", True, math.nan):
        pytest.raises(CourseError, split_by_prompt, [ROW, ROW | dict(prompt="q")], test)


def test_files_round_trip(tmp_path):
    rows = validate_pairs([ROW | dict(chosen="line\nbreak \u2028 \u00e9 <script>", label=.25, margin=1.5, source="s",
                                      extra=3)])
    path = save_pairs(tmp_path / "deep" / "pairs.jsonl", rows)
    assert load_pairs(path) == rows and save_pairs(path, rows).read_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]
    from datasets import load_dataset
    table = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert validate_pairs(table) == rows
    path.write_text("\ufeff" + json.dumps(ROW) + "\r\n\r\n")
    assert load_pairs(path) == [ROW | dict(label=1.)]


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "p", "chosen": "a"', "line 2, column"),
    ("[1, 2]", "line 2: found"),
    ('{"prompt": "p", "chosen": "a"}', "line 2: column 'rejected' is missing"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "label": NaN}', "line 2, column 'label': found NaN"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "line 2: chosen and rejected")])
def test_broken_files(tmp_path, line, words):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(CourseError, match=words) as caught: load_pairs(path)
    assert str(path) in str(caught.value)


def test_missing_or_empty_file(tmp_path):
    with pytest.raises(CourseError, match="no such file"): load_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CourseError, match="holds no pairs"): load_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(CourseError, match="UTF-8"): load_pairs(tmp_path / "latin.jsonl")
    with pytest.raises(CourseError, match="JSON cannot store"):
        save_pairs(tmp_path / "x.jsonl", [ROW | dict(extra={1, 2})])
    with pytest.raises(CourseError, match="JSON cannot store"):
        save_pairs(tmp_path / "x.jsonl", [ROW | dict(chosen="\ud800")])
    assert not (tmp_path / "x.jsonl").exists()


def test_trl_formats():
    rows = [ROW | dict(label=.9, margin=2.), ROW | dict(prompt="q", label=.3), ROW | dict(label=.5)]
    table, talk = to_trl(rows), to_trl(rows, conversational=True)
    assert table.column_names[:3] == ["prompt", "chosen", "rejected"] and table[1]["chosen"] == "b" and len(table) == 2
    assert talk[0]["prompt"] == [dict(role="user", content="p")]
    assert talk[0]["chosen"] == [dict(role="assistant", content="a")]
    assert from_trl(table) == from_trl(talk) == preferred_first(rows, ties="drop")
    with pytest.raises(CourseError, match="every pair is a tie"): to_trl([ROW | dict(label=.5)])


def test_trl_implicit_prompts_agree_with_trl():
    from trl.data_utils import extract_prompt
    user = dict(role="user", content="Sky?")
    yes, no = dict(role="assistant", content="Blue."), dict(role="assistant", content="Green.")
    row = dict(chosen=[user, yes], rejected=[user, no])
    ours = from_trl([row])
    assert ours == from_trl([extract_prompt(dict(row))])
    assert ours == [dict(prompt="Sky?", chosen="Blue.", rejected="Green.", label=1.)]
    plain = dict(chosen="The sky is blue.", rejected="The sky is green.")
    theirs = extract_prompt(dict(plain))
    assert from_trl([plain])[0] | dict(label=None) == {k: v.strip() for k, v in theirs.items()} | dict(label=None)
    turns = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello"), user]
    assert from_trl([dict(prompt=turns, chosen=[yes],
                          rejected=[no])])[0]["prompt"] == "Human: Hi\nAssistant: Hello\nHuman: Sky?"


def test_trl_bad_rows():
    for bad in (dict(prompt="p"), dict(chosen="x", rejected="y"), dict(chosen=["x"], rejected="y"),
                dict(prompt="p", chosen=[dict(role="assistant")], rejected="b"),
                dict(prompt="p", chosen=[], rejected=[]), 3):
        with pytest.raises(CourseError, match="row 0"): from_trl([bad])


def test_hh_transcripts():
    head = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it A or B?\n\nAssistant:"
    pair = from_trl([dict(chosen=head + " It is A.", rejected=head + " It is B.")])[0]
    assert pair["chosen"] == "It is A." and pair["rejected"] == "It is B." and pair["prompt"].endswith("Assistant:")


def test_real_hh_pairs():
    import gzip, os
    folder = os.environ.get("CAI_COURSE_REAL_DATA")
    if not folder: pytest.skip("CAI_COURSE_REAL_DATA is not set")
    with gzip.open(os.path.join(folder, "hh-rlhf", "harmless-base-even.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = from_trl(rows, identical="drop")
    assert len(pairs) > .98 * len(rows)
    assert np.mean([p["prompt"].endswith("\n\nAssistant:") for p in pairs]) > .95


def test_noisy_pairs_come_from_six_different_replies():
    rows = noisy_pairs(6, seed=2)
    assert len(validate_pairs(rows)) == len(rows) <= 90 and rows == noisy_pairs(6, seed=2) != noisy_pairs(6, seed=3)
    assert all(len(g) == 15 for g in group_pairs(noisy_pairs(20))), "six different replies, no ties"


def test_one_ranking_is_consistent():
    "No cycles: within a prompt the number of wins is a permutation of 0..5."
    for group in group_pairs(noisy_pairs(10, care=.1)):
        wins = {}
        for r in group:
            wins[r["chosen"]] = wins.get(r["chosen"], 0) + 1
            wins.setdefault(r["rejected"], 0)
        assert sorted(wins.values()) == [0, 1, 2, 3, 4, 5]


def test_memory_knows_only_what_it_saw():
    rows = [ROW, ROW | dict(rejected="c"), ROW | dict(chosen="b", rejected="c", label=.75)]
    score = memory_score(rows)
    assert score(["p"] * 4, list("abcd")).tolist() == [2., -.5, -1.5, 0.]
    assert score([" P"], ["a"]).tolist() == [2.] and score(["q"], ["a"]).tolist() == [0.]
    from cai_course.reward import pair_correct
    train, test = split_by_prompt(noisy_pairs(20), .2)
    assert set(pair_correct(memory_score(train), test)) == {.5} and pair_correct(memory_score(test), test).mean() > .95
