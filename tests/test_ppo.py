"""The PPO core: signs, clipping, padding, the first step, errors before any step, and that it learns."""
import dataclasses
import inspect
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cai_course import ppo, rl
from cai_course.errors import CourseError
from cai_course.experiments import EXPERIMENTS
from cai_course.ppo import (CLIPS, GLOSSARY, PRINTED_KL, PSEUDOCODE, SIGNS, SLOT_CONFIG, SYMPTOMS, PPOConfig, Rollout,
                            SlotRow, approx_kl, diagnose, kl_estimators, measure_clip_epochs, measure_first_ratio,
                            measure_kl_estimators, measure_sign_flips, policy_loss, ppo_loss, ppo_update, train_slots,
                            update_with_signs, value_loss)
from cai_course.rl import Corridor, explained_variance, gae, masked_mean, reinforce_loss, whiten
from conftest import ROOT

NAN = float("nan")


def generator(seed=0): return torch.Generator().manual_seed(seed)


class Toy(nn.Module):
    "A random policy over 4 actions and 6 states with a critic; its rollout, and its `evaluate`."
    def __init__(self, seed=0, rows=10, steps=5, extra=0, garbage=NAN):
        super().__init__()
        g = generator(seed)
        self.policy = nn.Parameter(torch.randn(6, 4, generator=g).double())
        self.critic = nn.Parameter(torch.randn(6, generator=g).double())
        self.states = torch.randint(0, 6, (rows, steps), generator=g)
        self.actions = torch.randint(0, 4, (rows, steps), generator=g)
        mask = torch.arange(steps) < torch.randint(1, steps + 1, (rows,), generator=g)[:, None]
        rewards = torch.randn(rows, steps, generator=g).double()
        logprobs, values, _ = self(torch.arange(rows))
        wide = torch.full((rows, extra), garbage).double()
        pad = lambda x: torch.cat([torch.where(mask, x.detach(), garbage), wide], 1)
        self.extra, self.garbage = extra, garbage
        self.rollout = Rollout(pad(logprobs), pad(values), pad(rewards),
                               torch.cat([mask, torch.zeros(rows, extra, dtype=torch.bool)], 1))

    def forward(self, rows):
        logits = self.policy[self.states[rows]].log_softmax(-1)
        out = (logits.gather(-1, self.actions[rows][..., None])[..., 0], self.critic[self.states[rows]],
               -(logits.exp() * logits).sum(-1))
        if not getattr(self, "extra", 0): return out
        wide = torch.full((len(rows), self.extra), self.garbage).double()
        return tuple(torch.cat([x, wide], 1) for x in out)

    def sgd(self, lr=1.): return torch.optim.SGD(self.parameters(), lr=lr)


ONE_STEP = PPOConfig(epochs=1, minibatch=1000, max_grad_norm=None)


# ---- numbers by hand

def column(*x): return torch.tensor([x], dtype=torch.float64)


def assert_policy_loss_by_hand(function):
    """Ratios 1.5, .5, 1.5, .5, 1.1 with advantages 2, 2, -1, -1, 3 and clip .2:
    1.2*2 = 2.4;  .5*2 = 1;  1.5*-1 = -1.5;  .8*-1 = -.8;  1.1*3 = 3.3; sum 4.4 over 5 steps."""
    ratio, adv = column(1.5, .5, 1.5, .5, 1.1, 7.), column(2, 2, -1, -1, 3, 100)
    loss = function(ratio.log(), torch.zeros(1, 6).double(), adv, column(1, 1, 1, 1, 1, 0), .2)
    assert loss.item() == pytest.approx(-4.4 / 5, abs=1e-6)


def test_policy_loss_by_hand(): assert_policy_loss_by_hand(policy_loss)


@pytest.mark.parametrize("broken", [
    lambda new, old, a, m, c: -policy_loss(new, old, a, m, c),                      # an objective is not a loss
    lambda new, old, a, m, c: policy_loss(old, new, a, m, c),                       # ratio upside down
    lambda new, old, a, m, c: policy_loss(new, old, a, torch.ones_like(m), c),      # mask forgotten
    lambda new, old, a, m, c: policy_loss(new, old, a, m, None),                    # clipping forgotten
    lambda new, old, a, m, c: -(torch.maximum(new.exp() * a, new.exp().clamp(1 - c, 1 + c) * a) * m).sum() / m.sum(),
    lambda new, old, a, m, c: -(new.exp().clamp(1 - c, 1 + c) * a * m).sum() / m.sum(),  # clipped without the minimum
], ids=["sign", "ratio", "mask", "no-clip", "max-for-min", "clip-only"])
def test_policy_loss_by_hand_notices_bugs(broken):
    with pytest.raises(AssertionError): assert_policy_loss_by_hand(broken)


def test_value_loss_by_hand():
    values, old, target, mask = column(.9, .1, -2., 5.), column(0, 0, 0, 0), column(1, 1, 0, 0), column(1, 1, 1, 0)
    # clipped to .2: (.8)^2 beats (.1)^2; .1 lies inside: .9^2; -2 is clipped to -.2, but unclipped 4 is larger
    assert value_loss(values, old, target, mask, .2).item() == pytest.approx((.64 + .81 + 4) / 3, abs=1e-6)
    assert value_loss(values, old, target, mask, None).item() == pytest.approx((.01 + .81 + 4) / 3, abs=1e-6)


