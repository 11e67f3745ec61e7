"""Plans against what is really there, small batches and processes against one large batch, and errors that say what to do."""
import importlib
import json
import math
import os
import re
import sys
import time

import pytest
import torch
from transformers import GPT2Config

from cai_course import cli, rlhf, scaling
from cai_course.errors import CourseError
from cai_course.models import load_policy
from cai_course.scaling import (FLAN_T5, accumulate_gradients, checkpoint_layers, counted_flops, dry_run, gradient_gap, held_bytes, idle_share,
                                kv_cache_bytes, measure_accumulation, plan_memory, plan_ppo, random_model, read_talks, run_ranks, saved_for_backward,
                                shared_gradient, short_words, t5_config, t5_parameters, t5_training_flops, tiny_writer, token_costs,
                                training_flops, uneven_replies, writer_losses)
from conftest import ROOT

PUBLISHED = {"small": 76_961_152, "base": 247_577_856, "large": 783_150_080, "xl": 2_849_757_184, "xxl": 11_135_332_352}
TINY = dict(d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=3, num_decoder_layers=2, vocab_size=2400)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("models") / "tiny", t5_config("small", **TINY))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("models") / "causal", GPT2Config(
        vocab_size=2400, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=1))


# --- one name ---

def test_a_random_model_is_untied_the_same_twice_and_speaks_its_whole_vocabulary(tiny, tmp_path):
    policy = load_policy(tiny)
    assert policy.model.lm_head.weight.data_ptr() != policy.model.shared.weight.data_ptr()
    assert not torch.equal(policy.model.lm_head.weight, policy.model.shared.weight)
    again, other = (random_model(tmp_path / name, t5_config("small", **TINY), seed) for name, seed in (("again", 0), ("other", 1)))
    files = [(path / "model.safetensors").read_bytes() for path in (tiny, again, other)]
    assert files[0] == files[1] != files[2]
    assert len(policy.tokenizer) == 2400 and all(policy.tokenizer.decode([i]).strip() for i in range(2353, 2400))
    text = "How do I bake bread? (A)"
    assert policy.encode([text]) == load_policy("pocket-t5").encode([text]), "the pocket tokenizer, with names for the other rows"


