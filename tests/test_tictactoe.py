"""The board against known counts, the worst case against plain recursion, the environments, learning, and the board to play on."""
import dataclasses
import functools
import json
import random
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from cai_course import tictactoe as t
from cai_course.errors import CourseError
from cai_course.experiments import load_result
from conftest import ROOT

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


def test_every_state_is_found_once():
    positions = t.all_positions()
    assert [len(b) for b in positions] == [1, 9, 72, 252, 756, 1260, 1520, 1140, 390, 78]  # known; 5,478 together
    for stones, boards in enumerate(positions):
        assert ((boards != 0).sum(1) == stones).all() and len(boards.unique(dim=0)) == len(boards)


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


# ---- many games at once

def opponent(name):
    return {"first free": t.first_free_agent, "minimax": t.minimax_agent, "chaotic": chaotic_agent(5)}[name]


@pytest.mark.parametrize("name", ["first free", "minimax", "chaotic"])
@pytest.mark.parametrize("agent_first", [True, False])
def test_many_games_are_played_as_one_by_one(name, agent_first):
    "The same moves, some of them illegal, in both environments: the same observations, rewards, ends and masks."
    n, dice = 40, np.random.default_rng(0)
    many = t.TicTacToeVectorEnv(n, opponent(name), agent_first)
    single = [t.TicTacToeEnv(opponent(name), agent_first) for _ in range(n)]
    seen, info = many.reset(seed=0)
    masks = [env.reset(seed=0)[1]["action_mask"] for env in single]
    ends = illegal = 0
    for _ in range(25):
        assert (info["action_mask"] == np.stack(masks)).all() and many.observation_space.contains(seen)
        actions = (info["action_mask"] * (1 + dice.random((n, 9)))).argmax(1)
        wild = dice.random(n) < .05
        actions[wild] = dice.integers(9, size=wild.sum())
        seen, rewards, ended, truncated, info = many.step(actions)
        assert not truncated.any() and (info["_final_obs"] == ended).all()
        for i, env in enumerate(single):
            free = env._info()["action_mask"][actions[i]]
            last, reward, over, _, extra = env.step(actions[i])
            assert (rewards[i], ended[i]) == (reward, over) and (info["final_obs"][i] == last).all()
            masks[i] = extra["action_mask"]
            if over:
                ends, illegal = ends + 1, illegal + (not free)
                last, extra = env.reset()
                masks[i] = extra["action_mask"]
            assert (seen[i] == last).all()
    assert ends > 50 and illegal > 5


def test_many_games_against_dice_have_the_exact_shares():
    "Dice against dice: 0.585 of the games for who opens, 0.288 for the other (exact shares of the game tree)."
    for first, win, loss in ((True, .5849, .2881), (False, .2881, .5849)):
        n, dice = 20_000, np.random.default_rng(1)
        envs = t.TicTacToeVectorEnv(n, agent_first=first)
        _, info = envs.reset(seed=0)
        results = np.full(n, np.nan)
        for _ in range(5):  # every first game is over after five moves; later games are left out, or short ones would count more
            actions = (info["action_mask"] * (1 + dice.random((n, 9)))).argmax(1)
            _, rewards, ended, _, info = envs.step(actions)
            results = np.where(ended & np.isnan(results), rewards, results)
        assert not np.isnan(results).any()
        assert abs((results > 0).mean() - win) < .014 and abs((results < 0).mean() - loss) < .014  # four standard errors


def test_many_games_are_seeded_and_a_coin_decides_who_opens():
    def run(seed):
        envs = t.TicTacToeVectorEnv(200)
        rows = [envs.reset(seed=seed)[0]]
        for _ in range(6): rows.append(envs.step((rows[-1] == 0).argmax(1))[0])
        return np.stack(rows)
    assert (run(3) == run(3)).all() and (run(3) != run(4)).any()
    opened = (run(3)[0] != 0).any(1).mean()  # the opponent's stone is there where it opened
    assert .35 < opened < .65
    assert t.TicTacToeVectorEnv.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP


@pytest.mark.parametrize("actions", [np.zeros(3, int), np.full(4, 9), np.full(4, -1), np.zeros(4), np.zeros((4, 1), int)],
                         ids=["too few", "nine", "negative", "floats", "a column"])
def test_many_games_refuse_what_is_no_action(actions):
    envs = t.TicTacToeVectorEnv(4)
    envs.reset(seed=0)
    with pytest.raises(CourseError, match="from 0 to 8 for each of the 4 games"): envs.step(actions)


@pytest.mark.parametrize("wrong", [lambda v: torch.zeros(len(v)).long(), lambda v: torch.full((len(v),), 9), lambda v: torch.zeros(1)],
                         ids=["taken", "outside", "shape"])
def test_many_games_refuse_an_opponent_that_breaks_the_rules(wrong):
    envs = t.TicTacToeVectorEnv(4, wrong, agent_first=True)
    envs.reset(seed=0)
    with pytest.raises(CourseError, match="needed: one free cell"): envs.step(np.zeros(4, int))