def test_value_clipping_stops_the_gradient_of_steps_far_enough_along():
    values = column(.9, .1, -2.).requires_grad_()
    value_loss(values, column(0, 0, 0), column(1, 1, 0), column(1, 1, 1), .2).backward()
    torch.testing.assert_close(values.grad, column(0., -2 * .9 / 3, -4 / 3))


def test_whole_loss_has_the_signs_of_the_paper():
    new, adv = column(1.1).log(), column(2.)
    args = (new, column(3.), column(.7), column(0.), column(3.), adv, column(5.), column(1.))
    loss, parts = ppo_loss(*args, PPOConfig(value_coef=.5, entropy_coef=.1))
    assert loss.item() == pytest.approx(-1.1 * 2 + .5 * 4 - .1 * .7, abs=1e-6)
    assert parts["approx_kl"] == pytest.approx(.1 - math.log(1.1), abs=1e-6)
    assert parts["ratio_max"] == pytest.approx(1.1) and parts["clip_fraction"] == 0
    higher_entropy, _ = ppo_loss(*args[:2], column(.8), *args[3:], PPOConfig(entropy_coef=.1))
    worse_critic, _ = ppo_loss(new, column(2.), *args[2:], PPOConfig(entropy_coef=.1, value_clip=None))
    assert higher_entropy < loss < worse_critic  # at equal c1, c2: entropy lowers the loss, error raises it


@pytest.mark.parametrize("seed", range(3))
def test_losses_agree_with_plain_loops(seed):
    g, shape = generator(seed), (6, 8)
    new, old, adv, v, old_v, ret, ent = (torch.randn(shape, generator=g).double() * .4 for _ in range(7))
    mask = torch.rand(shape, generator=g) < .7
    total_policy = total_value = total_entropy = total_kl = clipped = n = 0
    for b in range(6):
        for t in range(8):
            if not mask[b, t]: continue
            r, a = math.exp(new[b, t] - old[b, t]), adv[b, t].item()
            total_policy += min(r * a, min(max(r, .8), 1.2) * a)
            critic, before, target = v[b, t].item(), old_v[b, t].item(), ret[b, t].item()
            near = before + min(max(critic - before, -.2), .2)
            total_value += max((critic - target) ** 2, (near - target) ** 2)
            total_entropy, total_kl, n = total_entropy + ent[b, t].item(), total_kl + r - 1 - math.log(r), n + 1
            clipped += abs(r - 1) > .2
    loss, parts = ppo_loss(new, v, ent, old, old_v, adv, ret, mask, PPOConfig(entropy_coef=.3))
    assert loss.item() == pytest.approx(-total_policy / n + .5 * total_value / n - .3 * total_entropy / n, abs=1e-6)
    assert parts["approx_kl"] == pytest.approx(total_kl / n, abs=1e-6)
    assert parts["clip_fraction"] == pytest.approx(clipped / n, abs=1e-6)


# ---- gradients

def test_gradient_of_clipped_steps_is_exactly_zero():
    g = generator(1)
    new = (torch.randn(20, 10, generator=g) * .5).requires_grad_()
    adv, mask = torch.randn(20, 10, generator=g), torch.rand(20, 10, generator=g) < .8
    policy_loss(new, torch.zeros(20, 10), adv, mask, .2).backward()
    ratio = new.detach().exp()
    done = ((ratio > 1.2) & (adv > 0)) | ((ratio < .8) & (adv < 0)) | ~mask
    assert done.any() and (new.grad[done] == 0).all() and (new.grad[~done] != 0).all()


def test_unclipped_side_is_never_limited():  # clipping bounds the incentive, not the ratio
    new = column(5., 1 / 5).log().requires_grad_()
    policy_loss(new, column(0, 0), column(-1, 1), column(1, 1), .2).backward()
    torch.testing.assert_close(new.grad, column(5 / 2, -1 / 5 / 2))


@pytest.mark.parametrize("seed", range(3))
def test_first_minibatch_ratio_is_one_and_gradient_is_the_policy_gradient(seed):
    toy = Toy(seed)
    mask, rows = toy.rollout.mask, torch.arange(10)
    clean = toy.rollout.check()
    advantages, _ = gae(clean.rewards, clean.values, mask, 1., .95)
    logprobs, values, entropy = toy(rows)
    plain = torch.autograd.grad(reinforce_loss(logprobs, whiten(advantages, mask), mask), toy.policy)[0]
    before = toy.policy.detach().clone()
    stats = ppo_update(toy, toy.rollout, toy.sgd(), dataclasses.replace(ONE_STEP, value_coef=0.))
    assert stats["ratio_max"] == 1 and stats["first_log_ratio"] == 0 and stats["approx_kl"] == 0
    assert stats["clip_fraction"] == 0 and stats["steps"] == 1
    torch.testing.assert_close(before - toy.policy.detach(), plain, atol=1e-12, rtol=0)


