"""The command line: fast help, versions, exit status, and commands that reach what they name."""
import dataclasses
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from cai_course import cai, cli
from cai_course.cli import main, make_parser


def call(*words, module=True):
    return subprocess.run([sys.executable, "-m", "cai_course", *words], capture_output=True, text=True, timeout=120)


def test_version_as_a_module():
    done = call("--version")
    assert done.returncode == 0 and done.stdout.strip() == f"cai-course {metadata.version('cai_course')}"


@pytest.mark.parametrize("words", [["--help"], ["align", "--help"], ["pretrain", "--help"], ["pocket-report", "--help"], ["constitution", "--help"]])
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
