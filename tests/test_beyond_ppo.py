"""DPO, RLOO and GRPO against numbers by hand, exact sums and a problem that is solved."""
import math

import pytest
import torch

from cai_course.beyond_ppo import (MENU_STYLES, dpo_loss, exact_optimum, expected_gradient, group_advantages, leave_one_out, make_menu,
                                   objective, train_dpo, train_sampled)
from cai_course.errors import CourseError


@pytest.fixture(scope="module")
def menu():
    return make_menu(4, seed=3)


def test_a_menu_is_the_same_twice_and_knows_good_from_bad(menu):
    again = make_menu(4, seed=3)
    assert menu.replies == again.replies and torch.equal(menu.rewards, again.rewards) and torch.equal(menu.ref_logprobs, again.ref_logprobs)
    best = [MENU_STYLES["harmful" if i < 2 else "benign"][k] for i, k in enumerate(menu.rewards.argmax(1))]
    assert best == ["refuse", "refuse", "helpful", "helpful"]
    assert torch.allclose(menu.ref_logprobs.exp().sum(1), torch.ones(4))


@pytest.mark.parametrize("n", [0, 1, 3, -2])
def test_a_menu_needs_an_even_number(n):
    with pytest.raises(CourseError, match="even number"):
        make_menu(n)


def test_the_optimum_cannot_be_improved_and_beta_is_its_price(menu):
    for beta in (.1, 1., 10.):
        best = exact_optimum(menu.ref_logprobs, menu.rewards, beta).requires_grad_()
        slope, = torch.autograd.grad(objective(best.log_softmax(-1), menu.ref_logprobs, menu.rewards, beta), best)
        assert slope.abs().max() < 1e-5
    far = exact_optimum(menu.ref_logprobs, menu.rewards, 1e6)
    assert torch.allclose(far, menu.ref_logprobs, atol=1e-4)


def test_the_dpo_loss_by_hand_and_its_gradient():
    c, r = torch.tensor([-2.], requires_grad=True), torch.tensor([-3.], requires_grad=True)
    loss = dpo_loss(c, r, torch.tensor([-4.]), torch.tensor([-3.5]), .5)
    margin = .5 * (2 - .5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-6)
    loss.backward()
    pull = .5 / (1 + math.exp(margin))
    assert c.grad.item() == pytest.approx(-pull, abs=1e-6) and r.grad.item() == pytest.approx(pull, abs=1e-6)
    soft = dpo_loss(c, r, c.detach() - 1, r.detach(), 1., label=torch.tensor([.3]))
    assert soft.item() == pytest.approx(.3 * math.log(1 + math.exp(-1)) + .7 * math.log(1 + math.exp(1)), abs=1e-6)


def test_dpo_goes_to_the_optimum_and_a_flipped_sign_does_not(menu):
    assert train_dpo(menu, steps=300)[-1] < 1e-4
    turned = make_menu(4, seed=3)
    turned.rewards = -turned.rewards
    assert (exact_optimum(menu.ref_logprobs, menu.rewards, .5) - exact_optimum(turned.ref_logprobs, turned.rewards, .5)).abs().max() > 1


def test_advantages_by_hand():
    r = torch.tensor([[3., 0., 0.], [5., 5., 5.]])
    assert leave_one_out(r).tolist() == [[3., -1.5, -1.5], [0., 0., 0.]]
    assert group_advantages(r)[1].tolist() == [0., 0., 0.]
    assert group_advantages(r * 100)[0].tolist() == pytest.approx(group_advantages(r)[0].tolist(), abs=1e-4)
    for function in (leave_one_out, group_advantages):
        with pytest.raises(CourseError, match="2 or more"):
            function(torch.ones(3, 1))


def test_leave_one_out_is_unbiased_and_the_group_scale_is_not(menu):
    for logprobs, rewards in zip(menu.ref_logprobs, menu.rewards):
        p = logprobs.exp()
        exact = p * (rewards - (p * rewards).sum())
        assert torch.allclose(expected_gradient(logprobs, rewards, leave_one_out), exact, atol=1e-5)
        found = expected_gradient(logprobs, rewards, group_advantages)
        assert torch.cosine_similarity(found, exact, dim=0) < .999


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_every_method_learns(menu, method):
    best = objective(exact_optimum(menu.ref_logprobs, menu.rewards, .5), menu.ref_logprobs, menu.rewards, .5).item()
    curve = train_sampled(menu, method, steps=120)
    assert curve == train_sampled(menu, method, steps=120), "the same seed gives the same curve"
    assert best - curve[-1] < .15 * (best - curve[0]) and max(curve) <= best + 1e-6


def test_an_unknown_method_is_refused(menu):
    with pytest.raises(CourseError, match="ppo, rloo or grpo"):
        train_sampled(menu, "dqn")


def test_the_exercise_and_the_chapter_divide_by_the_same_spread():
    from cai_course.practice.ch16 import scaled_by_group
    space = {}
    exec(scaled_by_group.solution, space)
    r = torch.tensor([[1., 0., 0., 0.], [2., 2., 2., 2.], [3., 1., 4., 1.]])
    assert torch.allclose(torch.tensor(space["scaled_by_group"](r.numpy())), group_advantages(r), atol=1e-4)