def test_gradient_norm_covers_policy_and_critic_in_every_minibatch():
    toy = Toy(2)
    seen = []
    class Watched(torch.optim.SGD):
        def step(self, *args):
            seen.append(torch.cat([p.grad.flatten() for p in toy.parameters()]).norm().item())
            return super().step(*args)
    config = PPOConfig(epochs=2, minibatch=4, max_grad_norm=.01)
    stats = ppo_update(toy, toy.rollout, Watched(toy.parameters(), lr=.1), config)
    assert len(seen) == stats["steps"] == 6 and stats["grad_norm"] > .01
    assert all(norm <= .01 + 1e-9 for norm in seen) and max(seen) > .0099


# ---- padding

@pytest.mark.parametrize("garbage", [NAN, 1e6, -math.inf])
def test_padding_never_changes_an_update(garbage):
    results = []
    for extra in (0, 4):
        toy = Toy(3, extra=extra, garbage=garbage)
        config = PPOConfig(epochs=3, minibatch=4, entropy_coef=.1)
        stats = ppo_update(toy, toy.rollout, toy.sgd(.5), config, generator(7))
        assert all(math.isfinite(x) for x in stats.values())
        results.append((stats, torch.cat([p.detach().flatten() for p in toy.parameters()])))
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-12, rtol=0)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)


def test_every_real_step_weighs_the_same():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    adv = torch.tensor([[0., 0., 0.], [1., NAN, NAN]])
    assert policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), adv, mask).item() == pytest.approx(-1 / 4)  # not -1/2


def test_advantages_are_whitened_over_the_mask_of_the_whole_rollout(monkeypatch):
    seen, real_loss = {}, ppo.ppo_loss
    def spy(new, v, ent, old, old_v, adv, ret, mask, config):
        seen.setdefault("adv", []).append(adv[mask])
        return real_loss(new, v, ent, old, old_v, adv, ret, mask, config)
    monkeypatch.setattr(ppo, "ppo_loss", spy)
    toy = Toy(4)
    ppo_update(toy, toy.rollout, toy.sgd(0.), PPOConfig(epochs=1, minibatch=3))
    every = torch.cat(seen["adv"])
    assert abs(every.mean()) < 1e-12 and abs(every.var(correction=0) - 1) < 1e-6
    assert len(seen["adv"]) == 4 and len(every) == toy.rollout.mask.sum()


# ---- the loop

def test_early_stop_by_target_kl():
    toy = Toy(5)
    config = PPOConfig(epochs=50, minibatch=5, max_grad_norm=None, clip=None)
    wild = ppo_update(toy, toy.rollout, toy.sgd(2.), config, generator(1))
    tame_toy = Toy(5)
    config = dataclasses.replace(config, target_kl=.05)
    tame = ppo_update(tame_toy, tame_toy.rollout, tame_toy.sgd(2.), config, generator(1))
    assert wild["steps"] == 100 and not wild["stopped_early"]
    assert tame["steps"] < 100 and tame["stopped_early"] and tame["approx_kl"] <= .05 < wild["approx_kl"]


def test_same_seed_same_update_and_statistics_are_plain_numbers():
    runs = []
    for _ in range(2):
        toy = Toy(6)
        stats = ppo_update(toy, toy.rollout, toy.sgd(.3), PPOConfig(minibatch=3), generator(5))
        runs.append((stats, toy.policy.detach()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert all(type(x) is float for x in runs[0][0].values())
    assert {"policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "ratio_max", "grad_norm",
            "explained_variance"} <= set(runs[0][0])


def test_kl_is_never_negative_and_near_the_true_one():
    old, new = torch.tensor([.5, .3, .2]).double(), torch.tensor([.4, .3, .3]).double()
    actions = torch.multinomial(old, 200_000, replacement=True, generator=generator(0))[None]
    estimate = approx_kl(new.log()[actions], old.log()[actions], torch.ones_like(actions))
    exact = (old * (old / new).log()).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=.02)
    assert approx_kl(column(-3.), column(-1.), column(1.)) > 0


def test_half_precision_rollouts_are_widened():
    toy = Toy(7)
    narrow = [getattr(toy.rollout, name).to(torch.bfloat16) for name in ("logprobs", "values", "rewards")]
    half = Rollout(*narrow, toy.rollout.mask)
    assert half.check().logprobs.dtype == torch.float32
    assert math.isfinite(ppo_update(toy, half, toy.sgd(.1), PPOConfig(epochs=1))["loss"])


def test_critic_and_entropy_are_optional_when_their_weight_is_zero():
    toy = Toy(8)
    alone = lambda rows: (toy(rows)[0], None, None)
    stats = ppo_update(alone, toy.rollout, toy.sgd(.1), PPOConfig(value_coef=0., entropy_coef=0.))
    assert stats["value_loss"] == 0
    with pytest.raises(CourseError, match="no values, but its coefficient is 0.5"):
        ppo_update(alone, toy.rollout, toy.sgd(.1), PPOConfig())


# ---- bad input: a message, and nothing has moved

def spoiled(field, value=NAN, row=None):
    def change(rollout):
        x = getattr(rollout, field).clone()
        if row is None: x[rollout.mask.nonzero()[3][0], rollout.mask.nonzero()[3][1]] = value
        else: x[row] = value
        return dataclasses.replace(rollout, **{field: x})
    return change


@pytest.mark.parametrize("change,message", [
    (spoiled("rewards"), "rewards is nan at row"),
    (spoiled("logprobs", -math.inf), "logprobs is -inf at row"),
    (spoiled("values", math.inf), "values is inf at row"),
    (spoiled("mask", False, row=4), "1 of 10 rollout rows are all padding \\(first: row 4\\)"),
    (spoiled("mask", False, row=slice(None)), "10 of 10 rollout rows are all padding"),
    (lambda r: Rollout(*(torch.zeros(0, 5) for _ in range(4))), "at least one row"),
    (lambda r: Rollout(*(torch.zeros(5) for _ in range(4))), "needed: \\(B, T\\)"),
    (lambda r: dataclasses.replace(r, rewards=torch.zeros(10)), "rewards has shape \\(10,\\)"),
    (lambda r: dataclasses.replace(r, mask=r.mask.float() - 1), "other than 0 and 1"),
    (lambda r: dataclasses.replace(r, bootstrap=torch.zeros(3)), "bootstrap has shape"),
])
def test_bad_rollouts_are_refused_before_any_step(change, message):
    toy = Toy(9)
    optimizer, before = toy.sgd(), [p.detach().clone() for p in toy.parameters()]
    with pytest.raises(CourseError, match=message): ppo_update(toy, change(toy.rollout), optimizer, PPOConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters()))


