"""Returns, GAE, whitening: hand-computed numbers, plain loops, other libraries, padding, exact values, errors."""
import math

import numpy as np
import pytest
import torch

from cai_course import rl
from cai_course.errors import CourseError
from cai_course.experiments import load_result
from cai_course.rl import (LAMBDAS, TWO_PRIZES, Corridor, Episodes, actor_critic, episode_gradients, exact_values,
                           explained_variance, fit_critic, gae, gae_error, gae_moments, game_tree, masked_mean,
                           measure_gae, minus_value, move_shares, reinforce, reinforce_loss, returns, reward_to_go,
                           sample_games, whiten)

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


def filter_gae(rewards, values, gamma, lam, bootstrap):
    "The recursion as a first-order filter of scipy, run backward in time."
    from scipy.signal import lfilter
    errors = rewards + gamma * torch.cat([values[:, 1:], bootstrap[:, None]], 1) - values
    return torch.from_numpy(lfilter([1.], [1., -gamma * lam], errors.numpy()[:, ::-1])[:, ::-1].copy())


@pytest.mark.parametrize("gamma,lam", [(1., 1.), (1., .95), (.9, .5), (.99, 0.)])
def test_gae_agrees_with_a_filter_of_scipy(gamma, lam):
    rewards, values, _ = ragged(11)
    for bootstrap in (torch.zeros(7).double(), torch.randn(7, generator=generator(12)).double()):
        advantages, targets = gae(rewards, values, None, gamma, lam, bootstrap)
        torch.testing.assert_close(advantages, filter_gae(rewards, values, gamma, lam, bootstrap), atol=1e-6, rtol=0)
    wrong = filter_gae(rewards, values, gamma, 1 - lam if lam != .5 else 1., bootstrap)  # the comparison can fail
    assert (advantages - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("gamma,lam", [(1., 1.), (1., .95), (.9, .5), (.99, 0.)])
def test_gae_agrees_with_stable_baselines3(gamma, lam):
    "Its rollout buffer, on the same numbers: three environments, episodes that end and go on within a row."
    buffers = pytest.importorskip("stable_baselines3.common.buffers", reason="stable-baselines3 is not installed")
    from gymnasium import spaces
    T, envs, g = 9, 3, generator(13)
    rewards, values = torch.randn(envs, T, generator=g), torch.randn(envs, T, generator=g)
    starts = (torch.rand(envs, T, generator=g) < .3) | (torch.arange(T) == 0)  # True: a new episode begins here
    last, done = torch.randn(envs, generator=g), torch.tensor([True, False, True])
    buffer = buffers.RolloutBuffer(T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, envs)
    for t in range(T):
        buffer.add(np.zeros((envs, 1)), np.zeros((envs, 1)), rewards[:, t].numpy(), starts[:, t].numpy(), values[:, t],
                   torch.zeros(envs))
    buffer.compute_returns_and_advantage(last, done.numpy())
    for row in range(envs):  # ours has one episode in a row: cut theirs where a new one begins
        begins = starts[row].nonzero()[:, 0].tolist() + [T]
        for a, b in zip(begins, begins[1:]):
            goes_on = b == T and not done[row]
            bootstrap = last[row, None] if goes_on else torch.zeros(1)
            ours, targets = gae(rewards[row, None, a:b], values[row, None, a:b], None, gamma, lam, bootstrap)
            theirs = torch.from_numpy(buffer.advantages[a:b, row])
            torch.testing.assert_close(ours[0], theirs, atol=1e-6, rtol=1e-6)  # both compute in float32
            torch.testing.assert_close(targets[0], torch.from_numpy(buffer.returns[a:b, row]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("holes", [False, True])
def test_gae_agrees_with_a_filter_row_by_row_under_a_mask(holes):
    rewards, values, mask = ragged(14, holes=holes)
    advantages, _ = gae(rewards, values, mask, .95, .8)
    for r, v, m, ours in zip(rewards, values, mask, advantages):
        expected = filter_gae(r[m][None], v[m][None], .95, .8, torch.zeros(1).double())[0]
        torch.testing.assert_close(ours[m], expected, atol=1e-6, rtol=0)
        assert (ours[~m] == 0).all()


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


# --- the game tree ---

def plain_value(board, mine=True, seen={}):
    "Value to X when both roll dice, by plain recursion over tuples: no code of the course."
    lines = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
    if board not in seen:
        won = [p for p in (1, -1) if any(all(board[i] == p for i in line) for line in lines)]
        free = [i for i in range(9) if not board[i]]
        after = [board[:i] + (1 if mine else -1,) + board[i + 1:] for i in free]
        seen[board] = won[0] if won else sum(plain_value(b, not mine) for b in after) / len(free) if free else 0.
    return seen[board]


def test_the_tree_holds_the_exact_values_of_every_state_and_move():
    tree, (values, advantages) = game_tree(), exact_values()
    assert (tree.boards.abs().sum(1) % 2 == 0).all() and (tree.boards[0] == 0).all() and values[-1] == 0
    boards = [tuple(b) for b in tree.boards.tolist()]
    assert len(set(boards)) == len(boards) and set(range(len(boards))) == set(tree.state.tolist())
    expected = torch.tensor([plain_value(b) for b in boards], dtype=torch.double)
    torch.testing.assert_close(values[:-1], expected, atol=1e-12, rtol=0)
    after = tree.boards[tree.state].clone()
    after[torch.arange(len(after)), tree.cell] = 1
    q = torch.tensor([plain_value(tuple(b), mine=False) for b in after.tolist()], dtype=torch.double)
    torch.testing.assert_close(advantages, q - values[tree.state], atol=1e-12, rtol=0)


def test_events_of_a_move_are_a_distribution_and_lead_forward():
    tree = game_tree()
    whole = tree.over_events(torch.ones(len(tree.move)).double())
    torch.testing.assert_close(whole, torch.ones(len(tree.state)).double())
    goes_on = tree.next >= 0
    assert (tree.reward[goes_on] == 0).all() and (tree.next[goes_on] > tree.state[tree.move][goes_on]).all()
    assert move_shares().sum() == pytest.approx(1) and (move_shares() > 0).all()


def test_sampled_games_follow_the_tree():
    games, (values, _) = sample_games(20_000, generator(3)), exact_values()
    again = sample_games(20_000, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(games, again)) and games.mask[:, 0].all()
    assert (games.rewards[~games.mask] == 0).all() and ((games.rewards != 0).sum(1) <= 1).all()
    assert abs(games.rewards.sum(1).mean() - values[0]) < .025  # the standard error is .006
    counts = torch.bincount(games.actions[games.mask], minlength=len(move_shares())).double()
    assert (counts / counts.sum() - move_shares()).abs().max() < .003


def every_ending(state, tree):
    "All ways a game can go on from a state: [(chance, states, moves, rewards)]."
    found = []
    for move in (tree.state == state).nonzero()[:, 0].tolist():
        for event in (tree.move == move).nonzero()[:, 0].tolist():
            share, reward, after = tree.chance[event].item(), tree.reward[event].item(), tree.next[event].item()
            rest = every_ending(after, tree) if after >= 0 else [(1., [], [], [])]
            share /= (tree.state == state).sum().item()
            found += [(share * c, [state] + s, [move] + m, [reward] + r) for c, s, m, r in rest]
    return found


@pytest.mark.parametrize("lam", [0., .6, 1.])
def test_moments_of_the_tree_are_those_of_gae_over_every_ending(lam):
    "Late positions have few endings: run `gae` on each of them and weigh by chance. The two must agree exactly."
    tree = game_tree()
    critic = torch.cat([torch.randn(len(tree.boards), generator=generator(5)).double(), torch.zeros(1)])
    mean, variance = gae_moments(critic, lam)
    for state in ((tree.boards != 0).sum(1) == 4).nonzero()[::150, 0].tolist():
        endings = every_ending(state, tree)
        assert sum(e[0] for e in endings) == pytest.approx(1)
        estimates = [gae(torch.tensor([r]).double(), critic[s][None], None, 1., lam)[0][0, 0].item()
                     for _, s, _, r in endings]
        for move in (tree.state == state).nonzero()[:, 0].tolist():
            chance, found = zip(*((e[0], x) for e, x in zip(endings, estimates) if e[2][0] == move))
            expected = np.average(found, weights=chance)
            assert mean[move].item() == pytest.approx(expected, abs=1e-9)
            spread = np.average((np.array(found) - expected) ** 2, weights=chance)
            assert variance[move].item() == pytest.approx(spread, abs=1e-9)


def test_bias_and_variance_at_the_ends():
    values, _ = exact_values()
    noise = torch.cat([torch.randn(len(values) - 1, generator=generator(6)).double(), torch.zeros(1)])
    for critic in (values, values + noise, torch.zeros_like(values)):
        assert gae_error(critic, 1.)[0] < 1e-20  # full returns have no bias, whatever the critic
    assert gae_error(values, 0.)[0] < 1e-20      # a perfect critic has none, whatever lambda
    assert gae_error(values, .5)[0] < 1e-20
    assert gae_error(values + noise, 0.)[0] > .01
    shifted = torch.cat([values[:-1] + 3., torch.zeros(1)])  # the same error in every state: harmless at lambda 1 only
    assert gae_error(shifted, 1.)[1] == pytest.approx(gae_error(values, 1.)[1])


def test_a_critic_is_the_mean_return_with_one_drawn_game_added():
    games = Episodes(torch.tensor([[0, 5], [0, 7], [0, 5]]), torch.zeros(3, 2, dtype=torch.long),
                     torch.tensor([[0., 1.], [0., -1.], [0., 1.]]).double(), torch.ones(3, 2, dtype=torch.bool))
    critic = fit_critic(games)
    assert critic[[0, 5, 7, 1, -1]].tolist() == pytest.approx([1 / 4, 2 / 3, -1 / 2, 0, 0])


# --- learners and experiments ---

def test_gradients_of_single_walks_average_to_the_exact_one_with_and_without_baseline():
    logits = torch.randn(5, 2, generator=generator(8)).mul(.5).requires_grad_()
    (exact,) = torch.autograd.grad(TWO_PRIZES.values(logits, 1.)[2], logits)
    policy = logits.detach()
    played, spread = TWO_PRIZES.sample(policy, 40_000, generator(9)), {}
    for weigh in (reward_to_go, minus_value):
        g = episode_gradients(weigh(played, policy, TWO_PRIZES), played, policy)
        spread[weigh] = g.std(0)
        assert ((g.mean(0) - exact[:, 1]).abs() < 5 * g.std(0) / len(g) ** .5).all()
    assert (spread[minus_value] < spread[reward_to_go]).all()


def test_learners_are_deterministic_and_reach_the_better_prize():
    small = [reinforce(seed, minus_value, lr=.2) for seed in range(3)]
    assert all(len(c) == 101 and c[0] == pytest.approx(1.5) and c[-1] > 1.9 for c, _, _ in small)
    assert all((right > .5).all() and updates == 100 for _, right, updates in small)
    assert small[0].curve == reinforce(0, minus_value, lr=.2).curve
    curves = [actor_critic(seed) for seed in range(3)]
    assert all(len(c) == 61 and c[-1] > .95 * .9 ** 2 for c in curves) and curves[0] == actor_critic(0)


def test_a_policy_that_walks_in_circles_ends_the_training_and_not_the_program():
    circle = torch.zeros(5, 2)
    circle[:, 1] = torch.tensor([40., 40., 40., -40., -40.])  # right, right, right, left, left
    class Trap(Corridor):
        def sample(self, logits, *args, **kwargs): return super().sample(circle, *args, **kwargs)
    run = reinforce(0, reward_to_go, world=Trap(left=1., right=2.), updates=3)
    assert run.curve == pytest.approx([1.5] * 4) and run.updates == 0


def test_the_stored_bias_and_variance_are_what_the_code_gives():
    stored, live = load_result("gae-lambda").rows[0], measure_gae(0)
    assert len(live["bias2_100"]) == len(LAMBDAS)
    for name in live: assert live[name] == pytest.approx(stored[name], rel=1e-6, abs=1e-12), name


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
