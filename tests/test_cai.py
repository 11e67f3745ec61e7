"""The pipeline: settings, steps, measures, and whole runs on tiny random models."""
import dataclasses
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cai_course import cai, world
from cai_course.cai import AlignConfig, fast_config
from cai_course.errors import CourseError
from cai_course.runs import RunFolder

# --- settings ---

def test_every_default_is_in_its_range_and_settings_cannot_be_changed_in_place():
    config = AlignConfig()
    assert dataclasses.replace(config) == config and fast_config() == AlignConfig(**cai.FAST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


@pytest.mark.parametrize("field, value", [(each.name, value) for each in dataclasses.fields(AlignConfig) if each.metadata["low"] is not None
                                          for value in (each.metadata["low"] - 1, each.metadata["high"] + 1, float("nan"), None, "3", True)])
def test_values_outside_the_range_are_refused(field, value):
    with pytest.raises(CourseError, match=f"^{field.replace('_', '-')} is "):
        AlignConfig(**{field: value})


@pytest.mark.parametrize("field, value", [("model", ""), ("model", None), ("labels", "SOFT"), ("direct", 1), ("judge", None), ("prompts", ""),
                                          ("model", 3)])
def test_words_are_checked(field, value):
    with pytest.raises(CourseError, match=f"^{field} is "):
        AlignConfig(**{field: value})


def test_numbers_and_paths_of_other_types_are_taken():
    config = AlignConfig(steps=np.int64(3), beta=1, model=Path("a") / "b")
    assert config.steps == 3 and type(config.steps) is int and type(config.beta) is float and config.model == os.path.join("a", "b")
    json.dumps(dataclasses.asdict(config))


# --- prompts ---

def test_step_seeds_depend_on_seed_and_purpose_alone():
    seeds = {cai.step_seed(seed, name) for seed in range(20) for name in ("a", "b", "c")}
    assert len(seeds) == 60 and all(0 <= each < 2**31 for each in seeds)
    assert cai.step_seed(1, "a") == cai.step_seed(1, "a")


def test_ordinary_prompts_hold_some_that_sound_bad():
    groups = [world.understand(each)[0].group for each in cai.ordinary_prompts(50, 3)]
    assert groups.count("borderline") == 10 and groups.count("benign") == 40


def test_no_held_out_request_is_ever_trained_on():
    config = AlignConfig(red_team=300, evaluation=100)
    inputs = cai.load_inputs(config)
    held_out = {row["prompt"] for row in cai.evaluation_tasks(config)}
    assert not held_out & {*inputs.red_team, *inputs.helpful}
    assert len(inputs.red_team) == 300 and len(inputs.helpful) + len(inputs.skill) == round(300 / 1.35)


def test_distance_from_the_world():
    inside = cai.distance_from_world(world.red_team(30, seed=0) + cai.ordinary_prompts(30))
    assert inside["known"] == 1. and inside["unknown_words"] == 0.
    outside = cai.distance_from_world(["Quantum chromodynamics, please?", "Wie geht es Ihnen?"])
    assert outside["known"] == 0. and outside["unknown_words"] > .5
    assert cai.distance_from_world([])["known"] == 0.
    assert cai.outside_notes(world.red_team(5)) == []
    assert "100.0% of the 2 red-team prompts lie outside" in cai.outside_notes(["Quantum?", "Wie?"])[0]


def test_a_prompt_file_is_sampled_by_the_seed(prompt_file):
    first, second = (cai.load_inputs(AlignConfig(prompts=prompt_file, red_team=4, seed=seed)).red_team for seed in (0, 1))
    assert len(first) == len(second) == 4 and first != second


# --- preferences by people ---

def reply_pair(group="benign", good="helpful", bad="off_topic", n=30):
    rng = random.Random(0)
    return [{"prompt": each.text, "a": world.reply(each, good, rng), "b": world.reply(each, bad, rng)}
            for each in world.requests(group, "train", limit=n)]


def test_people_mostly_choose_the_helpful_reply_wherever_it_stands():
    pairs = reply_pair()
    swapped = [dict(each, a=each["b"], b=each["a"]) for each in pairs]
    for rows in (pairs, swapped):
        votes = cai.human_preferences(rows, AlignConfig())
        good = {each["a"] for each in pairs}
        assert np.mean([row["chosen"] in good for row in votes]) > .9
        assert all(.5 < row["label"] <= 1 and row["source"] == "human-helpfulness" for row in votes)
    assert cai.human_preferences(pairs, AlignConfig()) == cai.human_preferences(pairs, AlignConfig())


def test_people_skip_what_they_do_not_know():
    assert cai.human_preferences([{"prompt": "Quantum?", "a": "yes", "b": "no"}], AlignConfig()) == []
    assert cai.human_preferences([dict(each, b=each["a"]) for each in reply_pair(n=3)], AlignConfig()) == []


def test_the_votes_of_a_labeler_in_bad_faith_are_found_and_do_not_count():
    pairs = reply_pair(n=60)
    people = world.labelers()
    votes = [{**pair, "votes": [person.prefer(pair["prompt"], pair["a"], pair["b"], random.Random(f"{i} {person.name}"))
                                for person in people]} for i, pair in enumerate(pairs)]
    assert [people[i].name for i in cai.trusted_people(votes, people)] == [each.name for each in people if not each.bad_faith]
    assert cai.trusted_people(votes + votes, people) == cai.trusted_people(votes, people)   # the same contest twice is one
    two = [{**row, "votes": row["votes"][:2]} for row in votes]
    assert cai.trusted_people(two, people[:2]) == [0, 1] and cai.trusted_people([], people) == [0, 1, 2, 3, 4]
    shares = {row["label"] for row in cai.human_preferences(pairs, AlignConfig())}
    assert shares <= {.75, 1.}                                          # four votes; two against two drops the pair


def test_contrast_pairs_put_a_reply_of_somebody_else_beside_the_policys():
    pairs = reply_pair(n=20)
    mixed = cai.contrast_pairs(pairs, seed=1)
    assert mixed == cai.contrast_pairs(pairs, seed=1) and len(mixed) >= 15
    before = {row["prompt"]: row for row in pairs}
    assert all(row["a"] == before[row["prompt"]]["a"] and row["a"] != row["b"] for row in mixed)
    assert sum(row["b"] != before[row["prompt"]]["b"] for row in mixed) >= 15
    outside = [{"prompt": "Quantum?", "a": "yes", "b": "no"}]
    assert cai.contrast_pairs(outside) == outside


def test_skill_tasks_join_fine_tuning_alone():
    inputs = cai.load_inputs(AlignConfig(red_team=54))
    assert len(inputs.helpful) + len(inputs.skill) == 40 and len(inputs.skill) == 8
    assert all(text.startswith(world.SKILL_OPENING) for text in inputs.skill)
    assert not any(text.startswith(world.SKILL_OPENING) for text in inputs.helpful)


def test_evasiveness_of_the_unseen_kind_stands_apart():
    row = dict(stage="base", seed=0, group="harmful", prompt="p", response="r", harmful=0., evasive=1., helpful=0.)
    rows = [dict(row, kind="theft", prompt=str(i), evasive=0.) for i in range(3)]
    rows += [dict(row, kind=world.UNSEEN_KIND, prompt=f"u{i}") for i in range(3)]
    results, _ = cai.summarize(rows)
    assert results["evasive"]["base"]["value"] == 0 and results["evasive"]["base"]["n"] == 3
    assert results["evasive_unseen"]["base"]["value"] == 1 and results["harm"]["base"]["n"] == 6


def test_gold_reward():
    request, rng = world.requests("harmful", "heldout", limit=1)[0], random.Random(0)
    replies = [world.reply(request, style, rng) for style in ("comply", "refuse", "evasive")]
    assert cai.gold_reward([request.text] * 3 + ["Quantum?"], [*replies, "yes"]).tolist() == [-1., 1., 0., 0.]


# --- measures ---

def test_diversity_values_are_the_jackknife():
    texts = ["a b c", "a b d", "e f", "a", "e f g h"]

    def mean_distance(rows):
        return np.mean([cai.word_distance(a, b) for a, b in itertools.combinations(rows, 2)])
    n, whole = len(texts), mean_distance(texts)
    wanted = [n * whole - (n - 1) * mean_distance(texts[:i] + texts[i + 1:]) for i in range(n)]
    assert cai.diversity_values(texts) == pytest.approx(wanted)
    assert np.mean(cai.diversity_values(texts)) == pytest.approx(whole)
    assert cai.diversity_values(["same"] * 4) == [0.] * 4
    with pytest.raises(CourseError, match="at least 3"):
        cai.diversity_values(["a", "b"])


def evaluation_rows(harm, seeds=(0, 1, 2), n=30):
    rng = random.Random(0)
    rows = []
    for stage, level in harm.items():
        for seed in seeds:
            for i in range(n):
                base = {"stage": stage, "seed": seed, "kind": "k", "prompt": f"p{i}", "response": f"r {i % 7} {seed}", "refuses": False,
                        "helpful": 1., "evasive": 0., "harmful": 0.}
                rows += [{**base, "group": "harmful", "harmful": float(rng.random() < level)}, {**base, "group": "benign"},
                         {**base, "group": "borderline", "refuses": i == 0}, {**base, "group": "skill", "correct": float(i % 2)}]
    return rows


def test_the_results_have_the_form_of_the_file():
    results, differences = cai.summarize(evaluation_rows({"base": .9, "sl_cai": .3, "rl_cai": .02}))
    assert list(results) == ["harm", "help", "evasive", "over_refusal", "skill", "diversity"]
    for stages in results.values():
        assert list(stages) == ["base", "sl_cai", "rl_cai"]
        for figure in stages.values():
            assert list(figure) == ["value", "low", "high", "n"]
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert results["harm"]["base"]["value"] == pytest.approx(.9, abs=.08)
    assert results["help"]["rl_cai"]["value"] == 1. and results["over_refusal"]["base"]["value"] == pytest.approx(1 / 30)
    assert differences["harm"]["value"] == pytest.approx(results["harm"]["rl_cai"]["value"] - results["harm"]["base"]["value"])
    assert differences["harm"]["high"] < -.7 and differences["help"]["value"] == 0.


def test_own_prompts_never_enter_a_figure():
    rows = evaluation_rows({"base": .5})
    extra = [{"stage": "base", "seed": 0, "group": "yours", "kind": "yours", "prompt": "q", "response": "r"}]
    assert cai.summarize(rows) == cai.summarize(rows + extra)


# --- whole runs ---

@pytest.fixture(scope="module")
def small(tiny_t5, tiny_bert, tiny_constitution):
    """Settings of a run of a few seconds."""
    return fast_config(model=tiny_t5, reward_model=tiny_bert, constitution=tiny_constitution, red_team=6, preferences=6, human_pairs=6,
                       evaluation=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Such a run, finished, with its results."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, cai.align(small, folder, progress=False)


def test_the_folder_holds_what_the_design_promises(finished):
    folder, results = finished
    assert sorted(each.name for each in folder.iterdir() if not each.name.startswith(".")) == [
        "10_replies.jsonl", "20_revisions.jsonl", "30_sl_cai", "40_preferences.jsonl", "50_preference_model", "60_rl_cai", "70_evaluation.jsonl",
        "log.jsonl", "manifest.json", "report.html", "results.json", "timings.json"]
    stored = json.loads((folder / "results.json").read_text())
    assert stored == results
    measures = [name for name in stored if name != "evasive_unseen"]  # there only if the few requests hold the kind kept from critique
    assert measures == ["harm", "help", "evasive", "over_refusal", "skill", "diversity", "seconds", "peak_memory_mb"]
    assert stored["seconds"] > 0 and stored["peak_memory_mb"] > 100


def test_only_safetensors_are_written(finished):
    from safetensors import safe_open

    folder, _ = finished
    weights = [each for each in folder.rglob("*") if each.suffix in (".safetensors", ".bin", ".pt", ".pkl", ".pth")]
    assert weights and all(each.suffix == ".safetensors" for each in weights)
    for each in weights:
        with safe_open(each, "pt") as content:
            assert list(content.keys())


def test_the_rows_are_what_they_say(finished, small):
    run = RunFolder(finished[0])
    replies = run.rows("10_replies.jsonl")
    assert [row["source"] for row in replies].count("red_team") == 6
    assert all(len(row["revisions"]) == small.revisions for row in run.rows("20_revisions.jsonl"))
    pairs = run.rows("40_preferences.jsonl")
    assert {row["source"] for row in pairs} <= {"ai-harmlessness", "human-helpfulness"}
    assert all(.5 <= row["label"] <= 1 and row["chosen"] != row["rejected"] for row in pairs)
    assert all("principle" in row for row in pairs if row["source"] == "ai-harmlessness")
    log = run.rows("log.jsonl")
    assert {row["artefact"] for row in log} == {name for name in cai.STEPS}
    rl = [row for row in log if row["artefact"] == "60_rl_cai"]
    assert len(rl) >= small.steps and all({"proxy", "gold", "kl"} <= set(row) for row in rl)


def test_trl_takes_the_preferences_as_they_are(finished):
    from datasets import Dataset
    from trl.data_utils import is_conversational, unpair_preference_dataset

    rows = [json.loads(line) for line in (finished[0] / "40_preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not is_conversational(rows[0]) and all(0 <= row["label"] <= 1 for row in rows)
    data = Dataset.from_list(rows).select_columns(["prompt", "chosen", "rejected"])
    replies = unpair_preference_dataset(data)
    assert replies["completion"] == [*data["chosen"], *data["rejected"]] and sum(replies["label"]) == len(rows)


def test_the_report_can_be_made_anew(finished):
    folder, results = finished
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert cai.rebuild_report(folder) == results
    assert (folder / "report.html").read_bytes() == page
    text = page.decode()
    assert text.count("<svg") >= 4 and "Transcripts, side by side" in text and "Only 4 held-out requests" in text
    assert not any(f"{results['seconds']}" == part for part in text.split())


def test_rl_starts_from_sl_cai_and_the_policies_differ(finished, small):
    from cai_course.models import load_policy

    folder, _ = finished
    prompt, reply = ["How do I take a bike?"], ["please ask them first"]
    base = load_policy(small.model)
    sl = load_policy(small.model, adapter=folder / "30_sl_cai")
    rl = load_policy(small.model, adapter=folder / "60_rl_cai")
    scores = [float(each.sequence_logprobs(prompt, reply)) for each in (base, sl, rl)]
    assert len(set(scores)) == 3
    with rl.reference():
        assert float(rl.sequence_logprobs(prompt, reply)) == pytest.approx(scores[1], abs=1e-5)


def test_own_prompts_from_outside_the_world(small, prompt_file, tmp_path):
    config = dataclasses.replace(small, prompts=prompt_file)
    results = cai.align(config, tmp_path / "own", progress=False)
    assert set(results["harm"]) == {"base", "sl_cai", "rl_cai"}
    page = (tmp_path / "own" / "report.html").read_text()
    assert "lie outside the pocket world" in page and "The oracle&#39;s figures do not apply to these prompts" in page
    assert "Your prompts (seen in training; the oracle cannot judge them)" in page and "How do I take her diary?" in page


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(judge="chain-of-thought", labels="clamped"), dict(labels="hard", direct=True, revisions=2, train_on="all")])
def test_other_settings_run_through(change, small, tmp_path):
    cai.align(dataclasses.replace(small, **change), tmp_path / "other", progress=False)
    labels = [row["label"] for row in RunFolder(tmp_path / "other").rows("40_preferences.jsonl") if row["source"] == "ai-harmlessness"]
    assert all(each <= .6 for each in labels) if "judge" in change else all(each in (.5, 1.) for each in labels)


def test_library_use_is_checked_before_any_work(small, tmp_path):
    with pytest.raises(CourseError, match="it must be an AlignConfig"):
        cai.align({"steps": 3}, tmp_path / "a")
    for seeds in (0, 1.5, True, "2"):
        with pytest.raises(CourseError, match="seeds is"):
            cai.align(small, tmp_path / "a", seeds=seeds)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_causal_model(small, tmp_path):
    from conftest import make_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel
    import torch

    folder = tmp_path / "tiny-gpt2"
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=1,
                               pad_token_id=0)).save_pretrained(folder)
    results = cai.align(dataclasses.replace(small, model=str(folder)), tmp_path / "causal", progress=False)
    assert set(results["help"]) == {"base", "sl_cai", "rl_cai"}


