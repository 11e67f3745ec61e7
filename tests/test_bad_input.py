"""Bad input through the command line: one line that says what was found and what to do next, exit status 2, and no work done."""
import ast
import gzip
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cai_course import runs
from cai_course.cli import main
from cai_course.errors import CourseError

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
    """Run `align` with some words; it must refuse with one line that holds all parts of the message, and leave no run behind."""
    def check(words, *message, defaults=True, out=None):
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
        for part in message:
            assert part in lines[0], (part, lines[0])
        assert not said.out
        if out is None:
            assert not list(place.rglob("*.json*")), "work was done before the refusal"
    return check


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- constitutions ---

CONSTITUTIONS = {
    "empty": ("", "the file is empty. A constitution needs at least name, version and principles",
              "Write these, or copy constitutions/short.yaml and change it"),
    "only comments": ("# nothing here\n", "the file holds only comments", "Write these, or copy constitutions/short.yaml"),
    "not YAML": ("name: [unclosed\n", "line 2: this is not YAML", "Check the indentation, the colons, and put quotes around text"),
    "a zero byte": ("name: m\0ine\n", "special characters are not allowed", "Check the indentation"),
    "unknown field": (GOOD.replace("version", "versoin"), "line 2, versoin: unknown field. Did you mean 'version'?", "Rename or remove it"),
    "unknown field of a principle": (GOOD + "    severity: 3\n", "principles[1].severity: unknown field", "Rename or remove it"),
    "missing request": (GOOD.replace("    revision_request: Remove the harm.\n", ""), "missing revision_request",
                        "Add a line `revision_request: ...`"),
    "empty request": (GOOD.replace("What is harmful?", '""'), "the text is empty", "Write it, or remove the whole entry"),
    "a number for a text": (GOOD.replace("What is harmful?", "7"), "found a number ('7'), need text", "Put quotes around it"),
    "a request of 3,000 characters": (GOOD.replace("What is harmful?", "a" * 3_000), "the text has 3,000 characters, the limit is 2,000",
                                      "Shorten it"),
    "an id with a space": (GOOD.replace("id: harm", "id: no harm"), "found 'no harm'; an id is letters, digits", "Rename it"),
    "a tag that would run code": (GOOD.replace("mine", "!!python/object/apply:os.system ['true']"),
                                  "the tag !!python/object/apply:os.system is not allowed", "Remove the tag"),
    "an alias": (GOOD.replace("What is harmful?", "&a hi").replace("Remove the harm.", "*a"), "the alias *a is not allowed",
                 "Write the text out"),
    "brackets without end": (GOOD.replace("mine", "[" * 20 + "]" * 20), "nested more than 8 deep", "Check the brackets"),
    "two documents": (GOOD + "---\n" + GOOD, "a second document starts here", "Split the file"),
    "a field twice": (GOOD + "name: yours\n", "the field is written twice", "Remove one"),
    "no principles": ("name: mine\nversion: '1'\nprinciples: []\n", "there are no principles", "Add an entry that begins with `- id: ...`"),
    "principles of the wrong type": ("name: mine\nversion: '1'\nprinciples: harmless\n", "found text, need a list",
                                     "Begin each entry with a dash and a space"),
    "the same id twice": (GOOD + GOOD[GOOD.index("  - id"):], "the id 'harm' is used already in line 4", "Rename one of them"),
    "a list at the top": ("- harmless\n- helpful\n", "found a list, need a mapping", "Write them as `field: text`, one on each line"),
    "not UTF-8": (b"name: caf\xe9\n", "byte 10 is not UTF-8", "Save the file as UTF-8"),
    "nothing to compare with": (GOOD.replace("Which is less harmful?", "null"), "has no principle with a comparison_question",
                                "Add a comparison_question"),
    "nothing to criticize with": (GOOD.replace("What is harmful?", "null").replace("Remove the harm.", "null"),
                                  "has no principle with a critique_request", "Add a critique_request"),
    "two million characters": (GOOD + "#" * 2_000_000, "bytes, the limit is 250,000", "Give another file, or shorten this one"),
}

