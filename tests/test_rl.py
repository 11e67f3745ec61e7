"""Returns, GAE, whitening: hand-computed numbers, plain loops, padding, exact values of a small world, errors."""
import math

import pytest
import torch

from cai_course import rl
from cai_course.errors import CourseError
from cai_course.rl import Corridor, explained_variance, gae, masked_mean, reinforce_loss, returns, whiten

NAN = float("nan")


def generator(seed=0): return torch.Generator().manual_seed(seed)


def ragged(seed, rows=7, steps=9, holes=False):
    "Random rewards and values with padding on the right, or scattered anywhere."
    g = generator(seed)
    rewards, values = torch.randn(rows, steps, generator=g).double(), torch.randn(rows, steps, generator=g).double()
    lengths = torch.randint(1, steps + 1, (rows,), generator=g)
    mask = torch.arange(steps) < lengths[:, None]
    if holes:
        mask = torch.rand(rows, steps, generator=g) < .6
        mask[:, 0] = True
    return rewards, values, mask


def loop_gae(rewards, values, mask, gamma, lam):
    "Advantages by the definition: a sum over future one-step errors, row by row, in plain Python."
    out = torch.zeros_like(values)
    for b in range(len(rewards)):
        real = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r, v = [rewards[b, t].item() for t in real], [values[b, t].item() for t in real] + [0.]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(real))]
        for i, t in enumerate(real):
            out[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(real)))
    return out