@pytest.mark.parametrize("evaluate,message", [
    (lambda toy: lambda rows: toy(rows)[:2], "a tuple"),
    (lambda toy: lambda rows: tuple(x[:, :-1] for x in toy(rows)), "of shape"),
    (lambda toy: lambda rows: tuple(x.detach() for x in toy(rows)), "without gradient"),
    (lambda toy: lambda rows: (toy(rows)[0] * NAN, *toy(rows)[1:]), "loss became nan after 0 steps"),
])
def test_bad_evaluate_is_refused_before_any_step(evaluate, message):
    toy = Toy(9)
    before = [p.detach().clone() for p in toy.parameters()]
    with pytest.raises(CourseError, match=message): ppo_update(evaluate(toy), toy.rollout, toy.sgd(), PPOConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters()))


def test_log_probs_of_another_policy_are_warned_about():  # the mark of dropout left on
    toy = Toy(10)
    shaky = lambda rows: (toy(rows)[0] - .5, *toy(rows)[1:])
    with pytest.warns(UserWarning, match="dropout"):
        assert ppo_update(shaky, toy.rollout, toy.sgd(0.), PPOConfig())["first_log_ratio"] == pytest.approx(.5)


@pytest.mark.parametrize("field,value", [
    ("clip", 0.), ("clip", -.2), ("value_clip", -1.), ("value_coef", -.5), ("entropy_coef", -.1), ("epochs", 0),
    ("epochs", 1.5), ("minibatch", 0), ("gamma", 1.1), ("lam", -.1), ("max_grad_norm", 0.), ("target_kl", 0.)])
def test_config_refuses_values_out_of_range(field, value):
    with pytest.raises(CourseError, match=f"PPOConfig {field} is {value}"): PPOConfig(**{field: value})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError): PPOConfig().clip = .3


# ---- it learns, and a flipped sign unlearns

def train_corridor(seed, iterations=15, gamma=.9):
    "Exact value of the start after a few PPO updates of a table."
    world, g = Corridor(cells=5), generator(seed)
    table = nn.Parameter(torch.zeros(5, 2))
    critic = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.Adam([table, critic], lr=.05)
    for _ in range(iterations):
        played = world.sample(table, 64, g)
        def evaluate(rows):
            logits = table[played.states[rows]].log_softmax(-1)
            return (logits.gather(-1, played.actions[rows][..., None])[..., 0], critic[played.states[rows]],
                    -(logits.exp() * logits).sum(-1))
        with torch.no_grad(): logprobs, values, _ = evaluate(torch.arange(64))
        ppo_update(evaluate, Rollout(logprobs, values, played.rewards, played.mask), optimizer,
                   PPOConfig(gamma=gamma, epochs=4, minibatch=32), g)
    return world.values(table.detach(), gamma)[world.start].item()


def assert_learns():
    best, start = .9 ** 2, Corridor().values(torch.zeros(5, 2), .9)[2].item()
    results = [train_corridor(seed) for seed in range(3)]
    assert all(x > start + .8 * (best - start) for x in results), results


def test_ppo_learns_the_corridor(): assert_learns()


@pytest.mark.parametrize("name", ["policy_loss", "gae"])
def test_flipping_a_sign_is_noticed(monkeypatch, name):
    right = getattr(ppo, name)
    if name == "gae": wrong = lambda r, v, m, g, l, b=None: (-right(r, v, m, g, l, b)[0], right(r, v, m, g, l, b)[1])
    else: wrong = lambda *a, **k: -right(*a, **k)
    monkeypatch.setattr(ppo, name, wrong)
    with pytest.raises((AssertionError, CourseError)): assert_learns()


# ---- independent references

def numbers(seed, n=200):
    "Random numbers for one minibatch, far enough apart that every branch of the clips is taken."
    g = generator(seed)
    new, old, adv, v, old_v, ret, ent = (torch.randn(n, generator=g).double() * .5 for _ in range(7))
    return dict(new=new, old=old, adv=adv, values=v, old_values=old_v, returns=ret, entropy=ent.abs())


