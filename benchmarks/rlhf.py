"""One PPO iteration of ours against TRL 0.11.4's, the last release that trains encoder-decoder models with PPO.

    python benchmarks/rlhf.py --trl-python ENV/bin/python                       FLAN-T5-small and -base shapes, fp32
    python benchmarks/rlhf.py --trl-python ENV/bin/python --sizes small --dtypes fp32,bf16 --rounds 3 --json

TRL 0.11.4 needs libraries of its time, so it lives in an environment of its own:

    python3.11 -m venv ENV
    ENV/bin/pip install torch trl==0.11.4 transformers==4.46.3 peft==0.13.2 accelerate==1.1.1 datasets==3.6.0 tokenizers==0.20.3 \
        setuptools rich

Give both environments the same torch. Without --trl-python only ours and the floor are measured.

Both sides do the same work on the same shapes: random weights in FLAN-T5's architecture, LoRA of rank 32 on q and v of encoder and
decoder, a value head, 16 prompts of 128 tokens, sampled replies of 32 tokens (the end-of-sequence token is switched off, so that all
replies have that length), mini-batches of 4. Ours is `train_rlhf` on a policy that went through `fuse_t5`; --plain leaves that out. An
iteration is: write replies, score them under the reference, PPO epochs. TRL runs as two kinds of users run it:

    lab3      1 epoch, one prompt at a time, and a copy of the model as the reference (which it then never calls)
    batched   4 epochs, all prompts at once, no copy
    decoder   ours with an adapter on the decoder alone, which reads each prompt once; TRL as in lab3. Less can be learned, so this is
              a row of its own and says nothing about the others

Each side is a process of its own. The two take turns, iteration by iteration, so that whatever else the computer does slows both; each
figure is the median over the rounds, after one round to warm up. On a busy computer look at the processor time (`cpu`), which waiting does
not count in. The first iteration of ours also checks its start, and is not counted.

The floor is the time of the matrix products alone: operations of one iteration (writing with a cache and a merged adapter, one pass of the
reference, epochs of forward and backward passes through frozen weights) at the rate that torch reaches on a large product between the
iterations (the median). Narrow products of single decoding steps, softmax, norms and sampling are left out, so nothing reaches the floor.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SHAPES = dict(small=dict(d_model=512, d_ff=1024, num_layers=8, num_heads=6), base=dict(d_model=768, d_ff=2048, num_layers=12, num_heads=12),
              tiny=dict(d_model=64, d_ff=128, num_layers=2, num_heads=2)) # tiny: to try out the script
VOCABULARY, KEY, BATCH, PROMPT, REPLY, RANK, MINIBATCH = 32_128, 64, 16, 128, 32, 32, 4
SETTINGS = dict(lab3=dict(epochs=1, single=True, copy=True), batched=dict(epochs=4, single=False, copy=False),
                decoder=dict(epochs=1, single=True, copy=True))


def words(): # A vocabulary of made-up words
    return {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"t{i}": i for i in range(3, VOCABULARY)}}


def random_t5(size: str, dtype: str): # A T5 v1.1 with random weights and an untied head, as FLAN-T5 has
    import torch
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    shape = SHAPES[size]
    torch.set_default_dtype(dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]) # made in it, as `from_pretrained` reads weights
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_kv=KEY, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1, dropout_rate=.1, num_decoder_layers=shape["num_layers"], **shape))
    if model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr(): # some versions tie it whatever the configuration says
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.scale_decoder_outputs = False
    torch.set_default_dtype(torch.float32)
    model.lm_head.weight.data.mul_(.05) # keeps the entropy of the random policy high
    return model.eval()


# -- workers: one process for each side, one iteration for each line on standard input -------------------------------------------------------
def answer(**what): # One line of JSON for the parent
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    print(json.dumps(dict(what, peak_mb=memory)), file=sys.__stdout__, flush=True)


def trl_worker(size: str, dtype: str, epochs: int, single: bool, copy: bool):
    import contextlib
    import warnings
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from peft import LoraConfig, TaskType, get_peft_model
    from tokenizers import Tokenizer, models
    from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
    transformers.logging.set_verbosity_error()
    base = random_t5(size, dtype)
    base.generation_config.eos_token_id = None
    adapted = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q", "v"], lora_dropout=.05, bias="none",
                                              task_type=TaskType.SEQ_2_SEQ_LM)).to(base.dtype)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(adapted, is_trainable=True)
    model.v_head.to(base.dtype)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words(), unk_token="<unk>")),
                                                     pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = PPOConfig(model_name="x", learning_rate=1.41e-5, ppo_epochs=epochs, mini_batch_size=MINIBATCH, batch_size=BATCH)
    with contextlib.redirect_stdout(sys.stderr):
        trainer = PPOTrainer(config=config, model=model, ref_model=create_reference_model(model) if copy else None, tokenizer=tokenizer)
    sampling = dict(min_length=5, top_k=0, top_p=1., do_sample=True, max_new_tokens=REPLY)
    answer(ready=True, versions={name: __import__(name).__version__ for name in ("torch", "trl", "transformers", "peft")})
    for turn, _ in enumerate(sys.stdin):
        torch.manual_seed(turn)
        prompts = [torch.randint(3, VOCABULARY, (PROMPT,)) for _ in range(BATCH)]
        start, cpu = time.perf_counter(), time.process_time()
        if single: replies = [trainer.generate(p, **sampling).squeeze() for p in prompts]
        else: replies = trainer._generate_batched(trainer.model, prompts, batch_size=BATCH, remove_padding=False, **sampling)
        written, replies = time.perf_counter(), [reply[-REPLY - 1:] for reply in replies] # with the decoder's start token
        assert all(len(reply) == REPLY + 1 for reply in replies)
        trainer.step(prompts, replies, [torch.tensor(float(x)) for x in torch.randn(BATCH)])
        answer(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu, generate=written - start)


def our_worker(size: str, dtype: str, epochs: int, plain: bool, decoder_only: bool):
    import warnings
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from cai_course.fused import fuse_t5
    from cai_course.models import Policy
    from cai_course.ppo import PPOConfig
    from cai_course.rlhf import RLHFConfig, train_rlhf
    split = Tokenizer(models.WordLevel(words(), unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    policy = Policy(random_t5(size, dtype).requires_grad_(False), tokenizer, "benchmark")
    policy.start_adapter(r=RANK, alpha=RANK, decoder_only=decoder_only)
    if not plain: fuse_t5(policy)
    policy._ends = torch.tensor([-1]) # no token ends a reply
    generator = torch.Generator().manual_seed(0)
    prompts = [" ".join(f"t{i}" for i in torch.randint(3, VOCABULARY, (PROMPT - 1,), generator=generator).tolist()) for _ in range(64)]
    wrote, clock, sample = [0.], [0., 0.], policy.sample
    def timed(*args, **kwargs):
        start = time.perf_counter()
        out = sample(*args, **kwargs)
        wrote[0] = time.perf_counter() - start
        assert out.response_ids.shape == (BATCH, REPLY) and out.prompt_ids.shape == (BATCH, PROMPT)
        return out
    policy.sample = timed
    def turn(row, _): # after each iteration: report it, wait for the next request
        answer(seconds=time.perf_counter() - clock[0], cpu=time.process_time() - clock[1], generate=wrote[0], start_gap=row.get("start_gap"))
        if not sys.stdin.readline(): return True
        clock[:] = time.perf_counter(), time.process_time()
    config = RLHFConfig(steps=1000, batch_size=BATCH, max_new_tokens=REPLY, lr=1.41e-5, value_warmup=0,
                        ppo=PPOConfig(epochs=epochs, minibatch=MINIBATCH, value_coef=.1, gamma=1., lam=.95))
    answer(ready=True, versions={name: __import__(name).__version__ for name in ("torch", "transformers", "peft")})
    if sys.stdin.readline():
        clock[:] = time.perf_counter(), time.process_time()
        train_rlhf(policy, lambda p, r: torch.randn(len(r), generator=generator), prompts, config, seed=0, callback=turn, progress=False)


class Worker:
    """A process that does one iteration whenever it is asked."""

    def __init__(self, python: str, side: str, threads: int, **settings):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([python, __file__, "--worker", side, "--settings", json.dumps(settings)], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.last = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line: raise SystemExit(f"a worker stopped:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def turn(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.last = self.read()
        return self.last

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


# -- the floor --------------------------------------------------------------------------------------------------------------------------------
def operations(size: str, epochs: int, decoder_only: bool) -> float: # Of the matrix products of one iteration, in GFLOP
    s = SHAPES[size]
    d, inner, L, tokens, written = s["d_model"], KEY * s["num_heads"], s["num_layers"], BATCH * PROMPT, BATCH * REPLY
    lora = RANK * (d + inner) # one adapted projection
    encoder = tokens * L * (4 * d * inner + 3 * d * s["d_ff"] + 2 * PROMPT * inner)
    cross = tokens * L * 2 * d * inner
    decoder = written * L * (6 * d * inner + 3 * d * s["d_ff"] + REPLY * inner + 2 * PROMPT * inner)
    adapter = tokens * L * 3 * lora + written * L * 3 * lora # q and v; of the cross-attention, v reads the prompt and q the reply
    forward = encoder + cross + decoder + written * d * VOCABULARY
    if decoder_only: # the encoder reads once, and nothing flows back to what it said
        forward, adapter = forward - encoder, adapter - tokens * L * 2 * lora
        return 2e-9 * (encoder + 2 * forward + epochs * (2 * forward - cross + 3 * adapter))
    return 2e-9 * (2 * forward + epochs * (2 * forward + 3 * adapter)) # write, reference; forward and backward without weight gradients


def matmul_rate(dtype: str, threads: int) -> float: # GFLOP/s on a large product; the median of many
    import torch
    torch.set_num_threads(threads)
    kind = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    a, b, times = torch.randn(2048, 1024).to(kind), torch.randn(1024, 1024).to(kind), []
    for i in range(15):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2e-9 * 2048 * 1024 * 1024 / statistics.median(times[3:])


def measure(size: str, dtype: str, name: str, rounds: int, threads: int, trl_python: str | None, plain: bool = False) -> dict:
    """One row: medians of both sides, their ratio, the floor, peak memory."""
    setting = SETTINGS[name]
    ours = Worker(sys.executable, "ours", threads, size=size, dtype=dtype, epochs=setting["epochs"], plain=plain,
                  decoder_only=name == "decoder")
    theirs = trl_python and Worker(trl_python, "trl", threads, size=size, dtype=dtype, **setting)
    versions = {"ours": ours.last["versions"], **({"trl": theirs.last["versions"]} if theirs else {})}
    log, rates = {"ours": [], "trl": []}, []
    for turn in range(rounds + 1):
        rates.append(matmul_rate(dtype, threads)) # beside the iterations: on a shared computer it rises and falls with them
        for side, worker in (("ours", ours), ("trl", theirs)):
            if worker: log[side].append(worker.turn())
    for worker in (ours, theirs):
        if worker: worker.stop()
    gflop, rate = operations(size, setting["epochs"], name == "decoder"), statistics.median(rates)
    def median(side, key): return statistics.median(row[key] for row in log[side][1:])
    row = dict(size=size, dtype=dtype, setting=name, epochs=setting["epochs"], seconds=median("ours", "seconds"), cpu=median("ours", "cpu"),
               generate=median("ours", "generate"), peak_mb=ours.last["peak_mb"], gflop=gflop, gflops=rate, floor=gflop / rate,
               over_floor=median("ours", "seconds") / (gflop / rate), versions=versions,
               spread=[min(r["seconds"] for r in log["ours"][1:]), max(r["seconds"] for r in log["ours"][1:])])
    if theirs:
        row |= dict(trl_seconds=median("trl", "seconds"), trl_cpu=median("trl", "cpu"), trl_generate=median("trl", "generate"), trl_peak_mb=theirs.last["peak_mb"],
                    trl_spread=[min(r["seconds"] for r in log["trl"][1:]), max(r["seconds"] for r in log["trl"][1:])])
        row |= dict(ratio=row["trl_seconds"] / row["seconds"], cpu_ratio=row["trl_cpu"] / row["cpu"], memory=row["peak_mb"] / row["trl_peak_mb"])
    return row


def show(row: dict):
    text = (f"{row['size']:5s} {row['dtype']} {row['setting']:8s} ours {row['seconds']:6.2f} s (writing {row['generate']:5.2f}), "
            f"{row['peak_mb']:5.0f} MB, floor {row['floor']:5.2f} s, {row['over_floor']:.2f} x floor")
    if "ratio" in row:
        text += (f" | TRL {row['trl_seconds']:6.2f} s (writing {row['trl_generate']:5.2f}), {row['trl_peak_mb']:5.0f} MB"
                 f" | {row['ratio']:.2f} times faster (processor time {row['cpu_ratio']:.2f}), {row['memory']:.2f} of its memory")
    print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="Python of an environment with TRL 0.11.4 (see above); without it only ours is measured")
    parser.add_argument("--sizes", default="small,base", help="of small, base, tiny")
    parser.add_argument("--dtypes", default="fp32", help="of fp32, bf16 (slow where the processor has no bf16 units)")
    parser.add_argument("--settings", default="lab3,batched", help="of lab3, batched, decoder")
    parser.add_argument("--rounds", type=int, default=3, help="iterations that count, after one to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--plain", action="store_true", help="ours without fuse_t5, layer by layer as transformers has it")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--worker", choices=["trl", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return dict(trl=trl_worker, ours=our_worker)[args.worker](**json.loads(args.settings))
    for given, known in ((args.sizes, SHAPES), (args.dtypes, ("fp32", "bf16")), (args.settings, SETTINGS)):
        wrong = [x for x in given.split(",") if x not in known]
        if wrong: parser.error(f"{wrong[0]!r} is not one of {', '.join(known)}")
    if args.rounds < 1 or args.threads < 1: parser.error(f"--rounds is {args.rounds}, --threads is {args.threads}; both must be 1 or more")
    rows = []
    for size in args.sizes.split(","):
        for dtype in args.dtypes.split(","):
            for name in args.settings.split(","):
                rows.append(measure(size, dtype, name, args.rounds, args.threads, args.trl_python, args.plain))
                if not args.json: show(rows[-1])
    if args.json: print(json.dumps(dict(threads=args.threads, rounds=args.rounds, plain=args.plain, rows=rows)))


if __name__ == "__main__":
    main()
