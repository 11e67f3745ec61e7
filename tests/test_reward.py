"""Properties and edges of the Bradley-Terry loss, reward models and calibration."""
import gzip
import json
import math
import os

import numpy as np
import pytest
import torch

from cai_course import world
from cai_course.errors import CourseError
from cai_course.experiments import EXPERIMENTS
from cai_course.pairs import group_pairs
from cai_course.reward import (AGAINST_TRL, CROWD, ClassifierReward, ReplyDesk, RewardModel, RewardTrainer, accuracy, bayes_accuracy,
                               bradley_terry_loss, calibration_curve, class_reward, crowd_pairs, expected_accuracy,
                               expected_calibration_error, fit_by_hand, hh_accuracy, hh_pairs, measure_trl, normalize, pair_correct,
                               preference_probability, score_pairs, tiny_reward_model, train_reward_model,
                               train_with_trl)

GOOD, BAD = ["kind", "warm", "clear"], ["rude", "cold", "vague"]
FILL = ["the", "a", "lamp", "river", "coat", "stone", "goes", "is"]


def planted_pairs(n, seed, noise=0.):
    "The better reply holds a good word and the worse a bad one, among filler words of varying number."
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        reply = lambda word: " ".join(rng.permutation([word, *rng.choice(FILL, rng.integers(2, 12))]))
        good, bad = reply(rng.choice(GOOD)), reply(rng.choice(BAD))
        if rng.random() < noise: good, bad = bad, good
        rows.append(dict(prompt="what " + " ".join(rng.choice(FILL, 3)), chosen=good, rejected=bad))
    return rows


def tiny(seed=0): return tiny_reward_model(GOOD + BAD + FILL + ["what"], seed=seed)


@pytest.fixture(scope="module")
def trained():
    model = tiny()
    history = train_reward_model(model, planted_pairs(300, 0), epochs=2, lr=3e-3, progress=False)
    return model, history


# --- the loss

@pytest.mark.parametrize("seed", range(5))
def test_loss_properties(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 9, generator=g).double()
    q = torch.rand(9, generator=g).double()
    loss = bradley_terry_loss(a, b, q)
    by_hand = np.mean([-(qi * math.log(1 / (1 + math.exp(bi - ai))) + (1 - qi) * math.log(1 / (1 + math.exp(ai - bi))))
                       for ai, bi, qi in zip(a.tolist(), b.tolist(), q.tolist())])
    assert loss.item() == pytest.approx(by_hand, abs=1e-12) and loss >= 0
    torch.testing.assert_close(bradley_terry_loss(a + 7.5, b + 7.5, q), loss)                         # shift
    torch.testing.assert_close(bradley_terry_loss(b, a, 1 - q), loss)                                 # swap
    order = torch.randperm(9, generator=g)
    # order of the batch
    torch.testing.assert_close(bradley_terry_loss(a[order], b[order], q[order]), loss)
    # an independent implementation
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(a - b, q))


def test_soft_labels_at_0_and_1_are_hard_labels_exactly():
    a, b = torch.randn(50) * 20, torch.randn(50) * 20
    assert torch.equal(bradley_terry_loss(a, b, torch.ones(50)), bradley_terry_loss(a, b))
    assert torch.equal(bradley_terry_loss(a, b, torch.zeros(50)), bradley_terry_loss(b, a))


def test_minus_sign():
    a, b = torch.tensor([2.]), torch.tensor([0.])
    assert bradley_terry_loss(a, b) < bradley_terry_loss(b, a)
    a.requires_grad_()
    bradley_terry_loss(a, b).backward()
    # descending raises the chosen score
    assert a.grad < 0


def test_gradient_is_label_minus_probability():
    d = torch.linspace(-6, 6, 25, dtype=torch.double, requires_grad=True)
    q = torch.linspace(0, 1, 25, dtype=torch.double)
    (bradley_terry_loss(d, torch.zeros_like(d), q) * 25).backward()
    torch.testing.assert_close(d.grad, -(q - torch.sigmoid(d.detach())))


def test_extreme_scores_stay_finite():
    a = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(a, torch.zeros(2))
    loss.backward()
    assert loss.item() == pytest.approx(5e3) and torch.isfinite(a.grad).all()


