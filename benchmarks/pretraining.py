"""How long the training of pocket-t5 takes on this computer, from a few of its pools.

    python benchmarks/pretraining.py                two pools of every part, and what the whole training would take
    python benchmarks/pretraining.py --pools 4 --dtype float32

Pools of a part differ in their lessons (drills are short), so a part is timed at equal distances and counts as many times as it has pools.
The weights are the shipped ones: what a step costs does not depend on them. A long training compiles where the computer can; --compile does
so here, and leaves a first pool, with the compiler's own time, out of the sum. Two pools of a part can differ by a factor of two: more --pools
make the estimate finer.
"""
import argparse
import statistics
import time
from pathlib import Path

import torch

from cai_course import pretrain
from cai_course.models import load_policy


def timed(trainer, tokenizer, pool: int) -> float: # Seconds
    trainer.pool = pool
    began = time.perf_counter()
    pretrain.t5_pool(trainer, tokenizer)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=2, help="pools of every part that are timed, at least 1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the arithmetic; left out: the faster one here, as in the training")
    parser.add_argument("--compile", action="store_true", help="compile first, as a long training does where it can")
    args = parser.parse_args()
    if args.pools < 1: parser.error(f"--pools is {args.pools}; it must be 1 or more")
    config, policy = pretrain.PretrainConfig(), load_policy("pocket-t5")
    if args.dtype: pretrain.faster_dtype = lambda: args.dtype
    pretrain.has_compiler = lambda: args.compile
    trainer = pretrain.Trainer(policy.model.requires_grad_(True), Path("nowhere"), config) # nothing is saved
    if args.compile: timed(trainer, policy.tokenizer, 0)
    print(f"{trainer.dtype}, {torch.get_num_threads()} threads{', compiled' if args.compile else ''}")
    total, begins = 0., [0, *config.ends]
    for part, (first, last) in enumerate(zip(begins, config.ends), 1):
        places = [first + (2 * i + 1) * (last - first) // (2 * args.pools) for i in range(args.pools)]
        seconds = [timed(trainer, policy.tokenizer, place) for place in places]
        total += (last - first) * statistics.mean(seconds)
        print(f"part {part}: {last - first:3} pools, {' '.join(f'{s:.0f}' for s in seconds)} s a pool", flush=True)
    print(f"all {config.pools} pools: about {total:,.0f} s ({total / 60:.0f} minutes)")


if __name__ == "__main__":
    main()