@pytest.mark.slow
def test_a_model_of_the_shape_of_flan_t5_small(small, tmp_path):
    """The real configuration with random weights, so that `--model google/flan-t5-small` works for those who have a network."""
    from conftest import make_tiny_t5

    folder = make_tiny_t5(tmp_path / "flan-t5-small", vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8,
                          num_heads=6)
    config = dataclasses.replace(small, model=str(folder), red_team=4, preferences=4, human_pairs=4, evaluation=3, steps=1, rl_batch=4,
                                 sl_temperature=1.)  # random weights that sample coldly repeat one token, which may say nothing
    results = cai.align(config, tmp_path / "flan", progress=False)
    assert set(results["harm"]) == {"base", "sl_cai", "rl_cai"}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CAI_COURSE_REAL_DATA"), reason="CAI_COURSE_REAL_DATA names no folder of real data")
def test_real_red_team_prompts_with_the_published_principles(small, tmp_path):
    data = Path(os.environ["CAI_COURSE_REAL_DATA"])
    prompts, principles = data / "hh-rlhf" / "harmless-base-even.jsonl.gz", data / "constitutional-ai" / "prompts"
    if not prompts.exists() or not principles.exists():
        pytest.skip(f"{prompts} or {principles} does not exist")
    config = dataclasses.replace(small, prompts=str(prompts), constitution=str(principles), few_shot=1, red_team=24, preferences=24)
    cai.align(config, tmp_path / "real", progress=False)
    page = (tmp_path / "real" / "report.html").read_text()
    assert "lie outside the pocket world" in page and "<script" not in page
    assert len(RunFolder(tmp_path / "real").rows("20_revisions.jsonl")) == 24


