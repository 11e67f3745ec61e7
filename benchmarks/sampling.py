"""Tokens per second of our sampling against `transformers.generate`, on the same model, prompts and batch, in one run.

    python benchmarks/sampling.py                  a small table
    python benchmarks/sampling.py --json           {"tokens_per_second": ..., "transformers_tokens_per_second": ..., "ratio": ...}
    python benchmarks/sampling.py --model NAME     any name that load_policy takes; default pocket-t5

Both sides draw from the whole distribution at temperature 1, keep a key-value cache, and stop a reply at its end-of-sequence token. What
counts are the tokens of the replies, the end included, not the padding behind it. Ours starts from text and ends with text; transformers
starts from token numbers and ends with them, which is an advantage for transformers. The two take turns, round by round, so that whatever
else the computer does slows both; each figure is the median over the rounds.

A second pair of figures switches the end of replies off: then every reply has the full length, and nothing is gained by dropping finished rows.
"""
import argparse
import json
import statistics
import time

import torch

from cai_course import world
from cai_course.models import load_policy


def count(rows, ends) -> int: # Tokens up to the first end, which counts
    return sum(next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows)


def measure(model: str, batch: int, tokens: int, rounds: int, endless: bool) -> dict: # {name: median tokens per second}
    policy = load_policy(model)
    requests = [talk.prompt for talk in world.dialogues("heldout", batch // 2, seed=0)]
    requests += [request.text for request in world.requests(split="heldout", limit=batch - len(requests))]
    ids, mask = policy._pad_prompts(policy.encode(requests))
    if endless: policy._ends = torch.tensor([-1])
    ends = set(policy._ends.tolist())
    policy.model.generation_config.eos_token_id = None if endless else policy.eos
    options = dict(attention_mask=mask, do_sample=True, top_k=0, top_p=1., temperature=1., max_new_tokens=tokens)

    def ours(seed):
        rows = policy._write(policy.encode(requests), 1, tokens, 1., seed, 0, False, False)[0]
        policy.decode(rows)
        return sum(map(len, rows))

    def theirs(seed):
        torch.manual_seed(seed)
        with torch.no_grad(): rows = policy.model.generate(input_ids=ids, **options)
        start = 1 if policy.kind == "seq2seq" else ids.shape[1]
        return count(rows[:, start:].tolist(), ends)

    rates = {"tokens_per_second": [], "transformers_tokens_per_second": []}
    for seed in range(rounds + 1): # the first is for warming up
        for (name, rate), side in zip(rates.items(), (ours, theirs)):
            start = time.perf_counter()
            written = side(seed)
            rate.append(written / (time.perf_counter() - start))
    found = {name: statistics.median(rate[1:]) for name, rate in rates.items()}
    return found | {"ratio": found["tokens_per_second"] / found["transformers_tokens_per_second"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-t5")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="longest reply")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(args.batch, args.tokens, args.rounds) < 1: parser.error("--batch, --tokens and --rounds must be 1 or more")
    if args.threads: torch.set_num_threads(args.threads)
    found = measure(args.model, args.batch, args.tokens, args.rounds, endless=False)
    found["full_length"] = measure(args.model, args.batch, args.tokens, args.rounds, endless=True)
    if args.json:
        print(json.dumps({**found, "model": args.model, "batch": args.batch, "threads": torch.get_num_threads()}))
        return
    for name, row in (("replies end by themselves", found), ("all of full length", found["full_length"])):
        print(f"{name:26s} ours {row['tokens_per_second']:7.0f} tokens/s   transformers {row['transformers_tokens_per_second']:7.0f} "
              f"tokens/s   {row['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