def stable_baselines(x, value_clip=None):
    "What stable-baselines3's own `PPO.train` logs for these numbers, and the gradients that it leaves."
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed; for this check only: "
                              "pip install --no-deps -c constraints.txt stable-baselines3")
    import gymnasium
    from stable_baselines3.common.logger import Logger

    class Nothing(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)

    n, leaves = len(x["new"]), {name: x[name].clone().requires_grad_() for name in ("new", "values", "entropy")}
    model = sb3.PPO("MlpPolicy", Nothing(), n_steps=n, batch_size=n, n_epochs=1, clip_range=.2, clip_range_vf=value_clip,
                    vf_coef=.5, ent_coef=.01, normalize_advantage=False, device="cpu", verbose=0)
    model.set_logger(Logger(None, []))
    batch = SimpleNamespace(observations=None, actions=torch.zeros(n), old_log_prob=x["old"], advantages=x["adv"],
                            returns=x["returns"], old_values=x["old_values"])
    model.rollout_buffer = SimpleNamespace(get=lambda size: [batch], values=x["old_values"].numpy(),
                                           returns=x["returns"].numpy())
    model.policy.evaluate_actions = lambda observations, actions: tuple(leaves[k] for k in ("values", "new", "entropy"))
    model.train()
    return model.logger.name_to_value, {name: leaf.grad for name, leaf in leaves.items()}


def ours(x, value_clip=None, rows=5):
    "The same numbers through `ppo_loss`, as rows of uneven length with garbage under the padding."
    mask = torch.zeros(rows, 60, dtype=torch.bool)
    lengths = [60, 60, 40, 30, 10]
    for row, length in enumerate(lengths): mask[row, :length] = True
    leaves = {name: x[name].clone().requires_grad_() for name in ("new", "values", "entropy")}
    pad = lambda name: torch.full(mask.shape, NAN).double().masked_scatter(mask, leaves.get(name, x[name]))
    loss, parts = ppo_loss(*map(pad, ("new", "values", "entropy", "old", "old_values", "adv", "returns")), mask,
                           PPOConfig(value_clip=value_clip, entropy_coef=.01))
    loss.backward()
    return parts, {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_agree_with_stable_baselines(seed):
    x = numbers(seed)
    (theirs, their_gradients), (parts, gradients) = stable_baselines(x), ours(x)
    for name, other in (("loss", "loss"), ("policy_loss", "policy_gradient_loss"), ("value_loss", "value_loss"),
                        ("approx_kl", "approx_kl"), ("clip_fraction", "clip_fraction")):
        assert parts[name] == pytest.approx(theirs[f"train/{other}"], abs=1e-6), name
    assert parts["entropy"] == pytest.approx(-theirs["train/entropy_loss"], abs=1e-6)  # they log its negative
    assert explained_variance(x["old_values"][None], x["returns"][None]) == pytest.approx(
        float(theirs["train/explained_variance"]), abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-9, rtol=0)
    assert 0 < parts["clip_fraction"] < 1 and (gradients["new"] == 0).any()  # both branches were taken


def test_clipped_value_loss_is_never_below_the_one_of_stable_baselines():
    "They keep only the clipped error; we keep the larger of both, as the paper's own code does. Equal where nothing is clipped."
    x = numbers(0)
    theirs, mine = stable_baselines(x, .2)[0]["train/value_loss"], ours(x, .2)[0]["value_loss"]
    assert mine > theirs + 1e-3
    near = dict(x, values=x["old_values"] + .1 * torch.sin(x["values"]))
    assert ours(near, .2)[0]["value_loss"] == pytest.approx(stable_baselines(near, .2)[0]["train/value_loss"], abs=1e-6)


# ---- the six cases, and what must not matter

def test_what_was_recorded_does_not_move_while_the_critic_learns():
    "A rollout whose values are a view of the critic's parameters must give the same update as one with a copy."
    tables = []
    for copy in (torch.clone, lambda x: x):
        toy = Toy(14, rows=6, steps=6)
        toy.states = torch.arange(6).repeat(6, 1)
        evaluate = lambda rows: (toy(rows)[0], toy.critic.expand(len(rows), -1), toy(rows)[2])
        with torch.no_grad(): logprobs, values, _ = evaluate(torch.arange(6))
        rollout = Rollout(logprobs, copy(values), toy.rollout.rewards, toy.rollout.mask)
        ppo_update(evaluate, rollout, toy.sgd(.5), PPOConfig(epochs=3, minibatch=3), generator(0))
        tables.append((toy.policy.detach(), toy.critic.detach()))
    assert torch.equal(tables[0][0], tables[1][0]) and torch.equal(tables[0][1], tables[1][1])


@pytest.mark.parametrize("ratio,advantage,push", [(.5, 1, .5), (1., 1, 1.), (1.5, 1, 0.), (.5, -1, 0.), (1., -1, -1.), (1.5, -1, -1.5)])
def test_six_cases(ratio, advantage, push):
    new = column(ratio).log().requires_grad_()
    policy_loss(new, column(0), column(advantage), column(1)).backward()
    assert -new.grad.item() == pytest.approx(push, abs=1e-12) and (push != 0 or new.grad.item() == 0)


def test_an_entropy_without_weight_changes_nothing_not_even_a_bit():
    results = []
    for give in (True, False):
        toy = Toy(11)
        evaluate = toy if give else lambda rows: (*toy(rows)[:2], None)
        stats = ppo_update(evaluate, toy.rollout, toy.sgd(.5), PPOConfig(minibatch=3), generator(2))
        results.append((toy.policy.detach(), toy.critic.detach(), stats))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2]["entropy"] > 0 == results[1][2]["entropy"]  # but it is still logged
    assert {**results[0][2], "entropy": 0.} == results[1][2]


