"""The PPO core: signs, clipping, padding, the first step, errors before any step, and that it learns."""
import dataclasses
import math

import pytest
import torch
from torch import nn

from cai_course import ppo
from cai_course.errors import CourseError
from cai_course.ppo import (PPOConfig, Rollout, approx_kl, entropy_bonus, policy_loss, ppo_loss, ppo_update, value_loss)
from cai_course.rl import Corridor, gae, reinforce_loss, returns, whiten

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