def assert_gae_by_hand(function):
    "gamma .5, lam .5. Errors: 1 + .5*4 - 2 = 1, then 3 + 0 - 4 = -1. Advantages: 1 + .25 * -1 = .75, and -1."
    rewards, values = torch.tensor([[1., 3., 9.]]), torch.tensor([[2., 4., 9.]])
    advantages, targets = function(rewards, values, torch.tensor([[1, 1, 0]]), .5, .5)
    torch.testing.assert_close(advantages, torch.tensor([[.75, -1., 0.]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(targets, torch.tensor([[2.75, 3., 0.]]), atol=1e-6, rtol=0)


def test_gae_by_hand(): assert_gae_by_hand(gae)


@pytest.mark.parametrize("broken", [
    lambda r, v, m, g, l: tuple(-x for x in gae(r, v, m, g, l)),  # sign flipped
    lambda r, v, m, g, l: gae(r, v, None, g, l),                  # mask forgotten
    lambda r, v, m, g, l: gae(r, v, m, l, 1.),                    # lam dropped
    lambda r, v, m, g, l: gae(r.roll(1, 1), v, m, g, l),          # rewards one step late
], ids=["sign", "mask", "lam", "shift"])
def test_gae_by_hand_notices_bugs(broken):
    with pytest.raises(AssertionError): assert_gae_by_hand(broken)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("gamma,lam", [(1., 1.), (1., .95), (.9, .5), (.99, 0.), (0., .7)])
def test_gae_agrees_with_a_plain_loop(gamma, lam, holes):
    rewards, values, mask = ragged(int(100 * gamma + 10 * lam), holes=holes)
    advantages, targets = gae(rewards, values, mask, gamma, lam)
    expected = loop_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(targets, torch.where(mask, expected + values, 0.), atol=1e-6, rtol=0)


def test_lambda_one_is_return_minus_value_and_lambda_zero_is_one_step():
    rewards, values, mask = ragged(3)
    advantages, targets = gae(rewards, values, mask, .9, 1.)
    torch.testing.assert_close(targets, returns(rewards, .9, mask))
    one_step, _ = gae(rewards, values, mask, .9, 0.)
    following = torch.cat([torch.where(mask, values, 0.)[:, 1:], torch.zeros(len(values), 1)], 1)
    torch.testing.assert_close(one_step, torch.where(mask, rewards + .9 * following - values, 0.))


def test_gae_with_exact_values_has_mean_zero_errors_and_bootstrap_continues_an_episode():
    rewards, values, _ = ragged(4)
    whole, _ = gae(rewards, values, None, .9, .8)
    cut, _ = gae(rewards[:, :5], values[:, :5], None, .9, 0., bootstrap=values[:, 5])
    torch.testing.assert_close(cut, gae(rewards, values, None, .9, 0.)[0][:, :5])
    assert not torch.allclose(whole[:, :5], cut)
    forever = torch.full((1, 400), 1.).double()  # reward 1 forever: V = 1 / (1 - gamma), no surprise anywhere
    v = torch.full((1, 400), 10.).double()
    assert gae(forever, v, None, .9, .9, bootstrap=v[:, 0])[0].abs().max() < 1e-9


@pytest.mark.parametrize("garbage", [NAN, 1e9, -math.inf])
def test_padding_never_matters(garbage):
    rewards, values, mask = ragged(5)
    def dirty(x): return torch.cat([torch.where(mask, x, garbage), torch.full((len(x), 3), garbage).double()], 1)
    wide = torch.cat([mask, torch.zeros(len(mask), 3, dtype=torch.bool)], 1)
    for clean, filled in ((gae(rewards, values, mask, .9, .8), gae(dirty(rewards), dirty(values), wide, .9, .8)),
                          ((returns(rewards, .9, mask),), (returns(dirty(rewards), .9, wide),)),
                          ((whiten(values, mask),), (whiten(dirty(values), wide),))):
        for a, b in zip(clean, filled):
            torch.testing.assert_close(a, b[:, :9], atol=0, rtol=1e-12)
            assert (b[:, 9:] == 0).all()
    assert masked_mean(values, mask) == pytest.approx(masked_mean(dirty(values), wide).item(), rel=1e-12)
    assert explained_variance(values, rewards, mask) == explained_variance(dirty(values), dirty(rewards), wide)


def test_integer_and_float_masks_equal_boolean_ones():
    rewards, values, mask = ragged(6)
    expected = gae(rewards, values, mask, .9, .8)
    for other in (mask.long(), mask.float()):
        torch.testing.assert_close(gae(rewards, values, other, .9, .8), expected)


def test_whiten_counts_the_mask_only():
    _, values, mask = ragged(7)
    white = whiten(values, mask)
    real = white[mask]
    assert real.mean().abs() < 1e-12 and abs(real.var(correction=0) - 1) < 1e-6  # 1e-8 is added to a variance near 1
    assert (white[~mask] == 0).all()
    kept = whiten(values, mask, shift_mean=False)[mask]
    assert kept.mean() == pytest.approx(values[mask].mean().item()) and abs(kept.var(correction=0) - 1) < 1e-6
    torch.testing.assert_close(whiten(3 * values + 5, mask), white, atol=1e-6, rtol=1e-6)
    assert (whiten(torch.full((2, 2), 7.), None) == 0).all()
    with pytest.raises(AssertionError):  # whitening over the padding as well is another number
        torch.testing.assert_close(whiten(torch.where(mask, values, 0.), None)[mask], real)


def test_reinforce_loss_gradient_and_sign():
    logprobs = torch.tensor([[-1., -2., -3.]], requires_grad=True)
    reinforce_loss(logprobs, torch.tensor([[2., -4., NAN]]), torch.tensor([[1, 1, 0]])).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1., 2., 0.]]))


def test_explained_variance():
    target = torch.tensor([[0., 1., 2., 3.]])
    assert explained_variance(target, target) == 1
    assert explained_variance(torch.full((1, 4), 9.), target) == pytest.approx(0)
    assert explained_variance(-target, target) == pytest.approx(-3)
    assert explained_variance(target, torch.ones(1, 4)) == 0


