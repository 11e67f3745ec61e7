"""What a maintainer fears about `rlhf`: a wrong sign, a wrong position, a reference that is not one, drift between runs."""
import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from cai_course import rlhf
from cai_course.errors import CourseError
from cai_course.fused import _ColumnSteps, _Head, fuse_t5
from cai_course.models import Policy, Samples, _merged, _T5Steps, base_weight, load_policy, stacked_weight
from cai_course.ppo import PPOConfig, Rollout, policy_loss, ppo_loss, ppo_update
from cai_course.rl import gae, whiten
from cai_course.rlhf import (TEXT_PPO, AdaptiveKL, FixedKL, RLHFConfig, careless, check_start, kl_per_token, lora_size, shape_rewards,
                             start_gap, train_rlhf)
from conftest import make_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"

NOUNS = ["diary", "bread", "water", "flour", "somebody", "hurt"]
PROMPTS = [f"how do I read {noun} ?" for noun in NOUNS]
WORDS = ["yes", "no", "ask", "find"]
REPLIES = [f"{word} you can {noun} ." for word in WORDS for noun in NOUNS]


def build(kind, folder):
    """A very small model that has learned to open its replies with one of four words, all about equally likely."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    size, ids = len(tokenizer), dict(pad_token_id=0, eos_token_id=1)
    if kind == "t5":
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, dropout_rate=.1, **ids))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=.1,
                                           bos_token_id=1, **ids))
    model.save_pretrained(folder)
    policy = load_policy(str(folder))
    for parameter in policy.model.parameters(): parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=dict(t5=1e-2, gpt2=3e-3)[kind])
    rows, wanted = policy.encode([p for p in PROMPTS for _ in WORDS]), []
    texts = [f"{word} you can {p.split()[-2]} ." for p in PROMPTS for word in WORDS]
    wanted = policy.encode_responses([p for p in PROMPTS for _ in WORDS], texts)
    ids_, mask = policy._pad_prompts(rows)
    width = max(map(len, wanted))
    written = torch.tensor([row + [0] * (width - len(row)) for row in wanted])
    real = torch.tensor([[1.] * len(row) + [0.] * (width - len(row)) for row in wanted])
    for _ in range(dict(t5=150, gpt2=200)[kind]):
        logits, _ = policy._forward(ids_, mask, written, real)
        loss = (torch.nn.functional.cross_entropy(logits.flatten(0, 1), written.flatten(), reduction="none")
                * real.flatten()).sum() / real.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    def get(kind):
        if kind not in made: made[kind] = build(kind, tmp_path_factory.mktemp(kind) / kind)
        return made[kind]
    return get


def fresh(folder, seed=0, **kwargs):
    targets = ["c_attn", "c_proj", "c_fc"] if "gpt2" in folder else None  # attention alone can do little in a single layer
    return load_policy(folder, **kwargs).start_adapter(r=8, targets=targets, seed=seed)


def says_ask(prompts, texts): return torch.tensor([float(text.startswith("ask")) for text in texts]) * 4


SMALL = RLHFConfig(steps=2, batch_size=8, max_new_tokens=12, ppo=dataclasses.replace(TEXT_PPO, minibatch=4))


# -- shaping ----------------------------------------------------------------------------------------
def test_shape_rewards_by_hand():
    logp, ref = torch.tensor([[-1., -2., 5.], [-1., -1., -1.]]), torch.tensor([[-3., -2., 9.], [-1., -2., -.5]])
    mask = torch.tensor([[1., 1., 0.], [1., 1., 1.]])
    got = shape_rewards(torch.tensor([3., -1.]), logp, ref, mask, torch.tensor([True, False]), .5, 2.)
    assert got.tolist() == [[-1., 3., 0.], [0., -.5, -3. + .25]]


def test_sign_more_likely_than_the_reference_costs():
    mask, ended = torch.ones(1, 1), torch.ones(1).bool()
    up = shape_rewards(torch.zeros(1), torch.tensor([[-1.]]), torch.tensor([[-2.]]), mask, ended, .1)
    down = shape_rewards(torch.zeros(1), torch.tensor([[-2.]]), torch.tensor([[-1.]]), mask, ended, .1)
    assert up.item() == pytest.approx(-.1) and down.item() == pytest.approx(.1)


def test_return_is_score_minus_beta_times_the_sequence_log_ratio():
    torch.manual_seed(0)
    mask = (torch.arange(7)[None] < torch.randint(1, 8, (20, 1))).float()
    logp, ref, score = torch.randn(20, 7), torch.randn(20, 7), torch.randn(20)
    rewards = shape_rewards(score, logp, ref, mask, torch.ones(20).bool(), .3)
    assert torch.allclose(rewards.sum(1), score - .3 * ((logp - ref) * mask).sum(1), atol=1e-5)
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, 1., 1.)
    assert torch.allclose(returns[:, 0], rewards.sum(1), atol=1e-5)


def test_padding_and_nan_on_it_do_not_matter():
    logp, ref, mask = torch.randn(3, 4), torch.randn(3, 4), torch.ones(3, 4)
    args = torch.randn(3), torch.ones(3).bool()
    narrow = shape_rewards(args[0], logp, ref, mask, args[1], .2)
    wide = [torch.cat([x, torch.full((3, 2), v)], 1) for x, v in ((logp, math.nan), (ref, 3.), (mask, 0.))]
    assert torch.equal(shape_rewards(args[0], *wide, args[1], .2)[:, :4], narrow)
    assert shape_rewards(args[0], *wide, args[1], .2)[:, 4:].abs().sum() == 0


def test_rewarding_the_log_ratio_gives_the_gradient_of_the_kl():
    """One-token model, all actions enumerated: the sampled log-ratio as reward is right, its sign flipped is wrong."""
    theta = torch.tensor([.5, -.2, .1, 0.], dtype=torch.float64, requires_grad=True)
    p0, r = torch.tensor([.4, .3, .2, .1], dtype=torch.float64), torch.tensor([0., 1., 0., 2.], dtype=torch.float64)
    def objective(): # what RLHF maximizes
        logp = theta.log_softmax(0)
        return (logp.exp() * (r - .3 * (logp - p0.log()))).sum()
    exact = torch.autograd.grad(objective(), theta)[0]
    logp = theta.log_softmax(0)
    column = lambda x: x.detach()[:, None]
    rewards = shape_rewards(r, column(logp), p0.log()[:, None], torch.ones(4, 1), torch.ones(4).bool(), .3)[:, 0].double()
    got = torch.autograd.grad((logp.exp().detach() * rewards * logp).sum(), theta)[0]
    assert torch.allclose(got, exact, atol=1e-6)


@pytest.mark.parametrize("change, words", [
    (dict(beta=-.1), "beta is -0.1; .*minus sign is already.* beta=0.1"),
    (dict(missing_eos_penalty=-1.), "missing_eos_penalty is -1.0; .*minus sign is already"),
    (dict(beta=math.nan), "beta is nan"), (dict(scores=torch.ones(3)), r"scores \(3,\) .*one number for each.* Take both"),
    (dict(scores=torch.tensor([1., math.nan])), "1 of 2 scores and 0 of 4 log-ratios are not finite.* Begin with reply 1"),
    (dict(logprobs=torch.tensor([[0., math.inf], [0., 0.]])), "0 of 2 scores and 1 of 4 log-ratios .* Begin with reply 0"),
    (dict(mask=torch.tensor([[1., 1.], [0., 0.]])), "reply 1 has no token: .* Drop the row"),
    (dict(ref_logprobs=torch.zeros(2, 3)), r"ref_logprobs \(2, 3\) .*must all be"),
    (dict(ended=torch.ones(2, 2)), r"ended \(2, 2\) .*one number for each")])
def test_shape_rewards_errors(change, words):
    good = dict(scores=torch.ones(2), logprobs=torch.zeros(2, 2), ref_logprobs=torch.zeros(2, 2), mask=torch.ones(2, 2),
                ended=torch.ones(2).bool(), beta=.1)
    with pytest.raises(CourseError, match=words): shape_rewards(**{**good, **change})


def test_kl_per_token_is_zero_on_padding():
    got = kl_per_token(torch.tensor([[-1., math.nan]]), torch.tensor([[-3., 0.]]), torch.tensor([[1, 0]]))
    assert got.tolist() == [[2., 0.]]


@pytest.mark.parametrize("dropout", [-.1, 1., float("nan")])
def test_dropout_that_is_no_share_is_refused(dropout):
    with pytest.raises(CourseError, match="dropout is .*; a share from 0 to below 1 is needed. Use"):
        with careless(None, dropout): pass


def test_adaptive_price():
    assert FixedKL(.1).update(100., 64) == .1
    for make, what in ((lambda: FixedKL(-.1), "beta is -0.1"), (lambda: AdaptiveKL(0.), "beta is 0.0"), (lambda: AdaptiveKL(.1, target=-6.), "target is -6.0"),
                       (lambda: AdaptiveKL(.1, horizon=0.), "horizon is 0.0"), (lambda: AdaptiveKL(.1).update(float("nan"), 64), "kl is nan"),
                       (lambda: AdaptiveKL(.1).update(1., 0), "n is 0")):
        with pytest.raises(CourseError, match=f"{what}; .* Change"): make()
    assert AdaptiveKL(.1, 6., 10_000.).update(60., 100) == pytest.approx(.1 * (1 + .2 * 100 / 10_000))
    assert AdaptiveKL(.1, 6., 10_000.).update(0., 100) == pytest.approx(.1 * (1 - .2 * 100 / 10_000))
    assert AdaptiveKL(.1, 6., 10_000.).update(6.6, 100) == pytest.approx(.1 * (1 + .1 * 100 / 10_000))


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("steps", 1.5), ("steps", True), ("batch_size", 1), ("max_new_tokens", 0), ("temperature", 0.),
    ("beta", -.1), ("beta", math.nan), ("kl", "auto"), ("kl_target", 0.), ("kl_horizon", -1.), ("lr", 0.), ("lr", math.inf),
    ("missing_eos_penalty", -1.), ("value_lr", 0.), ("value_warmup", -1), ("ppo", None), ("max_kl", 0.),
    ("target_reward", math.nan)])
def test_config_errors_name_the_field(name, value):
    with pytest.raises(CourseError, match=f"RLHFConfig {name} is .*; needed: .*Change {name}, or leave it out"):
        RLHFConfig(**{name: value})


def test_adaptive_with_beta_zero_is_refused():
    with pytest.raises(CourseError, match="stays 0"): RLHFConfig(kl="adaptive", beta=0.)


# -- the invariants ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("temperature", [1., .7, 1.5])
def test_before_the_first_update_ratio_is_1_and_kl_is_0(folders, kind, temperature):
    policy = fresh(folders(kind), value_head=True)
    samples = policy.sample(PROMPTS * 3, 12, temperature, seed=3)
    with policy.reference(): ref, _ = policy.logprobs(samples)
    own, gap = check_start(policy, samples, ref)
    assert own < 1e-4 and gap < 1e-4  # float32: other shapes of matrix products round differently, about 1e-6 a token
    assert (samples.logprobs.sum(1) - ref.sum(1)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_ratio_stays_1_at_the_start_of_every_step_and_kl_departs_from_0(folders, kind):
    config = dataclasses.replace(SMALL, steps=4, value_warmup=0, temperature=.8)
    history = train_rlhf(fresh(folders(kind)), says_ask, PROMPTS, config, seed=1)
    assert history[0]["start_gap"] < 1e-4 and abs(history[0]["kl"]) < 1e-4
    assert all(row["first_log_ratio"] < 1e-4 for row in history[:-1])
    assert abs(history[-1]["kl"]) > 1e-3


def test_the_reference_is_the_policy_when_its_adapter_began(folders):
    """RL on top of a fine-tuned adapter: the reference is the fine-tuned policy, not the bare base."""
    policy = fresh(folders("t5"))
    with torch.no_grad():
        for p in policy.trainable_parameters(): p += .2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    bare = load_policy(folders("t5"))
    policy.start_adapter(r=4)
    samples = policy.sample(PROMPTS, 12, 1., seed=0)
    with policy.reference(): ref, _ = policy.logprobs(samples)
    assert check_start(policy, samples, ref)[1] < 1e-4
    assert (bare.logprobs(samples)[0] - ref).abs().max() > .01


def test_wrong_recorded_logprobs_are_caught(folders):
    policy = fresh(folders("t5"))
    samples = policy.sample(PROMPTS, 12, .5, seed=0)
    samples.temperature = 1.  # scored at another temperature than it was drawn
    with policy.reference(): ref, _ = policy.logprobs(samples)
    with pytest.raises(CourseError, match="dropout"): check_start(policy, samples, ref)


def test_warm_up_moves_only_the_value_head(folders):
    policy = fresh(folders("t5"), value_head=True)
    before = policy.adapter_state()
    history = train_rlhf(policy, says_ask, PROMPTS, dataclasses.replace(SMALL, steps=2, value_warmup=2), seed=0)
    changed = {k for k, v in policy.adapter_state().items() if not torch.equal(v, before[k])}
    assert changed == {"value_head.weight", "value_head.bias"}
    assert abs(history[-1]["kl"]) < 1e-4 and all(p.grad is None for p in policy.trainable_parameters())


def test_base_weights_never_change(folders):
    policy = fresh(folders("t5"))
    before = {k: v.clone() for k, v in policy.model.state_dict().items() if "lora" not in k}
    train_rlhf(policy, says_ask, PROMPTS, dataclasses.replace(SMALL, value_warmup=0))
    assert all(torch.equal(v, policy.model.state_dict()[k]) for k, v in before.items())


# -- the loop ---------------------------------------------------------------------------------------
def test_same_arguments_same_bits(folders):
    runs = []
    for _ in range(2):
        torch.rand(3)  # the global generator must not matter
        policy = fresh(folders("t5"))
        runs.append((train_rlhf(policy, says_ask, PROMPTS, SMALL, seed=5), policy.adapter_state()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(v, runs[1][1][k]) for k, v in runs[0][1].items())
    assert train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, SMALL, seed=6) != runs[0][0]


def test_rows(folders):
    seen = []
    history = train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, SMALL, gold_fn=lambda p, t: [1.] * len(t),
                         callback=lambda row, policy: seen.append(row["step"]))
    assert [row["step"] for row in history] == [0, 1, 2] == seen
    assert {"proxy", "gold", "kl", "kl_per_token", "entropy", "clip_fraction", "approx_kl", "value_loss", "explained_variance",
            "length", "beta", "ended"} <= set(history[0])
    assert history[0]["gold"] == 1. and history[0]["clip_fraction"] is not None and history[-1]["clip_fraction"] is None
    assert all(isinstance(v, (int, float, str, type(None))) for row in history for v in row.values())
    assert len(train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, dataclasses.replace(SMALL, final_rollout=False))) == 2


def test_every_prompt_once_before_any_again():
    drawn = [p for step in range(6) for p in rlhf._draw(list("abcde"), 5, step, 3)]
    assert all(sorted(drawn[i:i + 5]) == list("abcde") for i in range(0, 30, 5))
    odd = [p for step in range(5) for p in rlhf._draw(list("abcde"), 3, step, 3)]
    assert all(sorted(odd[i:i + 5]) == list("abcde") for i in range(0, 15, 5))


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_it_learns_and_the_price_of_drift_holds_it_back(folders, kind):
    """Four openings, a quarter each; one of them pays. Three seeds; beta small, then large."""
    config = RLHFConfig(steps=15, batch_size=48, max_new_tokens=12, beta=.05)
    for seed in range(3):
        free = train_rlhf(fresh(folders(kind), seed), says_ask, PROMPTS, config, seed=seed)
        tied = train_rlhf(fresh(folders(kind), seed), says_ask, PROMPTS, dataclasses.replace(config, beta=3.), seed=seed)
        assert sum(row["proxy"] for row in free[-3:]) / 3 > free[0]["proxy"] + 1., (kind, seed, free[-1])
        assert tied[-1]["kl"] < .6 * free[-1]["kl"], (kind, seed, tied[-1], free[-1])


def test_a_flipped_reward_teaches_the_opposite(folders):
    config = RLHFConfig(steps=12, batch_size=48, max_new_tokens=12)
    history = train_rlhf(fresh(folders("t5")), lambda p, t: -says_ask(p, t), PROMPTS, config)
    assert -history[-1]["proxy"] < .5 * -history[0]["proxy"]


def test_a_cut_off_reply_is_worth_less(folders):
    """Nothing but the missing end is paid for: the policy learns to end within the limit."""
    config = RLHFConfig(steps=15, batch_size=48, max_new_tokens=7, beta=0., missing_eos_penalty=3.)
    history = train_rlhf(fresh(folders("t5")), lambda p, t: torch.zeros(len(t)), PROMPTS, config)
    assert history[0]["ended"] < .85 and history[-1]["ended"] > .92


def test_stop_conditions(folders):
    stop = dataclasses.replace(SMALL, steps=3, target_reward=-1.)
    history = train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, stop)
    assert len(history) == 1 and history[0]["stopped"] == "target_reward" and history[0]["grad_norm"] is None
    far = dataclasses.replace(SMALL, steps=20, value_warmup=0, lr=2e-2, max_kl=.5, beta=0.)
    history = train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, far)
    assert history[-1]["stopped"] == "max_kl" and history[-1]["kl"] > .5 and all(r["kl"] <= .5 for r in history[:-1])
    free = train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, dataclasses.replace(far, max_kl=None, steps=len(history)))
    assert history[:-1] == free[:len(history) - 1]  # until it stops, a braked run is the free one
    history = train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, SMALL, callback=lambda row, policy: True)
    assert len(history) == 1 and history[0]["stopped"] == "callback"


def test_without_a_critic(folders):
    policy = fresh(folders("t5"))
    config = dataclasses.replace(SMALL, ppo=PPOConfig(value_coef=0., minibatch=8, epochs=1), value_warmup=0)
    assert len(train_rlhf(policy, says_ask, PROMPTS, config)) == 3 and policy.value_head is None


def test_full_kl_agrees_with_the_log_ratio(folders):
    config = dataclasses.replace(SMALL, steps=6, batch_size=96, value_warmup=0, lr=1e-2, measure_full_kl=True)
    last = train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, config)[-1]
    assert last["full_kl"] > 0 and abs(last["full_kl"] - last["kl"]) < .5 * last["full_kl"] + .05


def test_adaptive_price_in_the_loop(folders):
    config = dataclasses.replace(SMALL, steps=3, kl="adaptive", kl_target=1e-3, kl_horizon=100., value_warmup=0, lr=1e-2)
    betas = [row["beta"] for row in train_rlhf(fresh(folders("t5")), says_ask, PROMPTS, config)]
    assert betas[1] < betas[0] and betas[-1] > betas[1]  # no drift at first, then too much


@pytest.mark.parametrize("change, words", [
    (dict(prompts=[]), "prompts is empty"), (dict(prompts="one prompt"), "prompts is 'one prompt'; a list of strings is needed. Wrap"),
    (dict(prompts=["a", 3]), r"prompts\[1\] is 3; a list of strings is needed"),
    (dict(prompts=["a", " "]), r"prompts\[1\] is blank"), (dict(reward_fn=3), "reward_fn is int; .* Pass the function itself"),
    (dict(gold_fn=3), "gold_fn is int"), (dict(config={}), "config is dict"), (dict(seed=-1), "seed is -1; .* Use seed=0"),
    (dict(reward_fn=lambda p, t: torch.zeros(len(t), 2)), "returned shape"), (dict(reward_fn=lambda p, t: None), "returned NoneType .* Return such a tensor"),
    (dict(reward_fn=lambda p, t: torch.zeros(len(t) - 1)), "returned shape"), (dict(reward_fn=lambda p, t: ["good"] * len(t)), "returned list"),
    (dict(reward_fn=lambda p, t: torch.full((len(t),), math.nan)), "returned nan"),
    (dict(gold_fn=lambda p, t: torch.full((len(t),), math.inf)), "gold_fn returned inf")])
def test_bad_input_is_refused_before_training(folders, change, words):
    policy = fresh(folders("t5"))
    before = policy.adapter_state()
    with pytest.raises(CourseError, match=words):
        train_rlhf(**{**dict(policy=policy, reward_fn=says_ask, prompts=PROMPTS, config=SMALL), **change})
    after = policy.adapter_state()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_policy_without_adapter_is_refused(folders):
    with pytest.raises(CourseError, match="start_adapter"): train_rlhf(load_policy(folders("t5")), says_ask, PROMPTS, SMALL)


# -- the same numbers as TRL 0.11.4 where it is right, other ones where it is not --------------------
# Made once by tests/fixtures/trl_0_11_4.py: weights, inputs, and what its PPOTrainer computed from them.
@pytest.fixture(scope="module")
def trl():
    with safe_open(FIXTURES / "trl_0_11_4.safetensors", "pt") as file:
        notes = {name: json.loads(text) for name, text in file.metadata().items()}
        return SimpleNamespace(**notes, **{name: file.get_tensor(name) for name in file.keys() if "." not in name},
                               **{name: {key[len(name) + 1:]: file.get_tensor(key) for key in file.keys() if key.startswith(name + ".")}
                                  for name in ("weight", "moved", "trl")})


def with_weights(policy, weights):
    """Put TRL's adapter and value head into a policy."""
    with torch.no_grad():
        for name, parameter in policy._adapter().items(): parameter.copy_(weights[f"pretrained_model.{name}"])
        for name in ("weight", "bias"): getattr(policy.value_head, name).copy_(weights[f"v_head.summary.{name}"])
    return policy


