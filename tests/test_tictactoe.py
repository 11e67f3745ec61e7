"""The board against known counts, the worst case against plain recursion, the environment's checker, and learning."""
import dataclasses
import functools
import random

import pytest
import torch
from gymnasium.utils.env_checker import check_env

from cai_course import tictactoe as t
from cai_course.errors import CourseError

PLAIN_LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


def plain_winner(board):
    "Winner of a tuple of nine numbers, in plain Python."
    return next((board[a] for a, b, c in PLAIN_LINES if board[a] == board[b] == board[c] != 0), 0)


@functools.cache
def plain_minimax(view):
    "Value of a position for the player to move, by recursion."
    if plain_winner(view): return -1
    free = [i for i in range(9) if view[i] == 0]
    return max((-plain_minimax(tuple(-1 if j == i else -x for j, x in enumerate(view))) for i in free), default=0)


def chaotic_agent(seed):
    "Deterministic, but without any plan: a random preference for every position."
    preference = torch.rand(3 ** 9, 9, generator=torch.Generator().manual_seed(seed))
    return lambda views: preference[t.board_code(views)].masked_fill(views != 0, -1).argmax(1)


def plain_worst_case(agent, turn):
    "Counts of lines by recursion, one board at a time."
    counts = {"win": 0, "draw": 0, "loss": 0}
    def walk(board, player, ply):  # board: the agent's stones 1
        won = plain_winner(board)
        if won or 0 not in board:
            counts["win" if won > 0 else "loss" if won < 0 else "draw"] += 1
            return
        if ply % 2 == turn: cells = [int(agent(torch.tensor([board], dtype=torch.int8))[0])]
        else: cells = [i for i in range(9) if board[i] == 0]
        for cell in cells: walk(tuple(player if i == cell else x for i, x in enumerate(board)), -player, ply + 1)
    walk((0,) * 9, 1 if turn == 0 else -1, 0)
    return counts


def test_engine_knows_every_game():
    "255,168 games: 131,184 won by X, 77,904 by O, 46,080 drawn (known counts)."
    boards, ends = t.new_boards(1), []
    while len(boards):
        parent, cells = t.legal_moves(boards).nonzero().unbind(1)
        boards = t.place(boards[parent], cells)
        over = t.is_over(boards)
        ends.append(t.winner(boards[over]))
        boards = boards[~over]
    ends = torch.cat(ends)
    assert [(ends == r).sum().item() for r in (1, -1, 0)] == [131_184, 77_904, 46_080]


def test_winner_agrees_with_plain_python_on_every_board():
    boards = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 9)
    single = ~((boards[:, t.LINES].sum(-1) == 3).any(1) & (boards[:, t.LINES].sum(-1) == -3).any(1))  # not both
    boards = boards[single]
    assert t.winner(boards).tolist() == [plain_winner(b) for b in map(tuple, boards.tolist())]
    assert len(t.board_code(boards).unique()) == len(boards)


def test_minimax_agrees_with_recursion_on_every_reachable_position():
    plain_minimax.cache_clear()
    plain_minimax((0,) * 9)
    seen, todo = set(), [(0,) * 9]
    while todo:
        view = todo.pop()
        if view in seen: continue
        seen.add(view)
        if not plain_winner(view):
            todo += [tuple(-1 if j == i else -x for j, x in enumerate(view)) for i in range(9) if view[i] == 0]
    assert len(seen) == 5478  # known number of reachable positions
    views = torch.tensor(sorted(seen), dtype=torch.int8)
    assert t.minimax_values()[t.board_code(views)].tolist() == [plain_minimax(v) for v in sorted(seen)]


@pytest.mark.parametrize("agent", [chaotic_agent(0), chaotic_agent(1), t.first_free_agent, t.minimax_agent],
                         ids=["chaotic 0", "chaotic 1", "first free", "minimax"])
def test_worst_case_agrees_with_recursion(agent):
    found = t.worst_case(agent)
    assert found.first == plain_worst_case(agent, 0) and found.second == plain_worst_case(agent, 1)
    assert len(found.losing_lines) == found.losses


