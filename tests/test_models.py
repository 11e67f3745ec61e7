"""What a maintainer fears about `models`: wrong numbers, leaks between rows, silent random weights, drift."""
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (BartConfig, BartForConditionalGeneration, BertConfig,
                          BertForMaskedLM, GPT2Config,
                          GPT2LMHeadModel, MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration)

from cai_course.errors import CourseError
from cai_course.models import (Samples, _batches, _CachedSteps, _merged, _product, _T5Steps, _uniforms, choose_tokens,
                               default_model, load_policy,
                               sft)

PROMPTS = ["How do I read a diary?", "Bake bread", "Where can I buy a lamp for the river house in the old town, "
                                                   "please?", "Why?",
           "How do I water a plant in summer when it is hot?", "Tell me a story about a coat"]
REPLIES = ["You ask the owner first.", "Mix flour and water.", "In the shop.", "Because.", "Early, with a can.",
           "Once there was a coat that sang."]


def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator((PROMPTS + REPLIES) * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5(tied=False, gated=True, **kwargs):
    kwargs = dict(vocab_size=len(tokenizer()), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
                  num_heads=4) | kwargs
    config = T5Config(feed_forward_proj="gated-gelu" if gated else "relu", tie_word_embeddings=tied,
                      decoder_start_token_id=0,
                      pad_token_id=0, eos_token_id=1, **kwargs)
    model = T5ForConditionalGeneration(config)
    if not tied: # the library ties every new T5
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * .1)
    return model


def build(kind):
    size, ids = len(tokenizer()), dict(pad_token_id=0, eos_token_id=1)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=128)
    makers = {
        "t5": t5,
        "t5_deep": lambda: t5(num_decoder_layers=3), # transformers' own generate cannot do this one
        "t5_tied": lambda: t5(tied=True, gated=False),
        "flan": lambda: t5(vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8,
                           num_heads=6),
        "mt5": lambda: MT5ForConditionalGeneration(MT5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=48,
                                                             num_layers=2, num_heads=4,
                                                             decoder_start_token_id=0, **ids)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(
            vocab_size=size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128, bos_token_id=1,
            decoder_start_token_id=0, forced_eos_token_id=None, **ids)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                                                   bos_token_id=1, **ids)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=size, num_key_value_heads=2, bos_token_id=1,
                                                      **small, **ids)),
    }
    torch.manual_seed(0)
    model = makers[kind]()
    with torch.no_grad(): # sharper than at birth, so that greedy choices are far from ties and replies end now and then
        head = model.get_output_embeddings().weight
        head *= {"t5_tied": 1, "t5": 3, "t5_deep": 3, "flan": .5, "mt5": 1}.get(kind, 20)
        if kind.startswith(("t5", "flan")) and kind != "t5_tied":
            head[1] *= 1.2
    return model.eval()


