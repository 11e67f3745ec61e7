"""What a maintainer fears about `rlhf`: a wrong sign, a wrong position, a reference that is not one, drift between runs."""
import dataclasses
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from cai_course import rlhf
from cai_course.errors import CourseError
from cai_course.models import load_policy
from cai_course.ppo import PPOConfig
from cai_course.rl import gae
from cai_course.rlhf import (TEXT_PPO, AdaptiveKL, FixedKL, RLHFConfig, check_start, kl_per_token, shape_rewards,
                             train_rlhf)
from conftest import make_tokenizer

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
    (dict(beta=-.1), "minus sign is already"), (dict(missing_eos_penalty=-1.), "minus sign is already"),
    (dict(beta=math.nan), "beta is nan"), (dict(scores=torch.ones(3)), "one number for each"),
    (dict(scores=torch.tensor([1., math.nan])), "not finite"), (dict(mask=torch.tensor([[1., 1.], [0., 0.]])), "reply 1 has no token"),
    (dict(ref_logprobs=torch.zeros(2, 3)), "must all be"), (dict(ended=torch.ones(2, 2)), "one number for each")])
def test_shape_rewards_errors(change, words):
    good = dict(scores=torch.ones(2), logprobs=torch.zeros(2, 2), ref_logprobs=torch.zeros(2, 2), mask=torch.ones(2, 2),
                ended=torch.ones(2).bool(), beta=.1)
    with pytest.raises(CourseError, match=words): shape_rewards(**{**good, **change})


def test_kl_per_token_is_zero_on_padding():
    got = kl_per_token(torch.tensor([[-1., math.nan]]), torch.tensor([[-3., 0.]]), torch.tensor([[1, 0]]))
    assert got.tolist() == [[2., 0.]]


def test_adaptive_price():
    assert FixedKL(.1).update(100., 64) == .1
    assert AdaptiveKL(.1, 6., 10_000.).update(60., 100) == pytest.approx(.1 * (1 + .2 * 100 / 10_000))
    assert AdaptiveKL(.1, 6., 10_000.).update(0., 100) == pytest.approx(.1 * (1 - .2 * 100 / 10_000))
    assert AdaptiveKL(.1, 6., 10_000.).update(6.6, 100) == pytest.approx(.1 * (1 + .1 * 100 / 10_000))


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("steps", 1.5), ("steps", True), ("batch_size", 1), ("max_new_tokens", 0), ("temperature", 0.),
    ("beta", -.1), ("beta", math.nan), ("kl", "auto"), ("kl_target", 0.), ("kl_horizon", -1.), ("lr", 0.), ("lr", math.inf),
    ("missing_eos_penalty", -1.), ("value_lr", 0.), ("value_warmup", -1), ("ppo", None), ("max_kl", 0.),
    ("target_reward", math.nan)])
def test_config_errors_name_the_field(name, value):
    with pytest.raises(CourseError, match=f"RLHFConfig {name} is"): RLHFConfig(**{name: value})


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
    (dict(prompts=[]), "prompts is empty"), (dict(prompts="one prompt"), "list of strings"), (dict(prompts=["a", 3]), "list of strings"),
    (dict(prompts=["a", " "]), r"prompts\[1\] is blank"), (dict(reward_fn=3), "reward_fn is int"), (dict(gold_fn=3), "gold_fn is int"),
    (dict(config={}), "config is dict"), (dict(seed=-1), "seed is -1"),
    (dict(reward_fn=lambda p, t: torch.zeros(len(t), 2)), "returned shape"), (dict(reward_fn=lambda p, t: None), "returned NoneType"),
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