@pytest.mark.slow
def test_benchmark_prints_exactly_the_promised_json():
    pytest.importorskip("pettingzoo")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tictactoe.py"), "--json", "--rounds", "3", "--seconds", "0.3"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["plies_per_second", "pettingzoo_plies_per_second", "ratio"]
    assert found["ratio"] == pytest.approx(found["plies_per_second"] / found["pettingzoo_plies_per_second"], rel=.01)
    assert found["ratio"] >= 50


# ---- the table

def test_table_learner_becomes_unbeatable():
    for seed in range(2):
        table = t.TableLearner(seed)
        for _ in range(150): table.learn(200, explore=1.)
        assert t.worst_case(table).losses == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_table_of_the_chapter_cannot_be_beaten(seed):
    "Every line that any opponent could force, in either chair."
    assert t.worst_case(t.train_table(seed)).losses == 0


@pytest.mark.parametrize("name", ["tictactoe-ppo-never-loses", "tictactoe-table-never-loses"])
def test_stored_experiments_say_that_nobody_wins(name):
    found = load_result(name)
    assert [(row["seed"], row["losing_lines"], row["beatable"]) for row in found.rows] == [(seed, 0, 0) for seed in range(5)]
    assert found.verdict == "agrees"


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


def learns(seed, **settings):
    config = dataclasses.replace(t.SELF_PLAY, minibatch=128)
    net, history = t.train_self_play(seed, iterations=40, games=256, config=config, **settings)
    assert all(abs(stats["first_log_ratio"]) < 1e-5 for stats in history)
    return t.worst_case(net.play).losses


def assert_learns(**settings):
    start = t.worst_case(t.PolicyValueNet().play).losses
    assert all(learns(seed, **settings) < .15 * start for seed in range(3))  # measured: 17 to 23 of 487


def test_network_learns_by_self_play(): assert_learns()


def test_flipped_reward_is_noticed():
    with pytest.raises(AssertionError): assert_learns(reward_sign=-1.)