FAMILIES = ["t5", "t5_tied", "mt5", "bart", "gpt2", "qwen2"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = {}
    def get(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / kind
            build(kind).save_pretrained(path)
            tokenizer().save_pretrained(path)
            made[kind] = str(path)
        return made[kind]
    return get


def shaken(policy, seed=0, scale=None): # an adapter that does something
    torch.manual_seed(seed)
    scale = scale or (.3 if policy.model.config.hidden_size < 100 else .02) # wide layers add up more of it
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p += scale * torch.randn_like(p)
    return policy


def slow_logprobs(policy, prompt, response_ids, temperature=1.0):
    """One row, no padding, no cache, the plain forward pass."""
    ids = torch.tensor(policy.encode([prompt]))
    written = torch.tensor([response_ids])
    with torch.no_grad():
        if policy.kind == "seq2seq":
            before = torch.cat([torch.zeros(1, 1, dtype=torch.long), written[:, :-1]], 1)
            logits = policy.model(input_ids=ids, decoder_input_ids=before).logits[0]
        else:
            logits = policy.model(input_ids=torch.cat([ids, written], 1)).logits[0, ids.shape[1] - 1:-1]
    return (logits / temperature).log_softmax(-1).gather(1, written[0][:, None])[:, 0], logits


# -- agreement with transformers -------------------------------------------------------------------
@pytest.mark.parametrize("kind", FAMILIES + ["flan"])
def test_greedy_tokens_equal_transformers_generate(folder, kind):
    policy = load_policy(folder(kind))
    rows, *_ = policy._write(policy.encode(PROMPTS), 1, 12, 0.0, 0, 0, False, None)
    ids, mask = policy._pad_prompts(policy.encode(PROMPTS))
    theirs = policy.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=1,
                                   pad_token_id=policy.pad)
    skip = 1 if policy.kind == "seq2seq" else ids.shape[1]
    for row, reference in zip(rows, theirs[:, skip:].tolist()):
        assert row == reference[:len(row)] and all(t == policy.pad for t in reference[len(row):])


@pytest.mark.parametrize("kind", FAMILIES + ["flan"])
def test_logprobs_equal_plain_forward(folder, kind):
    policy = load_policy(folder(kind))
    ours, mask = policy.logprobs(PROMPTS, REPLIES)
    for i, row in enumerate(policy.encode_responses(PROMPTS, REPLIES)):
        expected, _ = slow_logprobs(policy, PROMPTS[i], row)
        assert row[-1] == 1 and mask[i].sum() == len(row)
        torch.testing.assert_close(ours[i, :len(row)], expected, atol=1e-4, rtol=0)
        assert (ours[i, len(row):] == 0).all()


@pytest.mark.parametrize("kind", FAMILIES + ["flan"])
def test_recorded_logprobs_and_values_equal_evaluate(folder, kind):
    policy = load_policy(folder(kind), value_head=True)
    policy.start_adapter(r=4)
    shaken(policy, scale=.02 if kind == "flan" else .1)
    s = policy.sample(PROMPTS, max_new_tokens=10, temperature=.8, seed=3)
    logprobs, values, entropy = policy.evaluate(s, range(len(PROMPTS)))
    assert logprobs.shape == values.shape == entropy.shape == s.mask.shape
    assert logprobs.requires_grad and values.requires_grad
    for recorded, again in ((s.logprobs, logprobs), (s.values, values), (policy.logprobs(s)[0], logprobs)):
        # rounding: adapter merged against beside
        torch.testing.assert_close(recorded, again.detach(), atol=1e-4, rtol=0)
    assert all((x[s.mask == 0] == 0).all() for x in (s.logprobs, logprobs, entropy))
    row = s.response_ids[2][s.mask[2] > 0].tolist()
    expected, logits = slow_logprobs(policy, PROMPTS[2], row, .8)
    torch.testing.assert_close(logprobs[2, :len(row)].detach(), expected, atol=1e-4, rtol=0)
    p = (logits / .8).softmax(-1)
    torch.testing.assert_close(entropy[2, :len(row)].detach(), -(p * p.log()).sum(-1), atol=1e-3, rtol=1e-4)
    part = policy.evaluate(s, torch.tensor([3, 1]))[0] # a narrower minibatch gives the same numbers
    torch.testing.assert_close(part, logprobs[[3, 1]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["t5", "t5_deep", "t5_tied", "flan"])
def test_own_t5_step_equals_the_library_step(folder, kind):
    policy = shaken(load_policy(folder(kind)).start_adapter(r=2))
    ids, mask = policy._pad_prompts(policy.encode(PROMPTS))
    with torch.no_grad(), _merged(policy.model):
        own, theirs = (S(policy.model, ids, mask, 6, True) for S in (_T5Steps, _CachedSteps))
        tokens = None
        for t in range(6):
            (a, x), (b, y) = own(tokens), theirs(tokens)
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-4)
            tokens = b.argmax(-1)
            if t == 2:
                keep = torch.tensor([4, 0, 2])
                own.select(keep), theirs.select(keep)
                tokens = tokens[keep]


# -- drawing ---------------------------------------------------------------------------------------
def test_draws_follow_the_distribution():
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(1))
    u = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for temperature in (.5, 1., 2.):
        drawn = choose_tokens(logits.expand(len(u), 7), u, temperature)
        share = torch.bincount(drawn, minlength=7) / len(u)
        # 5 standard errors of a share
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), atol=.012, rtol=0)
    kept = set(choose_tokens(logits.expand(len(u), 7), u, 1., top_k=3).tolist())
    assert kept == set(logits[0].topk(3).indices.tolist())


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0., -torch.inf, 0., -torch.inf]])
    u = torch.tensor([0., .5, np.nextafter(.5, 0), np.nextafter(1., 0)], dtype=torch.float64)
    assert set(choose_tokens(logits.expand(4, 5), u).tolist()) == {1, 3}