def test_margin_and_weights():
    a, b, m = torch.tensor([1., 0.]), torch.tensor([0., 0.]), torch.tensor([1., 0.])
    torch.testing.assert_close(bradley_terry_loss(a, b, margin=m), torch.tensor(math.log(2)))
    q = torch.tensor([.3, .8])
    # swapping says the same
    torch.testing.assert_close(bradley_terry_loss(a, b, q, m), bradley_terry_loss(b, a, 1 - q, m))
    torch.testing.assert_close(bradley_terry_loss(a, b, weights=torch.tensor([3., 0.])),
                               bradley_terry_loss(a[:1], b[:1]))


@pytest.mark.parametrize("margin", [None, [.5, 0., 2.]])
def test_trl_computes_the_same_loss(margin):
    from collections import defaultdict
    from types import SimpleNamespace
    from trl import RewardTrainer as Theirs
    # chosen, then rejected
    scores = torch.tensor([1., -2., .3, .5, .1, -.7])
    same = lambda x: x
    stub = SimpleNamespace(model=SimpleNamespace(training=False),
                           args=SimpleNamespace(center_rewards_coefficient=None), _metrics=dict(eval=defaultdict(list)),
                           _total_train_tokens=0, _tp_size=1,
                           accelerator=SimpleNamespace(gather=same, gather_for_metrics=same))
    inputs = dict(attention_mask=torch.ones(6, 4)) | ({} if margin is None else dict(margin=torch.tensor(margin)))
    theirs = Theirs.compute_loss(stub, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    torch.testing.assert_close(bradley_terry_loss(scores[:3], scores[3:], margin=margin), theirs)


@pytest.mark.parametrize("call, words", [
    (lambda a: bradley_terry_loss(a[:0], a[:0]), "B > 0"), (lambda a: bradley_terry_loss(a, a[:1]), "shapes"),
    (lambda a: bradley_terry_loss(a[:, None], a[:, None]), "shapes"),
    (lambda a: bradley_terry_loss(a, a, torch.tensor([1.1, 0])), r"\[0, 1\]"),
    (lambda a: bradley_terry_loss(a, a, torch.tensor([math.nan, 0])), "nan"),
    (lambda a: bradley_terry_loss(a, a, torch.ones(3)), "one per pair"),
    (lambda a: bradley_terry_loss(a, a, margin=-a), "infinity"),
    (lambda a: bradley_terry_loss(a, a * math.nan), "score is NaN"),
    (lambda a: bradley_terry_loss(a, a, weights=a * 0), "sum to 0")])
def test_bad_loss_inputs(call, words):
    with pytest.raises(CourseError, match=words): call(torch.ones(2))


# --- the model

def test_padding_batch_size_and_order_do_not_matter(trained):
    model, _ = trained
    prompts = [r["prompt"] for r in planted_pairs(40, 5)]
    texts = [r["chosen"] for r in planted_pairs(40, 5)]
    together = model(prompts, texts)
    alone = torch.cat([model([p], [t]) for p, t in zip(prompts, texts)])
    # matrix sizes differ, so the last bits may
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, model.score(prompts, texts, batch_size=3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, model(prompts[::-1], texts[::-1]).flip(0), atol=1e-5, rtol=1e-5)
    with_long = model(prompts + ["the"], texts + ["stone " * 200])
    torch.testing.assert_close(together, with_long[:-1], atol=1e-5, rtol=1e-5)
    assert together.shape == (40,) and together.dtype == torch.float32 and not together.requires_grad


def test_no_dropout_while_scoring_even_in_training_mode(trained):
    model, _ = trained
    model.train()
    try:
        first, second = model(["what"], ["kind lamp"]), model(["what"], ["kind lamp"])
        assert torch.equal(first, second) and model.training
        rows = model.encode(["what"], ["kind lamp"])
        assert not torch.equal(model.logits(rows), model.logits(rows))          # dropout is on for training
    finally: model.eval()


def test_empty_inputs_and_empty_replies(trained):
    model, _ = trained
    assert model([], []).shape == (0,)
    assert torch.isfinite(model(["what", "what"], ["", "unseen words \U0001f600"])).all()


@pytest.mark.parametrize("prompts, responses, words",
                         [("what", ["a"], "one string"), (["a"], ["b", "c"], "1 prompts and 2 responses"),
                                                       (["a"], [None], r"responses\[0\] is None")])
def test_bad_texts(trained, prompts, responses, words):
    with pytest.raises(CourseError, match=words): trained[0](prompts, responses)


@pytest.mark.parametrize("seed", range(3))
def test_learns_a_planted_preference(seed):
    model, held_out = tiny(seed), planted_pairs(200, 100 + seed)
    train_reward_model(model, planted_pairs(300, seed, noise=.15), epochs=4, lr=3e-3, seed=seed, progress=False)
    # chance is .5, the labels it saw are 85 % right
    assert accuracy(model, held_out) > .9


def test_flipped_sign_gives_one_minus_accuracy(trained):
    model, _ = trained
    rows = planted_pairs(100, 7, noise=.2)
    flipped = lambda p, r: -model(p, r)
    assert accuracy(flipped, rows) == pytest.approx(1 - accuracy(model, rows))
    assert accuracy(flipped, rows) < .5 < accuracy(model, rows)


def test_training_on_flipped_labels_flips_the_model():
    rows, held_out = planted_pairs(300, 0), planted_pairs(200, 50)
    model = tiny()
    train_reward_model(model, [r | dict(label=0.) for r in rows], epochs=2, lr=3e-3, progress=False)
    assert accuracy(model, held_out) < .1


def test_swapped_rows_train_the_same_model():
    rows = planted_pairs(64, 0)
    swapped = [r | dict(chosen=r["rejected"], rejected=r["chosen"], label=.2) for r in rows]
    a, b = tiny(), tiny()
    train_reward_model(a, [r | dict(label=.8) for r in rows], lr=1e-3, progress=False)
    train_reward_model(b, swapped, lr=1e-3, progress=False)
    x, y = score_pairs(a, rows), score_pairs(b, rows)
    # only the order of the rows in the forward pass differs (and with it the dropout), so the direction must agree
    assert (torch.sign((x[0] - x[1]).mean()) == torch.sign((y[0] - y[1]).mean())).item()


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))                                            # must not matter
        before = torch.random.get_rng_state()
        model = tiny()
        history = train_reward_model(model, planted_pairs(80, 0), progress=False)
        assert torch.equal(before, torch.random.get_rng_state())
        runs.append((model.state_dict(), history))
    assert runs[0][1] == runs[1][1] and all(torch.equal(v, runs[1][0][k]) for k, v in runs[0][0].items())
    other = train_reward_model(tiny(), planted_pairs(80, 0), seed=1, progress=False)
    assert other != runs[0][1]