def test_losing_lines_really_lose():
    found = t.worst_case(chaotic_agent(2))
    for number, line in enumerate(found.losing_lines):
        boards = t.new_boards(1)
        for cell in line: boards = t.place(boards, torch.tensor([cell]))
        assert t.winner(boards).item() == (-1 if number < found.first["loss"] else 1)
    assert found.losses > 0


def test_minimax_never_loses_and_a_worse_one_does():
    assert t.worst_case(t.minimax_agent).losses == 0
    flipped = lambda views: t.minimax_moves(views).masked_fill(views != 0, 9.).argmin(1)
    assert t.worst_case(flipped).losses > 100


def test_worst_case_refuses_dice_and_illegal_moves():
    with pytest.raises(CourseError, match="deterministic"): t.worst_case(t.random_agent(0))
    with pytest.raises(CourseError, match="not legal"): t.worst_case(lambda views: torch.zeros(len(views)).long())
    with pytest.raises(CourseError, match="one cell each"):
        t.worst_case(lambda views: torch.zeros(len(views), 2).long())


@pytest.mark.parametrize("cell", [0, 9, -1])
def test_illegal_moves_say_what_is_free(cell):
    board = t.place(t.new_boards(1), torch.tensor([0]))
    with pytest.raises(CourseError, match=f"Move {cell} on board 0 .*Free cells are \\[1, 2, 3"):
        t.place(board, torch.tensor([cell]))
    full = torch.tensor([[1, 1, 1, -1, -1, 0, 0, 0, 0]], dtype=torch.int8)
    with pytest.raises(CourseError, match="The game is over"): t.place(full, torch.tensor([8]))


def test_views_are_the_same_from_both_chairs():
    "Swapping who opens swaps the results of a deterministic pair."
    a, b = chaotic_agent(3), chaotic_agent(4)
    assert t.match(a, b, 2)["win"] == t.match(b, a, 2)["loss"]
    seen = []
    def spy(views):
        seen.append(views.clone())
        return t.first_free_agent(views)
    t.play_games(spy, spy, 1)
    for ply, views in enumerate(seen): assert views.sum() == -(ply % 2) and (views == 1).sum() == ply // 2


def test_play_games_is_seeded_and_leaves_finished_games_alone():
    runs = [t.play_games(t.random_agent(0), t.random_agent(1), 500) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs))
    results, history = runs[0]
    for before, after in zip(history[:-1], history[1:]):
        assert torch.equal(before[t.is_over(before)], after[t.is_over(before)])


def test_random_games_have_the_exact_shares():
    "The sampled shares agree with the sum over the game tree of every line's probability."
    boards, chance, shares = t.new_boards(1), torch.ones(1).double(), {1: 0., 0: 0., -1: 0.}
    while len(boards):
        legal = t.legal_moves(boards)
        parent, cells = legal.nonzero().unbind(1)
        boards, chance = t.place(boards[parent], cells), (chance / legal.sum(1))[parent]
        over, won = t.is_over(boards), t.winner(boards)
        for r in shares: shares[r] += chance[over & (won == r)].sum().item()
        boards, chance = boards[~over], chance[~over]
    assert sum(shares.values()) == pytest.approx(1)
    results, _ = t.play_games(t.random_agent(0), t.random_agent(1), 40_000)
    for r, share in shares.items(): assert abs((results == r).float().mean() - share) < .01  # four standard errors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keywords", [{}, {"agent_first": True}, {"agent_first": False, "opponent": t.minimax_agent}])
def test_environment_passes_the_checker(keywords):
    check_env(t.TicTacToeEnv(**keywords), skip_render_check=True)