def test_row_seeds_are_distinct_and_do_not_touch_the_global_generator():
    before = torch.random.get_rng_state()
    u = _uniforms(0, [(0, 0), (0, 1), (1, 0)], 50)
    assert torch.equal(before, torch.random.get_rng_state()) and len(set(u.flatten().tolist())) == 150
    assert not torch.equal(u, _uniforms(1, [(0, 0), (0, 1), (1, 0)], 50))
    assert _uniforms(-1, [(0, 0)], 2).shape == (1, 2) # any whole number is a seed


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_reply_does_not_depend_on_its_batch(folder, kind):
    policy = load_policy(folder(kind))
    texts = PROMPTS * 4
    whole = policy.generate(texts, 16, seed=5)
    assert whole == policy.generate(texts, 16, seed=5)
    assert whole != policy.generate(texts, 16, seed=6)
    for rows in (1, 5):
        policy.max_rows = rows
        assert policy.generate(texts, 16, seed=5) == whole
    policy.max_rows = 128
    assert policy.generate(texts[:7], 16, seed=5) == whole[:7]
    several = policy.generate(texts[:5], 16, n=3, seed=5)
    assert [r[0] for r in several] == whole[:5] and any(r[0] != r[1] for r in several)
    short = policy.generate(texts, 4, seed=5) # fewer tokens: the same beginning
    assert all(w.startswith(s.rstrip("\ufffd")) for s, w in zip(short, whole))


def test_batches_cover_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    batches = list(_batches(lengths, 16, 300))
    assert sorted(sum(batches, [])) == list(range(200))
    assert all(len(b) <= 16 and len(b) * max(lengths[i] for i in b) <= 300 for b in batches)
    assert list(_batches([999], 4, 10)) == [[0]] and list(_batches([], 4, 10)) == []


def test_stop_strings_and_empty_lists(folder):
    policy = load_policy(folder("t5"))
    plain = policy.generate(PROMPTS, 12, seed=1)
    mark = next(t for t in plain if len(t) > 3)[2]
    assert all(mark not in t for t in policy.generate(PROMPTS, 12, seed=1, stop=mark))
    assert len(policy.generate(PROMPTS, 1)) == 6 and policy.sample(PROMPTS, 1).mask.shape == (6, 1)
    assert policy.generate(p for p in PROMPTS) == policy.generate(tuple(PROMPTS)) == policy.generate(np.array(PROMPTS))
    assert policy.generate([]) == [] and policy.encode([]) == []
    assert policy.logprobs([], [])[0].shape[0] == 0 and policy.score_options([], ["a", "b"]).shape == (0, 2)


# -- adapters and the reference --------------------------------------------------------------------
@pytest.mark.parametrize("kind", FAMILIES + ["flan"])
def test_kl_is_zero_and_ratio_one_before_the_first_update(folder, kind):
    policy = load_policy(folder(kind), value_head=True).start_adapter(r=4)
    shaken(policy) # stands for supervised fine-tuning
    tuned = policy.logprobs(PROMPTS, REPLIES)[0]
    policy.start_adapter(r=4)
    # folding in changes nothing
    torch.testing.assert_close(policy.logprobs(PROMPTS, REPLIES)[0], tuned, atol=1e-4, rtol=0)
    s = policy.sample(PROMPTS, 8, seed=1)
    with policy.reference():
        reference = policy.logprobs(s)[0]
        greedy = policy.generate(PROMPTS, 8, temperature=0)
    assert torch.equal(policy.logprobs(s)[0], reference) # exactly 0
    assert torch.equal(policy.full_kl(s), torch.zeros_like(reference))
    assert greedy == policy.generate(PROMPTS, 8, temperature=0)
    now = policy.evaluate(s, range(len(s)))[0]
    assert torch.equal((now - now.detach()).exp(), torch.ones_like(now))
    assert ((now - s.logprobs).exp() - 1).abs().max() < 1e-4 # sampling's own record, up to rounding
    shaken(policy)
    with policy.reference():
        assert torch.equal(policy.logprobs(s)[0], reference) # the reference has not moved
    assert not torch.allclose(policy.logprobs(s)[0], reference, atol=1e-3)
    kl = policy.full_kl(s)
    assert (kl >= -1e-6).all() and kl.sum() > 0 and (kl[s.mask == 0] == 0).all()


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_merging_leaves_no_trace(folder, kind):
    policy = shaken(load_policy(folder(kind)).start_adapter())
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    for seed in range(3):
        policy.generate(PROMPTS, 4, seed=seed)
    with pytest.raises(RuntimeError), _merged(policy.model):
        raise RuntimeError
    after = policy.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not policy.model.training and all(not m.training for m in policy.model.modules())