# --- other teachers, refrains, released answers ---

def test_every_teacher_gives_a_reward(small):
    inputs, frozen, policy = cai.first_phase(small)
    rewards = cai.rewards_of_teachers(inputs, frozen, policy, dataclasses.replace(small, reward_epochs=1))
    assert tuple(rewards) == cai.TEACHERS
    prompts = [*inputs.red_team[:3], *inputs.helpful[:3]]
    replies = frozen.generate(prompts, 12, seed=1, progress=False)
    for teacher, reward in rewards.items():
        scores = torch.as_tensor(reward(prompts, replies))
        assert scores.shape == (6,) and torch.isfinite(scores).all(), teacher
    direct = torch.as_tensor(rewards["direct"](prompts, replies))
    assert torch.equal(direct, torch.as_tensor(rewards["direct"](prompts, replies)))


def test_phase_one_in_memory_is_that_of_a_run(finished, small):
    inputs, frozen, policy = cai.first_phase(small)
    run = RunFolder(finished[0])
    replies = cai.first_replies(frozen, inputs, small, False)
    assert replies == run.rows("10_replies.jsonl")
    assert cai.first_revisions(frozen, replies, inputs, small, False) == run.rows("20_revisions.jsonl")
    from cai_course.models import load_policy
    stored = load_policy(small.model, adapter=finished[0] / "30_sl_cai")
    prompt, reply = ["How do I take a bike?"], ["please ask them first"]
    assert float(policy.sequence_logprobs(prompt, reply)) == pytest.approx(float(stored.sequence_logprobs(prompt, reply)), abs=1e-6)


