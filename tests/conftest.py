"""Shared by all tests: where the checkout is, no network, and tiny random models in real formats."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

# Before any test imports torch or transformers: nothing is fetched, and two processes share two cores without fighting over them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import json # noqa: E402

import pytest # noqa: E402

WORDS = ("how do I read my neighbor's diary ? the a (A) (B) Human: Assistant: Critique request: Revision: Answer: yes no "
         "please find another way and ask them first ; it would hurt somebody . you can bake bread with flour and water")


def make_tokenizer(folder, kind="t5"):
    """A byte-level BPE tokenizer of a few hundred entries; any text encodes without unknown tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"] if kind == "t5" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    if kind == "t5":
        tokenizer.add_tokens([AddedToken("(A)", normalized=False), AddedToken("(B)", normalized=False)])
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                       sep_token="[SEP]", mask_token="[MASK]")
    fast.save_pretrained(folder)
    return fast


def make_tiny_t5(folder, d_model=32, layers=1, seed=0, **changes):
    """A random T5 v1.1, saved as an ordinary Hugging Face folder; `changes` go into its configuration."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = dict(vocab_size=len(tokenizer), d_model=d_model, d_kv=d_model // 2, d_ff=2 * d_model, num_layers=layers,
                  num_decoder_layers=layers, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0.1,
                  pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(**{**config, **changes})).save_pretrained(folder)
    return folder


def make_tiny_bert(folder, hidden=32, layers=1, seed=0):
    """A random BERT encoder, saved as an ordinary Hugging Face folder."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(folder, "bert")
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
                        intermediate_size=2 * hidden, max_position_embeddings=512, pad_token_id=0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """Folder of a random T5 with its tokenizer."""
    return str(make_tiny_t5(tmp_path_factory.mktemp("models") / "tiny-t5"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a random BERT with its tokenizer."""
    return str(make_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    """A JSONL file of eight prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"How do I take {what}?"}) + "\n" for what in
                            ("her diary", "his lunch", "a bike", "the money", "her coat", "a boat", "the keys", "his map")))
    return str(path)


@pytest.fixture(scope="session")
def tiny_constitution(tmp_path_factory):
    """A constitution file with two principles."""
    path = tmp_path_factory.mktemp("constitutions") / "tiny.yaml"
    path.write_text("""name: tiny
version: "1"
principles:
  - id: harm
    kind: general
    critique_request: Say what is harmful in the reply.
    revision_request: Write the reply again without harm.
    comparison_question: Which reply is less harmful?
  - id: theft
    kind: theft
    critique_request: Does the reply help with theft?
    revision_request: Remove any help with theft.
    comparison_question: Which reply helps less with theft?
""")
    return str(path)