def test_dropout_stays_off_whatever_happens_to_the_model(folder):
    policy = load_policy(folder("t5")).start_adapter()
    before, replies = policy.logprobs(PROMPTS, REPLIES)[0], policy.generate(PROMPTS, 8)
    s = policy.sample(PROMPTS, 8)
    policy.model.train()
    assert torch.equal(policy.logprobs(PROMPTS, REPLIES)[0], before)
    policy.model.train()
    assert policy.generate(PROMPTS, 8) == replies
    policy.model.train()
    assert torch.equal(policy.evaluate(s, [0, 1])[0], policy.evaluate(s, [0, 1])[0])


def test_one_base_model_in_memory(folder):
    policy = load_policy(folder("t5"))
    embedding = policy.model.get_input_embeddings().weight
    policy.start_adapter().start_adapter()
    with policy.reference():
        assert policy.model.get_input_embeddings().weight is embedding
    # A and B, of q and v, in encoder, decoder, cross attention
    assert len(policy.trainable_parameters()) == 2 * 2 * (2 + 2 + 2)


def test_dropping_the_current_adapter(folder):
    policy = load_policy(folder("t5"))
    base = policy.logprobs(PROMPTS, REPLIES)[0]
    shaken(policy.start_adapter()).start_adapter(freeze_current=False)
    assert torch.equal(policy.logprobs(PROMPTS, REPLIES)[0], base)


@pytest.mark.parametrize("kind", ["t5", "t5_tied", "gpt2", "qwen2", "bart", "flan"])
def test_save_and_load_bring_back_every_bit(folder, kind, tmp_path):
    policy = shaken(load_policy(folder(kind), value_head=True).start_adapter(r=4))
    policy.save(tmp_path / "sl")
    from peft import PeftModel # a single adapter is an ordinary peft folder
    plain = PeftModel.from_pretrained(load_policy(folder(kind)).model, str(tmp_path / "sl"))
    ids, mask = policy._pad_prompts(policy.encode(PROMPTS))
    inputs = dict(input_ids=ids, attention_mask=mask) | ({"decoder_input_ids": ids} if policy.kind == "seq2seq" else {})
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, policy.model(**inputs).logits, atol=1e-4, rtol=1e-4)
    shaken(policy.start_adapter(r=2, alpha=4), 1).save(tmp_path / "rl")
    again = load_policy(folder(kind), adapter=tmp_path / "rl", value_head=True)
    assert torch.equal(again.logprobs(PROMPTS, REPLIES)[0], policy.logprobs(PROMPTS, REPLIES)[0])
    with policy.reference(), again.reference():
        assert torch.equal(again.logprobs(PROMPTS, REPLIES)[0], policy.logprobs(PROMPTS, REPLIES)[0])
    a, b = policy.sample(PROMPTS, 8, seed=2), again.sample(PROMPTS, 8, seed=2)
    assert a.texts == b.texts and torch.equal(a.values, b.values) and a.values.abs().sum() > 0
    again.save(tmp_path / "rl2").rename(tmp_path / "moved")
    files = sorted(p.relative_to(tmp_path / "rl") for p in (tmp_path / "rl").rglob("*") if p.is_file())
    assert all((tmp_path / "rl" / f).read_bytes() == (tmp_path / "moved" / f).read_bytes() for f in files)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["moved", "rl", "sl"] # nothing temporary is left
    policy.save(tmp_path / "rl") # replaces
    assert load_policy(folder(kind), adapter=tmp_path / "sl", value_head=False).value_head is None