def test_examples_follow_the_settings(small):
    replies = [{"prompt": f"r{i}", "response": "bad", "source": "red_team"} for i in range(6)] + [
        {"prompt": f"h{i}", "response": "good" if i else " ", "source": "helpful"} for i in range(6)]
    revised = [{"prompt": f"r{i}", "response": "bad", "revisions": [{"revision": "better"}, {"revision": "best"}]} for i in range(6)]
    rows = cai.sl_examples(replies, revised, dataclasses.replace(small, helpful_ratio=2.))
    assert sorted((row["source"], row["response"]) for row in rows) == [("helpful", "good")] * 3 + [("revision", "best")] * 6
    rows = cai.sl_examples(replies, revised, dataclasses.replace(small, train_on="all"))
    assert sum(row["source"] == "revision" for row in rows) == 12
    with pytest.raises(CourseError, match="only empty replies"):
        cai.sl_examples([], [{"prompt": "r", "response": "bad", "revisions": [{"revision": " "}] * 2}], small)


def test_the_scale_of_a_reward_is_set_on_given_replies():
    def length(prompts, replies):
        return torch.tensor([float(len(each)) for each in replies])
    replies = ["a", "bbb", "ccccccc"]
    scores = np.asarray(cai.same_scale(length, ["p"] * 3, replies)(["p"] * 3, replies))
    assert scores.mean() == pytest.approx(0, abs=1e-6) and scores.std() == pytest.approx(1, abs=1e-6)
    assert (np.argsort(scores) == [0, 1, 2]).all()
    assert cai.same_scale(length, ["p"] * 2, ["x", "y"]) is length, "equal scores set no scale"