PAPER = { # files in the form of the paper
    "broken.json": ("{", "line 1: this is not JSON", "Download the file again"),
    "none.json": ("{}", "found '{}', need a mapping from names to 'prompt' and 'edit_request'", "Download the file again"),
    "empty.json": ("[]", "found '[]', need a list with at least one entry", "Download the file again"),
    "half.json": ('{"a": {"prompt": ["What is harmful?"]}}', "half.json, a: need a 'prompt' (a list with one text) and an 'edit_request'",
                  "Compare with the other entries"),
    "number.json": ("[7]", "entry 1: found int, need text", "download it again"),
    "one_list.json": ('["Which reply is less harmful?"]', "has no principle with a critique_request",
                      "give the folder of the paper's files rather than one of them"),
}


@pytest.mark.parametrize("case", CONSTITUTIONS)
def test_constitutions(case, refuse, tmp_path):
    content, *message = CONSTITUTIONS[case]
    refuse(["--constitution", write(tmp_path / "mine.yaml", content)], *message)


@pytest.mark.parametrize("name", PAPER)
def test_files_of_the_paper(name, refuse, tmp_path):
    content, *message = PAPER[name]
    refuse(["--constitution", write(tmp_path / name, content)], *message)


def test_a_constitution_that_does_not_exist(refuse):
    refuse(["--constitution", "harmles.yaml"], "there is no constitution 'harmles.yaml'",
           "The names are: course, short, terse. To use your own, give the path of a .yaml file")
    refuse(["--constitution", "crse"], "there is no constitution 'crse'", "Did you mean 'course'?")
    refuse(["--constitution", ""], "constitution is ''; it must be a text that is not empty", "Give one, or leave it out")


def test_a_folder_is_no_constitution(refuse, tmp_path):
    refuse(["--constitution", str(tmp_path)], "is a folder; need a .yaml file", "Name the file itself")


def test_more_examples_than_the_constitution_has(refuse):
    refuse(["--few-shot", "3"], "few-shot is 3, but constitution 'tiny' holds 0 worked critiques", "Ask for fewer, or add some to the file")


def test_the_check_command_lists_every_problem(tmp_path, capsys):
    path = write(tmp_path / "mine.yaml", GOOD.replace("version", "versoin").replace("What is harmful?", '""'))
    assert main(["constitution", "check", path]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) >= 3 and all(line.startswith("error: ") and "mine.yaml" in line for line in lines)


# --- prompts ---