def test_adapter_state_round_trip(folder):
    policy = shaken(load_policy(folder("t5"), value_head=True).start_adapter(r=4))
    state, before = policy.adapter_state(), policy.logprobs(PROMPTS, REPLIES)[0]
    shaken(policy, 1)
    assert not torch.equal(policy.logprobs(PROMPTS, REPLIES)[0], before)
    policy.load_adapter_state(state)
    assert torch.equal(policy.logprobs(PROMPTS, REPLIES)[0], before)


def test_untied_heads_stay_untied(folder, tmp_path):
    raw = load_file(f"{folder('t5')}/model.safetensors")
    policy = shaken(load_policy(folder("t5")).start_adapter())
    policy.start_adapter()
    head, shared = policy.model.lm_head.weight, policy.model.shared.weight
    assert torch.equal(head, raw["lm_head.weight"]) and torch.equal(shared,
                                                                    raw["shared.weight"]) and not torch.equal(head,
                                                                                                              shared)
    assert policy.model.config.scale_decoder_outputs is False
    tied = load_policy(folder("t5_tied"))
    assert tied.model.lm_head.weight is tied.model.shared.weight and tied.model.config.scale_decoder_outputs is True


# -- judging and learning --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_score_options_reads_the_first_token_that_differs(folder, kind):
    policy = load_policy(folder(kind))
    options, prefixes = ["(A)", "(B)"], ["", "Early", "", "In the shop. Answer:", "", "Because"]
    table = policy.score_options(PROMPTS, options, prefixes)
    assert table.shape == (6, 2) and (table < 0).all()
    for i, prefix in enumerate(prefixes):
        texts = [prefix + (" " if prefix else "") + o for o in options]
        if policy.kind == "seq2seq":
            rows = policy._tokens(texts)
            got = [slow_logprobs(policy, PROMPTS[i], row)[0] for row in rows]
            where = next(k for k in range(99) if rows[0][k] != rows[1][k])
            expected = [g[where] for g in got]
        else:
            rows = policy.encode([PROMPTS[i] + " " + t for t in texts])
            where = next(k for k in range(99) if rows[0][k] != rows[1][k])
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor(rows[:1])).logits[0, where - 1].log_softmax(-1)
            expected = [logits[row[where]] for row in rows]
        torch.testing.assert_close(table[i], torch.stack(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.score_options(PROMPTS, ["(B)", "(A)"], prefixes), table.flip(1), atol=1e-5,
                               rtol=0)


def test_score_options_refuses_options_of_the_same_tokens(folder, monkeypatch):
    policy = load_policy(folder("t5"))
    monkeypatch.setattr(policy, "_tokens", lambda texts: [[5, 6] for _ in texts])   # as a tokenizer that drops spaces says of "yes" and "yes "
    with pytest.raises(CourseError, match=r"\['yes', 'yes '\] are the same tokens .* Use labels that differ"):
        policy.score_options(PROMPTS, ["yes", "yes "])


@pytest.mark.parametrize("kind", ["t5", "t5_tied", "gpt2", "qwen2"])
def test_sft_learns_to_write_the_responses(folder, kind):
    policy = load_policy(folder(kind)).start_adapter(r=16)
    before = policy.sequence_logprobs(PROMPTS, REPLIES)
    base = {k: v.clone() for k, v in policy.model.state_dict().items() if "lora" not in k}
    losses = sft(policy, PROMPTS, REPLIES, epochs=20, lr=1e-2, batch_size=3, progress=False)
    assert len(losses) == 40 and np.mean(losses[-5:]) < .8 * np.mean(losses[:5])
    assert (policy.sequence_logprobs(PROMPTS, REPLIES) > before).all()
    assert all(torch.equal(v, base[k]) for k, v in policy.model.state_dict().items() if "lora" not in k)
    again = load_policy(folder(kind)).start_adapter(r=16)
    assert sft(again, PROMPTS, REPLIES, epochs=20, lr=1e-2, batch_size=3) == losses # the same numbers, bit for bit


def test_sft_weights_and_first_loss(folder):
    policy = load_policy(folder("t5")).start_adapter()
    logprobs, mask = policy.logprobs(PROMPTS, REPLIES)
    weights = [0, 0, 1, 0, 2, 0]
    expected = -(logprobs.sum(1) * torch.tensor(weights)).sum() / (mask.sum(1) * torch.tensor(weights)).sum()
    assert sft(policy, PROMPTS, REPLIES, weights=weights)[0] == pytest.approx(expected.item(), abs=1e-4)


def test_padding_never_changes_gradients(folder):
    policy = load_policy(folder("t5"), value_head=True).start_adapter()
    s = policy.sample(PROMPTS, 8, seed=1)
    grads = []
    for wider in (False, True):
        if wider: # more padding on every side
            more = lambda x, k=3: torch.nn.functional.pad(x, (0, k))
            s = Samples(s.prompts, s.texts, more(s.prompt_ids), more(s.prompt_mask), more(s.response_ids),
                        more(s.mask), more(s.logprobs),
                        more(s.values), s.ended, s.temperature)
        logprobs, values, entropy = policy.evaluate(s, range(6))
        grads.append(torch.autograd.grad((logprobs * s.mask).sum() + values.sum() + entropy.sum(),
                                         policy.trainable_parameters()))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logprobs_with_gradient_are_logprobs_and_can_be_learned_from(folder, kind):
    policy = shaken(load_policy(folder(kind)).start_adapter())
    logprobs, mask = policy.logprobs_with_gradient(PROMPTS, REPLIES)
    known, same = policy.logprobs(PROMPTS, REPLIES)
    assert torch.equal(mask, same) and not known.requires_grad
    torch.testing.assert_close(logprobs.detach(), known, atol=1e-4, rtol=1e-4)
    grads = torch.autograd.grad(logprobs[0].sum(), policy.trainable_parameters())
    alone = torch.autograd.grad(policy.logprobs_with_gradient(PROMPTS[:1], REPLIES[:1])[0].sum(), policy.trainable_parameters())
    assert sum(float(g.abs().sum()) for g in grads) > 0
    for a, b in zip(grads, alone): # neither other rows nor padding reach a row
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6 # 32-bit sums in another order


def test_logprobs_with_gradient_refuses_what_it_cannot_score(folder):
    policy = load_policy(folder("gpt2"))
    with pytest.raises(CourseError, match="prompts is empty"):
        policy.logprobs_with_gradient([], [])
    with pytest.raises(CourseError, match="positions"):
        policy.logprobs_with_gradient(["a lamp " * 100], ["yes"])
    with pytest.raises(CourseError):
        policy.logprobs_with_gradient(PROMPTS, REPLIES[:-1])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_adapter_on_the_decoder_alone_reads_each_prompt_once(folder, kind, monkeypatch, tmp_path):
    policy = load_policy(folder(kind), value_head=True).start_adapter(r=4, decoder_only=True)
    assert all("decoder" in name and "encoder." not in name for name in policy._adapter()) and policy._adapter()
    calls, encoder = [], policy.model.get_encoder()
    once = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *args, **kwargs: calls.append(1) or once(*args, **kwargs))
    s = policy.sample(PROMPTS, 8, seed=1)
    known = [policy.logprobs(s)[0], *policy.evaluate(s, [0, 3, 5])]
    assert len(calls) == 1 and s.states[1].shape[:2] == s.prompt_ids.shape
    s.states = None
    for a, b in zip(known, [policy.logprobs(s)[0], *policy.evaluate(s, [0, 3, 5])]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert len(calls) == 3
    sft(policy, PROMPTS, REPLIES, epochs=3, lr=1e-2)
    again = load_policy(folder(kind), adapter=policy.save(tmp_path / "a"), value_head=True)
    assert torch.equal(again.sequence_logprobs(PROMPTS, REPLIES), policy.sequence_logprobs(PROMPTS, REPLIES))


def test_states_of_another_encoder_are_not_used(folder):
    policy = load_policy(folder("t5")).start_adapter(decoder_only=True)
    other = load_policy(folder("t5_tied"))
    s = policy.sample(PROMPTS, 8, seed=1)
    with_states, (s.states, states) = other.logprobs(s)[0], (None, s.states)
    assert torch.equal(with_states, other.logprobs(s)[0])
    s.states = states
    policy.start_adapter() # now the encoder learns too
    assert policy._known_states(s) is None and policy.sample(PROMPTS, 8, seed=1).states is None


def test_an_encoder_that_learns_as_a_whole_gets_its_gradient(folder):
    policy = load_policy(folder("t5"))
    policy.model.requires_grad_(True)
    samples = policy.sample(PROMPTS, 8, seed=1)
    policy.evaluate(samples, [0, 1])[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.model.get_encoder().parameters())


def test_the_narrow_product_is_a_product():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 200, generator=generator)
    for rows in (1, 12, 13, 32, 33):
        x = torch.randn(rows, 200, generator=generator)
        out = _product(x, weight)
        assert out.is_contiguous()
        torch.testing.assert_close(out, x @ weight.T)


