"""Experiments: verdicts by hand, resume to the same bytes, stale results found, bad input refused with what to do."""
import importlib
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import cai_course
from cai_course import experiments
from cai_course.errors import CourseError
from cai_course.experiments import (EXPERIMENTS, Experiment, experiment_names, find_experiment, fingerprints, judge_rows, list_results,
                                    load_result, run_experiment)

MODULE = '''
    """A module with one experiment."""
    import math
    from cai_course.errors import CourseError
    from cai_course.experiments import Experiment
    from cai_course.{helper} import shift

    FACTOR = 1.

    def measure(seed):
        "One seed."
        from cai_course import {helper}
        # a comment
        if seed < 0: raise CourseError(f"seed is {{seed}}. Give 0 or more.")
        return {{"gap": FACTOR + shift(seed) / 10, "curve": [seed, {helper}.double(seed)]}}

    def unused(): return 1

    made = Experiment(name="{name}", chapter="02", claim="The gap is positive.", source="a test", run=measure, value="gap",
                      predicts=">", seeds=4)
'''
HELPER = '''
    def shift(seed): return float(seed)

    def double(seed): return 2 * seed

    def elsewhere(): return "not used by the run"
'''


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is forgotten after it."""
    before = dict(EXPERIMENTS)
    yield
    EXPERIMENTS.clear()
    EXPERIMENTS.update(before)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Writes modules that belong to the package as long as the test runs; results go to a folder of the test."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(cai_course, "__path__", [*cai_course.__path__, str(folder)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file changed within its second must be read again
    known = set(sys.modules)

    def write(name, text):
        (folder / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        for old in [f"cai_course.{path.stem}" for path in folder.glob("*.py")]:
            sys.modules.pop(old, None)
        for made in [name for name, each in EXPERIMENTS.items() if each.run.__module__.startswith("cai_course.tmp")]:
            del EXPERIMENTS[made]
        importlib.invalidate_caches()
        return folder / f"{name}.py"

    yield write
    for name in set(sys.modules) - known:
        if name.startswith("cai_course.tmp"):
            del sys.modules[name]
            if hasattr(cai_course, name.split(".")[1]):
                delattr(cai_course, name.split(".")[1])


@pytest.fixture
def gap(course):
    """The experiment `tmp-gap` in the module `tmpgap`, with the helper `tmphelp`."""
    course("tmphelp", HELPER)
    course("tmpgap", MODULE.format(name="tmp-gap", helper="tmphelp"))
    return course


def measure(seed):
    return {"gap": seed + 1.}


def make(**changes):
    settings = dict(name="tmp-here", chapter="02", claim="It grows.", source="a test", run=measure, value="gap", predicts=">")
    return Experiment(**{**settings, **changes})


def rows_of(values):
    return [{"seed": seed, "gap": value} for seed, value in enumerate(values)]


def without_seconds(path: Path) -> bytes:
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b' "seconds":'))


# --- verdicts ---

# 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5) = 0.70711; t with 4 degrees of freedom is 2.7764 (95%) and 2.1318 (90%),
# so the intervals are 3 -+ 1.9632 and 3 -+ 1.5074.
@pytest.mark.parametrize("predicts, threshold, margin, word", [
    (">", 1.03, None, "agrees"), (">", 1.04, None, "inconclusive"), (">", 4.95, None, "inconclusive"), (">", 4.97, None, "disagrees"),
    ("<", 4.97, None, "agrees"), ("<", 4.95, None, "inconclusive"), ("<", 1.04, None, "inconclusive"), ("<", 1.03, None, "disagrees"),
    ("=", 3, 1.51, "agrees"), ("=", 3, 1.50, "inconclusive"),   # the 95% interval, 3 -+ 1.96, would not do
    ("=", 2, 2.51, "agrees"), ("=", 2, 2.50, "inconclusive"),   # shifted: 1.4926 to 4.5074 within 2 -+ margin
    ("=", 0, 1.49, "disagrees"), ("=", 0, 1.50, "inconclusive"), ("=", 6, 1.49, "disagrees"),
])
def test_verdicts_worked_out_by_hand(predicts, threshold, margin, word):
    found, said = judge_rows(make(predicts=predicts, threshold=threshold, margin=margin), rows_of([1, 2, 3, 4, 5]))
    half = 1.5074 if predicts == "=" else 1.9632
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    assert found.level == pytest.approx(.9 if predicts == "=" else .95) and (found.seeds, found.n) == (5, 5)
    assert said == word


def test_one_seed_or_equal_values_say_nothing_without_bounds():
    for values in ([.7], [.7, .7, .7, .7, .7]):
        found, word = judge_rows(make(), rows_of(values))
        assert (found.low, found.high, word) == (-math.inf, math.inf, "inconclusive")


def test_equal_values_within_bounds_get_the_wilson_interval():
    found, word = judge_rows(make(predicts="<", threshold=.3, bounds=(0, 1)), rows_of([0.] * 10))
    assert (found.low, found.high) == pytest.approx((0, 1.95996**2 / (10 + 1.95996**2)), abs=1e-4) # 0 of 10
    assert word == "agrees"
    assert judge_rows(make(predicts="<", threshold=.27, bounds=(0, 1)), rows_of([0.] * 10))[1] == "inconclusive"


def test_a_value_outside_its_bounds_names_the_seed():
    with pytest.raises(CourseError, match=r"seed 2: gap is 1.5, outside its bounds \(0.0, 1.0\)"):
        judge_rows(make(bounds=(0, 1)), rows_of([0., 1., 1.5]))


def test_nine_of_ten_intervals_of_ninety_percent_hold_the_truth():
    rng, hits = np.random.default_rng(0), 0
    claim = make(predicts="=", margin=1.)
    for _ in range(200):
        found, _ = judge_rows(claim, rows_of(rng.normal(0, 1, 4)))
        hits += found.low <= 0 <= found.high
    assert 165 <= hits <= 194 # 180 expected; 3.5 standard deviations


# --- running ---

def test_a_result_is_stored_loaded_and_shown(gap, tmp_path):
    result = run_experiment("tmp-gap", out=tmp_path, progress=False)
    assert [row["seed"] for row in result.rows] == [0, 1, 2, 3] and result.rows[3] == {"seed": 3, "gap": 1.3, "curve": [3., 6.]}
    assert result.verdict == "agrees" and not result.stale and result.estimate.value == pytest.approx(1.15)
    assert result.column("gap").tolist() == [1., 1.1, 1.2, 1.3] and result.column("curve").shape == (4, 2)
    again = load_result("tmp-gap", tmp_path)
    assert again == result
    for text in (str(result), result._repr_html_()):
        for part in ("The gap is positive.", "a test", "1.150 [", "95% interval over 4 seeds", "agrees"):
            assert part in text
        assert "stale" not in text
    with pytest.raises(CourseError, match="no column 'loss'.*seed, gap, curve"):
        result.column("loss")
    assert os.listdir(tmp_path / "modules") and sorted(p.name for p in tmp_path.iterdir()) == ["modules", "tmp-gap.json"]


def test_the_stored_file_holds_what_decides_it(gap, tmp_path):
    run_experiment("tmp-gap", out=tmp_path, progress=False)
    record = json.loads((tmp_path / "tmp-gap.json").read_text(encoding="utf-8"))
    assert list(record) == ["format", "name", "chapter", "claim", "source", "config", "hashes", "versions", "rows", "estimate", "verdict",
                            "seconds"]
    assert record["config"] == dict(seeds=[0, 1, 2, 3], value="gap", predicts=">", threshold=0., margin=None, bounds=None, uses=[], models=[])
    assert len(record["hashes"]["code"]) == 64 and {"python", "numpy", "torch"} <= set(record["versions"])


def test_a_model_and_the_data_of_the_world_count(course):
    course("tmpworld", MODULE.format(name="tmp-world", helper="tmphelp").replace('seeds=4', 'seeds=4, uses=("world",), models=("pocket-t5",)'))
    course("tmphelp", HELPER)
    found = fingerprints(find_experiment("tmp-world"))
    assert set(found) == {"code", "data/world", "models/pocket-t5"} and all(len(each) == 64 for each in found.values())
    course("tmpworld", MODULE.format(name="tmp-world", helper="tmphelp").replace('seeds=4', 'seeds=4, models=("pocket-gpt",)'))
    with pytest.raises(CourseError, match="names the model 'pocket-gpt', which the course does not ship"):
        fingerprints(find_experiment("tmp-world"))


def test_a_run_that_raised_goes_on_and_ends_with_the_same_bytes(gap, tmp_path, monkeypatch):
    run_experiment("tmp-gap", out=tmp_path / "whole", progress=False)
    module, calls = importlib.import_module("cai_course.tmphelp"), []
    shift = module.shift

    def failing(seed):
        calls.append(seed)
        if seed == 2 and calls.count(2) == 1:
            raise ZeroDivisionError("the power went out")
        return shift(seed)

    monkeypatch.setattr(importlib.import_module("cai_course.tmpgap"), "shift", failing)
    folder = tmp_path / "stopped"
    with pytest.raises(ZeroDivisionError):
        run_experiment("tmp-gap", out=folder, progress=False)
    assert os.listdir(folder) == [".tmp-gap.partial.jsonl"]
    run_experiment("tmp-gap", out=folder, progress=False)
    assert calls == [0, 1, 2, 2, 3]
    assert os.listdir(folder) == ["tmp-gap.json"]
    assert without_seconds(folder / "tmp-gap.json") == without_seconds(tmp_path / "whole" / "tmp-gap.json")


@pytest.mark.parametrize("damage", ["", "{", '{"hashes": 1}\n', "\xff"])
def test_rows_that_are_torn_or_of_other_code_are_measured_anew(gap, tmp_path, damage):
    run_experiment("tmp-gap", out=tmp_path / "whole", progress=False)
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / ".tmp-gap.partial.jsonl").write_bytes(damage.encode("latin-1"))
    run_experiment("tmp-gap", out=folder, progress=False)
    assert without_seconds(folder / "tmp-gap.json") == without_seconds(tmp_path / "whole" / "tmp-gap.json")


def test_more_seeds_use_what_is_there_and_fewer_keep_it(gap, tmp_path, monkeypatch):
    run_experiment("tmp-gap", out=tmp_path, progress=False)
    calls, module = [], importlib.import_module("cai_course.tmpgap")
    shift = module.shift
    monkeypatch.setattr(module, "shift", lambda seed: calls.append(seed) or shift(seed))
    assert len(run_experiment("tmp-gap", seeds=6, out=tmp_path, progress=False).rows) == 6
    assert calls == [4, 5]
    before = (tmp_path / "tmp-gap.json").read_bytes()
    few = run_experiment("tmp-gap", seeds=2, out=tmp_path, progress=False)
    assert len(few.rows) == few.estimate.seeds == 2 and few.config["seeds"] == [0, 1]
    assert (tmp_path / "tmp-gap.json").read_bytes() == before and calls == [4, 5]
    assert not load_result("tmp-gap", tmp_path).stale # more seeds than the experiment asks for
    run_experiment("tmp-gap", out=tmp_path, progress=False, fresh=True)
    assert calls == [4, 5, 0, 1, 2, 3]


def test_claims_about_the_same_measurement_share_it(tmp_path):
    asked = []
    def once(seed):
        asked.append(seed)
        return {"gap": 1. + seed / 10, "other": 2. + seed}
    def again(seed): return once(seed)
    for name, value, run in (("tmp-one", "gap", once), ("tmp-two", "other", once), ("tmp-three", "gap", again)):
        make(name=name, value=value, run=run, seeds=3)
    first = run_experiment("tmp-one", out=tmp_path, progress=False)
    second = run_experiment("tmp-two", out=tmp_path, progress=False)
    assert asked == [0, 1, 2] and [row["other"] for row in second.rows] == [2., 3., 4.] and second.rows == first.rows
    run_experiment("tmp-three", out=tmp_path, progress=False)
    assert asked == [0, 1, 2] * 2, "another function is another measurement"
    run_experiment("tmp-two", out=tmp_path, progress=False, fresh=True)
    assert asked == [0, 1, 2] * 3


def test_a_killed_process_goes_on(tmp_path):
    program = textwrap.dedent("""
        import os, sys
        from cai_course.experiments import Experiment, run_experiment
        def measure(seed):
            if seed == 3 and sys.argv[2] == "killed": os.kill(os.getpid(), 9)
            return {"x": seed / 7}
        Experiment(name="tmp-kill", chapter="02", claim="A.", source="b", run=measure, value="x", predicts=">", seeds=6)
        run_experiment("tmp-kill", out=sys.argv[1], progress=False)
    """)
    script = tmp_path / "script.py"
    script.write_text(program)
    root = str(Path(cai_course.__file__).parents[1])

    def run(folder, how):
        return subprocess.run([sys.executable, str(script), str(tmp_path / folder), how], env=dict(os.environ, PYTHONPATH=root),
                              capture_output=True, text=True)
    assert run("a", "killed").returncode == -9
    assert sorted(os.listdir(tmp_path / "a")) == [".tmp-kill.partial.jsonl"]
    for folder in "ab":
        done = run(folder, "whole")
        assert done.returncode == 0, done.stderr
    assert without_seconds(tmp_path / "a" / "tmp-kill.json") == without_seconds(tmp_path / "b" / "tmp-kill.json")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder that cannot be written")
def test_a_folder_that_cannot_be_written_names_out(gap, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    with pytest.raises(CourseError, match="--out"):
        run_experiment("tmp-gap", out=folder, progress=False)


def test_a_disk_that_refuses_names_out(gap, tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(experiments, "write_atomic", refuse)
    with pytest.raises(CourseError, match="permission denied.*--out"):
        run_experiment("tmp-gap", out=tmp_path, progress=False)


def test_equal_values_without_bounds_are_explained(tmp_path):
    def run(seed): return {"gap": 0.}
    make(run=run, predicts="<", threshold=.5)
    result = run_experiment("tmp-here", out=tmp_path, progress=False)
    assert result.verdict == "inconclusive" and "every seed gave the same value" in str(result)
    make(run=run, predicts="<", threshold=.5, bounds=(0, 1))
    result = run_experiment("tmp-here", out=tmp_path, progress=False)
    assert result.verdict == "agrees" and "every seed" not in str(result)


# --- stale results ---

@pytest.mark.parametrize("module, old, new, stale", [
    ("tmpgap", "# a comment", "# another comment", False),
    ("tmpgap", '"One seed."', '"One seed, measured."', False),
    ("tmpgap", "def unused(): return 1", "def unused(): return 2", False),
    ("tmpgap", "def unused(): return 1", "TABLE: list = ['words']\nA, B = 1, 2", False),
    ("tmpgap", "FACTOR = 1.", "FACTOR, OTHER = 1.5, 2", True),
    ("tmpgap", "FACTOR = 1.", "FACTOR = 1.\nFACTOR += 1", True),
    ("tmpgap", "FACTOR = 1.", "FACTOR: float = 2.", True),
    ("tmpgap", "import math\n", "import math, os\n", False),
    ("tmpgap", "def measure(seed):", "def measure( seed, ):", False),
    ("tmpgap", "Give 0 or more.", "Count from 0.", False),
    ("tmpgap", "if seed < 0:", "if seed < -1:", True),
    ("tmphelp", '"not used by the run"', '"still not"', False),
    ("tmpgap", "/ 10", "/ 11", True),
    ("tmpgap", "FACTOR = 1.", "FACTOR = 2.", True),
    ("tmphelp", "float(seed)", "float(seed + 1)", True),
    ("tmphelp", "2 * seed", "3 * seed", True),           # reached through the module, inside the function
    ("tmphelp", "\ndef elsewhere", "\nimport os\nos.environ.get('X')\n\ndef elsewhere", True), # runs on import
    ("tmpgap", "The gap is positive.", "The gap is above 0.", True),
    ("tmpgap", 'predicts=">"', 'predicts=">", threshold=1', True),
    ("tmpgap", "seeds=4", "seeds=5", True),
    ("tmpgap", "seeds=4", "seeds=3", False),
])
def test_a_result_is_stale_when_what_decides_it_changes(gap, tmp_path, module, old, new, stale):
    run_experiment("tmp-gap", out=tmp_path, progress=False)
    path = tmp_path / "modules" / f"{module}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    gap(module, text.replace(old, new))
    result = load_result("tmp-gap", tmp_path)
    assert result.stale is stale and bool(result.why) is stale
    assert ("stale" in str(result)) is stale
    if stale:
        assert "run `cai-course experiment tmp-gap`" in result.why
        assert not run_experiment("tmp-gap", out=tmp_path, progress=False).stale


def test_a_module_in_uses_that_the_run_does_not_import_counts_whole(gap, tmp_path):
    gap("tmpgap", MODULE.format(name="tmp-gap", helper="tmphelp").replace("seeds=4", 'seeds=4, uses=("tmpother",)'))
    with pytest.raises(CourseError, match="there is no cai_course.tmpother"):
        find_experiment("tmp-gap")
    gap("tmpother", "def far(): return 1\n")
    run_experiment("tmp-gap", out=tmp_path, progress=False)
    gap("tmpother", "def far():\n    'Far.'\n    return 1 # as before\n")
    assert not load_result("tmp-gap", tmp_path).stale
    gap("tmpother", "def far(): return 2\n")
    assert "code changed since" in load_result("tmp-gap", tmp_path).why


def test_other_words_cost_no_measuring(gap, tmp_path, monkeypatch):
    run_experiment("tmp-gap", out=tmp_path, progress=False)
    gap("tmpgap", MODULE.format(name="tmp-gap", helper="tmphelp").replace("The gap is positive.", "The gap lies above 1.")
        .replace('predicts=">"', 'predicts=">", threshold=1.'))
    monkeypatch.setattr(importlib.import_module("cai_course.tmpgap"), "shift", lambda seed: 1 / 0)
    result = run_experiment("tmp-gap", out=tmp_path, progress=False)
    assert (result.claim, result.verdict) == ("The gap lies above 1.", "inconclusive") and not result.stale


def test_the_fingerprint_is_the_same_under_every_python():
    """Trees differ between versions of Python; what counts of them must not. These digits come from 3.10, 3.11, 3.12 and 3.13."""
    tree = experiments.ast.parse(textwrap.dedent('''
        from x import y
        @y(1)
        class A(B):
            "Words."
            z: int = 0
            async def f(self, a, /, b=1, *c, d=None, **e) -> "A": return f"{a!r:>{b}} x" f"{c=}"
        def g(x): return [i for i in x if (j := i)] + {**x, "k": ...}["k"] + x[1:2, ::3] + (lambda: "\\u00e9\\U0001f600")() if 0 else -1.5e3j
        try: pass
        except (A, B) as e: raise C from e
        with a as b, c: del b
        match x:
            case {"a": [1, *_], **r} if r: pass
    '''))
    assert experiments.hashlib.sha256(experiments._normal(tree).encode()).hexdigest()[:16] == "062b6e0aba84af2e"


# --- bad input ---

def test_an_unknown_name_lists_what_there_is(gap):
    with pytest.raises(CourseError, match="there is no experiment 'tmp-gab'; there is .*tmp-gap"):
        run_experiment("tmp-gab")
    with pytest.raises(CourseError, match="no experiment 'tmp-gab'"):
        load_result("tmp-gab")


def test_a_missing_or_damaged_result_says_what_to_run(gap, tmp_path):
    with pytest.raises(CourseError, match="no stored result.*cai-course experiment tmp-gap"):
        load_result("tmp-gap", tmp_path)
    for text in ("", "[]", "{}", '{"estimate": 3}', "\xff"):
        (tmp_path / "tmp-gap.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CourseError, match="tmp-gap"):
            load_result("tmp-gap", tmp_path)
    assert not run_experiment("tmp-gap", out=tmp_path, progress=False).stale


@pytest.mark.parametrize("seeds", [0, -1, 2.5, "3", True])
def test_a_number_of_seeds_that_cannot_be(gap, tmp_path, seeds):
    with pytest.raises(CourseError, match="seeds is .*whole number of at least 1.*Leave it out to run 4"):
        run_experiment("tmp-gap", seeds=seeds, out=tmp_path)


@pytest.mark.parametrize("row, said", [
    (3., "returned '3.0'; it must return a dictionary"), (None, "returned 'None'"), ({1: 2.}, "must return a dictionary"),
    ({"gap": math.nan}, "'gap' is nan"), ({"gap": 1., "loss": math.inf}, "'loss' is inf"), ({"gap": "1"}, "'gap' is 1; it must be a finite"),
    ({"gap": 1., "curve": [1., [2.]]}, "'curve' is"), ({"gap": [1.]}, "the number 'gap'"), ({"other": 1.}, "returned 'other', but"),
    ({}, "returned nothing"), ({"gap": 1., "seed": 7}, "returned the seed 7"), ({"gap": 1., "curve": [math.nan]}, "'curve' is"),
    ({"gap": None}, "'gap' is None"),
])
def test_a_run_that_returns_something_else_names_the_seed(tmp_path, monkeypatch, row, said):
    def run(seed):
        return {"gap": 1.} if seed < 2 else row
    monkeypatch.setitem(EXPERIMENTS, "tmp-here", make(run=run))
    with pytest.raises(CourseError) as caught:
        run_experiment("tmp-here", out=tmp_path, progress=False)
    assert "experiment 'tmp-here', seed 2" in str(caught.value) and said in str(caught.value)
    lines = (tmp_path / ".tmp-here.partial.jsonl").read_text().splitlines()
    assert len(lines) == 3 # what was measured before is kept


def test_array_scalars_and_truth_values_are_numbers(tmp_path):
    def run(seed):
        return {"gap": np.float32(.5), "won": True, "count": np.int64(3), "curve": np.arange(3), "seed": seed}
    make(run=run)
    row = run_experiment("tmp-here", seeds=1, out=tmp_path, progress=False).rows[0]
    assert row == {"seed": 0, "gap": .5, "won": 1., "count": 3., "curve": [0., 1., 2.]}


@pytest.mark.parametrize("changes, said", [
    (dict(name="GAE"), "a name such as"), (dict(name=3), "a name such as"), (dict(chapter=2), "a chapter as '02', not 2"), (dict(claim=" "), "a claim"),
    (dict(source=""), "a source"), (dict(run=lambda seed: {}), "a function with a name"), (dict(run=3), "a function with a name"),
    (dict(value=None), "value"), (dict(predicts=">="), "predicts to be"), (dict(threshold=math.nan), "a threshold"),
    (dict(threshold=None), "a threshold"), (dict(predicts="="), "a margin above 0"), (dict(predicts="=", margin=0), "a margin above 0"),
    (dict(margin=1.), "no margin to predict '>'"), (dict(seeds=1), "seeds as a whole number"), (dict(seeds=10.), "seeds as a whole number"),
    (dict(uses="rl"), "uses as a tuple"), (dict(uses=("rll",)), "there is no cai_course.rll"), (dict(models=["pocket-t5"]), "models as a tuple"),
    (dict(bounds=(1, 0)), "bounds as"), (dict(bounds=3), "bounds as"),
])
def test_a_part_that_cannot_be_is_refused_when_the_experiment_is_made(changes, said):
    before = dict(EXPERIMENTS)
    with pytest.raises(CourseError, match="experiment .* needs ") as caught:
        make(**changes)
    assert said in str(caught.value) and EXPERIMENTS == before


# --- the registry ---

def test_a_name_belongs_to_one_experiment(gap):
    find_experiment("tmp-gap")
    with pytest.raises(CourseError, match=r"'tmp-gap' is taken by an experiment of chapter 02 \(cai_course.tmpgap.measure\)"):
        make(name="tmp-gap", chapter="03")

    def other(seed): return {"gap": 1.}
    with pytest.raises(CourseError, match="is taken"):
        make(name="tmp-gap", run=other)
    assert make(name="tmp-gap").run is measure # the chapter's own cell, run after its module was imported
    assert EXPERIMENTS["tmp-gap"].run.__module__ == "cai_course.tmpgap"


def test_two_modules_cannot_share_a_name(gap):
    gap("tmpmore", MODULE.format(name="tmp-gap", helper="tmphelp"))
    with pytest.raises(CourseError, match="two experiments are called 'tmp-gap', in tmpgap and tmpmore"):
        experiment_names()
    find = importlib.import_module
    find("cai_course.tmpgap")
    with pytest.raises(CourseError, match="is taken"):
        find("cai_course.tmpmore")


def test_a_name_must_be_plain(gap):
    gap("tmpmore", MODULE.format(name="tmp-more", helper="tmphelp").replace('name="tmp-more"', 'name="tmp" + "-more"'))
    with pytest.raises(CourseError, match="cai_course.tmpmore, line .*without a plain name"):
        experiment_names()


def test_a_run_that_is_not_at_the_top_of_its_module_is_refused(gap, tmp_path):
    gap("tmpgap", MODULE.format(name="tmp-gap", helper="tmphelp").replace("def measure", "def renamed")
        .replace("run=measure", "run=(lambda f: (setattr(f, '__name__', 'gone'), f)[1])(renamed)"))
    with pytest.raises(CourseError, match="no function 'gone' at its top level"):
        run_experiment("tmp-gap", out=tmp_path, progress=False)


def test_names_are_found_without_importing(gap):
    assert experiment_names()["tmp-gap"] == "tmpgap" and "cai_course.tmpgap" not in sys.modules
    done = subprocess.run([sys.executable, "-c", "import sys\nfrom cai_course.experiments import experiment_names\nexperiment_names()\n"
                           "assert 'torch' not in sys.modules"], capture_output=True, text=True, cwd=Path(cai_course.__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_the_list_holds_missing_found_and_stale_results(gap, tmp_path, monkeypatch):
    gap("tmpmore", MODULE.format(name="tmp-more", helper="tmphelp").replace('chapter="02"', 'chapter="01"'))
    monkeypatch.setattr(experiments, "experiment_names", lambda: {"tmp-gap": "tmpgap", "tmp-more": "tmpmore"})
    run_experiment("tmp-gap", out=tmp_path, progress=False)
    missing, found = list_results(tmp_path)
    keys = ["name", "claim", "source", "value", "low", "high", "seeds", "verdict", "seconds", "stale"]
    assert list(missing) == list(found) == keys
    assert missing == dict(dict.fromkeys(keys), name="tmp-more", claim="The gap is positive.", source="a test", stale=True)
    assert found["value"] == pytest.approx(1.15) and (found["seeds"], found["verdict"], found["stale"]) == (4, "agrees", False)
    run_experiment("tmp-more", seeds=1, out=tmp_path, progress=False)
    alone, _ = list_results(tmp_path)
    assert (alone["low"], alone["high"], alone["verdict"], alone["stale"]) == (None, None, "inconclusive", True) # one seed of four
    json.dumps(list_results(tmp_path), allow_nan=False)
