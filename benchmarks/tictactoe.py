"""Plies per second of our vectorized tic-tac-toe against PettingZoo's, in one run.

    python benchmarks/tictactoe.py            a small table
    python benchmarks/tictactoe.py --json     {"plies_per_second": ..., "pettingzoo_plies_per_second": ..., "ratio": ...}

Needs PettingZoo, which comes with the course (`pip install -c constraints.txt pettingzoo`). Its tic-tac-toe imports pygame to draw; nothing
is drawn here, so an empty module stands in where pygame is not installed.

Both sides play the same policy, a uniformly random legal move for either player, and count the same thing, stones placed. The two take turns,
round by round, so that whatever else the computer does slows both; each figure is the median over the rounds. PettingZoo is timed in two
forms: `env()`, as its pages show it, and the bare `raw_env()` without the wrappers that check for mistakes. The JSON compares with the faster
of the two.
"""
import argparse
import json
import random
import statistics
import sys
import time
import types

import numpy as np

from cai_course.errors import CourseError
from cai_course.tictactoe import TicTacToeVectorEnv


def pettingzoo_games():
    """PettingZoo's module, with a stand-in for pygame if need be."""
    try:
        import pygame  # noqa: F401
    except ImportError:
        sys.modules["pygame"] = types.ModuleType("pygame")
    try:
        from pettingzoo.classic import tictactoe_v3
    except ImportError as problem:
        raise CourseError(f"PettingZoo's tic-tac-toe cannot be imported ({problem}). Install it, then run this again: "
                          "pip install -c constraints.txt pettingzoo") from None
    return tictactoe_v3


class OneByOne:
    """PettingZoo, one game after another."""

    def __init__(self, env):
        self.env, self.dice = env, random.Random(0)

    def play(self, seconds: float) -> tuple[int, float]: # Plies, seconds that they took
        start, plies = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self.env.reset()
            for agent in self.env.agent_iter():
                observation, _, terminated, truncated, _ = self.env.last()
                if terminated or truncated:
                    self.env.step(None)
                else:
                    self.env.step(self.dice.choice(np.flatnonzero(observation["action_mask"])))
                    plies += 1
        return plies, time.perf_counter() - start


class SideBySide:
    """Ours: many games in every step; the environment's own dice answer ours."""

    def __init__(self, games: int):
        self.envs, self.dice = TicTacToeVectorEnv(games), np.random.default_rng(0)
        self.seen, self.info = self.envs.reset(seed=0)

    def play(self, seconds: float) -> tuple[int, float]: # Plies, seconds that they took
        start, plies = time.perf_counter(), -np.count_nonzero(self.seen)
        while time.perf_counter() - start < seconds:
            shares = self.dice.random(self.seen.shape, dtype=np.float32)
            actions = (self.info["action_mask"] * (1 + shares)).argmax(1)
            self.seen, _, ended, _, self.info = self.envs.step(actions)
            plies += np.count_nonzero(self.info["final_obs"][ended])
        return plies + np.count_nonzero(self.seen), time.perf_counter() - start


def measure(games: int, rounds: int, seconds: float) -> dict: # {name: median plies per second}
    zoo = pettingzoo_games()
    players = {"ours": SideBySide(games), "PettingZoo env()": OneByOne(zoo.env()), "PettingZoo raw_env()": OneByOne(zoo.raw_env())}
    for player in players.values():
        player.play(seconds / 4) # first calls are slow
    speeds = {name: [] for name in players}
    for _ in range(rounds):
        for name, player in players.items():
            plies, spent = player.play(seconds)
            speeds[name].append(plies / spent)
    return {name: statistics.median(each) for name, each in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    parser.add_argument("--games", type=int, default=4096, help="games side by side (default 4096)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (default 7)")
    parser.add_argument("--seconds", type=float, default=.5, help="seconds of each side in each round (default 0.5)")
    options = parser.parse_args()
    if options.games < 1 or options.rounds < 1 or options.seconds <= 0:
        parser.error("games and rounds must be at least 1, and seconds above 0")
    try:
        speeds = measure(options.games, options.rounds, options.seconds)
    except CourseError as problem:
        raise SystemExit(f"benchmarks/tictactoe.py: {problem}") from None
    ours, theirs = speeds["ours"], max(speed for name, speed in speeds.items() if name != "ours")
    if options.json:
        print(json.dumps({"plies_per_second": round(ours), "pettingzoo_plies_per_second": round(theirs), "ratio": round(ours / theirs, 1)}))
        return
    print(f"{'':<22}{'plies per second':>18}{'ours is faster by':>20}")
    for name, speed in speeds.items():
        print(f"{name:<22}{speed:>18,.0f}" + ("" if name == "ours" else f"{f'{ours / speed:,.0f} times':>20}"))
    print(f"median of {options.rounds} alternating rounds of {options.seconds:g} s; ours plays {options.games:,} games side by side")


if __name__ == "__main__":
    main()