def test_bfloat16(folder):
    policy = load_policy(folder("t5"), dtype="bfloat16", value_head=True).start_adapter()
    assert policy.model.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in policy.trainable_parameters())
    s = policy.sample(PROMPTS, 6, seed=0)
    assert torch.isfinite(s.logprobs).all() and len(sft(policy, PROMPTS, REPLIES)) == 1
    policy.evaluate(s, [0, 1])[0].sum().backward()


# -- bad input -------------------------------------------------------------------------------------
def refuses(words, call):
    with pytest.raises(CourseError) as error:
        call()
    for word in words.split("|"):
        assert word in str(error.value)


def copied(folder, tmp_path, kind="t5"):
    return shutil.copytree(folder(kind), tmp_path / kind)


def test_names_that_lead_nowhere(monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9") # nobody listens there
    started = time.time()
    refuses("nobody/nothing|hub|pocket-t5", lambda: load_policy("nobody/nothing"))
    assert time.time() - started < 5 # at once, not after many attempts
    refuses("no folder|spelling", lambda: load_policy(str(tmp_path / "gone")))
    refuses("no folder|spelling", lambda: load_policy("./gone"))
    refuses("cai-course pretrain", lambda: load_policy("pocket-nothing"))
    refuses("name is", lambda: load_policy(None))
    (tmp_path / "file").write_text("x")
    refuses("is a file", lambda: load_policy(str(tmp_path / "file")))


def test_folders_that_are_no_models(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refuses("no config.json", lambda: load_policy(str(tmp_path / "empty")))
    path = copied(folder, tmp_path)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[:-100], content[:5], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        refuses("damaged|again", lambda: load_policy(str(path)))
    tensors = load_file(f"{folder('t5')}/model.safetensors")
    save_file({k: v for k, v in tensors.items() if "decoder.block.1" not in k}, weights, metadata={"format": "pt"})
    refuses("lack", lambda: load_policy(str(path)))
    save_file({**tensors, "lm_head.weight": torch.full_like(tensors["lm_head.weight"], torch.nan)}, weights,
              metadata={"format": "pt"})
    refuses("lm_head.weight|NaN", lambda: load_policy(str(path)))
    save_file({**tensors, "lm_head.weight": torch.zeros(7, 7)}, weights, metadata={"format": "pt"})
    refuses(str(path), lambda: load_policy(str(path)))
    weights.write_bytes(content)
    (path / "config.json").write_text("{not json")
    refuses(str(path), lambda: load_policy(str(path)))


def test_pickles_are_never_opened(folder, tmp_path):
    path = copied(folder, tmp_path)
    (path / "model.safetensors").unlink()
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    torch.save({"x": Bomb()}, path / "pytorch_model.bin")
    refuses("pytorch_model.bin|safetensors only", lambda: load_policy(str(path)))
    assert not (tmp_path / "exploded").exists()


def test_models_that_do_not_write(tmp_path):
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=16)).save_pretrained(tmp_path / "bert")
    refuses("BertForMaskedLM|causal", lambda: load_policy(str(tmp_path / "bert")))