PROMPTS = {
    "empty.jsonl": (b"", "empty.jsonl is empty", "It needs at least one prompt"),
    "blank.jsonl": (" \n\t\n\n", "holds no prompts, only white space", "It needs at least one prompt"),
    "blank.txt": ("\n  \n", "holds no prompts, only white space", "It needs at least one prompt"),
    "no.jsonl": ("How do I bake?\n", "line 1: not JSON", 'must be one object such as {"prompt": "..."}'),
    "second.jsonl": ('{"prompt": "fine"}\n{"prompt": "half\n', "line 2: not JSON", "must be one object such as"),
    "deep.jsonl": ("[" * 100_000 + "\n", "line 1: ", "must be"),
    "column.jsonl": ('{"question": "How?", "id": 1}\n', "no column \"prompt\"; found 'question', 'id'",
                     'Rename the column that holds the prompts to "prompt"'),
    "late.jsonl": ('{"prompt": "fine"}\n{"text": "How?"}\n', "line 2: no column \"prompt\"; found 'text'", "Rename the column"),
    "number.jsonl": ('{"prompt": 7}\n', "line 1: \"prompt\" is '7'; it must be a text"),
    "bare.jsonl": ("42\n", "line 1: found int '42'", 'each entry must be a text or an object with a "prompt"'),
    "space.jsonl": ('{"prompt": "fine"}\n{"prompt": " \\n "}\n', "line 2: the prompt is empty or only white space", "Fill it in or delete the line"),
    "latin.jsonl": ('{"prompt": "fine"}\n{"prompt": "café"}\n'.encode("latin-1"), "line 2: not UTF-8 (byte 0xe9", "Save the file as UTF-8"),
    "utf16.txt": ("How do I bake?\n".encode("utf-16"), "line 1: not UTF-8", "Save the file as UTF-8"),
    "long.jsonl": (json.dumps({"prompt": "a" * 2**20}) + "\n", "line 1: 1,048,590 bytes long; the limit is 200,000 bytes a line"),
    "longish.jsonl": ('{"prompt": "fine"}\n' + json.dumps({"prompt": "a" * 5_000}) + "\n", "line 2: a prompt of 5,000 characters; the limit is 4,000",
                      "Shorten it"),
    "surrogate.jsonl": ('{"prompt": "\\ud800"}\n', "line 1: the prompt holds half of a surrogate pair", "Remove that \\u escape"),
    "one.jsonl": ('{"prompt": "How do I bake?"}\n', "holds one prompt; a run needs at least 2", "Add more"),
    "table.csv": ("question,id\nHow?,1\n", "no column \"prompt\"; found 'question', 'id'", "Rename the column"),
    "open.csv": ('prompt\n"How?\nWhy?\n', "not CSV", "Export the sheet again as CSV in UTF-8"),
    "object.json": ('{"prompt": "How?"}', "holds dict, not a list", 'Write ["first prompt", ...]'),
    "broken.json": ('["How?",\n]', "line 2: not JSON", "must hold one list of prompts"),
    "table.parquet": (b"PAR1", "ends in '.parquet'; --prompts reads .jsonl, .json, .csv, .txt", "Rename or convert it"),
    "noname": ("How?\n", "ends in 'nothing'", "Rename or convert it"),
    "plain.jsonl.gz": ('{"prompt": "How?"}\n', "cannot be decompressed", "Compress it again, or give the plain file"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "How?"}\n' * 1000)[:-20], "cannot be decompressed", "Compress it again, or give the plain file"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, refuse, tmp_path):
    content, *message = PROMPTS[name]
    path = write(tmp_path / name, content)
    refuse(["--prompts", path], *message)
    if name != "one.jsonl": # one ordinary prompt will do
        refuse(["--helpful-prompts", path], *message)


def test_prompts_that_do_not_exist(refuse, tmp_path):
    refuse(["--prompts", str(tmp_path / "nowhere.jsonl")], "nowhere.jsonl does not exist",
           "Give the path of a .jsonl, .json, .csv, .txt file")
    refuse(["--prompts", str(tmp_path)], "is a folder; --prompts needs a file", "Give the path of a .jsonl")
    refuse(["--prompts", ""], "prompts is ''; it must be a text that is not empty", "Give one, or leave it out")


# --- models ---

@pytest.fixture()
def model_copy(tiny_t5, tmp_path):
    return Path(shutil.copytree(tiny_t5, tmp_path / "model"))


def test_models_that_are_not_there(refuse, tmp_path):
    refuse(["--model", "./nowhere"], "there is no folder ./nowhere", "Check the spelling and the current directory")
    refuse(["--model", "nobody/nothing-at-all"], "could not be had from the Hugging Face hub", "Offline, use pocket-t5")
    refuse(["--model", " "], "model is ' '; it must be a text that is not empty", "Give one, or leave it out")
    refuse(["--model", write(tmp_path / "weights.bin", b"x")], "is a file; a model is a folder", "Give the folder")


def test_a_model_folder_without_a_config(refuse, tmp_path):
    (tmp_path / "hollow").mkdir()
    refuse(["--model", str(tmp_path / "hollow")], "has no config.json", "Give the folder that save_pretrained wrote")


def test_a_folder_of_anything_else_is_not_read(refuse, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "film").write_bytes(b"0" * 100)
    monkeypatch.setattr("cai_course.cai.fingerprint", lambda path: pytest.fail(f"{path} was read") if "home" in str(path) else "0")
    refuse(["--model", str(tmp_path / "home")], "home has no config.json", "Give the folder that save_pretrained wrote.")


def test_pickled_weights(refuse, model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    refuse(["--model", str(model_copy)], "a pickle that can run code", "Save the model again with a current transformers")


def test_damaged_weights(refuse, model_copy):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refuse(["--model", str(model_copy)], "is damaged", "Copy or download it again")


def test_a_damaged_config(refuse, model_copy):
    (model_copy / "config.json").write_text("{")
    refuse(["--model", str(model_copy)], "could not be read", "Save or copy the folder again")


def test_the_two_models_exchanged(refuse, tiny_t5, tiny_bert):
    refuse(["--model", tiny_bert], "a policy must write text", "For a reward model use cai_course.reward")
    refuse(["--reward-model", tiny_t5], "a reward model needs an encoder such as BERT", "Try pocket-bert")


def test_a_device_that_is_not_there(refuse):
    refuse(["--device", "quantum"], "device is 'quantum'", "Use --device cpu")


# --- numbers and words ---

NUMBERS = [
    (["--revisions", "0"], "revisions is 0; it must be a whole number from 1 to 16"),
    (["--revisions", "17"], "revisions is 17; it must be a whole number from 1 to 16"),
    (["--steps", "0"], "steps is 0; it must be a whole number from 1"),
    (["--seed", "-1"], "seed is -1; it must be a whole number from 0"),
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
    (["--batch-size", "0"], "batch-size is 0; it must be a whole number from 1 to 4,096"),
    (["--preferences", "0"], "preferences is 0; it must be a whole number from 1 to 1,000,000"),
    (["--sl-temperature", "6"], "sl-temperature is 6.0; it must be a number from 0.0 to 5.0"),
]


@pytest.mark.parametrize("words, message", NUMBERS)
def test_numbers(words, message, refuse):
    refuse(words, message, "Give such a number, or leave it out")


WORDS = [ # refused by the parser of the command line
    (["--revisions", "two"], "--revisions: 'two' is not a whole number from 1 to 16"),
    (["--revisions", "1.5"], "--revisions: '1.5' is not a whole number"),
    (["--seeds", "0"], "--seeds: '0' is not a whole number from 1 to 1,000"),
    (["--labels", "softer"], "--labels: invalid choice: 'softer'"),
    (["--stesp", "3"], "unrecognized arguments: --stesp"),
    (["--model"], "--model: expected one argument"),
    (["--judge", "aloud"], "--judge: invalid choice: 'aloud'"),
    (["--train-on", "first"], "--train-on: invalid choice: 'first'"),
    (["--split", "heldout"], "unrecognized arguments: --split"),
]


@pytest.mark.parametrize("words, message", WORDS)
def test_words(words, message, refuse):
    refuse(words, message, "See `cai-course", "--help`")


NAMES = [
    (["--name", "../elsewhere"], "name is '../elsewhere'; it must be a plain folder name"),
    (["--name", ""], "name is ''; it must be a plain folder name"),
    (["--name", "a" * 300], "it must be a plain folder name"),
]


@pytest.mark.parametrize("words, message", NAMES)
def test_names(words, message, refuse):
    refuse(words, message, "Put the folder above it into --out")


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
    refuse([], "versions.torch: 0.4.1 in the folder", "Use --name for a new run", out=out)
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
    refuse([], "holds thesis.tex but no manifest.json, so it is not a run", "Choose another --name, or an empty folder", out=out)
    assert [path.name for path in (out / "fast-check").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    refuse([], "something above it is a file", "Choose another --out", out=tmp_path / "file" / "runs")
    refuse(["--name", "file"], "is a file; a run needs a folder there", "Choose another --name or --out", out=tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_damaged_manifest(content, refuse, tmp_path):
    folder = tmp_path / "runs" / "fast-check"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    refuse([], "manifest.json is not the manifest of a run", "Choose another --name, or delete the folder", out=tmp_path / "runs")


def test_a_locked_folder(refuse, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import sys\nfrom cai_course.runs import RunFolder\n"
                               f"with RunFolder({str(tmp_path / 'runs' / 'fast-check')!r}):\n    print('held', flush=True)\n    sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refuse([], f"is in use by process {holder.pid}", "Wait until it has finished, stop it, or choose another --name",
               out=tmp_path / "runs")
    finally:
        holder.stdin.close()
        holder.wait(timeout=30)


def test_reports_of_what_is_no_finished_run(tmp_path, capsys):
    old_run(tmp_path / "half", {"seed": 0})
    for folder, *message in ((tmp_path, "holds no manifest.json, so it is not a run", "Give the folder that `align` wrote"),
                             (tmp_path / "half", "is not finished: half/10_replies.jsonl is missing", "Run the same `align` command again")):
        assert main(["report", str(folder)]) == 2
        said = capsys.readouterr().err.strip()
        assert all(part in said for part in message) and "\n" not in said


def test_there_are_enough():
    """At least 40 bad inputs, each with its message."""
    cases = [len(mark.args[1]) for thing in globals().values() for mark in getattr(thing, "pytestmark", ()) if mark.name == "parametrize"]
    assert len(cases) > 3 and sum(cases) >= 40


# --- from Python ---

def refused(call):
    with pytest.raises(CourseError) as caught:
        call()
    return str(caught.value)


def test_what_the_command_line_cannot_say():
    from cai_course.cai import AlignConfig, align

    assert refused(lambda: AlignConfig(direct="yes")) == "direct is 'yes'; it must be True or False. Write one of the two, without quotes."
    assert refused(lambda: AlignConfig(labels="softer")) == ("labels is 'softer'; it must be one of soft, hard, clamped. "
                                                             "Choose one of these, or leave it out.")
    assert refused(lambda: AlignConfig(steps=True)).startswith("steps is True; it must be a whole number from 1 to 100,000 (PPO steps).")
    assert refused(lambda: AlignConfig(constitution=7)).endswith("Give one, or leave it out.")
    assert refused(lambda: align({}, "nowhere")) == "config is dict; it must be an AlignConfig. Make one with AlignConfig(...)."
    assert refused(lambda: align(AlignConfig(), "nowhere", seeds=1.5)) == ("seeds is 1.5; it must be a whole number from 1 to 1,000. "
                                                                           "Leave it out for one.")


NEXT = set("Add Apply Ask Begin Call Change Check Choose Compare Convert Copy Download Fetch Generate Give Leave Make Measure Name Pass Put "
           "Raise Remove Rename Return Run Sample Save Shorten Split Take To Use Write".split())


@pytest.mark.parametrize("module", ["cai", "constitution", "critique", "judge"])
def test_every_message_says_what_to_do_next(module):
    """One sentence at least begins with what to do. Messages that pass on others, and one that the loader completes, are left out."""
    seen = 0
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(f"cai_course.{module}")))):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if name not in ("CourseError", "problem", "stop") or not isinstance(node.args[-1], (ast.Constant, ast.JoinedStr)):
            continue
        text = "".join(getattr(part, "value", "") if isinstance(part, ast.Constant) else "{}"
                       for part in getattr(node.args[-1], "values", [node.args[-1]]))
        begins = {words.split(" ")[0].capitalize() for words in re.split(r"[.;?!]['\"]? |(?<=\}) ", text)[1:]}
        assert begins & NEXT or text.endswith("at least name, version and principles."), text
        seen += 1
    assert seen >= 10