def test_environment_rewards():
    env = t.TicTacToeEnv(opponent=t.first_free_agent, agent_first=True, render_mode="ansi")
    env.reset(seed=0)
    assert env.step(4)[1:4] == (0., False, False) and env.step(3)[1:4] == (0., False, False)   # the other takes 0 and 1
    observation, reward, over, truncated, info = env.step(5)
    assert (reward, over, truncated) == (1., True, False) and info["action_mask"].sum() == 0
    assert env.render() == "O O 2\nX X X\n6 7 8"
    env.reset(seed=0)
    env.step(8)
    assert env.step(8)[1:3] == (-1., True)  # an illegal move loses
    env.reset(seed=0)
    env.step(8), env.step(7)
    assert env.step(4)[1:3] == (-1., True)  # the other has 0, 1, 2


def test_environment_is_seeded():
    def play(seed):
        env = t.TicTacToeEnv()
        observation, info = env.reset(seed=seed)
        rows, over = [observation.tolist()], False
        while not over:
            observation, reward, over, _, info = env.step(int(info["action_mask"].argmax()))
            rows.append((observation.tolist(), reward))
        return rows
    assert play(3) == play(3) and any(play(3) != play(s) for s in range(4, 8))


def test_table_learner_becomes_unbeatable():
    for seed in range(2):
        table = t.TableLearner(seed)
        for _ in range(150): table.learn(200, explore=1.)
        assert t.worst_case(table).losses == 0


# ---- self-play

def test_self_play_records_what_happened():
    net = t.PolicyValueNet(32)
    with torch.no_grad():  # any policy that is not uniform
        for p in net.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * .3)
    rollout, views, actions = t.self_play(net, 200, torch.Generator().manual_seed(0))
    mask = rollout.check().mask
    logits, values = net(views[mask])
    torch.testing.assert_close(logits.log_softmax(-1).gather(1, actions[mask][:, None])[:, 0], rollout.logprobs[mask])
    torch.testing.assert_close(values, rollout.values[mask])
    assert (views[mask].gather(1, actions[mask][:, None]) == 0).all()  # every move was legal
    final = rollout.rewards.masked_fill(~mask, 0).sum(1)
    assert set(final.tolist()) <= {-1., 0., 1.}
    for row in random.Random(0).sample(range(len(mask)), 50):  # a won row ends with a line on the board
        last = mask[row].nonzero()[-1].item()
        board = views[row, last].clone()
        board[actions[row, last]] = 1
        assert (t.winner(board[None]).item() == 1) == (final[row].item() == 1)


def test_self_play_rewards_are_zero_sum_when_everything_is_recorded():
    rollout, *_ = t.self_play(t.PolicyValueNet(16), 300, torch.Generator().manual_seed(0), random_opening=0)
    assert len(rollout) == 600 and rollout.mask[:, 0].all()
    assert (rollout.rewards.reshape(300, 2, 5).sum((1, 2)) == 0).all()


def learns(seed, iterations=40):
    config = dataclasses.replace(t.SELF_PLAY, minibatch=128)
    net, history = t.train_self_play(seed, iterations=iterations, games=256, config=config)
    assert all(abs(stats["first_log_ratio"]) < 1e-5 for stats in history)
    return t.worst_case(net.play).losses


def assert_learns():
    start = t.worst_case(t.PolicyValueNet().play).losses
    assert all(learns(seed) < .15 * start for seed in range(3))  # measured: 17 to 23 of 487


def test_network_learns_by_self_play(): assert_learns()


def test_flipped_reward_is_noticed(monkeypatch):
    right = t.self_play
    def wrong(*args, **keywords):
        rollout, views, actions = right(*args, **keywords)
        rollout.rewards = -rollout.rewards
        return rollout, views, actions
    monkeypatch.setattr(t, "self_play", wrong)
    with pytest.raises(AssertionError): assert_learns()


def test_training_is_seeded_and_leaves_global_dice_alone():
    before = torch.random.get_rng_state()
    nets = [t.train_self_play(5, iterations=3, games=32)[0] for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


@pytest.mark.slow
def test_five_seeds_cannot_be_beaten():
    losses = [t.worst_case(t.train_self_play(seed)[0].play).losses for seed in range(5)]
    assert losses == [0] * 5