def test_an_entropy_without_weight_costs_no_backward_pass():
    new, entropy = column(-1.).requires_grad_(), column(.5).requires_grad_()
    rest = (column(0.), column(-1.), column(0.), column(1.), column(1.), column(1.))
    ppo_loss(new, rest[0], entropy, *rest[1:], PPOConfig())[0].backward()
    assert entropy.grad is None and new.grad is not None
    ppo_loss(new, rest[0], entropy, *rest[1:], PPOConfig(entropy_coef=.1))[0].backward()
    assert entropy.grad.item() == pytest.approx(-.1)


# ---- the pseudo-code cannot drift

def statement_line(line): # Number of the line in its file that holds the quoted statement
    source, first = inspect.getsourcelines(line.function)
    (at,) = [i for i, text in enumerate(source) if line.code in text]
    return first + at


def update_watched():
    "Run an update; the lines of cai_course.ppo and cai_course.rl in the order of their first execution, and who was called."
    toy, seen, called = Toy(12), {}, set()
    outer = (ppo_update.__code__, ppo_loss.__code__)

    def watch(frame, event, arg):
        if frame.f_globals.get("__name__") not in ("cai_course.ppo", "cai_course.rl"): return None
        if event == "call" and frame.f_back.f_code in outer and frame.f_code.co_name[0] not in "_<":
            called.add(frame.f_code)
        if event == "line": seen.setdefault((frame.f_code.co_filename, frame.f_lineno), len(seen))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try: ppo_update(toy, toy.rollout, toy.sgd(.1), PPOConfig(epochs=2, minibatch=4, entropy_coef=.1), generator(0))
    finally: sys.settrace(before)
    return seen, called


@pytest.fixture(scope="module")
def watched(): return update_watched()


def pseudocode_faults(lines, watched):
    "What is wrong with a pseudo-code: statements that are gone, never run or run in another order, and steps left out."
    seen, called = watched
    gone = [line.words for line in lines if inspect.getsource(line.function).count(line.code) != 1]
    if gone: return gone
    places = [(inspect.getsourcefile(line.function), statement_line(line)) for line in lines]
    idle = [line.words for line, place in zip(lines, places) if place not in seen]
    if idle: return idle
    order = [seen[place] for place in places]
    late = [b.words for (a, b), (i, j) in zip(zip(lines, lines[1:]), zip(order, order[1:])) if j < i]
    named = {line.function.__code__ for line in lines} | {masked_mean.__code__}  # the mean is part of every loss
    return late + [f"{code.co_name} is not in the pseudo-code" for code in called - named]


def test_every_line_of_the_pseudocode_is_carried_out_in_its_order_and_none_is_missing(watched):
    assert pseudocode_faults(PSEUDOCODE, watched) == []
    public = {**vars(ppo), **vars(rl)}
    for line in PSEUDOCODE:
        name = line.function.__qualname__.split(".")[0]
        assert name in ppo.__all__ + rl.__all__ and public[name] in (line.function, Rollout), f"{name} is not exported"
    assert len(watched[0]) > 40 and len(watched[1]) > 5


@pytest.mark.parametrize("at", range(len(PSEUDOCODE)), ids=lambda i: PSEUDOCODE[i].words[:25])
def test_drift_of_any_line_is_noticed(at, watched):
    lines = list(PSEUDOCODE)
    lines[at] = lines[at]._replace(code=lines[at].code + " # as it was last year")
    assert pseudocode_faults(lines, watched) == [PSEUDOCODE[at].words]


@pytest.mark.parametrize("at", range(len(PSEUDOCODE) - 1))
def test_lines_in_the_wrong_order_are_noticed(at, watched):
    lines = list(PSEUDOCODE)
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    assert pseudocode_faults(lines, watched) != []


def test_a_step_left_out_of_the_pseudocode_is_noticed(watched):
    lines = [line for line in PSEUDOCODE if line.function is not whiten]
    assert pseudocode_faults(lines, watched) == ["whiten is not in the pseudo-code"]