def test_training_is_seeded_and_leaves_global_dice_alone():
    before = torch.random.get_rng_state()
    nets = [t.train_self_play(5, iterations=3, games=32)[0] for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_five_seeds_cannot_be_beaten(seed):
    "The promise of the chapter: after at most a minute on one thread, no line of any opponent wins, in either chair."
    start = time.process_time()
    net, _ = t.train_self_play(seed)
    spent = time.process_time() - start
    found = t.worst_case(net.play)
    assert found.losses == 0 and found.first["loss"] == found.second["loss"] == 0
    assert spent <= 60, f"{spent:.0f} s of processor time"


def test_checkpoints_are_the_run_itself_at_earlier_times():
    settings = dict(games=32, hidden=16)
    kept = t.train_checkpoints(3, every=2, iterations=5, **settings)
    assert list(kept) == [0, 2, 4, 5]
    for updates in (0, 5):  # the learning rate's schedule depends on the whole length, so only these can be compared
        again = t.train_self_play(3, iterations=updates, **settings)[0]
        assert all(torch.equal(a, b) for a, b in zip(kept[updates].parameters(), again.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(kept[2].body.parameters(), kept[4].body.parameters()))


# ---- what a player thinks, and the board to play on

def shaken_net(seed=0):
    "A network with weights that mean nothing."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = t.PolicyValueNet(16)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn(p.shape, generator=dice) * .3)
    return net


def test_move_values_look_one_move_ahead():
    net = shaken_net()
    views = torch.tensor([[1, 1, 0, -1, -1, 0, 0, 0, 0], [0] * 9, [1, -1, 1, 1, -1, -1, 0, 1, -1]], dtype=torch.int8)
    found = net.move_values(views)
    assert found[0, 2] == 1 and found[2, 6] == 1  # wins
    for view, row in zip(views, found):
        for cell in range(9):
            if view[cell]:
                assert row[cell] == -torch.inf
                continue
            after = view.clone()
            after[cell] = 1
            if plain_winner(after.tolist()) == 0: assert row[cell] == pytest.approx(-net(-after[None])[1].clamp(-1, 1).item(), abs=1e-6)
    full = net.move_values(torch.tensor([[1, -1, 1, 1, -1, -1, -1, 1, 0]], dtype=torch.int8))
    assert full[0, 8] == 0  # fills the board


def players():
    net = shaken_net()
    return {"shaken": t.Player(net.play, net.move_values), "perfect": t.Player(t.minimax_agent, t.minimax_moves)}


TRAP = torch.tensor([1, 0, 0, 0, -1, 0, 0, 0, 1], dtype=torch.int8)


def test_a_game_on_the_board():
    game = t.PlayBoard({"first free": t.Player(t.first_free_agent, t.minimax_moves)})
    assert "you are X" in game.message() and (game.thoughts() == 0).all()  # perfect play from the empty board is a draw
    assert game.take(8) and game.boards[0].tolist() == [-1, 0, 0, 0, 0, 0, 0, 0, 1]
    before = game.boards.clone()
    assert not game.take(8) and not game.take(0) and torch.equal(game.boards, before)  # taken: nothing happens
    game.take(5)
    assert game.thoughts()[2] == 1  # the player sees that you can win there
    game.take(2)
    assert game.message().startswith("You win!") and game.tally == {"won": 1, "drawn": 0, "lost": 0}
    assert not game.take(6) and game.tally["won"] == 1 and (game.thoughts() == -torch.inf).all()
    game.new_game(you_open=False)
    assert game.boards[0, 0] == 1 and "you are O" in game.message()
    for cell in (8, 7): game.take(cell)  # it takes 0, 1, 2
    assert game.message().startswith("You lose.") and game.tally == {"won": 1, "drawn": 0, "lost": 1}


def test_nobody_beats_the_perfect_player_on_the_board():
    game, dice = t.PlayBoard({"perfect": t.Player(t.minimax_agent, t.minimax_moves)}), random.Random(0)
    for number in range(30):
        game.new_game(you_open=number % 2 == 0)
        while not t.is_over(game.boards)[0]: game.take(dice.choice(t.legal_moves(game.boards)[0].nonzero().flatten().tolist()))
    assert game.tally["won"] == 0 and sum(game.tally.values()) == 30


def test_thoughts_are_those_of_the_chosen_player_from_your_chair():
    game = t.PlayBoard(players())
    game.new_game(you_open=False)
    game.boards, game.name = TRAP[None], "perfect"  # you are O and about to walk into the trap
    assert torch.equal(game.thoughts(), t.minimax_moves(-TRAP[None])[0])
    game.name = "shaken"
    assert torch.equal(game.thoughts(), shaken_net().move_values(-TRAP[None])[0])


def test_clicks_reach_the_game():
    pytest.importorskip("ipywidgets")
    game = t.PlayBoard(players())
    who, row, board, said = game.widget().children
    cells = board.children[0].children
    assert len(cells) == 9 and all(cell.description for cell in cells)  # hints are shown
    cells[4].click()
    assert [c.description for c in cells].count("O") == 1 and cells[4].description == "X"
    assert "Your move" in said.value and "what it saw" in board.children[1].value
    colors = [c.style.button_color for c in cells]
    who.value = "perfect"
    assert game.name == "perfect" and [c.style.button_color for c in cells] != colors
    chair, again, hints = row.children
    hints.value = False
    assert {c.description for c in cells} == {"", "X", "O"} and board.children[1].value == ""
    again.click()
    assert {c.description for c in cells} == {""}
    chair.value = False  # it opens
    assert [c.description for c in cells].count("X") == 1


def test_without_a_kernel_there_is_a_picture(monkeypatch):
    game = t.PlayBoard(players(), TRAP)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    bundle = game._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/plain"} and 'role="img"' in bundle["image/svg+xml"]
    assert "perfect: X.. / .O. / ..X, cells 1 0.0, 2 -1.0, 3 0.0, 5 0.0, 6 -1.0, 7 0.0." in bundle["text/plain"]
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    monkeypatch.delenv("IN_TEST", raising=False)
    assert "application/vnd.jupyter.widget-view+json" in game._repr_mimebundle_()


def test_board_needs_a_player():
    with pytest.raises(CourseError, match="no players"): t.PlayBoard({})


# ---- drawing

def luminance(color):
    "Relative luminance of a hex color (WCAG)."
    parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= .04045 else ((p + .055) / 1.055) ** 2.4 for p in parts)
    return .2126 * r + .7152 * g + .0722 * b


def test_numbers_can_be_read_on_every_heat():
    for value in np.linspace(-1.2, 1.2, 25):
        low, high = sorted([luminance(t.heat_color(value)), luminance(t.INK)])
        assert (high + .05) / (low + .05) >= 4.5
    assert t.heat_color(0) == t.heat_color(-0.) == "#ffffff" and t.heat_color(.5) != t.heat_color(-.5)


def test_figures_say_in_words_what_they_show():
    fig = t.draw_boards(TRAP.expand(2, 9), torch.tensor([[.25] * 9, [-1.] * 9]), ["one", "two\nlines"], alt="Two boards.")
    assert fig.alt.startswith("Two boards. one: X.. / .O. / ..X, cells 1 +0.2") and "two, lines: " in fig.alt and "2 -1.0" in fig.alt
    shares = t.draw_boards(TRAP[None], torch.full((1, 9), 1 / 6), percent=True)
    assert "cells 1 17%" in shares.alt
    tree = t.draw_tree(torch.tensor([1, -1, 1, -1, -1, 0, 0, 1, 0]), t.winner)
    assert [tree.alt.count(f"after {n} move{'s' * (n != 1)}, worth") for n in range(4)] == [1, 3, 6, 4]
    with pytest.raises(CourseError, match="5 free cells; at most 3"): t.draw_tree(torch.tensor([1, -1, 1, -1, 0, 0, 0, 0, 0]))