def test_resume_gives_the_same_bytes(tmp_path):
    rows, whole = planted_pairs(100, 0), tiny()
    history = train_reward_model(whole, rows, epochs=2, batch_size=16, progress=False)
    first = RewardTrainer(tiny(), rows, epochs=2, batch_size=16)
    early = [first.step() for _ in range(5)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    model = tiny(seed=9)
    late = train_reward_model(model, rows, epochs=2, batch_size=16, progress=False,
                              resume=torch.load(tmp_path / "state.pt", weights_only=True))
    assert early + late == history
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in whole.state_dict().items())
    with pytest.raises(CourseError, match="another|same pairs"):
        RewardTrainer(tiny(), rows[:20]).load_state_dict(first.state_dict())


def test_batches_cover_every_pair_once_per_epoch_within_budget():
    rows = planted_pairs(101, 3)
    trainer = RewardTrainer(tiny(), rows, epochs=3, batch_size=8, max_tokens=200)
    for epoch in range(3):
        batches = [b for e, b in trainer.batches if e == epoch]
        assert sorted(i for b in batches for i in b) == list(range(101))
        assert all(len(b) <= 8 and (len(b) == 1 or 2 * len(b) * trainer._length(b) <= 200) for b in batches)
    assert trainer.batches[:5] != trainer.batches[len(trainer.batches) // 3:][:5]


def test_k_wise_keeps_prompts_together_and_weights_them_equally():
    rows = [dict(prompt=f"what {p}", chosen=f"kind {i}", rejected=f"rude {i}") for p,
            n in (("lamp", 6), ("river", 1), ("coat", 3)) for i in range(n)]
    trainer = RewardTrainer(tiny(), rows, batch_size=4, k_wise=True)
    for _, batch in trainer.batches:
        for prompt in {trainer.rows[i]["prompt"] for i in batch}:
            assert sum(trainer.rows[i]["weight"] for i in range(len(rows)) if trainer.rows[i]["prompt"]
                       == prompt) == pytest.approx(1)
            assert {i for i in range(len(rows)) if trainer.rows[i]["prompt"] == prompt} <= set(batch)


def test_learning_rate_rises_and_falls():
    history = train_reward_model(tiny(), planted_pairs(200, 0), batch_size=10, lr=1e-3, warmup=.25, progress=False)
    rates = [h["lr"] for h in history]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1e-3) and peak == 4 and (np.diff(rates[:peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] > 0


def test_soft_labels_stop_the_lead_where_the_label_is():
    rows = [dict(prompt="what", chosen="kind lamp", rejected="rude lamp", label=.7)] * 32
    model = tiny()
    train_reward_model(model, rows, epochs=60, lr=3e-3, progress=False)
    a, b = score_pairs(model, rows[:1])
    assert preference_probability(a, b).item() == pytest.approx(.7, abs=.03)


@pytest.mark.parametrize("rows, words", [
    ([], "empty"), ([dict(prompt="p", chosen="a")],
                    "missing"), ([dict(prompt="p", chosen="a", rejected="b", label=1.5)], "must lie in"),
    ([dict(prompt="p", chosen="a", rejected="b", label=math.nan)],
     "NaN"), ([dict(prompt="p", chosen="a", rejected="a")], "same text"),
    ([dict(prompt="p", chosen=1, rejected="a")], "must be a string"), ("pairs.jsonl", "load_pairs")])
def test_bad_pairs_stop_before_any_step(rows, words):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CourseError, match=words): train_reward_model(model, rows, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("options", [dict(epochs=0), dict(epochs=1.5), dict(lr=0), dict(lr=-1), dict(lr=math.nan),
                                     dict(batch_size=0), dict(warmup=-1), dict(seed=-1), dict(seed=.5)])
def test_bad_settings(options):
    with pytest.raises(CourseError, match=next(iter(options))):
        train_reward_model(tiny(), planted_pairs(4, 0), progress=False, **options)


def test_not_a_reward_model():
    with pytest.raises(CourseError, match="must be a RewardModel"):
        train_reward_model(torch.nn.Linear(2, 2), planted_pairs(4, 0), progress=False)


# --- saving and loading

def test_save_and_load(trained, tmp_path):
    model, _ = trained
    prompts, texts = [r["prompt"] for r in planted_pairs(20, 9)], [r["chosen"] for r in planted_pairs(20, 9)]
    mean, spread = normalize(model, prompts, texts)
    try:
        folder = model.save(tmp_path / "reward")
        again = RewardModel.load(str(folder), seed=5)
        assert torch.equal(model(prompts, texts), again(prompts, texts)) and again.max_length == model.max_length
        assert sorted(p.name for p in tmp_path.iterdir()) == ["reward"] and not list(folder.glob("*.bin"))
        # saving over an old reward model is allowed
        again.save(folder)
        assert torch.equal(model(prompts, texts), RewardModel.load(folder)(prompts, texts))
        first = {p.name: p.read_bytes() for p in folder.iterdir()}
        model.save(folder)
        assert first == {p.name: p.read_bytes() for p in folder.iterdir()}      # the same bytes every time
    finally:
        model.shift.zero_(); model.scale.fill_(1)
    (tmp_path / "thesis").mkdir(); (tmp_path / "thesis" / "draft.txt").write_text("x")
    with pytest.raises(CourseError, match="holds no reward model"): model.save(tmp_path / "thesis")


def test_a_plain_encoder_gets_a_seeded_head(trained, tmp_path):
    trained[0].body.save_pretrained(tmp_path / "bert"); trained[0].tokenizer.save_pretrained(tmp_path / "bert")
    heads = [RewardModel.load(tmp_path / "bert", seed=s).head.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_normalize_moves_rewards_but_not_probabilities(trained):
    model, _ = trained
    rows = planted_pairs(30, 11)
    prompts, texts = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    before = score_pairs(model, rows)
    try:
        normalize(model, prompts, texts)
        scores = model(prompts, texts)
        assert scores.mean().item() == pytest.approx(0, abs=1e-5)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(before[0], score_pairs(model, rows)[0])
        with pytest.raises(CourseError, match="cannot be normalized"): normalize(model, ["what"] * 3, ["lamp"] * 3)
        with pytest.raises(CourseError, match="cannot be normalized"): normalize(model, [], [])
    finally:
        model.shift.zero_(); model.scale.fill_(1)


def test_load_errors(tmp_path, trained):
    for name, words in (("pocket-nothing", "cai-course pretrain"), (str(tmp_path / "none"), "there is no folder"),
                        (3, "must be a string"),
                        (str(tmp_path), "has no config.json")):
        with pytest.raises(CourseError, match=words): RewardModel.load(name)


def test_pickled_weights_are_refused(trained, tmp_path):
    trained[0].body.save_pretrained(tmp_path); trained[0].tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(trained[0].body.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CourseError, match="a pickle that can run code"): RewardModel.load(tmp_path)


def test_weights_that_are_no_numbers_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = trained[0].save(tmp_path / "reward")
    state = load_file(folder / "model.safetensors")
    next(v for k, v in state.items() if k.endswith("dense.weight"))[0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CourseError, match="dense.weight of .* holds NaN"): RewardModel.load(folder)


def test_a_hub_id_without_a_network_fails_fast(monkeypatch):
    monkeypatch.setattr("cai_course.models.hub_answers", lambda: False)
    with pytest.raises(CourseError, match="needs a network or a filled cache"): RewardModel.load("nobody/no-such-encoder")


def test_wrong_kinds_of_model_are_refused(trained, tmp_path):
    from transformers import GPT2Config, GPT2Model, T5Config, T5ForConditionalGeneration
    left_to_right = GPT2Model(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    two_part = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for name, model in (("gpt2", left_to_right), ("t5", two_part)):
        model.save_pretrained(tmp_path / name)
        trained[0].tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(CourseError, match="encoder such as BERT"): RewardModel.load(tmp_path / name)


def test_damaged_head(trained, tmp_path):
    folder = trained[0].save(tmp_path / "reward")
    (folder / "reward_head.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CourseError, match="reward_head"): RewardModel.load(folder)


def test_roberta_positions(tmp_path):
    from transformers import RobertaConfig, RobertaModel
    tokenizer = tiny().tokenizer
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                           intermediate_size=8, max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id,
                           type_vocab_size=1)
    body = RobertaModel(config, add_pooling_layer=False)
    model = RewardModel(body, tokenizer)
    assert torch.isfinite(model(["lamp"], ["stone " * 300])).all()              # longest input just fits


# --- accuracy, calibration, ceiling, classifiers

def test_accuracy_counts():
    length = lambda prompts, responses: torch.tensor([float(len(r)) for r in responses])
    rows = [dict(prompt="p", chosen="long", rejected="x"), dict(prompt="p", chosen="x", rejected="long"),
            dict(prompt="p", chosen="x", rejected="long", label=.1),
            dict(prompt="p", chosen="a", rejected="b"), dict(prompt="p", chosen="a", rejected="bb", label=.5)]
    right = pair_correct(length, rows)
    np.testing.assert_array_equal(right, [1, 0, 1, .5, np.nan])
    assert accuracy(length, rows) == pytest.approx(2.5 / 4)
    with pytest.raises(CourseError, match="tie"): accuracy(length, rows[-1:])
    with pytest.raises(CourseError, match=r"shape \(3,\) for 10 texts, with 0 NaN; it must return one number per text"):
        accuracy(lambda p, r: torch.zeros(3), rows)
    with pytest.raises(CourseError, match="with 10 NaN"): accuracy(lambda p, r: torch.full((len(p),), math.nan), rows)


def test_calibration_of_a_calibrated_predictor():
    rng = np.random.default_rng(0)
    p = rng.random(40000)
    y = (rng.random(40000) < p).astype(float)
    assert expected_calibration_error(p, y) < .02 and expected_calibration_error(p, y, fold=False) < .02
    sharp = 1 / (1 + ((1 - p) / p) ** 3)
    assert expected_calibration_error(sharp, y) > .08
    assert np.maximum(p, 1 - p).mean() == pytest.approx(bayes_accuracy(p))
    assert ((p > .5) == y).mean() == pytest.approx(bayes_accuracy(p), abs=.01)


def test_calibration_is_symmetric_under_swaps():
    rng = np.random.default_rng(1)
    p, y, swap = rng.random(500), rng.random(500), rng.random(500) < .5
    one, two = calibration_curve(p, y), calibration_curve(np.where(swap, 1 - p, p), np.where(swap, 1 - y, y))
    for key in one: np.testing.assert_allclose(one[key], two[key])
    assert one["count"].sum() == 500


@pytest.mark.parametrize("p, y, words", [
    ([], [], r"shape \(0,\) .* non-empty"), ([.5], [.5, .5], "1 probabilities and 2 outcomes"), ([math.nan], [1], r"holds \[nan\]"),
    ([.5, 2.], [1, 1], r"probabilities .* holds \[2.0\]"), ([.5], [-1], r"outcomes .* holds \[-1.0\]"), (["x"], [1], r"list of numbers")])
def test_bad_calibration_inputs(p, y, words):
    with pytest.raises(CourseError, match=words): calibration_curve(p, y)


def test_class_reward():
    logits = torch.randn(5, 3)
    torch.testing.assert_close(torch.sigmoid(class_reward(logits, 1)), logits.softmax(-1)[:, 1])
    torch.testing.assert_close(class_reward(logits + 3, 1), class_reward(logits, 1))
    assert not torch.allclose(class_reward(logits + 3, 1, "logit"), class_reward(logits, 1, "logit"))
    for bad in (lambda: class_reward(logits, 3), lambda: class_reward(logits[:, 0], 0),
                lambda: class_reward(logits, 0, "score")):
        pytest.raises(CourseError, bad)


def test_classifier_reward(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification
    tokenizer = tiny().tokenizer
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8, id2label={0: "nothate", 1: "hate"}, label2id={"nothate": 0, "hate": 1})
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path), "nothate", kind="probability")
    assert reward(["p", "q"], ["lamp", "kind stone river"]).shape == (2,) and reward([], []).shape == (0,)
    # the prompt is not read
    torch.testing.assert_close(reward(["p", "q"], ["lamp", "lamp"])[0], reward(["x"], ["lamp"])[0])
    bad = ClassifierReward(str(tmp_path), "HATE", kind="probability")
    torch.testing.assert_close(reward(["p"], ["lamp"]) + bad(["p"], ["lamp"]), torch.ones(1))
    for call in (lambda: ClassifierReward(str(tmp_path), "toxic"),
                 lambda: ClassifierReward(str(tmp_path / "no"), "hate"),
                 lambda: ClassifierReward(str(tmp_path), "hate", kind="x")): pytest.raises(CourseError, call)


# --- the loop by hand, the crowd, TRL

@pytest.mark.parametrize("sign, better", [(-1., True), (1., False)])
def test_the_loop_by_hand_goes_where_its_sign_says(sign, better):
    model, held_out = tiny(), planted_pairs(100, 30)
    losses = fit_by_hand(model, planted_pairs(300, 0), sign, batch_size=16, lr=3e-3)
    assert losses[-1] < losses[0] and not model.training           # what is minimized falls either way
    assert (accuracy(model, held_out) > .9) == better and (accuracy(model, held_out) < .1) == (not better)


def test_crowd_pairs_keep_their_promises():
    rows = crowd_pairs(8, seed=3, harmful=.25, replies=3)
    groups = group_pairs(rows)
    assert rows == crowd_pairs(8, seed=3, harmful=.25, replies=3) != crowd_pairs(8, seed=4, harmful=.25, replies=3)
    assert len(groups) == 8 and all(len(g) <= 3 for g in groups)
    kinds = [world.understand(g[0]["prompt"])[0].group for g in groups]
    assert kinds.count("harmful") == 2 and kinds.count("benign") == 6
    assert not {r["prompt"] for r in rows} & {r["prompt"] for r in crowd_pairs(40, "heldout", seed=3)}


def test_expected_accuracy_is_the_mean_over_all_labels():
    rows = crowd_pairs(6, seed=1)
    model = tiny_reward_model([r["chosen"] for r in rows], 0)
    chosen, rejected = (x.numpy() for x in score_pairs(model, rows))
    chance = np.array([CROWD.prob(r["prompt"], r["chosen"], r["rejected"]) for r in rows])
    fresh = np.random.default_rng(0).random((20_000, len(rows))) < chance              # labels thrown anew
    assert expected_accuracy(model, rows) == pytest.approx(((chosen > rejected) == fresh).mean(), abs=.005)
    swapped = [r | dict(chosen=r["rejected"], rejected=r["chosen"]) for r in rows]
    assert expected_accuracy(model, swapped) == pytest.approx(expected_accuracy(model, rows))
    assert expected_accuracy(model, rows) <= bayes_accuracy(chance) + 1e-12


def test_trl_trains_the_same_network():
    rows, held_out, model = planted_pairs(200, 0), planted_pairs(100, 60), tiny()
    before = torch.random.get_rng_state()
    train_with_trl(model, rows, epochs=2, lr=3e-3, batch_size=16)
    assert accuracy(model, held_out) > .9 and not model.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.dropout.p > 0 and model.body.embeddings.dropout.p > 0, "TRL would switch dropout off, and leave it so"


def test_the_margin_of_the_comparison_with_trl_stays_as_it_was_written_down():
    assert EXPERIMENTS["reward-trl"] is AGAINST_TRL
    assert (AGAINST_TRL.predicts, AGAINST_TRL.threshold, AGAINST_TRL.margin, AGAINST_TRL.seeds) == ("=", 0., .03, 16)


@pytest.mark.slow
def test_one_row_of_the_comparison_with_trl():
    row = measure_trl(0)
    assert row["difference"] == pytest.approx(row["ours"] - row["trl"]) and row["by_order"] == pytest.approx(row["ours"] - row["reordered"])
    assert len({row["ours"], row["reordered"], row["trl"]}) == 3 and .5 < row["same_order"] < 1


# --- real people

def test_hh_pairs_are_read_and_cut(tmp_path, monkeypatch):
    monkeypatch.delenv("CAI_COURSE_REAL_DATA", raising=False)
    assert hh_pairs() == []
    with pytest.raises(CourseError, match="holds no hh-rlhf"): hh_pairs(tmp_path)
    head = "\n\nHuman: " + "word " * 100 + "why?\n\nAssistant:"
    (tmp_path / "hh-rlhf").mkdir()
    with gzip.open(tmp_path / "hh-rlhf" / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(dict(chosen=head + " Because it is.", rejected=head + " No " + "no " * 100)) + "\n")
    (row,) = hh_pairs(tmp_path, before=5, after=7)
    assert row["prompt"].split()[-2:] == ["why?", "Assistant:"] and len(row["prompt"].split()) == 5
    assert row["chosen"] == "Because it is." and row["rejected"] == "No no no no no no no"


def test_hh_accuracy_holds_every_pair_out_once():
    rows = planted_pairs(200, 0)
    found, body = hh_accuracy(rows, epochs=6)
    assert found.n == len({r["prompt"] for r in rows}) and found.low > .5 and body


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CAI_COURSE_REAL_DATA"), reason="CAI_COURSE_REAL_DATA names no folder of real data")
def test_a_reward_model_on_real_pairs_does_better_than_a_coin():
    pairs = hh_pairs()
    found, body = hh_accuracy(pairs, folds=3, epochs=2)
    print(f"HH-RLHF harmless, {len(pairs)} pairs, {body}: held-out accuracy {found}")
    assert len(pairs) > 1000 and found.low > .5 and found.high - found.low < .1


# --- the desk ---

def test_the_desk_scores_what_is_typed_and_escapes_it():
    desk = ReplyDesk("How?", {"length": lambda p, r: torch.tensor([float(len(x)) for x in r]), "zero": lambda p, r: [0.] * len(r)}, ["no", "yes sir"])
    assert desk.say("<b>please  do</b>") == {"reply": "<b>please do</b>", "length": 16., "zero": 0.}
    assert [row["reply"] for row in desk.rows] == ["no", "yes sir", "<b>please do</b>"]
    desk.say("no")
    assert len(desk.rows) == 3, "the same reply stands there once"
    table = desk.table()
    assert "&lt;b&gt;please" in table and "<b>" not in table
    assert table.index("please") < table.index("yes sir") < table.index(">no<"), "the best of the first reward on top"


@pytest.mark.parametrize("make, words", [
    (lambda: ReplyDesk("  ", {"x": len}), "request with words"), (lambda: ReplyDesk("How?", {}), "at least one function"),
    (lambda: ReplyDesk("How?", {"x": 3}), "at least one function"), (lambda: ReplyDesk("How?", {"x": lambda p, r: [1.]}, [" "]), "1 to 1,000"),
    (lambda: ReplyDesk("How?", {"x": lambda p, r: [1.]}, ["a" * 1_001]), "1001 characters")])
def test_an_unusable_desk_is_refused(make, words):
    with pytest.raises(CourseError, match=words): make()


def test_the_live_desk_scores_on_a_click():
    desk = ReplyDesk("How?", {"length": lambda p, r: [float(len(x)) for x in r]}, ["no"])
    (line, said, page) = desk.widget().children
    text, button = line.children
    text.value = "a longer one"
    button.click()
    assert "12.00" in said.value and "a longer one" in page.value and len(desk.rows) == 2
    text.value = " "
    button.click()
    assert "characters" in said.value and len(desk.rows) == 2