def test_the_chapter_explains_each_function_of_the_pseudocode_where_the_table_links_to():
    cells = json.loads((ROOT / "nbs" / "03_ppo.ipynb").read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    for function in {line.function for line in PSEUDOCODE if line.function.__module__ == "cai_course.ppo"}:
        name = function.__qualname__.split(".")[0]
        anchor = f'<a id="code-{name.lower().replace("_", "-")}"></a>'
        here = [i for i, source in enumerate(text) if anchor in source]
        made = [i for i, source in enumerate(text) if f"def {name}(" in source or f"class {name}:" in source]
        assert len(here) == 1 and here[0] < made[0], name
        assert any(f'href="#code-{name.lower().replace("_", "-")}"' in "".join(output.get("data", {}).get("text/html", ""))
                   for cell in cells for output in cell.get("outputs", [])), f"no link to {name}"
    for target in re.findall(r"\]\(#([\w-]+)\)", "\n".join(text)):
        assert f'<a id="{target}"></a>' in "\n".join(text), f"a link leads to #{target}, which does not exist"


# ---- the log: every number explained, symptoms recognized

def test_glossary_holds_every_returned_number_and_no_other():
    toy = Toy(13)
    assert set(GLOSSARY) == set(ppo_update(toy, toy.rollout, toy.sgd(.1), PPOConfig(target_kl=1e-9)))
    assert all(entry.meaning.strip() and entry.healthy.strip() for entry in GLOSSARY.values())
    documented = inspect.getdoc(ppo_update)
    assert [key for key in GLOSSARY if f"`{key}`" not in documented] == []


def test_symptoms_name_only_numbers_that_exist():
    for symptom in SYMPTOMS:
        keys = set(re.findall(r"`(\w+)`", symptom.look))
        assert keys and keys <= set(GLOSSARY), symptom.name
    assert len({symptom.name for symptom in SYMPTOMS}) == len(SYMPTOMS) == 9


def update_on(rewards, lr=.05, steps=6, config=SLOT_CONFIG, start=0., seed=0, shaky=0.):
    "Logs of a training on made-up payoffs: `rewards(levers, step)` says what is paid; `shaky` adds noise to the scoring."
    g = generator(seed)
    table = torch.zeros(8, 4)
    table[:, 0] = start
    table, critic, log = table.requires_grad_(), torch.zeros(8, requires_grad=True), []
    optimizer = torch.optim.Adam([dict(params=[table]), dict(params=[critic], lr=4 * lr)], lr=lr)
    for step in range(steps):
        levers = torch.multinomial(table.detach().softmax(-1), 16, replacement=True, generator=g).T

        def evaluate(rows, noise=shaky):
            logp = (table + noise * torch.randn(8, 4, generator=g)).log_softmax(-1).expand(len(rows), -1, -1)
            return (logp.gather(-1, levers[rows][..., None])[..., 0], critic.expand(len(rows), -1),
                    -(logp.exp() * logp).sum(-1))
        with torch.no_grad(): logprobs, values, _ = evaluate(torch.arange(16), 0.)
        paid = rewards(levers, step) + .3 * torch.randn(16, 8, generator=g)
        log.append(ppo_update(evaluate, Rollout(logprobs, values, paid, torch.ones(16, 8)), optimizer, config, g))
    return log


def kind(levers, step): return 1. * (levers == 3)


SICK = {
    "wrong from the start": lambda: update_on(kind, shaky=.5),
    "steps too long": lambda: train_slots(0, dataclasses.replace(SLOT_CONFIG, clip=None, epochs=16)).history,
    "nothing moves": lambda: update_on(kind, lr=1e-9),
    "decided too early": lambda: train_slots(0, lr=2.).history,
    "undecided more and more": lambda: update_on(kind, start=3., config=dataclasses.replace(SLOT_CONFIG, entropy_coef=1.)),
    "useless critic": lambda: train_slots(0, train_critic=False).history,
    "critic running away": lambda: update_on(lambda levers, step: kind(levers, step) * (30. if step > 3 else 1.)),
    "gradient always cut": lambda: update_on(lambda levers, step: 100. * kind(levers, step)),
    "always stopped": lambda: update_on(kind, config=dataclasses.replace(SLOT_CONFIG, target_kl=1e-6)),
}


@pytest.mark.filterwarnings("ignore:Before the first step")
@pytest.mark.parametrize("name", SICK)
def test_each_symptom_is_found_in_a_training_made_sick_on_purpose(name):
    assert name in [symptom.name for symptom in diagnose(SICK[name]())]


def test_every_symptom_has_a_sick_training(): assert set(SICK) == {symptom.name for symptom in SYMPTOMS}


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_training_has_no_symptom(seed): assert diagnose(train_slots(seed).history) == []


def test_diagnose_refuses_logs_that_it_cannot_read():
    with pytest.raises(CourseError, match="got 0 updates"): diagnose([])
    row = train_slots(0, updates=1).history[0]
    del row["entropy"]
    with pytest.raises(CourseError, match="update 1 has no entropy"): diagnose([train_slots(0, updates=1).history[0], row])


# ---- divergences

@pytest.mark.parametrize("m", [.1, 1.])
def test_kl_estimators_have_the_exact_bias_and_deviation_and_these_are_the_printed_ones(m):
    "Moments of k1, k2, k3 for N(0, 1) against N(m, 1): closed form, quadrature with 80 points, and the printed table."
    true = m ** 2 / 2
    exact = {"k1": (0., 2 / m), "k2": (m ** 2 / 4, 2 * math.sqrt(.5 + m ** 2 / 4)),
             "k3": (0., math.sqrt(math.exp(m ** 2) - 1 - m ** 2) / true)}
    x, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
    weight = weight / weight.sum()
    for name, k in zip(exact, kl_estimators(m * x - m ** 2 / 2)):
        bias, spread = (weight @ k) / true - 1, ((weight @ k ** 2 - (weight @ k) ** 2).sqrt()) / true
        assert (bias.item(), spread.item()) == pytest.approx(exact[name], abs=1e-9)
        assert exact[name] == pytest.approx(PRINTED_KL[m][name], abs=.0052)  # printed with 1 to 3 digits


def test_sampled_table_is_near_the_printed_one_and_repeats():
    row = measure_kl_estimators(3, samples=400_000)
    assert row == measure_kl_estimators(3, samples=400_000) != measure_kl_estimators(4, samples=400_000)
    assert row["largest_gap"] < .15 and len(row) == 13  # 20 / sqrt(400,000) = .03 is one standard error
    assert row["largest_gap"] == max(abs(row[f"{name} {what}, m={m:g}"] - pair[i]) for m, p in PRINTED_KL.items()
                                     for name, pair in p.items() for i, what in enumerate(("bias", "deviation")))


def test_k3_is_never_negative_and_differs_from_k1_by_something_of_mean_zero():
    old, new = column(.5, .3, .2)[0], column(.1, .3, .6)[0]
    k1, k2, k3 = kl_estimators((new / old).log())
    assert (k3 >= 0).all() and (k2 >= 0).all() and (k1 < 0).any()
    exact = (old * (old / new).log()).sum().item()
    assert (old @ k1).item() == pytest.approx(exact, abs=1e-12) == (old @ k3).item()
    assert abs((old @ k2).item() - exact) > .01
    assert kl_estimators(torch.tensor(1e-4))[2].item() == pytest.approx(5e-9, rel=.01)  # 32 bit, without cancellation


# ---- slot machines and experiments

def test_slot_machines_pay_what_they_say():
    slots = SlotRow(seed=5)
    levers, paid = slots.play(torch.zeros(8, 4), 20_000, generator(1))
    assert levers.shape == paid.shape == (20_000, 8)
    for lever in range(4):
        mean = (paid * (levers == lever)).sum(0) / (levers == lever).sum(0)
        torch.testing.assert_close(mean, slots.means()[:, lever], atol=.08, rtol=0)  # 5 standard errors of 1 / sqrt(5,000)
    assert slots.score(torch.zeros(8, 4)) == pytest.approx(0, abs=1e-6)
    assert slots.score(1e4 * slots.means()) == pytest.approx(1, abs=1e-3) and slots.score(-1e4 * slots.means()) < -.5
    assert torch.equal(slots.means(), SlotRow(seed=5).means()) and not torch.equal(slots.means(), SlotRow(seed=6).means())


def test_training_repeats_and_a_forgotten_critic_stays_as_it_was():
    a, b = train_slots(2, updates=3), train_slots(2, updates=3)
    assert a.scores == b.scores and a.history == b.history and torch.equal(a.table, b.table)
    assert a.scores != train_slots(3, updates=3).scores
    still = train_slots(2, updates=3, train_critic=False, lr=1e-12)
    fresh = train_slots(2, updates=1, train_critic=False, lr=1e-12)
    assert still.critic_error == pytest.approx(fresh.critic_error, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_update_by_hand_with_the_right_signs_is_ppo_update(seed):
    config = dataclasses.replace(SLOT_CONFIG, entropy_coef=.05, minibatch=5, value_clip=.2)
    by_hand = train_slots(seed, config, updates=4, update=update_with_signs(*SIGNS["right"]))
    right = train_slots(seed, config, updates=4)
    torch.testing.assert_close(by_hand.table, right.table, atol=1e-5, rtol=0)
    assert by_hand.critic_error == pytest.approx(right.critic_error, abs=1e-5)
    for name, signs in SIGNS.items():
        if name == "right": continue
        wrong = train_slots(seed, config, updates=4, update=update_with_signs(*signs))
        assert not torch.allclose(wrong.table, right.table, atol=1e-3) or wrong.critic_error > right.critic_error + .01


@pytest.mark.parametrize("name", ["k1-k2-k3", "ppo-sign-flips", "ratio-one-at-start", "clip-epochs"])
def test_experiments_are_registered_with_a_prediction(name):
    experiment = EXPERIMENTS[name]
    assert experiment.chapter == "03" and experiment.seeds >= 5 and experiment.run.__module__ == "cai_course.ppo"


def test_first_ratio_is_one_and_each_bug_is_seen():
    row = measure_first_ratio(1)
    assert row["clean"] < 1e-5 and row == measure_first_ratio(1)
    assert row["gap"] == pytest.approx(min(row["dropout"], row["temperature"], row["shift"]) - row["clean"])
    assert min(row["dropout"], row["temperature"], row["shift"]) > .1


def test_sign_flips_show_where_they_sit():
    row = measure_sign_flips(1)
    assert row["policy: scores"][-1] < 0 < row["right: scores"][-1]
    assert row["value: critic error"] > 10 * row["right: critic error"]
    assert row["margin"] <= row["right: entropy"] - row["entropy: entropy"]
    assert {len(row[f"{name}: scores"]) for name in SIGNS} == {21}


def test_clip_epochs_grid(monkeypatch):
    monkeypatch.setattr(ppo, "EPOCHS", (1, 4))
    row = measure_clip_epochs(0)
    assert {len(row[name]) for name in CLIPS} == {2}
    assert row["gap"] == row["clip 0.2"][-1] - row["unclipped"][-1]
    assert row["clip 0.2"][1] == train_slots(0, dataclasses.replace(SLOT_CONFIG, clip=.2, epochs=4)).scores[-1]