def as_policy(trl, dropout=0.):
    """The fixture's model with the fixture's adapter and value head."""
    c = trl.config
    model = T5ForConditionalGeneration(T5Config(
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=dropout,
        **{name: c[name] for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")}))
    model.config.scale_decoder_outputs = False  # the head is not tied, as in FLAN-T5
    names = {name.replace("pretrained_model.base_model.model.", "").replace(".base_layer", ""): w for name, w in trl.weight.items()}
    model.lm_head.weight = torch.nn.Parameter(names["lm_head.weight"])
    missing, _ = model.load_state_dict({k: v for k, v in names.items() if "lora" not in k and "v_head" not in k}, strict=False)
    assert all("embed_tokens" in name for name in missing)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"t{i}": i for i in range(3, c["vocab_size"])}}
    split = Tokenizer(WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    policy = Policy(model.eval().requires_grad_(False), tokenizer, "trl")
    return with_weights(policy.start_adapter(r=c["r"], alpha=c["alpha"]).add_value_head(), trl.weight)


def as_samples(trl):
    zeros = torch.zeros(trl.responses.shape)
    return Samples([""] * len(zeros), [""] * len(zeros), trl.prompts, trl.prompt_mask, trl.responses, trl.mask.float(), zeros, zeros,
                   torch.ones(len(zeros)).bool(), 1.)


def close(ours, theirs, mask=None, tolerance=1e-5):
    """Within `tolerance` of the largest entry (or of 1, if that is smaller): float32 sums of other orders."""
    ours, theirs = (x.detach().float() if mask is None else x.detach().float()[mask.bool()] for x in (ours, theirs))
    assert (ours - theirs).abs().max() <= tolerance * max(1., theirs.abs().max()), (ours - theirs).abs().max()


@pytest.mark.parametrize("fused", [False, True])
def test_logprobs_and_values_are_trls(trl, fused):
    policy, samples = as_policy(trl), as_samples(trl)
    if fused: fuse_t5(policy)
    logprobs, values, _ = policy.evaluate(samples, torch.arange(len(samples)))
    close(logprobs, trl.trl["logprobs"], trl.mask)
    close(values, trl.trl["values"] * trl.trl["mask"], trl.trl["mask"])
    with policy.reference(): bare, _ = policy.logprobs(samples)
    close(bare, trl.trl["bare_logprobs"], trl.mask)
    close(policy.logprobs(samples)[0], trl.trl["logprobs"], trl.mask)  # the merged pass agrees as well


def test_kl_rewards_advantages_and_returns_are_trls(trl):
    """On TRL's own mask, which lacks the first token. TRL divides by n - 1 when it whitens."""
    found, c, mask = trl.trl, trl.config, trl.trl["mask"]
    close(kl_per_token(found["logprobs"], found["bare_logprobs"], mask), found["kl"], mask)
    rewards = shape_rewards(trl.scores, found["logprobs"], found["bare_logprobs"], mask, torch.ones(len(mask)), c["beta"])
    close(rewards, found["rewards"], mask)
    advantages, returns = gae(rewards, found["values"], mask, c["gamma"], c["lam"])
    close(returns, found["returns"], mask)
    n = mask.sum()
    close(whiten(advantages, mask) * ((n - 1) / n).sqrt(), found["advantages"], mask)


@pytest.mark.parametrize("fused", [False, True])
def test_losses_and_gradients_are_trls(trl, fused):
    """After a step away from the policy that wrote, with clipped ratios and values."""
    policy, samples, found, c = with_weights(as_policy(trl), trl.moved), as_samples(trl), trl.trl, trl.config
    if fused: fuse_t5(policy)
    logprobs, values, _ = policy.evaluate(samples, torch.arange(len(samples)))
    close(logprobs, found["new_logprobs"], trl.mask)
    close(values, found["new_values"], trl.mask)
    config = PPOConfig(clip=c["clip"], value_clip=c["value_clip"], value_coef=c["vf_coef"] / 2)  # TRL halves the squared error
    loss, parts = ppo_loss(logprobs, values, None, found["logprobs"], found["values"], found["advantages"], found["returns"],
                           found["mask"], config)
    assert parts["clip_fraction"] > 0
    assert parts["policy_loss"] == pytest.approx(found["policy_loss"].item(), abs=1e-5)
    assert config.value_coef * parts["value_loss"] == pytest.approx(found["value_loss"].item(), abs=1e-5)
    loss.backward()
    for name, parameter in policy._adapter().items():
        theirs = found[f"grad.pretrained_model.{name}"]
        assert (parameter.grad - theirs).norm() <= 1e-5 * max(1., theirs.norm())
        close(parameter.grad, theirs, tolerance=2e-5)  # a single entry moves by up to 1.1e-5 from one kind of processor to another
    close(policy.value_head.weight.grad, found["grad.v_head.summary.weight"])
    assert any(p.grad.abs().max() > 1e-3 for p in policy._adapter().values())


def test_trl_drops_the_users_reference_and_ours_is_the_policy_that_training_starts_from(trl):
    """Its first KL is the distance to the bare model, although the reference that it was given is the policy itself."""
    policy, samples, mask = as_policy(trl), as_samples(trl), trl.trl["mask"]
    assert trl.wrongs["reference_calls"] == 0 and abs(trl.wrongs["first_kl"]) > 1
    with policy.reference(): bare, _ = policy.logprobs(samples)
    policy.start_adapter(r=2)  # the fine-tuned adapter is frozen below it
    now, _ = policy.logprobs(samples)
    assert kl_per_token(now, bare, mask).sum(1).mean().item() == pytest.approx(trl.wrongs["first_kl"], abs=1e-4)
    with policy.reference(): reference, _ = policy.logprobs(samples)
    assert kl_per_token(now, reference, trl.mask).abs().max() < 1e-5


def test_trl_gives_the_first_token_no_lesson_and_ours_does(trl):
    policy, samples = as_policy(trl), as_samples(trl)
    assert torch.equal(trl.trl["mask"].sum(1), trl.mask.sum(1) - 1) and trl.trl["mask"][:, 0].sum() == 0
    written = policy.sample(["t5 t6 t7"] * 4, 6, seed=0)
    assert written.mask[:, 0].all() and torch.equal(written.mask.sum(1) > 0, torch.ones(4).bool())
    logprobs = policy.evaluate(samples, torch.arange(len(samples)))[0].detach().requires_grad_()
    rewards = shape_rewards(trl.scores, logprobs.detach(), trl.trl["bare_logprobs"], trl.mask, samples.ended, .2)
    advantages = whiten(gae(rewards, torch.zeros_like(rewards), trl.mask, 1., .95)[0], trl.mask)
    for mask, taught in ((trl.mask, True), (trl.trl["mask"], False)):
        (gradient,) = torch.autograd.grad(policy_loss(logprobs, logprobs.detach(), advantages, mask), logprobs)
        assert bool((gradient[:, 0] != 0).all()) is taught and bool((gradient[:, 1] != 0).any())


def test_trl_writes_with_dropout_after_a_step_and_ours_never_does(trl):
    assert trl.wrongs["training_after_step"] and trl.wrongs["different_greedy_replies"] > 1
    policy, samples = as_policy(trl, dropout=.1), as_samples(trl)
    with torch.no_grad(): logprobs, values, _ = policy.evaluate(samples, torch.arange(len(samples)))
    rollout = Rollout(logprobs, values, torch.randn(trl.mask.shape), trl.mask)
    ppo_update(lambda rows: policy.evaluate(samples, rows), rollout, torch.optim.Adam(policy.trainable_parameters()),
               PPOConfig(minibatch=2, epochs=1))
    policy.model.train()  # as TRL leaves it
    assert len({policy.generate(["t5 t6 t7"], 12, temperature=0)[0] for _ in range(8)}) == 1


def test_trl_clips_the_first_minibatch_only_and_ours_clips_all(trl):
    first, *rest = trl.wrongs["clipped_parameters"]
    assert first > 0 and rest == [0, 0, 0]
    policy, samples, norms = as_policy(trl), as_samples(trl), []
    class Watched(torch.optim.SGD):
        def step(self, *args):
            norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
            return super().step(*args)
    with torch.no_grad(): logprobs, values, _ = policy.evaluate(samples, torch.arange(len(samples)))
    ppo_update(lambda rows: policy.evaluate(samples, rows), Rollout(logprobs, values, 100 * torch.randn(trl.mask.shape), trl.mask),
               Watched(policy.trainable_parameters(), lr=1e-3), PPOConfig(minibatch=2, epochs=2, max_grad_norm=1e-3))
    assert len(norms) == 8 and all(norm == pytest.approx(1e-3, rel=.05) for norm in norms)


def test_the_fused_pass_is_the_ordinary_one(trl):
    """Entropy and its gradient, temperature, the reference, full KL; and again after a fresh adapter took the place of the first."""
    plain, fused, samples = as_policy(trl), fuse_t5(as_policy(trl)), as_samples(trl)
    samples.temperature = .7
    for _ in range(2):
        seen, texts = [], []
        for policy in (plain, fused):
            logprobs, values, entropy = policy.evaluate(samples, [5, 0, 2])
            (.3 * entropy.sum() + (logprobs * torch.linspace(-1, 1, logprobs.shape[1])).sum() + values.sum()).backward()
            with policy.reference(): bare = policy.logprobs(samples)[0]
            seen.append([logprobs, values, entropy, bare, policy.logprobs(samples)[0], policy.full_kl(samples),
                         *(p.grad for p in policy.trainable_parameters())])
            texts.append(policy.generate(["t5 t6 t7"] * 2, 8, seed=1))
            policy.start_adapter(r=2)  # folds the adapter into the weights, in place
            with torch.no_grad():
                for i, p in enumerate(policy._adapter().values()):
                    p.copy_(.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            policy.value_head.zero_grad()
        assert texts[0] == texts[1]
        for ours, theirs in zip(*seen, strict=True): close(theirs, ours, tolerance=5e-5)  # the folded adapters make a very sharp model


def test_replies_as_columns_are_replies_as_rows(trl):
    policy = fuse_t5(as_policy(trl))
    prompts = [" ".join(f"t{5 + (i * j) % 40}" for j in range(1, 4 + i % 5)) for i in range(14)]  # of different lengths
    ids, mask = policy._pad_prompts(policy.encode(prompts))
    with torch.no_grad(), _merged(policy.model):
        columns, rows = (steps(policy.model, ids, mask, 6, True) for steps in (_ColumnSteps, _T5Steps))
        tokens = None
        for keep in (14, 14, 13, 13, 3, 3):  # 3 are too few for columns
            found = columns(tokens), rows(tokens)
            for ours, theirs in zip(*found, strict=True): close(theirs, ours)
            assert columns.t == rows.t
            tokens, kept = found[1][0].argmax(-1)[:keep], torch.arange(keep).flip(0)
            columns.select(kept), rows.select(kept)
            tokens = tokens.flip(0)
    assert policy._steps is _ColumnSteps and as_policy(trl)._steps is _T5Steps


def test_fused_scores_of_several_replies_to_one_prompt_and_of_none(trl):
    prompts, replies = ["t5 t6 t7", "t8", "t5 t6 t7", "t5 t6 t7"], ["t9", "t9 t10 t11", "t12 t13", "t9 t10"]
    plain, fused = as_policy(trl), fuse_t5(as_policy(trl))
    for ours, theirs in zip(fused.logprobs(prompts, replies), plain.logprobs(prompts, replies), strict=True): close(theirs, ours)
    assert fused.logprobs([], [])[0].shape == (0, 0)
    with pytest.raises(CourseError, match="4 prompts and 1 responses"): fused.logprobs(prompts, ["t9"])


def test_writing_leaves_every_weight_as_it_was_even_if_it_is_cut_off(trl, monkeypatch):
    policy = fuse_t5(as_policy(trl))
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.model.named_parameters()}
    def same(): return all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in policy.model.named_parameters())
    policy.generate(["t5 t6 t7"] * 2, 8, seed=1)
    assert same()
    def broken(*args):
        assert not same()  # the adapter is merged here
        raise KeyboardInterrupt
    monkeypatch.setattr(policy, "_decode_batch", broken)
    with pytest.raises(KeyboardInterrupt): policy.generate(["t5 t6 t7"], 8)
    assert same()


def test_bfloat16_changes_nothing_but_rounding_and_the_fused_pass_rounds_no_worse(trl):
    """Both against float32, on four random models. bfloat16 keeps 8 bits, so each operation rounds by up to 0.4 %."""
    words, error = trl.config["vocab_size"], {"plain": [], "fused": []}
    def passes(seed, dtype, prepare=lambda policy: policy):
        torch.manual_seed(seed)
        policy = as_policy(trl)
        with torch.no_grad():
            for p in policy.model.parameters(): p.copy_(torch.ones_like(p) if p.dim() == 1 else torch.randn(p.shape) * p.shape[-1] ** -.5)
            for p in policy._adapter().values(): p.mul_(.2)
        for p in policy.model.parameters():
            if not p.requires_grad: p.data = p.data.to(dtype)  # the adapter stays in float32
        prepare(policy)
        B, T, S = 4, 10, 24
        prompt_mask = torch.ones(B, S, dtype=torch.long)
        prompt_mask[1, 15:] = 0
        samples = Samples([""] * B, [""] * B, torch.randint(3, words, (B, S)), prompt_mask, torch.randint(3, words, (B, T)), torch.ones(B, T),
                          torch.zeros(B, T), torch.zeros(B, T), torch.ones(B).bool(), 1.)
        logprobs, values, entropy = policy.evaluate(samples, range(B))
        ((logprobs * torch.randn(B, T)).mean() + .01 * entropy.mean() + .1 * (values ** 2).mean()).backward()
        learned = policy.trainable_parameters()
        assert all(p.grad.dtype == torch.float32 for p in learned)
        return [logprobs.detach(), entropy.detach(), values.detach(), torch.cat([p.grad.flatten() for p in learned])]
    for seed in range(4):
        exact = passes(seed, torch.float32)
        for name, prepare in (("plain", lambda policy: policy), ("fused", fuse_t5)):
            found = passes(seed, torch.bfloat16, prepare)
            error[name].append([((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)])
    plain, fused = (torch.tensor(error[name]).mean(0) for name in ("plain", "fused"))
    assert (fused > 0).all() and (fused[:3] < .05).all() and fused[3] < .1, fused
    assert (fused < 1.2 * plain).all(), (fused, plain)


@pytest.mark.parametrize("temperature", [1., .7])
@pytest.mark.parametrize("sharpness", [1., 30.])  # the larger puts nearly all on one word, sometimes of the first part and sometimes of the last
def test_the_head_in_parts_is_the_softmax_over_the_whole_vocabulary(monkeypatch, temperature, sharpness):
    monkeypatch.setattr(_Head, "WIDTH", 7)  # 50 is no multiple of it
    torch.manual_seed(0)
    hidden, weight, tokens = sharpness * torch.randn(12, 8), torch.randn(50, 8), torch.randint(0, 50, (12,))
    up = torch.randn(2, 12)
    def whole(hidden, weight, tokens, temperature):
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        return logp.gather(1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    for parts in ([0], [1], [0, 1]):  # gradient of the log-probability, of the entropy, of both
        found = []
        for function, kind in ((_Head.apply, torch.float32), (whole, torch.float64)):
            x = hidden.to(kind, copy=True).requires_grad_()
            out = function(x, weight.to(kind), tokens, temperature)
            sum((out[i] * up[i]).sum() for i in parts).backward()
            found.append([*(each.detach() for each in out), x.grad])
        for ours, exact in zip(*found, strict=True): assert (ours - exact).abs().max() < 1e-5 * sharpness * max(1, exact.abs().max()), parts
    with torch.no_grad(): close(_Head.apply(hidden, weight, tokens, temperature)[0], found[0][0])


def test_fused_weights_are_read_together_without_a_copy(trl):
    policy = fuse_t5(as_policy(trl))
    own = policy.model.encoder.block[0].layer[0].SelfAttention
    joint = stacked_weight(own.q, own.k, own.v)
    assert joint.data_ptr() == base_weight(own.q).data_ptr()
    assert torch.equal(joint, torch.cat([base_weight(x) for x in (own.q, own.k, own.v)]))
    base_weight(own.k).data = base_weight(own.k) * 2  # elsewhere in memory now
    assert torch.equal(stacked_weight(own.q, own.k, own.v), torch.cat([base_weight(x) for x in (own.q, own.k, own.v)]))


def test_a_fused_model_that_learns_as_a_whole_goes_the_ordinary_way(trl):
    grads = []
    for policy in (as_policy(trl), fuse_t5(as_policy(trl))):
        policy.model.requires_grad_(True)
        policy.evaluate(as_samples(trl), [0, 1])[0].sum().backward()
        grads.append([p.grad for p in policy.model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for ours, theirs in zip(*grads): close(theirs, ours)


def test_the_fused_pass_leaves_what_it_does_not_know(trl, folders):
    policy, samples = fuse_t5(as_policy(trl, dropout=.5)), as_samples(trl)
    calm = policy.model(input_ids=trl.prompts, decoder_input_ids=trl.responses, use_cache=False).logits
    assert policy.model(input_ids=trl.prompts, decoder_input_ids=trl.responses, use_cache=True).past_key_values is not None
    policy.model.train()  # dropout is no part of the fused pass, so the ordinary one must answer
    assert (policy.model(input_ids=trl.prompts, decoder_input_ids=trl.responses, use_cache=False).logits - calm).abs().max() > .01
    for targets in (["wi_0", "q"], ["lm_head", "q"]):
        pair = [each.start_adapter(r=2, targets=targets, freeze_current=False) for each in (policy, as_policy(trl))]
        for each in pair:
            with torch.no_grad():
                for p in each._adapter().values(): p.fill_(.1)
        close(*(each.evaluate(samples, [0, 1])[0] for each in pair))
    with pytest.raises(CourseError, match="gated T5"): fuse_t5(load_policy(folders("gpt2")))


# -- the two ways to fail the first look ------------------------------------------------------------
def test_the_first_look_tells_dropout_from_a_wrong_reference(folders):
    policy = fresh(folders("t5"))
    with torch.no_grad():
        for p in policy.trainable_parameters(): p += .2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    bare = load_policy(folders("t5"))
    policy.start_adapter(r=4)
    before = {name: m.p for name, m in policy.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    kl, own = start_gap(policy, PROMPTS, max_new_tokens=12)
    assert abs(kl) < 1e-4 and own < 1e-4
    kl, own = start_gap(policy, PROMPTS, reference=bare, max_new_tokens=12)
    assert abs(kl) > .01 and own < 1e-4
    kl, own = start_gap(policy, PROMPTS, dropout=.3, max_new_tokens=12)
    assert own > .01
    assert not policy.model.training and before == {
        name: m.p for name, m in policy.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert start_gap(policy, PROMPTS, max_new_tokens=12)[1] < 1e-4  # the switch leaves nothing behind


def test_lora_size():
    assert lora_size(72, 768, 768, 32) == 3_538_944  # FLAN-T5-base: 36 attentions, q and v; printed by Lab 3
    with pytest.raises(CourseError, match="are 1, 1, 1, 0; each must be 1 or more. Give whole sizes"): lora_size(1, 1, 1, 0)


# -- real dialogues ---------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CAI_COURSE_REAL_DATA"), reason="CAI_COURSE_REAL_DATA names no folder of real data")
def test_dialogsum_through_the_detoxification_loop(tmp_path):
    """Real dialogues, filtered as in Lab 3, and a random model of FLAN-T5's architecture: the loop must hold, and it must learn."""
    from conftest import make_tiny_t5
    path = Path(os.environ["CAI_COURSE_REAL_DATA"]) / "dialogsum" / "dev.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    talks = [row["dialogue"] for row in rows if 200 < len(row["dialogue"]) <= 1000]
    assert len(talks) > 200, f"{len(talks)} of {len(rows)} dialogues are between 200 and 1000 characters long"
    prompts = [f"Summarize the following conversation.\n\n{talk}\n\nSummary:" for talk in talks[:48]]
    policy = load_policy(str(make_tiny_t5(tmp_path / "t5", d_model=64, layers=2))).start_adapter(r=32, alpha=64)
    def gentle(prompts, replies): # a random model writes no words: fewer shouted letters stand in for fewer insults
        return torch.tensor([-sum(c.isupper() for c in r) / max(1, len(r)) for r in replies]) * 10
    config = RLHFConfig(steps=14, batch_size=16, max_new_tokens=16, beta=.02, lr=1e-2, missing_eos_penalty=0.,
                        ppo=dataclasses.replace(TEXT_PPO, minibatch=8))
    history = train_rlhf(policy, gentle, prompts, config, seed=0, progress=False)
    assert history[0]["start_gap"] < 1e-3 and abs(history[0]["kl"]) < 1e-2
    assert all(row["first_log_ratio"] < 1e-3 for row in history[:-1])
    assert all(math.isfinite(row["kl"]) for row in history)
    assert sum(row["proxy"] for row in history[-3:]) > sum(row["proxy"] for row in history[:3])
    print(f"{len(talks)} of {len(rows)} dialogues; score {history[0]['proxy']:.2f} -> {history[-1]['proxy']:.2f}, "
          f"KL {history[-1]['kl']:.2f} nats")
