"""The making of the pocket models: tokenizer, lessons, resume, and what is shipped."""
import json
import random
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
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return norm
    monkeypatch.setattr(pretrain.Trainer, "learn", watched)
    pretrain.pretrain_t5(tmp_path, replace(SMALL, pools=4, cooldown=.5), progress=False)
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
    assert [row["answer"] for row in whole] == [row["answer"] for row in parts]
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()


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