def test_remote_code_is_never_run(folder, tmp_path):
    path = copied(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config.update(model_type="custom", auto_map={"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'exploded')!r})")
    refuses(str(path), lambda: load_policy(str(path)))
    assert not (tmp_path / "exploded").exists()


def test_adapters_that_do_not_fit(folder, tmp_path):
    load_policy(folder("gpt2")).start_adapter().save(tmp_path / "gpt2")
    refuses("fit", lambda: load_policy(folder("t5"), adapter=tmp_path / "gpt2"))
    load_policy(folder("t5")).start_adapter(r=4).save(tmp_path / "t5")
    refuses("fit", lambda: load_policy(folder("flan"), adapter=tmp_path / "t5"))
    refuses("adapter_config.json", lambda: load_policy(folder("t5"), adapter=tmp_path / "gone"))
    weights = tmp_path / "t5" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refuses("damaged", lambda: load_policy(folder("t5"), adapter=tmp_path / "t5"))


def test_arguments_out_of_range(folder, tmp_path):
    policy = load_policy(folder("t5"))
    refuses("list of strings|[text]", lambda: policy.generate("one text"))
    refuses("prompts[1] is 3|list of strings", lambda: policy.generate(["a", 3]))
    refuses("responses[0] is None", lambda: policy.logprobs(["a"], [None]))
    refuses("list of strings", lambda: policy.generate(None))
    refuses("NaN", lambda: choose_tokens(torch.tensor([[0., torch.nan]]), torch.zeros(1, dtype=torch.float64)))
    refuses("temperature|-1", lambda: policy.generate(["a"], temperature=-1))
    refuses("temperature|nan", lambda: policy.generate(["a"], temperature=float("nan")))
    refuses("max_new_tokens|0", lambda: policy.generate(["a"], max_new_tokens=0))
    refuses("n is 0", lambda: policy.generate(["a"], n=0))
    refuses("top_k is -1", lambda: policy.generate(["a"], top_k=-1))
    refuses("empty", lambda: policy.sample([]))
    refuses("temperature is 0", lambda: policy.sample(["a"], temperature=0))
    refuses("2 prompts and 1", lambda: policy.logprobs(["a", "b"], ["c"]))
    refuses("responses", lambda: policy.logprobs(["a"]))
    refuses("options", lambda: policy.score_options(["a"], ["x", "x"]))
    refuses("options", lambda: policy.score_options(["a"], ["x"]))
    refuses("prefixes", lambda: policy.score_options(["a"], ["x", "y"], ["b", "c"]))
    refuses("no adapter", lambda: sft(policy, ["a"], ["b"]))
    refuses("no adapter", lambda: policy.save(tmp_path / "x"))
    refuses("targets", lambda: policy.start_adapter(targets=["nothing"]))
    refuses("r is 0", lambda: policy.start_adapter(r=0))
    policy.start_adapter()
    refuses("empty", lambda: sft(policy, [], []))
    refuses("weights", lambda: sft(policy, ["a"], ["b"], weights=[-1]))
    refuses("epochs", lambda: sft(policy, ["a"], ["b"], epochs=0))
    refuses("float32 or bfloat16", lambda: load_policy(folder("t5"), dtype="float16"))
    gpt2 = load_policy(folder("gpt2"))
    refuses("128 positions", lambda: gpt2.generate(["word " * 200]))
    refuses("128 positions", lambda: gpt2.generate(["word"], max_new_tokens=200))
    refuses("128 positions", lambda: gpt2.logprobs(["a"], ["word " * 200]))


def test_default_model(monkeypatch):
    monkeypatch.delenv("CAI_COURSE_MODEL", raising=False)
    assert default_model() == "pocket-t5"
    monkeypatch.setenv("CAI_COURSE_MODEL", "google/flan-t5-small")
    assert default_model() == "google/flan-t5-small"


def test_any_text_survives(folder):
    policy = load_policy(folder("t5")).start_adapter()
    odd = ["", " ", "\u00e9\u4f60\u597d \U0001f600", "</s><pad>", "a\n\nb\t", "x" * 500]
    assert len(policy.generate(odd, 5)) == 6
    logprobs, mask = policy.logprobs(odd, odd)
    assert torch.isfinite(logprobs).all() and (mask.sum(1) >= 1).all()
    assert policy.decode(policy.encode(odd[2:3])) == odd[2:3]
