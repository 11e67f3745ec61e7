"""The command line: fast help, versions, exit status, and commands that reach what they name."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from cai_course import cai, cli
from cai_course.cli import main, make_parser
from cai_course.errors import CourseError


def call(*words, module=True):
    return subprocess.run([sys.executable, "-m", "cai_course", *words], capture_output=True, text=True, timeout=120)


def test_version_as_a_module():
    done = call("--version")
    assert done.returncode == 0 and done.stdout.strip() == f"cai-course {metadata.version('cai_course')}"


@pytest.mark.parametrize("words", [["--help"], ["align", "--help"], ["pretrain", "--help"], ["pocket-report", "--help"], ["constitution", "--help"],
                                   ["start", "--help"], ["progress", "--help"], ["experiment", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as leave:
        main(words)
    assert leave.value.code == 0 and "usage: cai-course" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = ("import sys\nfrom cai_course.cli import main\n"
            "try: main(['align', '--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy")
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    assert time.monotonic() - start < 20


def test_every_setting_is_an_option_with_its_range():
    options = vars(make_parser().parse_args(["align"]))
    text = make_parser()._subparsers._group_actions[0].choices["align"].format_help()
    for each in dataclasses.fields(cai.AlignConfig):
        assert each.name in options and options[each.name] is None
        assert "--" + each.name.replace("_", "-") in text
        assert each.metadata["help"], each.name
        if isinstance(each.default, (int, float)) and not isinstance(each.default, bool):
            assert each.metadata["low"] <= each.default <= each.metadata["high"]


def test_abbreviations_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["align", "--rev", "2"])
    assert "unrecognized arguments: --rev" in capsys.readouterr().err


@pytest.fixture()
def caught(monkeypatch):
    """What `align` is called with."""
    calls = []

    def align(config, folder, seeds, progress):
        calls.append((config, folder, seeds, progress))
        figure = {"value": 0., "low": 0., "high": 1., "n": 1}
        return {"harm": {"base": figure}, "seconds": 1., "peak_memory_mb": 2.}
    monkeypatch.setattr(cai, "align", align)
    monkeypatch.setattr(cai, "read_differences", lambda folder: {})
    return calls


def test_align_passes_everything_on(caught, capsys):
    assert main(["align", "--model", "m", "--seed", "3", "--seeds", "2", "--beta", "0.5", "--direct", "--out", "o", "--name", "n", "--quiet"]) == 0
    config, folder, seeds, progress = caught[0]
    assert (config.model, config.seed, config.beta, config.direct, seeds, progress) == ("m", 3, .5, True, 2, False)
    assert folder == Path("o/n") and config.steps == cai.AlignConfig().steps
    assert "harm" in capsys.readouterr().out


def test_fast_check_can_be_changed_one_by_one(caught):
    assert main(["align", "--fast-check", "--steps", "5"]) == 0
    config, folder, *_ = caught[0]
    assert config == cai.fast_config(steps=5) and folder == Path("runs/fast-check") and config.red_team == cai.FAST["red_team"]


def test_the_model_comes_from_the_environment(caught, monkeypatch):
    monkeypatch.setenv("CAI_COURSE_MODEL", "some/where")
    main(["align"])
    assert caught[0][0].model == "some/where"


def test_ctrl_c(monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "align", stop)
    assert main(["align"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["aling"], "Did you mean align? See `cai-course --help`"), (["align", "--sede", "3"], "--sede 3. Did you mean --seed? See `cai-course align --help`"),
    (["pretrain", "--pool=3"], "--pool=3. Did you mean --pools? See `cai-course pretrain --help`"), (["pretrain", "--po", "3"], "unrecognized arguments: --po 3"),
    (["align", "more"], "unrecognized arguments: more. See `cai-course align --help`"), (["align", "--judge", "directly"], "Did you mean direct? "),
])
def test_a_misspelt_word_gets_the_right_one_and_the_help_of_its_command(words, said, capsys):
    with pytest.raises(SystemExit) as leave:
        main(words)
    error = capsys.readouterr().err
    assert leave.value.code == 2 and said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["a/b", "../x", "x ", "x.", ".x", "-", " ", "a\nb", "a" * 101, "a\\b"])
def test_a_name_that_is_no_plain_folder_name(name, caught, capsys):
    assert main(["align", f"--name={name}"]) == 2
    assert "it must be a plain folder name" in capsys.readouterr().err and not caught


@pytest.mark.parametrize("name", ["a", "my first run", "v1.2", "A" * 100, "a-_"])
def test_a_name_that_is_one(name, caught):
    assert main(["align", "--name", name]) == 0 and caught[0][1].name == name


def test_a_home_that_nobody_has(caught, capsys):
    for option in ("--out", "--model"):
        assert main(["align", option, "~nobody-at-all/x"]) == 2
        assert f"{option[2:]} is '~nobody-at-all/x'; there is no home folder of that name here" in capsys.readouterr().err and not caught


def test_a_model_without_a_tokenizer(tiny_t5, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny_t5) / name).read_bytes())
    for words in (["align", "--out", str(tmp_path / "runs"), "--model"], ["align", "--out", str(tmp_path / "runs"), "--reward-model"], ["pocket-report", "--model"]):
        assert main([*words, str(tmp_path)]) == 2
        assert "has no tokenizer (such as tokenizer.json)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["align", "--fast-check", "--out"], ["report"], ["grade"], ["align", "--fast-check", "--prompts"], ["pocket-report", "--model"],
                                   ["pretrain", "--pools", "1", "--out"], ["experiment", "baseline-cuts-variance", "--seeds", "2", "--quiet", "--out"]])
def test_a_path_that_no_system_takes_is_one_line(words, capsys):
    assert main([*words, "a" * 3_000]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 'aaa") and "cannot be used (File name too long)" in error and "Give another path" in error and len(error) < 400


def test_a_file_where_a_folder_is_needed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words in (["pretrain", "--pools", "1"], ["experiment", "baseline-cuts-variance", "--seeds", "2", "--quiet"]):
        assert main([*words, "--out", str(tmp_path / "file")]) == 2
        assert "cannot be used" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full device is needed")
def test_an_output_that_is_full_or_closed_is_no_traceback():
    for place, status, said in (("/dev/full", 2, "error: the operating system refused to read or write (No space left on device)"), ("| true", 1, "")):
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -m cai_course completion bash {place if '|' in place else '> ' + place}"],
                              capture_output=True, text=True, timeout=120)
        assert done.stderr.startswith(said) and "Traceback" not in done.stderr and "Exception" not in done.stderr
        assert done.returncode in (status, 0) # 0: the reader left later than the writer


def test_sigterm_stops_as_ctrl_c_does(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def wait(options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    monkeypatch.setitem(cli.COMMANDS, "align", wait)
    assert main(["align"]) == 143
    assert "the same command goes on from there" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_before_the_command_is_known(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "make_parser", stop)
    assert main(["align"]) == 130
    assert capsys.readouterr().err == "\nstopped.\n"


def test_a_mistake_of_the_course_is_not_hidden(monkeypatch):
    def fail(options):
        raise ZeroDivisionError
    monkeypatch.setitem(cli.COMMANDS, "align", fail)
    with pytest.raises(ZeroDivisionError):
        main(["align"])


def test_constitution_check(tiny_constitution, capsys):
    assert main(["constitution", "check", tiny_constitution]) == 0
    assert "tiny (version 1) is fine: 2 principles for critique and revision, 2 for comparison" in capsys.readouterr().out


def test_pretrain_and_pocket_report_reach_their_module(monkeypatch):
    import inspect
    import types

    from cai_course import pretrain

    calls = []
    fake = types.ModuleType("cai_course.pretrain")
    for name in ("run", "report"):
        setattr(fake, name, lambda *given, real=getattr(pretrain, name), **more: calls.append(inspect.signature(real).bind(*given, **more).arguments))
    monkeypatch.setattr("cai_course.pretrain", fake)
    assert main(["pretrain", "--out", "o", "--only", "pocket-bert", "--seed", "2", "--pools", "3", "--fresh"]) == 0
    assert main(["pocket-report", "--seeds", "1", "--json", "--prompts", "5", "--model", "m"]) == 0
    assert calls == [dict(out="o", only="pocket-bert", seed=2, resume=False, pools=3), dict(seeds=1, as_json=True, n=5, model="m")]


# --- start, progress ---

@pytest.fixture()
def learner(monkeypatch):
    """A stand-in for `cai_course.start`, and what it is called with."""
    import types

    calls, fake = [], types.ModuleType("cai_course.start")

    def start(chapters, solutions=True, force=False):
        calls.append((chapters, solutions, force))
        return [Path("work/03_ppo.ipynb")] if "03" in chapters else []
    fake.start = start
    fake.progress_table = lambda: [{"id": "03-clipped-side", "passed": True}]
    fake.progress_text = lambda: "03-clipped-side  x"
    monkeypatch.setitem(sys.modules, "cai_course.start", fake)
    monkeypatch.setattr("cai_course.start", fake, raising=False)
    return calls


@pytest.mark.parametrize("words, given, said", [
    (["03", "ppo"], (["03", "ppo"], True, False), "work/03_ppo.ipynb"),
    (["03", "--no-solutions"], (["03"], False, False), "work/03_ppo.ipynb"),
    (["--force", "all"], (["all"], True, True), "Nothing was copied"),
    ([], ([], True, False), "Nothing was copied"),
])
def test_start_passes_everything_on(learner, capsys, words, given, said):
    assert main(["start", *words]) == 0
    assert learner == [given] and said in capsys.readouterr().out


def test_a_mistake_of_start_is_one_line(learner, monkeypatch, capsys):
    def start(chapters, solutions, force):
        raise CourseError("no chapter is called 'poker';\nthere is 03_ppo")
    monkeypatch.setattr(sys.modules["cai_course.start"], "start", start)
    assert main(["start", "poker"]) == 2
    assert capsys.readouterr().err == "error: no chapter is called 'poker';; there is 03_ppo\n"


def test_progress_as_text_and_as_json(learner, capsys):
    assert main(["progress"]) == 0 and capsys.readouterr().out == "03-clipped-side  x\n"
    assert main(["progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"id": "03-clipped-side", "passed": True}]


# --- experiment ---

def measure_seed(seed):
    return {"gap": 1. + seed}


@pytest.fixture()
def claim(monkeypatch):
    """One small experiment, the only one of the course."""
    from cai_course import experiments

    monkeypatch.setattr(experiments, "EXPERIMENTS", {})
    made = experiments.Experiment(name="tmp-cli", chapter="02", claim="It grows.", source="a test", run=measure_seed, value="gap", predicts=">",
                                  seeds=5)
    monkeypatch.setattr(experiments, "experiment_names", lambda: {"tmp-cli": "nowhere"})
    monkeypatch.setattr(experiments, "find_experiment", lambda name: experiments.EXPERIMENTS[name])
    return made


def test_experiment_runs_stores_and_lists(claim, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main(["experiment", "--list", "--json", *out]) == 0
    keys = ["name", "claim", "source", "value", "low", "high", "seeds", "verdict", "seconds", "stale"]
    (missing,) = json.loads(capsys.readouterr().out)
    assert list(missing) == keys and missing["stale"] is True and [missing[key] for key in keys[3:9]] == [None] * 6
    assert main(["experiment", "--list", *out]) == 0
    assert "no result" in capsys.readouterr().out

    assert main(["experiment", "tmp-cli", "--quiet", *out]) == 0
    text = capsys.readouterr().out
    for part in ("It grows.", "gap > 0", "3.000 [1.0", "95% interval over 5 seeds", "agrees", "s for all seeds"):
        assert part in text
    assert main(["experiment", "--list", "--json", *out]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert list(found) == keys and (found["value"], found["seeds"], found["verdict"], found["stale"]) == (3., 5, "agrees", False)
    assert main(["experiment", "--list", *out]) == 0
    assert "agrees" in (text := capsys.readouterr().out) and "5 seeds" in text and "stale" not in text

    assert main(["experiment", "tmp-cli", "--seeds", "7", "--json", *out]) == 0
    assert json.loads(capsys.readouterr().out) == {**found, "value": 4., "low": pytest.approx(2., abs=.01), "high": pytest.approx(6., abs=.01),
                                                   "seeds": 7, "seconds": pytest.approx(0, abs=1)}


def test_experiment_shows_its_progress_unless_told_not_to(claim, tmp_path, capsys):
    assert main(["experiment", "tmp-cli", "--out", str(tmp_path)]) == 0
    assert "tmp-cli: 100%" in capsys.readouterr().err
    assert main(["experiment", "tmp-cli", "--out", str(tmp_path), "--fresh", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words, said", [
    ([], "either a NAME or --list, got neither"), (["tmp-cli", "--list"], "got 'tmp-cli' and --list"), (["--list", "--fresh"], "--fresh was given"),
    (["--list", "--seeds", "3"], "--seeds was given"), (["--list", "--out", "no/such/folder"], "there is no folder no/such/folder; --list needs"),
])
def test_mistakes_of_experiment_are_one_line(claim, capsys, words, said):
    assert main(["experiment", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("seeds", ["0", "-1", "many", "1.5"])
def test_a_number_of_seeds_that_cannot_be(capsys, seeds):
    with pytest.raises(SystemExit) as leave:
        main(["experiment", "tmp-cli", f"--seeds={seeds}"])
    assert leave.value.code == 2 and "is not a whole number from 1" in capsys.readouterr().err


def test_an_unknown_experiment_lists_what_there_is(capsys):
    assert main(["experiment", "no-such-claim"]) == 2
    assert "there is no experiment 'no-such-claim'; there is " in capsys.readouterr().err
    assert main(["experiment", "gae-lamda"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean 'gae-lambda'?\n")


def test_a_list_that_is_piped_as_json_is_strict(capsys):
    assert main(["experiment", "--list", "--json"]) == 0
    def refuse(word): raise ValueError(word)
    assert isinstance(json.loads(capsys.readouterr().out, parse_constant=refuse), list)