def test_people_name_what_they_compared():
    request = world.requests("harmful", "train", limit=1, seed=1)[0]
    rng = random.Random(0)
    pair = [{"prompt": request.text, "a": world.reply(request, "refuse", rng), "b": world.reply(request, "comply", rng)}]
    assert {row["source"] for row in cai.human_preferences(pair, fast_config())} == {"human-helpfulness"}
    assert {row["source"] for row in cai.human_preferences(pair, fast_config(), source="human-harmlessness")} == {"human-harmlessness"}


# --- instruments for comparing teachers ---

@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_help_at_a_harm_lies_between_the_looks_around_it(path, level):
    harm, help = zip(*path)
    if min(harm) > level:
        with pytest.raises(CourseError, match="the lowest harm"):
            cai.help_at_harm(harm, help, level)
        return
    first = next(i for i, h in enumerate(harm) if h <= level)
    around = help[max(0, first - 1):first + 1]
    assert min(around) - 1e-9 <= cai.help_at_harm(harm, help, level) <= max(around) + 1e-9
    assert cai.help_at_harm(harm, help, harm[0]) == help[0]


def test_two_instructions_disagree_about_dodges_alone():
    rng = random.Random(2)
    asks = world.requests("harmful", "heldout", limit=12, seed=2)
    prompts = [ask.text for ask in asks]
    say = {style: [world.reply(ask, style, rng) for ask in asks] for style in ("comply", "evasive", "refuse")}
    for dodging in (True, False):
        for style in ("evasive", "refuse"):
            assert (cai.harmlessness_votes(prompts, say[style], say["comply"], dodging) == 1).all(), "harm comes first"
            assert (cai.harmlessness_votes(prompts, say[style], say[style], dodging) == .5).all()
    assert (cai.harmlessness_votes(prompts, say["evasive"], say["refuse"]) == .5).all()
    assert (cai.harmlessness_votes(prompts, say["evasive"], say["refuse"], dodging=False) == 0).all()
    assert (cai.harmlessness_votes(prompts, say["refuse"], say["evasive"], dodging=False) == 1).all()


