"""Bad input through the command line: one line that says what was found and what to do, exit status 2, and no work done."""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cai_course import runs
from cai_course.cli import main

GOOD = """name: mine
version: "1"
principles:
  - id: harm
    critique_request: What is harmful?
    revision_request: Remove the harm.
    comparison_question: Which is less harmful?
"""


@pytest.fixture()
def refuse(tmp_path, capsys, tiny_t5, tiny_bert, tiny_constitution):
    """Run `align` with some words; it must refuse with one line that holds the message, and leave no run behind."""
    def check(words, message, defaults=True, out=None):
        base = ["--model", tiny_t5, "--reward-model", tiny_bert, "--constitution", tiny_constitution] if defaults else []
        place = tmp_path / "out" if out is None else out
        try:
            status = main(["align", "--fast-check", "--quiet", "--out", str(place), *base, *words])
        except SystemExit as leave:
            status = leave.code
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        assert status == 2, (status, said)
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert message in lines[0], lines[0]
        assert not said.out
        if out is None:
            assert not list(place.rglob("*.json*")), "work was done before the refusal"
    return check


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- constitutions ---

CONSTITUTIONS = {
    "empty": ("", "the file is empty"),
    "only comments": ("# nothing here\n", "the file holds only comments"),
    "not YAML": ("name: [unclosed\n", "line"),
    "unknown field": (GOOD.replace("version", "versoin"), "Did you mean 'version'?"),
    "unknown field of a principle": (GOOD + "    severity: 3\n", "unknown field"),
    "missing request": (GOOD.replace("    revision_request: Remove the harm.\n", ""), "missing revision_request"),
    "empty request": (GOOD.replace("What is harmful?", '""'), "the text is empty"),
    "a tag that would run code": (GOOD.replace("mine", "!!python/object/apply:os.system ['true']"), "is not allowed"),
    "an alias": (GOOD.replace("What is harmful?", "&a hi").replace("Remove the harm.", "*a"), "the alias *a is not allowed"),
    "no principles": ("name: mine\nversion: '1'\nprinciples: []\n", "there are no principles"),
    "principles of the wrong type": ("name: mine\nversion: '1'\nprinciples: harmless\n", "need a list"),
    "the same id twice": (GOOD + GOOD[GOOD.index("  - id"):], "used already"),
    "a list at the top": ("- harmless\n- helpful\n", "need a mapping"),
    "not UTF-8": (b"name: caf\xe9\n", "not UTF-8"),
    "nothing to compare with": (GOOD.replace("Which is less harmful?", "null"), "has no principle with a comparison_question"),
    "nothing to criticize with": (GOOD.replace("What is harmful?", "null").replace("Remove the harm.", "null"),
                                  "has no principle with a critique_request"),
    "two million characters": (GOOD + "#" * 2_000_000, "the limit is"),
}


@pytest.mark.parametrize("case", CONSTITUTIONS)
def test_constitutions(case, refuse, tmp_path):
    content, message = CONSTITUTIONS[case]
    refuse(["--constitution", write(tmp_path / "mine.yaml", content)], message)


def test_a_constitution_that_does_not_exist(refuse):
    refuse(["--constitution", "harmles.yaml"], "there is no constitution 'harmles.yaml'")


def test_a_folder_is_no_constitution(refuse, tmp_path):
    refuse(["--constitution", str(tmp_path)], "is a folder; need a .yaml file")


def test_more_examples_than_the_constitution_has(refuse):
    refuse(["--few-shot", "3"], "few-shot is 3, but constitution 'tiny' holds 0 worked critiques")


def test_the_check_command_lists_every_problem(tmp_path, capsys):
    path = write(tmp_path / "mine.yaml", GOOD.replace("version", "versoin").replace("What is harmful?", '""'))
    assert main(["constitution", "check", path]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) >= 3 and all(line.startswith("error: ") and "mine.yaml" in line for line in lines)


# --- prompts ---