def test_global_dice_are_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    random_model(tmp_path / "m", t5_config("small", **TINY))
    tiny_writer(3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", ["tiny", "causal"])
def test_a_dry_run_finds_no_leak_and_is_the_same_twice(kind, request):
    name = request.getfixturevalue(kind)
    found = dry_run(name)
    assert found == dry_run(name)
    assert found["off"] == 0 and found["frozen"] == 1 and max(found["again"], found["start"]) < 1e-3 < found["moved"]
    policy = load_policy(name)
    assert found["weights"] == sum(p.numel() for p in policy.model.parameters())
    assert found["trainable"] == sum(p.numel() for p in policy.start_adapter().add_value_head().trainable_parameters())


def test_a_dry_run_finds_a_step_that_touches_the_base(tiny, monkeypatch):
    from cai_course import rlhf
    learn = rlhf.train_rlhf

    def careless(policy, *args, **kwargs):
        rows = learn(policy, *args, **kwargs)
        policy.model.lm_head.weight.data[7, 3] += 1e-3
        return rows
    monkeypatch.setattr(rlhf, "train_rlhf", careless)
    assert dry_run(tiny)["frozen"] == 0


def test_sixteen_bits_show(tiny):
    assert dry_run(tiny, dtype="bfloat16")["again"] > 30 * dry_run(tiny)["again"]


def test_short_words():
    assert short_words(["", "", ""], ["ab abcd", "", "abc"]).tolist() == [-3.5, 0., -3.]


@pytest.mark.parametrize("call,words", [
    (lambda path: t5_config("giant"), "size is 'giant'; it must be small, base"),
    (lambda path: random_model(path, t5_config("small", **{**TINY, "vocab_size": 100})), "vocab_size is 100; the tokenizer has"),
    (lambda path: [random_model(path, t5_config("small", **TINY)) for _ in range(2)], "is not empty; a new one is needed"),
    (lambda path: dry_run(path / "nowhere"), "there is no folder"),
    (lambda path: dry_run("pocket-t5", prompts=[]), "prompts is empty")])
def test_what_cannot_be_tried_is_refused(call, words, tmp_path):
    with pytest.raises(CourseError, match=words):
        call(tmp_path / "m")


# --- memory ---

@pytest.mark.parametrize("size", FLAN_T5)
def test_the_formula_gives_the_published_sizes(size):
    assert t5_parameters(t5_config(size))["total"] == PUBLISHED[size]


@pytest.mark.parametrize("changes", [{}, dict(num_layers=1, num_decoder_layers=5), dict(d_kv=24), dict(num_heads=1), dict(d_ff=7)])
def test_the_formula_gives_the_size_of_any_shape_by_part(changes):
    config = t5_config("small", **{**TINY, **changes})
    with torch.device("meta"): model = scaling._build(config)
    size = lambda module: sum(p.numel() for name, p in module.named_parameters() if "embed_tokens" not in name)
    found = t5_parameters(config)
    assert (found["encoder"], found["decoder"], found["head"]) == (size(model.encoder), size(model.decoder), size(model.lm_head))
    assert found["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [False, True])
def test_planned_bytes_are_measured_bytes(tiny, adapter, dtype):
    policy = load_policy(tiny, dtype=dtype)
    count = sum(p.numel() for p in policy.model.parameters())
    if adapter: learns = policy.start_adapter(r=4).trainable_parameters()
    else: learns = list(policy.model.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(learns)
    samples = policy.sample(["How?", "Why not?"], 6)
    (-policy.evaluate(samples, range(2))[0].sum()).backward()
    optimizer.step()
    plan, held = plan_memory(count, sum(p.numel() for p in learns) if adapter else 0, dtype), held_bytes(policy.model.parameters(), optimizer)
    if dtype == "bfloat16" and not adapter: # torch's Adam keeps its moments in the weights' own type; the plan has them and a copy in float32
        assert held == dict(weights=2 * count, gradients=2 * count, optimizer=4 * count) and plan["total"] == 16 * count
    else:
        assert held == {part: plan[part] for part in held}


def test_a_copied_reference_costs_a_model_and_the_adapter_switched_off_nothing():
    off, copied = plan_memory(1000, adapter=10), plan_memory(1000, adapter=10, copied_reference=True)
    assert off["reference"] == 0 and copied["total"] - off["total"] == copied["reference"] == 4000


def test_saved_tensors_are_counted_once_and_weights_not_at_all():
    layer, x = torch.nn.Linear(10, 20, bias=False), torch.randn(5, 10)
    with saved_for_backward(layer) as kept:
        y = layer(x).tanh()                    # the input, and the output of tanh, which is its own memory
        z = (y * y).sum()                      # the same storage again
    assert sorted(n for n, _ in kept) == [5 * 10 * 4, 5 * 20 * 4]
    z.backward()
    with saved_for_backward(layer) as kept, torch.no_grad(): layer(x).tanh()
    assert kept == []


def test_the_cache_is_what_transformers_keeps(tiny):
    policy = load_policy(tiny)
    with torch.no_grad():
        out = policy.model(input_ids=torch.ones(3, 9, dtype=torch.long), decoder_input_ids=torch.ones(3, 4, dtype=torch.long), use_cache=True)
    caches = (out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache)
    assert kv_cache_bytes(policy.model.config, 3, 9, 4) == sum(t.numel() * 4 for c in caches for layer in c.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(policy.model.config, 3, 9, 4, "bfloat16") * 2 == kv_cache_bytes(policy.model.config, 3, 9, 4)


@pytest.mark.parametrize("call,words", [
    (lambda: plan_memory(0), "weights is 0"), (lambda: plan_memory(5, adapter=-1), "adapter is -1"),
    (lambda: plan_memory(5, dtype="float16"), "dtype is 'float16'; float32 or bfloat16"),
    (lambda: t5_parameters(GPT2Config()), "this is a gpt2"),
    (lambda: kv_cache_bytes(t5_config(), 0, 1, 1), "prompt, response and dtype are 0, 1, 1"),
    (lambda: training_flops(0, 1), "weights is 0"), (lambda: training_flops(1, -1), "tokens is -1")])
def test_plans_refuse_what_makes_no_sense(call, words):
    with pytest.raises(CourseError, match=words):
        call()


# --- work ---

def test_the_counter_finds_every_multiplication():
    """By hand: each matrix once for each token that passes it, and attention's two products."""
    config, P, R = t5_config("small", **TINY), 20, 6
    d, inner, ff, V, E, D = 32, 32, 48, 2400, 3, 2
    weights = E * (4 * d * inner + 3 * d * ff) * P + D * (6 * d * inner + 3 * d * ff) * R + D * 2 * d * inner * P + d * V * R
    attention = inner * (E * 2 * P * P + D * (2 * R * R + 2 * R * P))
    found = counted_flops(config, 3, P, R)
    assert found["forward"] == 2 * 3 * (weights + attention)
    assert found["backward"] == pytest.approx(2 * found["forward"], rel=.02)  # no gradient flows below the embeddings


def test_frozen_weights_need_no_gradient_of_their_own():
    config = t5_config("small", num_layers=4, num_decoder_layers=4)
    free, frozen = counted_flops(config), counted_flops(config, frozen=True)
    assert free["forward"] == frozen["forward"] and frozen["backward"] == pytest.approx(free["backward"] / 2, rel=.1)


def test_the_rules_by_hand():
    parts = t5_parameters(t5_config("small", **TINY))
    expected = 6 * (parts["encoder"] * 7 + (parts["decoder"] + parts["head"]) * 5)
    assert t5_training_flops(t5_config("small", **TINY), 7, 5) == expected
    assert t5_training_flops(t5_config("small", **TINY), 7, 5, frozen=True) == pytest.approx(expected * 4 / 6)


# --- FLAN-T5 itself ---

def test_the_plan_of_an_iteration_by_hand_and_its_adapter_is_the_real_one(tiny):
    config = t5_config("small", **TINY)
    plan, parts = plan_ppo(config, 4, 7, 5, epochs=3, r=4), t5_parameters(config)
    assert plan["flops"] == (2 + 2 + 4 * 3) * (4 * 7 * parts["encoder"] + 4 * 5 * (parts["decoder"] + parts["head"]))
    learns = sum(p.numel() for p in load_policy(tiny).start_adapter(r=4).trainable_parameters())
    assert plan["kept"] == plan_memory(parts["total"], learns)["total"] and plan["cache"] == kv_cache_bytes(config, 4, 7, 5)


@pytest.mark.parametrize("sizes", [dict(batch=0), dict(prompt=0), dict(response=-1), dict(epochs=0)])
def test_a_plan_of_nothing_is_refused(sizes):
    with pytest.raises(CourseError, match="each must be 1 or more. Take the sizes"):
        plan_ppo(t5_config("small"), **sizes)


def flan_lines() -> list:
    """The blocks of code of the section on FLAN-T5, as learners copy them."""
    cells = json.loads((ROOT / "nbs" / "15_scaling.ipynb").read_text(encoding="utf-8"))["cells"]
    [text] = [text for text in ("".join(cell["source"]) for cell in cells) if text.startswith("### FLAN-T5 itself")]
    return re.findall(r"```(?:python)?\n(.*?)```", text, re.S)


def test_the_three_lines_of_rlhf_run(tiny):
    lines, _ = flan_lines()
    assert len(lines.splitlines()) == 3 and lines.count('"google/flan-t5-small"') == lines.count("steps=20") == 1
    space = dict(load_policy=load_policy, RLHFConfig=rlhf.RLHFConfig, train_rlhf=rlhf.train_rlhf, short_words=short_words,
                 prompts=["How do I bake bread?", "Why?"])
    exec(lines.replace("google/flan-t5-small", tiny.as_posix()).replace("steps=20", "steps=1"), space)
    assert len(space["history"]) == 2 and space["history"][0]["start_gap"] < 1e-3


def test_the_lines_for_the_terminal_are_understood(monkeypatch):
    _, lines = flan_lines()
    export, *calls = lines.splitlines()
    variable, _, value = export.removeprefix("export ").partition("=")
    monkeypatch.setenv(variable, value)
    asked = [cli.make_parser().parse_args(line.split()[1:]) for line in calls if line.startswith("cai-course align ")]
    assert len(asked) == len(calls) == 2 and [each.fast_check for each in asked] == [True, False] and value == "google/flan-t5-small"


# --- micro-batches ---

@pytest.fixture(scope="module")
def replies():
    tokens, mask = uneven_replies(12, seed=4)
    model = tiny_writer(2)
    losses = writer_losses(model, tokens, mask)
    found, real = losses(range(12))
    return model, losses, torch.autograd.grad((found * real).sum() / real.sum(), model.parameters())


@pytest.mark.parametrize("batches", [[range(12)], [[i] for i in range(12)], [[3, 0], [1, 2, 4, 5, 6], [11, 10, 9, 8, 7]]])
def test_accumulated_gradients_are_those_of_the_whole_batch(replies, batches):
    model, losses, whole = replies
    assert gradient_gap(accumulate_gradients(model.parameters(), losses, batches), whole) < 1e-5
    if len(batches) > 1:
        assert gradient_gap(accumulate_gradients(model.parameters(), losses, batches, "batch"), whole) > .01


def test_equal_lengths_forgive_the_mean_of_means():
    model, tokens = tiny_writer(), torch.randint(12, (8, 5), generator=torch.Generator().manual_seed(0))
    losses = writer_losses(model, tokens, torch.ones(8, 5))
    both = [accumulate_gradients(model.parameters(), losses, [[0, 1], [2, 3], [4, 5], [6, 7]], by) for by in ("token", "batch")]
    assert gradient_gap(*both) < 1e-5


def test_empty_micro_batches_weigh_nothing(replies):
    model, losses, _ = replies
    tokens, mask = uneven_replies(4, seed=0)
    mask[2] = 0
    some = writer_losses(model, tokens, mask)
    for by in ("token", "batch"):
        with_it, without = (accumulate_gradients(model.parameters(), some, rows, by) for rows in ([[0], [1], [2], [3]], [[0], [1], [3]]))
        assert gradient_gap(with_it, without) < 1e-6
    with pytest.raises(CourseError, match="no real token"): accumulate_gradients(model.parameters(), some, [[2]])
    with pytest.raises(CourseError, match="by is 'row'"): accumulate_gradients(model.parameters(), some, [[1]], "row")


def test_the_replies_are_uneven_and_short_ones_have_other_words():
    tokens, mask = uneven_replies(64, seed=0)
    lengths = mask.sum(1)
    assert lengths[::2].max() < 6 <= 20 <= lengths[1::2].min() and (tokens * (1 - mask)).sum() == 0
    assert tokens[::2].max() <= 6 and (tokens[1::2] + 12 * (1 - mask[1::2])).min() >= 5


def test_one_seed_of_the_claim():
    found = measure_accumulation(3)
    assert found == measure_accumulation(3) and found["error"] > .05 and found["rounding"] < 1e-5


@pytest.mark.parametrize("kind", ["tiny", "causal"])
def test_checkpointed_layers_give_the_same_gradients_for_less(kind, request):
    results = []
    for change in (lambda policy: policy, checkpoint_layers):
        policy = change(load_policy(request.getfixturevalue(kind)).start_adapter(seed=0))
        samples = policy.sample(["How do I bake bread?", "Why?"], 8)
        with saved_for_backward(policy.model) as kept: logprobs, _, _ = policy.evaluate(samples, range(2))
        (-logprobs.sum()).backward()
        results.append((samples.texts, [p.grad for p in policy.trainable_parameters()], sum(n for n, shape in kept if 2400 not in shape)))
    plain, wrapped = results
    assert plain[0] == wrapped[0] and gradient_gap(wrapped[1], plain[1]) < 1e-5 and wrapped[2] < .6 * plain[2]


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(CourseError, match="Sequential has no layers"):
        checkpoint_layers(tiny_writer())


# --- processes ---

def test_two_processes_are_one_if_every_token_weighs_the_same():
    model, (tokens, mask) = tiny_writer(1), uneven_replies(10, 1)
    whole = accumulate_gradients(model.parameters(), writer_losses(model, tokens, mask), [range(10)])
    right, wrong = run_ranks(shared_gradient, 2, (10, 1)), run_ranks(shared_gradient, 2, (10, 1, "rank"))
    for found in (right, wrong): assert gradient_gap(*found) == 0, "all ranks agree, on whatever it is"
    assert gradient_gap(right[0], whole) < 1e-5 and gradient_gap(wrong[0], whole) > .05


def test_a_process_that_fails_is_named_with_its_reason():
    with pytest.raises(CourseError, match=r"rank 0 of 1 failed: .*TypeError.*takes exactly one argument.*Try one rank"):
        run_ranks(math.sqrt, 1)


@pytest.fixture
def troubled(tmp_path, monkeypatch):
    """A module whose second rank is the trouble, and the process numbers that its ranks wrote down."""
    (tmp_path / "troubled.py").write_text("""
import os, pathlib, time
import torch.distributed as dist

def note(rank): (pathlib.Path(__file__).parent / f"pid{rank}").write_text(str(os.getpid()))

def stuck(rank, ranks):
    note(rank)
    if rank: time.sleep(600)

def failing(rank, ranks):
    note(rank)
    if rank: raise KeyError("no such reply")
    dist.barrier()
""")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("troubled")
    sys.modules.pop("troubled")
    for path in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError): os.kill(int(path.read_text()), 0)


def test_nobody_waits_for_ever(troubled):
    start = time.monotonic()
    with pytest.raises(CourseError, match=r"2 processes were not done after 12 s. Give more time"):
        run_ranks(troubled.stuck, 2, timeout=12.)
    assert time.monotonic() - start < 60


def test_one_that_fails_ends_those_who_wait_for_it(troubled):
    start = time.monotonic()
    with pytest.raises(CourseError, match="rank 1 of 2 failed: .*no such reply"):
        run_ranks(troubled.failing, 2, timeout=100.)
    assert time.monotonic() - start < 90


@pytest.mark.parametrize("call,words", [
    (lambda: run_ranks(shared_gradient, 0), "ranks is 0"), (lambda: run_ranks(shared_gradient, 1, timeout=0), "timeout is 0"),
    (lambda: run_ranks(type("f", (), {"__module__": "__main__", "__name__": "mine"})), "defined in a notebook or script"),
    (lambda: idle_share([1, 2, 3], 2), "3 lengths for 2 ranks"), (lambda: idle_share([], 1), "0 lengths"), (lambda: idle_share([1, 0], 1), "a token")])
def test_what_cannot_be_shared_is_refused(call, words):
    with pytest.raises(CourseError, match=words):
        call()


def test_idle_share_by_hand():
    assert idle_share([4, 4, 4], 3) == 0 and idle_share([1, 2, 4, 8], 1) == 0
    assert idle_share([1, 2, 4, 8], 2) == pytest.approx(1 - (2 + 8) / 16) and idle_share([1, 2, 4, 8], 4) == pytest.approx(1 - 15 / 32)
    assert idle_share([1, 8, 4, 2], 2) < idle_share([1, 2, 4, 8], 2)


# --- real data ---

def test_talks_are_read_in_both_of_their_shapes(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("\ufeff" + json.dumps(dict(dialogue=" #Person1#: Hi. ", summary=" A greeting. ")) + "\n\n"
                    + json.dumps(dict(dialogue="#Person1#: Bye, café.", summary1="A farewell.", summary2="Other.")) + "\n", encoding="utf-8")
    assert read_talks(path, "Sum up.") == [dict(prompt="Sum up.\n#Person1#: Hi.", response="A greeting."),
                                           dict(prompt="Sum up.\n#Person1#: Bye, café.", response="A farewell.")]


@pytest.mark.parametrize("content,words", [
    (b"", "holds no dialogue"), (b"{", "line 1: found '{'"), (b'{"dialogue": "x", "summary": "y"}\n[1]', "line 2"),
    (b'{"dialogue": "", "summary": "y"}', "line 1"), (b'{"dialogue": "x", "summary": 3}', "line 1"), (b"\xff\xfe\xfa", "cannot be read")])
def test_talks_that_cannot_be_read_are_named_by_line(content, words, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(CourseError, match=words) as error: read_talks(tmp_path / "t.jsonl")
    assert "t.jsonl" in str(error.value) and str(tmp_path) not in str(error.value)


def test_token_costs_by_hand():
    class Four: # four-letter pieces, and bytes for what is not ascii
        def __call__(self, text, **kwargs):
            pieces = [p for w in text.split() for p in ([w[i:i + 4] for i in range(0, len(w), 4)] if w.isascii() else ["<0xC3>"] * len(w.encode()))]
            return type("Out", (), {"input_ids": pieces})
        def convert_ids_to_tokens(self, row): return row
    policy = type("P", (), {"tokenizer": Four()})
    assert token_costs(policy, ["abcd efgh", "abcdefghi"]) == dict(per_word=5 / 3, spelled=1 / 5, longest=3)
    assert token_costs(policy, ["\u00e9\u00e9"])["spelled"] == 1
    with pytest.raises(CourseError, match="1 texts with 0 words"): token_costs(policy, ["  "])


# --- the useful batch ---

def test_the_noise_scale_by_hand():
    """Two replies with gradients 1 and 3 in one weight: mean 2, variance 1."""
    weight = torch.zeros(1, requires_grad=True)
    losses = lambda rows: (weight * torch.tensor([[1.], [3.]])[rows], torch.ones(len(rows), 1))
    assert scaling.noise_scale([weight], losses, [0, 1]) == pytest.approx(1 / 4)
    with pytest.raises(CourseError, match="there are 1 rows"): scaling.noise_scale([weight], losses, [0])