def test_wins_that_length_explains_are_taken_out():
    rng = np.random.default_rng(0)
    other = rng.integers(5, 40, 4000)
    words = np.maximum(1, (other * np.exp(rng.normal(.4, .5, 4000))).round())
    chance = 1 / (1 + np.exp(-(.7 + .9 * np.log(words / other))))
    wins = (rng.random(4000) < chance).astype(float)
    even = cai.wins_at_equal_length(wins, words, other)
    assert even == pytest.approx(1 / (1 + np.exp(-.7)), abs=.03) and even < wins.mean()
    assert cai.wins_at_equal_length(1 - wins, other, words) == pytest.approx(1 - even, abs=1e-6), "the two sides change places"
    for wins in (np.ones(9), np.zeros(9)):
        assert 0 < cai.wins_at_equal_length(wins, np.arange(1, 10), np.full(9, 5)) < 1
    for bad in (([1.], [1], []), ([], [], []), ([[1.]], [[1]], [[1]])):
        with pytest.raises(CourseError, match="N above 0"):
            cai.wins_at_equal_length(*bad)


def test_raters_share_one_pot():
    rng = random.Random(3)
    asks = world.requests("harmful", "heldout", limit=6, seed=4)
    said = {arm: [{"group": "harmful", "prompt": ask.text, "response": world.reply(ask, style, rng)} for ask in asks]
            for arm, style in (("base", "comply"), ("people", "refuse"), ("machine", "partial"))}
    found = cai._rated(said, 0)
    for told in ("dodges_allowed", "mind_dodges"):
        assert np.mean([value for name, value in found.items() if name.startswith(told)]) == pytest.approx(.5)
    assert found["mind_dodges_dodger"] < found["dodges_allowed_dodger"]
    assert found == cai._rated(said, 0)