def test_corridor_values_and_advantages_are_exact():
    world = Corridor(cells=5, left=-1., right=2., step_cost=.1)
    logits = torch.randn(5, 2, generator=generator(1)).double()
    v, gamma = world.values(logits, .9), .9
    a = world.advantages(logits, gamma)
    assert (logits.softmax(-1) * a).sum(-1).abs().max() < 1e-12  # advantages average to 0 under the policy
    swept = torch.zeros(5).double()  # value iteration for this policy, a second computation
    p = logits.softmax(-1)
    for _ in range(400):
        left, right = torch.cat([torch.zeros(1), swept[:-1]]), torch.cat([swept[1:], torch.zeros(1)])
        extra_left, extra_right = torch.tensor([-1., 0, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 2.])
        swept = p[:, 0] * (extra_left + gamma * left) + p[:, 1] * (extra_right + gamma * right) - .1
    torch.testing.assert_close(v, swept, atol=1e-6, rtol=0)


def test_corridor_sampling_agrees_with_its_exact_values():
    world, logits = Corridor(), torch.randn(5, 2, generator=generator(2))
    played = world.sample(logits, 20_000, generator(3))
    mean = returns(played.rewards, .9, played.mask)[:, 0].mean()
    assert abs(mean - world.values(logits, .9)[world.start]) < .012  # standard error is below .003
    assert played.mask[:, 0].all() and (played.rewards[~played.mask] == 0).all()
    again = world.sample(logits, 20_000, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(played, again))


def assert_gradient_points_uphill(loss):
    "The average sampled gradient agrees in direction with the exact one."
    world, logits = Corridor(), torch.zeros(5, 2, requires_grad=True)
    (exact,) = torch.autograd.grad(world.values(logits, 1.)[world.start], logits)
    played = world.sample(logits, 4000, generator(4))
    logprobs = logits.log_softmax(-1)[played.states].gather(-1, played.actions[..., None])[..., 0]
    advantages, _ = gae(played.rewards, world.values(logits.detach(), 1.)[played.states], played.mask, 1., .9)
    (sampled,) = torch.autograd.grad(-loss(logprobs, advantages, played.mask) * played.mask.sum() / 4000, logits)
    assert torch.cosine_similarity(sampled.flatten(), exact.flatten(), dim=0) > .95


def test_sampled_policy_gradient_is_the_exact_one(): assert_gradient_points_uphill(reinforce_loss)


def test_flipped_sign_is_noticed():
    with pytest.raises(AssertionError): assert_gradient_points_uphill(lambda *a: -reinforce_loss(*a))


@pytest.mark.parametrize("call,message", [
    (lambda: gae(torch.zeros(2, 3), torch.zeros(2, 4), None, 1., 1.), "values has shape"),
    (lambda: gae(torch.zeros(3), torch.zeros(3), None, 1., 1.), "x\\[None\\]"),
    (lambda: gae(torch.zeros(0, 3), torch.zeros(0, 3), None, 1., 1.), "at least one row"),
    (lambda: gae(torch.tensor([[0., NAN]]), torch.zeros(1, 2), None, 1., 1.), "row 0, step 1"),
    (lambda: gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[0., -1e9]]), 1., 1.), "other than 0 and 1"),
    (lambda: gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 3), 1., 1.), "mask has shape"),
    (lambda: gae(torch.zeros(1, 2), torch.zeros(1, 2), None, 1.1, 1.), "gamma is 1.1"),
    (lambda: gae(torch.zeros(1, 2), torch.zeros(1, 2), None, 1., -.1), "lam is -0.1"),
    (lambda: gae(torch.zeros(2, 2), torch.zeros(2, 2), None, 1., 1., bootstrap=torch.zeros(3)), "bootstrap has shape"),
    (lambda: returns(torch.zeros(1, 2, dtype=torch.long), 1.), "floating point"),
    (lambda: masked_mean(torch.zeros(1, 2), torch.zeros(1, 2)), "without a single 1"),
    (lambda: whiten(torch.zeros(2, 2), torch.zeros(2, 2)), "without a single 1"),
    (lambda: Corridor(cells=1001).sample(torch.zeros(1001, 2), 2, max_steps=50), "had not ended"),
])
def test_errors_name_what_was_found(call, message):
    with pytest.raises(CourseError, match=message): call()
    assert issubclass(CourseError, ValueError)


def test_public_names(): assert {"returns", "gae", "whiten", "masked_mean", "explained_variance"} <= set(rl.__all__)