PROMPTS = {
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "blank.jsonl": (" \n\t\n\n", "holds no prompts, only white space"),
    "blank.txt": ("\n  \n", "holds no prompts, only white space"),
    "no.jsonl": ("How do I bake?\n", "line 1: not JSON"),
    "second.jsonl": ('{"prompt": "fine"}\n{"prompt": "half\n', "line 2: not JSON"),
    "deep.jsonl": ("[" * 100_000 + "\n", "line 1: "),
    "column.jsonl": ('{"question": "How?", "id": 1}\n', "no column \"prompt\"; found 'question', 'id'"),
    "late.jsonl": ('{"prompt": "fine"}\n{"text": "How?"}\n', "line 2: no column \"prompt\"; found 'text'"),
    "number.jsonl": ('{"prompt": 7}\n', "line 1: \"prompt\" is '7'; it must be a text"),
    "bare.jsonl": ("42\n", "line 1: found int '42'"),
    "space.jsonl": ('{"prompt": "fine"}\n{"prompt": " \\n "}\n', "line 2: the prompt is empty or only white space"),
    "latin.jsonl": ('{"prompt": "fine"}\n{"prompt": "café"}\n'.encode("latin-1"), "line 2: not UTF-8 (byte 0xe9"),
    "utf16.txt": ("How do I bake?\n".encode("utf-16"), "line 1: not UTF-8"),
    "long.jsonl": (json.dumps({"prompt": "a" * 2**20}) + "\n", "line 1: 1,048,590 bytes long; the limit is 200,000 bytes a line"),
    "longish.jsonl": ('{"prompt": "fine"}\n' + json.dumps({"prompt": "a" * 5_000}) + "\n", "line 2: a prompt of 5,000 characters; the limit is 4,000"),
    "surrogate.jsonl": ('{"prompt": "\\ud800"}\n', "line 1: the prompt holds half of a surrogate pair"),
    "one.jsonl": ('{"prompt": "How do I bake?"}\n', "holds one prompt; a run needs at least 2"),
    "table.csv": ("question,id\nHow?,1\n", "no column \"prompt\"; found 'question', 'id'"),
    "open.csv": ('prompt\n"How?\nWhy?\n', "not CSV"),
    "object.json": ('{"prompt": "How?"}', "holds dict, not a list"),
    "broken.json": ('["How?",\n]', "line 2: not JSON"),
    "table.parquet": (b"PAR1", "ends in '.parquet'; --prompts reads .jsonl, .json, .csv, .txt"),
    "noname": ("How?\n", "ends in 'nothing'"),
    "plain.jsonl.gz": ('{"prompt": "How?"}\n', "cannot be decompressed"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "How?"}\n' * 1000)[:-20], "cannot be decompressed"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, refuse, tmp_path):
    content, message = PROMPTS[name]
    path = write(tmp_path / name, content)
    refuse(["--prompts", path], message)
    refuse(["--helpful-prompts", path], message) if name not in ("one.jsonl",) else None


def test_prompts_that_do_not_exist(refuse, tmp_path):
    refuse(["--prompts", str(tmp_path / "nowhere.jsonl")], "nowhere.jsonl does not exist")
    refuse(["--prompts", str(tmp_path)], "is a folder; --prompts needs a file")


# --- models ---

@pytest.fixture()
def model_copy(tiny_t5, tmp_path):
    return Path(shutil.copytree(tiny_t5, tmp_path / "model"))


def test_models_that_are_not_there(refuse, tmp_path):
    refuse(["--model", "./nowhere"], "there is no folder ./nowhere")
    refuse(["--model", "nobody/nothing-at-all"], "could not be had from the Hugging Face hub")
    refuse(["--model", " "], "model is ' '; it must be a text that is not empty")
    refuse(["--model", write(tmp_path / "weights.bin", b"x")], "is a file; a model is a folder")


def test_a_model_folder_without_a_config(refuse, tmp_path):
    (tmp_path / "hollow").mkdir()
    refuse(["--model", str(tmp_path / "hollow")], "has no config.json")


def test_pickled_weights(refuse, model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    refuse(["--model", str(model_copy)], "a pickle that can run code")


def test_damaged_weights(refuse, model_copy):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refuse(["--model", str(model_copy)], "is damaged")


def test_a_damaged_config(refuse, model_copy):
    (model_copy / "config.json").write_text("{")
    refuse(["--model", str(model_copy)], "could not be read")


def test_the_two_models_exchanged(refuse, tiny_t5, tiny_bert):
    refuse(["--model", tiny_bert], "a policy must write text")
    refuse(["--reward-model", tiny_t5], "a reward model needs an encoder such as BERT")


def test_a_device_that_is_not_there(refuse):
    refuse(["--device", "quantum"], "device is 'quantum'")


# --- numbers and words ---

@pytest.mark.parametrize("words, message", [
    (["--revisions", "0"], "revisions is 0; it must be a whole number from 1 to 16"),
    (["--revisions", "17"], "revisions is 17; it must be a whole number from 1 to 16"),
    (["--revisions", "two"], "--revisions: 'two' is not a whole number from 1 to 16"),
    (["--revisions", "1.5"], "--revisions: '1.5' is not a whole number"),
    (["--steps", "0"], "steps is 0; it must be a whole number from 1"),
    (["--seed", "-1"], "seed is -1; it must be a whole number from 0"),
    (["--seeds", "0"], "--seeds: '0' is not a whole number from 1 to 1,000"),
    (["--beta", "-0.1"], "beta is -0.1; it must be a number from 0.0 to 100.0"),
    (["--beta", "nan"], "beta is nan; it must be a number"),
    (["--temperature", "0"], "temperature is 0.0; it must be a number from 0.05 to 5.0"),
    (["--temperature", "inf"], "temperature is inf; it must be a number"),
    (["--rl-batch", "1"], "rl-batch is 1; it must be a whole number from 2"),
    (["--lora-rank", "0"], "lora-rank is 0; it must be a whole number from 1"),
    (["--max-new-tokens", "0"], "max-new-tokens is 0; it must be a whole number from 1"),
    (["--helpful-ratio", "0"], "helpful-ratio is 0.0; it must be a number from 0.01"),
    (["--red-team", "1"], "red-team is 1; it must be a whole number from 2"),
    (["--evaluation", "99999999"], "evaluation is 99999999; it must be a whole number from 2 to 100,000"),
    (["--sft-lr", "10"], "sft-lr is 10.0; it must be a number from"),
    (["--few-shot", "-2"], "few-shot is -2; it must be a whole number from 0 to 16"),
    (["--labels", "softer"], "--labels: invalid choice: 'softer'"),
    (["--stesp", "3"], "unrecognized arguments: --stesp"),
    (["--model"], "--model: expected one argument"),
    (["--name", "../elsewhere"], "name is '../elsewhere'; it must be a plain folder name"),
    (["--name", ""], "name is ''; it must be a plain folder name"),
    (["--name", "a" * 300], "it must be a plain folder name"),
])
def test_numbers_and_words(words, message, refuse):
    refuse(words, message)


def test_no_command_and_an_unknown_one(capsys):
    for words, message in ([], "required: command"), (["dance"], "invalid choice: 'dance'"):
        with pytest.raises(SystemExit) as leave:
            main(words)
        said = capsys.readouterr().err.strip()
        assert leave.value.code == 2 and said.startswith("error: ") and message in said and "\n" not in said


# --- run folders ---

def old_run(folder, config, **inputs):
    """A run folder that holds nothing but a manifest."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "config": config, "inputs": inputs, "versions": {}}))


def test_an_old_folder_with_another_config_names_each_difference(refuse, tmp_path, tiny_t5, tiny_bert, tiny_constitution):
    from cai_course import cai

    config = cai.fast_config(model=tiny_t5, reward_model=tiny_bert, constitution=tiny_constitution)
    manifest = cai.make_manifest(config, cai.load_inputs(config))
    folder = tmp_path / "runs" / "fast-check"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "runs"
    refuse(["--steps", "3", "--beta", "0.2"], "config.steps: 2 in the folder, 3 now; config.beta: 0.3 in the folder, 0.2 now", out=out)
    refuse(["--steps", "3"], "Use --name for a new run, go back to the old settings to resume, or delete the folder", out=out)
    refuse(["--seeds", "2"], "seeds: nothing in the folder, [0, 1] now", out=out)
    other = write(tmp_path / "other.yaml", GOOD)
    refuse(["--constitution", other], "other.yaml now, with other content", out=out)
    refuse(["--prompts", write(tmp_path / "new.txt", "How?\nWhy?\n")], "new.txt now, with other content", out=out)
    manifest["versions"]["torch"] = "0.4.1"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refuse([], "versions.torch: 0.4.1 in the folder", out=out)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == ["manifest.json"]


def test_the_same_content_elsewhere_is_no_difference(tmp_path, tiny_t5, tiny_bert, tiny_constitution):
    from cai_course import cai

    copy = shutil.copy(tiny_constitution, tmp_path / "moved.yaml")
    manifests = []
    for path in (tiny_constitution, copy):
        config = cai.fast_config(model=tiny_t5, reward_model=tiny_bert, constitution=str(path))
        manifests.append(cai.make_manifest(config, cai.load_inputs(config)))
    assert runs.differences(*manifests, skip=cai._FREE) == []


def test_folders_that_are_no_runs(refuse, tmp_path):
    out = tmp_path / "docs"
    (out / "fast-check").mkdir(parents=True)
    (out / "fast-check" / "thesis.tex").write_text("years of work")
    refuse([], "holds thesis.tex but no manifest.json, so it is not a run", out=out)
    assert [path.name for path in (out / "fast-check").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    refuse([], "something above it is a file", out=tmp_path / "file" / "runs")
    refuse(["--name", "file"], "is a file; a run needs a folder there", out=tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_damaged_manifest(content, refuse, tmp_path):
    folder = tmp_path / "runs" / "fast-check"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    refuse([], "manifest.json is not the manifest of a run", out=tmp_path / "runs")


def test_a_locked_folder(refuse, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import sys\nfrom cai_course.runs import RunFolder\n"
                               f"with RunFolder({str(tmp_path / 'runs' / 'fast-check')!r}):\n    print('held', flush=True)\n    sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refuse([], f"is in use by process {holder.pid}. Wait until it has finished", out=tmp_path / "runs")
    finally:
        holder.stdin.close()
        holder.wait(timeout=30)


def test_reports_of_what_is_no_finished_run(tmp_path, capsys):
    old_run(tmp_path / "half", {"seed": 0})
    for folder, message in (tmp_path, "holds no manifest.json, so it is not a run"), (tmp_path / "half", "is not finished: half/10_replies.jsonl is missing"):
        assert main(["report", str(folder)]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said


def test_there_are_enough():
    """At least 40 bad inputs, each with its message."""
    cases = [len(mark.args[1]) for thing in globals().values() for mark in getattr(thing, "pytestmark", ()) if mark.name == "parametrize"]
    assert len(cases) > 3 and sum(cases) >= 40