def test_the_reply_to_beat_is_worth_nothing(small):
    inputs, frozen, policy = cai.first_phase(small)
    reward, prompts = cai.direct_reward(frozen, policy, inputs, small), [*inputs.red_team, *inputs.helpful]
    same = policy.generate(prompts, max_new_tokens=small.max_new_tokens, progress=False, temperature=small.temperature,
                           seed=cai.step_seed(small.seed, "to beat"))
    assert (reward(prompts, same) == 0).all(), "a reply against itself is a tie"


def test_the_refrain_counts_replies_not_repetitions():
    assert cai.top_phrase(["a b c d a b c d a b c d", "w x y z", "W x, y z!"]) == ("w x y z", 2 / 3)
    assert cai.top_phrase(["You’re not a fool", "you're not a saint"], words=3) == ("you're not a", 1.)
    assert cai.top_phrase(["", "short"]) == ("", 0.)
    with pytest.raises(CourseError, match="texts is empty"):
        cai.top_phrase([])


@pytest.mark.parametrize("text, brief", [("I'm sorry, I can't.", True), ("I cant do that.", True), ("Sure.", False), ("I won't. " + "Reason " * 30, False),
                                         ("I apologize, but no.", True), ("", False)])
def test_short_refusals(text, brief):
    assert cai.refuses_briefly(text) is brief


def released(folder, answer=" Hello there.\n\nHuman: more"):
    for key in cai.RELEASED:
        row = {"rl_prompt": "\n\nHuman: Hi\n\nAssistant:", "sampled_answers": [{"sampled_string": answer, "pm_scores": []}] * 3}
        (folder / f"PALMS_{key}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_released_answers_end_where_the_model_plays_the_human(tmp_path):
    assert cai.released_answers(released(tmp_path)) == {name: [["Hello there."] * 3] for name in cai.RELEASED.values()}


def test_released_answers_of_another_form_are_named(tmp_path):
    released(tmp_path)
    (tmp_path / "PALMS_HRLHF.jsonl").write_text('{"sampled_answers": 3}\n')
    with pytest.raises(CourseError, match="PALMS_HRLHF.jsonl cannot be read"):
        cai.released_answers(tmp_path)
    with pytest.raises(CourseError, match="Give the folder"):
        cai.released_answers(tmp_path / "nowhere")


@pytest.mark.skipif(not os.environ.get("CAI_COURSE_REAL_DATA"), reason="CAI_COURSE_REAL_DATA names no folder of real data")
def test_the_released_answers_show_what_chapter_13_says():
    found = cai.released_answers(Path(os.environ["CAI_COURSE_REAL_DATA"]) / "constitutional-ai" / "samples")
    assert {name: (len(prompts), {len(texts) for texts in prompts}) for name, prompts in found.items()} == {n: (40, {17}) for n in cai.RELEASED.values()}
    flat = {name: [text for texts in prompts for text in texts] for name, prompts in found.items()}
    short = {name: np.mean([cai.refuses_briefly(text) for text in texts]) for name, texts in flat.items()}
    refrain = {name: cai.top_phrase(texts)[1] for name, texts in flat.items()}
    assert short["HH-RLHF"] > .2 and short["RL-CAI"] == short["RL-CAI with CoT"] == 0
    assert refrain["RL-CAI"] > .5 > .25 > max(refrain[name] for name in refrain if name != "RL-CAI")
