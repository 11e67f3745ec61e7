"""The making of the pocket models: tokenizer, lessons, resume, and what is shipped."""
import json
import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cai_course import pretrain, world
from cai_course.errors import CourseError
from cai_course.paths import model_dir

SMALL = pretrain.PretrainConfig(pools=2, pool_size=24, budget=1_200, save_every=1, warmup=2)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.make_tokenizer(pretrain.vocabulary_texts(4_000))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
def test_any_text_can_be_encoded_and_decoded(text):
    tokenizer = pretrain.make_tokenizer(["How do I read my neighbor's diary?"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    # a text that itself spells a special token or the word marker is the one exception
    if not any(mark in text for mark in (*pretrain.SPECIAL, "\u2581", "<0x")):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")   # T5 drops one leading space, too


def test_words_of_the_world_and_option_labels_are_single_tokens(tokenizer):
    for topic in world.topics():
        for word in world.normalize(" ".join(topic.steps)).replace("'s", "").split():
            assert len(tokenizer("to " + word, add_special_tokens=False)["input_ids"]) == 2, word
    a, b = (tokenizer(label, add_special_tokens=False)["input_ids"] for label in ("(A)", "(B)"))
    assert len(a) == len(b) == 1 and a != b
    assert a[0] not in tokenizer("a cake (a)", add_special_tokens=False)["input_ids"]


def test_models_are_within_their_size_and_the_head_is_untied(tokenizer):
    t5, bert = pretrain.build_t5(tokenizer), pretrain.build_bert(tokenizer)
    assert sum(p.numel() for p in t5.parameters()) <= 4_000_000 and sum(p.numel() for p in bert.parameters()) <= 2_000_000
    assert t5.lm_head.weight is not t5.shared.weight


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", .02)])  # bfloat16 keeps 8 bits: 0.4 % per operation
def test_the_fast_copy_computes_the_same(tokenizer, dtype, tolerance):
    torch.manual_seed(0)
    model = pretrain.build_t5(tokenizer)
    fast = pretrain.fast_copy(model, dtype)
    lessons = [pretrain.lesson(random.Random(i)) for i in range(6)]
    slow_sum, weight, _ = pretrain.t5_loss(model, tokenizer, lessons)
    fast_sum, *_ = pretrain.t5_loss(fast, tokenizer, lessons)
    assert abs(slow_sum - fast_sum) / slow_sum < tolerance


def test_the_learning_rate_warms_up_falls_and_cools_down_to_nothing(tmp_path, monkeypatch):
    rates, learn = [], pretrain.Trainer.learn
    def watched(trainer, loss):
        norm = learn(trainer, loss)
        [rate] = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}   # both optimizers go by one
        rates.append(rate)
        return norm
    monkeypatch.setattr(pretrain.Trainer, "learn", watched)
    pretrain.pretrain_t5(tmp_path, replace(SMALL, pools=4, cooldown=.5, parts=(1,)), progress=False)
    half = len(rates) // 2
    assert rates[0] < max(rates) and rates.index(max(rates)) < half
    assert rates[half:] == sorted(rates[half:], reverse=True) and rates[-1] < .3 * rates[half]


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole = pretrain.pretrain_t5(tmp_path / "whole", SMALL, progress=False)
    class Stop(Exception): pass
    saved = pretrain.Trainer.save
    def save_and_stop(self):
        saved(self)
        if self.pool == 1: raise Stop
    pretrain.Trainer.save = save_and_stop
    try:
        with pytest.raises(Stop): pretrain.pretrain_t5(tmp_path / "parts", SMALL, progress=False)
    finally: pretrain.Trainer.save = saved
    parts = pretrain.pretrain_t5(tmp_path / "parts", SMALL, progress=False)
    losses = lambda rows: [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    assert len(whole) == 2 and losses(whole) == losses(parts)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_muon_takes_the_steps_of_torchs_own(shape):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    a = pretrain.Muon([ours], lr=.01)
    b = torch.optim.Muon([theirs], lr=.01, momentum=.95, weight_decay=.01, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        a.step(), b.step()
        # torch's rounds to bfloat16 at each of its five iterations, which keeps 8 bits
        assert (ours - theirs).abs().max() < .03 * (ours - before).abs().max()
        theirs.data.copy_(ours)


def test_muon_moves_matrices_of_one_shape_as_each_alone():
    generator = torch.Generator().manual_seed(1)
    together = [torch.nn.Parameter(torch.randn(8, 12, generator=generator)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [pretrain.Muon(together, lr=.02), *(pretrain.Muon([p], lr=.02) for p in alone)]
    for _ in range(2):
        for p, q in zip(together, alone):
            p.grad = torch.randn(8, 12, generator=generator); q.grad = p.grad.clone()
        for optimizer in optimizers: optimizer.step()
    for p, q in zip(together, alone): torch.testing.assert_close(p, q)


def test_muon_takes_the_matrices_of_the_stacks_and_adamw_all_the_rest(tokenizer, tmp_path):
    model = pretrain.build_t5(tokenizer)
    adamw, muon = pretrain.Trainer(model, tmp_path, SMALL).optimizers
    mine = lambda optimizer: {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert mine(adamw) | mine(muon) == set(names) and not mine(adamw) & mine(muon)
    assert {"shared.weight", "lm_head.weight"} <= {names[i] for i in mine(adamw)}
    assert all(".block." in names[i] and names[i].endswith(("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight", "wo.weight"))
               for i in mine(muon))
    assert len(pretrain.Trainer(pretrain.build_bert(tokenizer), tmp_path, pretrain.BERT_CONFIG).optimizers) == 1


def test_a_principle_of_a_close_call_names_the_harm_half_of_the_time():
    rng, named = random.Random(0), 0
    for _ in range(600):
        request, scope, style = pretrain.close_call(rng, "train")
        reply = pretrain.draw_reply(request, rng, style)
        verdict = world.judge(request.text, reply)
        named += request.kind in scope.faults
        assert (f"The reply is harmful because {world.lexicon()['harmful'][request.kind]['effect']}." in
                world.critique(verdict, reply, scope)) == bool(verdict.harmful and request.kind in scope.faults)
    assert 240 < named < 360                           # five standard deviations around a half


def test_the_number_of_kinds_in_a_matching_drill_says_nothing_about_the_answer():
    rng, right = random.Random(0), {}
    for _ in range(1_500):
        one = pretrain.matching_lesson(rng, "train", .3)
        assert one.prompt.startswith("Assistant: ") and one.prompt.count("\n") == 2
        nouns = 1 + one.prompt.count(",") + one.prompt.count(" or ")
        right.setdefault(nouns, []).append(one.response == world.NOTHING_WRONG)
    assert set(right) == {1, 2, 3}
    for answers in right.values(): assert abs(sum(answers) / len(answers) - .5) < 2.5 / len(answers) ** .5   # five standard deviations


def test_copying_drills_ask_for_the_reply_itself():
    rng = random.Random(0)
    for _ in range(200):
        one = pretrain.copying_lesson(rng, "train")
        assert one.prompt == f"Assistant: {one.response}\nCritique: {world.NOTHING_WRONG}\nRevision:"


def test_wild_copies_are_different_taught_words_and_shuffled_words_are_the_same_ones():
    for seed in range(100):
        wild, plain = (pretrain.copying_lesson(random.Random(seed), "train", wild=share) for share in (1., 0.))
        words = wild.response.split()
        assert wild.prompt == f"Assistant: {wild.response}\nCritique: {world.NOTHING_WRONG}\nRevision:"
        assert 2 <= len(words) == len(set(words)) <= 10 and set(words) <= set(pretrain.taught_words())
        mixed = pretrain.shuffled_words(plain.response, random.Random(seed))
        assert sorted(mixed.split()) == sorted(plain.response.split())
        assert mixed != plain.response or len(plain.response.split()) < 4


def test_near_replies_are_nearly_what_is_said_and_are_asked_for_as_they_stand():
    rng, changed, odd = random.Random(0), 0, 0
    for _ in range(300):
        request = pretrain.draw_request(rng, "train", .6, True)
        said = pretrain.draw_reply(request, rng)
        text = pretrain.slipped(said, rng)
        assert abs(len(text.split()) - len(said.split())) <= 3 and text
        assert {*text.split()} <= {*said.split(), *pretrain.taught_words()}
        changed += text != said
        if request.group == "harmful":
            own = world.understand(request.text)[0]
            odd += not any(world.to_you(world.fill(offer, request.slots[0])) in pretrain.odd_refusal(request, rng) for offer in own.instead)
        one = pretrain.copying_lesson(rng, "train", slips=1.)
        assert one.prompt == f"Assistant: {one.response}\nCritique: {world.NOTHING_WRONG}\nRevision:"
    assert changed > 280 and odd > 100
    assert pretrain.slipped("No.", random.Random(1))


def test_dodge_calls_ask_whether_a_benign_request_is_answered():
    rng, right = random.Random(0), []
    for _ in range(400):
        request, scope, style = pretrain.dodge_call(rng, "train")
        reply = pretrain.draw_reply(request, rng, style)
        said = world.critique(world.judge(request.text, reply), reply, scope)
        assert request.group != "harmful" and "evasive" in scope.faults
        assert ("dodges" in said) == (style not in ("helpful", "partial")), (style, reply, said)
        right.append("dodges" in said)
    assert 150 < sum(right) < 250
    assert len(pretrain.PretrainConfig().lrs) == len(pretrain.PretrainConfig().parts)


def test_drills_of_fitting_ask_whether_a_step_belongs_to_the_request():
    rng, dodges = random.Random(0), 0
    for _ in range(400):
        one = pretrain.fitting_lesson(rng, "train")
        asked, reply = (line.split(": ", 1)[1] for line in one.prompt.split("\n")[:2])
        topic = world.understand(asked)[0]
        own = any(world.normalize(step) in world.normalize(reply) for step in topic.steps)
        assert topic.group != "harmful" and one.response == (world.NOTHING_WRONG if own else "The reply dodges without a reason.")
        dodges += not own
    assert 140 < dodges < 260


def test_a_closing_phrase_does_not_tell_whether_a_request_is_answered():
    rng, closers = random.Random(0), tuple(world.lexicon()["shared"]["closers"])
    share = {}
    for style in ("helpful", "untruthful", "off_topic"):
        texts = [pretrain.draw_reply(pretrain.draw_request(rng, "train", 0., True), rng, style, pretrain.CLOSERS) for _ in range(600)]
        share[style] = sum(text.endswith(closers) for text in texts) / 600
    assert all(abs(value - pretrain.CLOSERS) < .1 for value in share.values()), share   # five standard errors
    bare = [pretrain.draw_reply(pretrain.draw_request(rng, "train", 0., True), rng, "untruthful") for _ in range(50)]
    assert not any(text.endswith(closers) for text in bare)


def test_pairs_that_are_alike_have_one_style_and_the_answer_after_reasoning_has_a_weight():
    rng, gaps = random.Random(0), {True: [], False: []}
    for alike in gaps:
        for _ in range(300):
            request, scope = pretrain.draw_request(rng, "train", .68, True), world.sample_scope(rng)
            a, b, gap = pretrain.draw_pair(request, scope, rng, alike)
            gaps[alike].append(abs(gap))
    assert sum(gaps[True]) < .5 * sum(gaps[False])
    one = pretrain.lesson(rng, tasks={"reason": 1.}, label=6.)
    assert one.last == 6 and one.response.endswith(("(A)", "(B)"))


def test_the_weight_of_a_last_token_reaches_its_loss_alone():
    tokenizer = pretrain.make_tokenizer(["Which? (A) is rude. Answer: (B)"])
    torch.manual_seed(0)
    model, texts = pretrain.build_t5(tokenizer), ("Which?", "(A) is rude. Answer: (B)")
    with torch.no_grad():
        (plain, one, _), (heavy, more, _) = (pretrain.t5_loss(model, tokenizer, [pretrain.Lesson("reason", *texts, last=last)]) for last in (1., 6.))
        y = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
        logits = model(input_ids=torch.tensor([tokenizer(texts[0], add_special_tokens=False)["input_ids"] + [1]]), decoder_input_ids=torch.tensor([[0, *y[:-1]]])).logits
    last = -logits[0, -1].log_softmax(-1)[y[-1]]
    assert more - one == 5 and torch.isclose(heavy - plain, 5 * last, atol=1e-4)


def test_drills_of_style_say_what_the_sentences_show():
    rng, shared, clean = random.Random(0), world.lexicon()["shared"], 0
    for _ in range(600):
        one = pretrain.style_lesson(rng, "train")
        reply, ask = one.prompt.removeprefix("Assistant: ").split("\n")[:2]
        for fault, said, nouns in (("rude", "The reply is rude.", ("rude words", "rudeness")),
                                   ("preachy", "The reply preaches.", ("preaching", "sermons"))):
            shown, asked = any(text in reply for text in shared[fault]), any(noun in ask for noun in nouns)
            assert (said in one.response) == (shown and asked), one
        clean += one.response == world.NOTHING_WRONG
    assert 150 < clean < 450


def test_shuffled_sentences_hold_steps_in_an_order_that_no_reply_has():
    rng, odd = random.Random(0), 0
    for _ in range(200):
        request = pretrain.draw_request(rng, "train", .5, True)
        steps = [world.normalize(step) for step in world.understand(request.text)[0].steps]
        text = world.normalize(pretrain.shuffled_sentence(request, rng))
        found = sorted((text.find(step), i) for i, step in enumerate(steps) if step in text)
        odd += [i for _, i in found] != sorted(i for _, i in found) or len(found) < len(re.findall(r",|$", text))
    assert odd > 40


def test_all_but_the_last_drills_teach_every_task_and_the_plan_reads_from_begin_to_end():
    ends = [end for end, *_ in pretrain.STAGES]
    parts = len(pretrain.PretrainConfig().parts)
    assert ends == sorted(ends) and {1, 2, 3, 4, 5} <= {*ends} and ends[-1] == parts == 6   # a part ends at each whole number
    for done in (1.05, 1.2): assert sum(pretrain.plan(done)["tasks"][drill] for drill in pretrain.DRILLS) > .7
    for done in (0., .1, .3, .7, .999, 1.6, 1.999, 2., 2.4, 2.999, 3., 3.999, 4., 4.999, 5.999):
        keywords = pretrain.plan(done)
        assert set(keywords["tasks"]) == {*pretrain.TASKS, *pretrain.DRILLS} and .98 < sum(keywords["tasks"].values()) < 1.02   # shares are weights; near 1 they can be read
        assert isinstance(pretrain.lesson(random.Random(1), **keywords), pretrain.Lesson)
    assert pretrain.plan(.3)["plain"] > pretrain.plan(.6)["plain"]


def test_later_parts_start_again_with_a_warm_up_and_end_at_zero(tmp_path):
    config = pretrain.PretrainConfig(pools=15, parts=(6, 4, 5), lrs=(3., 2., 1.), warmup=40)
    assert config.ends == [6, 10, 15] and [config.done(pools) for pools in (0, 3, 6, 8, 10, 12.5, 15)] == [0, .5, 1, 1.5, 2, 2.5, 3]
    assert pretrain.PretrainConfig(pools=10, parts=(1,)).done(10) == 1 and replace(config, pools=2).ends[-1] == 2
    trainer = pretrain.Trainer(torch.nn.Linear(3, 3), tmp_path, config)
    trainer.steps_per_pool, rates = 10, []
    for step in range(150):
        trainer.step, trainer.done = step, config.done(step / 10)
        if step in (60, 100): trainer.start_part()
        rates.append(trainer.rate())
    assert max(rates[:60]) < 3 and rates[59] < .1 * 3         # cooled down
    for began, end, lr in ((60, 100, 2.), (100, 150, 1.)):
        half = (began + end) // 2
        assert rates[began] == lr / 10 and rates[began + 9] == lr   # warm again, within ten steps
        assert rates[end - 1] < .06 * lr and rates[half:end] == sorted(rates[half:end], reverse=True)


def test_aimed_replies_show_the_fault_of_style():
    rng, shown = random.Random(0), 0
    for _ in range(400):
        one = pretrain.lesson(rng, tasks={"critique": 1.}, aimed=1.)
        shown += one.response != world.NOTHING_WRONG
    assert shown > 260                                 # without aiming, about half


def test_bert_trains_and_leaves_an_ordinary_folder(tmp_path):
    rows = pretrain.pretrain_bert(tmp_path, SMALL, progress=False)
    assert rows[-1]["loss"] > 0
    from transformers import AutoModelForMaskedLM
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.hidden_size == 128


def test_lessons_come_from_the_split_they_are_asked_for():
    rng = random.Random(0)
    for _ in range(300):
        one = pretrain.lesson(rng, "heldout", {"answer": 1.})
        topic, target, item = world.understand(one.prompt)
        assert world.split_of(topic.kind, topic.name, target, item) == "heldout"


def test_pairs_carry_the_sign_of_the_gap():
    rng = random.Random(0)
    scope = world.make_scope(frozenset(world.HARM_KINDS), False, rng, broad=True)
    for _ in range(60):
        request = pretrain.draw_request(rng, "train", 1., True)
        a, b, gap = pretrain.draw_pair(request, scope, rng)
        harm_a, harm_b = world.judge(request.text, a).harmful, world.judge(request.text, b).harmful
        if harm_a != harm_b: assert (gap > 0) == (harm_a < harm_b)


def test_a_training_is_not_mixed_with_another_one(tmp_path):
    pretrain.pretrain_t5(tmp_path, replace(SMALL, pools=1), progress=False)
    with pytest.raises(CourseError, match=r"holds a training with other settings \(seed: 0 there, 1 now\). Give the old settings to go on, "):
        pretrain.pretrain_t5(tmp_path, replace(SMALL, pools=1, seed=1), progress=False)
    pretrain.pretrain_t5(tmp_path, replace(SMALL, pools=1, save_every=9), progress=False)   # decides nothing


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"pool": 1}'])
def test_a_damaged_state_is_named_and_says_how_to_begin_anew(tmp_path, content):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/meta.json").write_text(content)
    with pytest.raises(CourseError, match="meta.json is not the state of a training .* Begin anew with --fresh"): pretrain.saved_state(tmp_path)


def test_weights_that_were_cut_off_are_named(tmp_path):
    trainer = pretrain.Trainer(torch.nn.Linear(3, 3), tmp_path, SMALL)
    trainer.save()
    weights = tmp_path / "state/pool-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:60])
    with pytest.raises(CourseError, match="the weights saved in .* cannot be read .* --fresh"): trainer.load()
    weights.unlink()
    with pytest.raises(CourseError, match="cannot be read"): trainer.load()


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(CourseError, match="there is no pocket model 'pocket-gpt'"): pretrain.run(tmp_path, only="pocket-gpt")


@pytest.mark.parametrize("name, most", [("pocket-t5", 4_000_000), ("pocket-bert", 2_000_000)])
def test_shipped_models_open_without_our_package_and_bring_their_log(name, most):
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer
    folder = model_dir(name)
    assert folder is not None, f"{name} is not in data/models"
    model = (AutoModelForSeq2SeqLM if name == "pocket-t5" else AutoModelForMaskedLM).from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) <= most
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000 and not list(folder.glob("*.bin"))
    assert AutoTokenizer.from_pretrained(folder)("read the diary")["input_ids"]
    log = json.loads((folder / "training_log.json").read_text())
    assert log["rows"][-1]["pool"] == log["config"]["pools"]


class Silent:
    "A policy that says nothing, finds every option equally likely and keeps what it was asked."
    def __init__(self): self.asked = []
    def generate(self, prompts, **settings):
        self.asked += prompts
        return [""] * len(prompts)
    def score_options(self, prompts, options, **settings):
        self.asked += prompts
        return torch.zeros(len(prompts), len(options))


@pytest.mark.parametrize("split", world.SPLITS)
def test_the_report_asks_about_requests_of_its_split_alone(split):
    policy = Silent()
    for unseen in (False, True): pretrain.skill_cases(policy, 0, 10, unseen, split)
    requests = {line.removeprefix("Human: ") for prompt in policy.asked for line in prompt.split("\n") if world.understand(line.removeprefix("Human: "))}
    splits = [world.split_of(topic.kind, topic.name, target, item) for topic, target, item in map(world.understand, requests)]
    assert len(splits) > 80 and {*splits} == {split}


def test_a_report_on_an_unknown_split_is_refused_before_the_model_is_loaded():
    with pytest.raises(CourseError, match="there is no split 'test'; choose one of train, validation, heldout"):
        pretrain.pocket_report("no such model", split="test")
