"""What a maintainer fears about exercises: a blank that raises, a wrong answer that passes, the wrong hint."""
import copy
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from cai_course.errors import CourseError
from cai_course.exercises import (BLANK, EXERCISES, MARK, Check, Exercise, Result, is_blank, progress, quiz, show_solutions,
                                  solutions_shown, without_solution, work_dir)

X = np.array([1., 2., 6.])


def right(x):
    return x - x.mean()


MISTAKES = {"sign": (lambda x: x.mean() - x, "Which is taken from which?"),
            "median": (lambda x: x - np.median(x), "The mean, not the middle one."),
            "forgotten": (lambda x: x, "Nothing was taken away.")}


def make(**changes):
    parts = dict(id="98-center", title="Center <b>x</b>", difficulty="easy", minutes=2,
                 check=Check(lambda f: f(X.copy()), right, MISTAKES, "Centered."),
                 hints=("Look at the mean.", "x - ..."),
                 solution="def center(x):\n    return x - x.mean()  # <b>")
    return Exercise(**{**parts, **changes})


@pytest.fixture(autouse=True)
def own_work(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delenv("CAI_COURSE_SOLUTIONS", raising=False)
    before = dict(EXERCISES)
    yield
    show_solutions(True)
    EXERCISES.clear()
    EXERCISES.update(before)


def test_solution_passes_and_each_mistake_gets_its_own_hint():
    exercise = make()
    assert exercise.audit() == []
    assert exercise.grade(right).passed and exercise.grade(right).message == "Centered."
    for name, (wrong, hint) in MISTAKES.items():
        result = exercise.grade(wrong)
        assert not result.passed and result.mistake == name and result.message == hint


def test_audit_finds_mistakes_that_cannot_be_told_apart():
    blind = make(check=Check(lambda f: f(np.array([1., 2., 3.])), right, MISTAKES))     # mean = median here
    assert any("'median': passes" in p for p in blind.audit())
    twins = {"a": MISTAKES["sign"], "b": (lambda x: -right(x), "other hint")}
    assert make(check=Check(lambda f: f(X), right, twins)).audit() == ["'b': is taken for 'a'"]
    assert make(check=lambda answer: Result(True, "")).audit()


@pytest.mark.parametrize("solution,says", [
    ("def center(x):\n    return x", "does not pass: Not yet. Nothing was taken away."),
    ("def center(x):\n    return x - np.mean(x)", "NameError"),      # imports nothing, so it cannot be run as it stands
    ("def center(x):\n    return x - x.mean()\ny = 3", "does not pass"),  # the last name is the answer
    ("for x in [1]: pass", "defines nothing"), ("def center(x:", "SyntaxError")],
    ids=["wrong", "no import", "another name", "nothing", "syntax"])
def test_audit_runs_the_solution(solution, says):
    (problem,) = make(solution=solution).audit()
    assert says in problem


@pytest.mark.parametrize("solution", ["import numpy as np\ncenter = lambda x: x - np.mean(x)", "center: object = lambda x: x - x.mean()",
                                      "def mean(x): return x.mean()\ndef center(x): return x - mean(x)"])
def test_the_solution_is_the_last_name(solution):
    exercise = make(solution=solution)
    assert exercise.audit() == [] and exercise.grade(exercise.solve(), record=False).passed


def stub(x):
    """A stub with a docstring."""
    ...


@pytest.mark.parametrize("answer", [BLANK, ..., stub, lambda x: ..., lambda x: BLANK, lambda x: x - BLANK,
                                    lambda x: np.exp(BLANK),
                                    lambda x: math.exp(BLANK), lambda x: sum(BLANK, BLANK), [1, BLANK], {"a": ...},
                                    lambda x: BLANK.mean(axis=0)[1:] ** 2 / 3, lambda x: [v * BLANK for v in x]])
def test_a_blank_never_raises_and_records_nothing(answer):
    result = make().grade(answer)
    assert result.blank and not result.passed and str(result).startswith("Not solved yet.")
    assert progress() == {}


def test_blank_absorbs_arrays_and_tensors():
    torch = pytest.importorskip("torch")
    for thing in (np.ones(2) * BLANK, BLANK @ np.ones(2), 1 - BLANK, -BLANK, BLANK > 3, np.mean(BLANK),
                  torch.ones(2) * BLANK,
                  BLANK - torch.ones(2), torch.exp(BLANK), BLANK.anything.at.all(1)[2]):
        assert is_blank(thing)
    assert not BLANK and list(BLANK) == [] and repr(BLANK) == "BLANK"
    assert copy.deepcopy([BLANK])[0] is BLANK and pickle.loads(pickle.dumps(BLANK)) is BLANK


@pytest.mark.parametrize("answer", [None, 0, "", [], False, np.zeros(3), right, lambda: 0, lambda x: "text", len, dict])
def test_real_answers_are_not_blank(answer):
    assert not is_blank(answer)


@pytest.mark.parametrize("answer,says", [(lambda x: None if len(x) else 1, "return missing"),
                                         (lambda x: 3., r"shape \(\)"),
                                         (lambda x: x / 0, "NaN or infinity"), (lambda x: x[:2], r"shape \(2,\)"),
                                         (lambda x, y: x, "TypeError"),
                                         (lambda x: x - x.mean() + [0, 1, 0], "1 of 3 entries"),
                                         (lambda x: "a", "str"), (5, "TypeError"), (lambda x: [[1], [2, 3]], "list")])
def test_an_unknown_mistake_is_described_without_the_answer(answer, says):
    with np.errstate(all="ignore"):
        result = make().grade(answer)
    assert not result.passed and not result.blank and result.mistake == ""
    __import__("re").search(says, result.message) or pytest.fail(result.message)


def test_values_of_many_kinds():
    torch = pytest.importorskip("torch")
    def passes(answer, solution): return Check(lambda a: a, solution, {})(answer).passed
    assert passes(torch.tensor([1., 2.], requires_grad=True), [1., 2.]) and passes(np.float32(.1), .1)
    assert passes({"a": [1, (2, 3)]}, {"a": [1, (2, 3)]}) and not passes({"a": 1}, {"a": 1, "b": 2})
    assert passes("b", "b") and not passes("a", "b") and not passes(1, "1") and not passes("1", 1)
    assert passes({1, 2}, {2, 1}) and passes(["x", "y"], ["x", "y"]) and not passes(["x"], ["x", "y"])
    assert passes(True, True) and passes(np.True_, True) and not passes(False, True) and passes(None, None)
    assert not passes(1.01, 1.) and "too large" in Check(lambda a: a, 1., {})(1.01).message
    assert "Every sign" in Check(lambda a: a, [1., -2.], {})([-1., 2.]).message


def test_progress_counts_and_survives_damage(tmp_path):
    exercise = make()
    exercise.grade(MISTAKES["sign"][0])
    exercise.grade(right)
    exercise.grade(MISTAKES["sign"][0])                                 # once passed, always passed
    assert progress() == {"98-center": {"passed": True, "attempts": 3}}
    exercise.grade(right, record=False)
    assert progress()["98-center"]["attempts"] == 3
    path = work_dir() / "progress.json"
    for damage in ('{"exercises": {"98-', "[]", '{"exercises": 3}', "\x00\xff", "[" * 100_000):
        path.write_text(damage, encoding="utf-8")
        assert progress() == {}
        assert exercise.grade(right).passed and progress()["98-center"]["attempts"] == 1
        assert path.with_suffix(".damaged.json").read_text(encoding="utf-8") == damage
    assert json.loads(path.read_text())["version"] == 1


def test_progress_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAI_COURSE_WORK", str(tmp_path / "file" / "below"))
    result = make().grade(right)
    assert result.passed and "Progress was not stored" in result.message


def test_work_dir_follows_the_project(monkeypatch, tmp_path):
    monkeypatch.delenv("CAI_COURSE_WORK")
    (tmp_path / "project" / "nbs").mkdir(parents=True)
    (tmp_path / "project" / "settings.ini").write_text("")
    monkeypatch.chdir(tmp_path / "project" / "nbs")
    assert work_dir() == tmp_path / "project" / "work" and not work_dir().exists()


def test_a_used_work_folder_is_found_from_inside_and_from_beside(monkeypatch, tmp_path):
    """Without a project file around it, a notebook in `work/` and a terminal beside it mean the same folder."""
    monkeypatch.delenv("CAI_COURSE_WORK")
    monkeypatch.chdir(tmp_path)
    make().grade(right)
    assert (tmp_path / "work" / MARK).exists() and (tmp_path / "work" / "progress.json").exists()
    (tmp_path / "work" / "deeper").mkdir()
    for folder in ("work", "work/deeper"):
        monkeypatch.chdir(tmp_path / folder)
        assert work_dir() == tmp_path / "work" and progress()["98-center"]["passed"]


def test_two_processes_lose_no_attempt(tmp_path):
    code = "from cai_course.exercises import _record\nfor i in range(20): _record('97-x', False)"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert progress()["97-x"]["attempts"] == 40


def test_card_is_escaped_and_folded():
    exercise = make(hints=("<i>one</i>", "two"))
    card = exercise._repr_html_()
    assert card.count("<details>") == 3 and "<b>x</b>" not in card and "<i>one" not in card and "# &lt;b&gt;" in card
    assert (exercise.hint(), exercise.hint(2)) == ("<i>one</i>", "two") and EXERCISES["98-center"] is exercise
    assert "<script>" not in Result(False, "<script>")._repr_html_()
    with pytest.raises(CourseError, match="hints 1 and 2"):
        exercise.hint(3)


def test_a_card_without_its_solution(monkeypatch):
    exercise = make()
    card = exercise._repr_html_()
    show_solutions(False)
    bare = exercise._repr_html_()
    assert bare.count("<details>") == 2 and "x.mean()" not in bare and "Solution" not in bare
    assert without_solution(card) == bare == without_solution(bare)
    show_solutions()
    assert exercise._repr_html_() == card
    for value in ("0", "false", "No", "OFF"):
        monkeypatch.setenv("CAI_COURSE_SOLUTIONS", value)
        assert not solutions_shown() and exercise._repr_html_() == bare
    for value in ("1", "yes", ""):
        monkeypatch.setenv("CAI_COURSE_SOLUTIONS", value)
        assert solutions_shown()


def test_a_solution_that_holds_markup_is_cut_out_whole():
    tricky = "text = '</code></pre></details><details>'\ndef center(x):\n    return x - x.mean()"
    card = make(solution=tricky)._repr_html_()
    assert without_solution(card + card).count("<details>") == 4 and "mean()" not in without_solution(card)


@pytest.mark.parametrize("changes,message", [(dict(id="6-x"), "an id"), (dict(title=" "), "a title"),
                                             (dict(difficulty="x"), "difficulty"),
                                             (dict(minutes=0), "minutes"), (dict(check=3), "check"),
                                             (dict(hints="one"), "two hints"),
                                             (dict(hints=("a",)), "two hints"), (dict(solution=""), "solution")])
def test_an_incomplete_exercise_is_refused(changes, message):
    with pytest.raises(CourseError, match=message):
        make(**changes)


def test_a_check_of_ones_own_may_raise():
    def check(answer): raise KeyError("oops")
    assert "KeyError" in make(check=check).grade(right).message


def test_quiz_explains_every_choice(monkeypatch):
    q = quiz("1 < 2?", ["<yes>", "no"], ["One is less.", "Count again."])
    assert q.choose(0).passed and not q.choose(1).passed and q.choose(1).message == "Count again."
    page = q._repr_html_()
    assert page.count("<details>") == 2 and "<yes>" not in page and "Count again." in page and "1 &lt; 2?" in page
    assert set(q._repr_mimebundle_()) == {"text/html", "text/plain"}
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("JPY_SESSION_NAME", "nb.ipynb")
    live = q._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in live and "<details>" in live["text/html"]
    box = q.widget()
    box.children[2].click()
    assert "Count again." in box.children[-1].value
    monkeypatch.setitem(sys.modules, "ipywidgets", None)                # not installed: the folded page is as good
    assert set(q._repr_mimebundle_()) == {"text/html", "text/plain"}
    monkeypatch.setitem(sys.modules, "ipywidgets", object())            # broken: nobody shall be left guessing
    with pytest.raises(AttributeError):
        q._repr_mimebundle_()
    for number in (2, -1, "0", True):
        with pytest.raises(CourseError, match="it must be a whole number from 0 to 1. Count the choices from 0"):
            q.choose(number)


@pytest.mark.parametrize("args", [("q", ["a"], ["x"]), ("q", ["a", "b"], ["x"]), ("q", ["a", "a"], ["x", "y"]),
                                  ("", ["a", "b"], ["x", "y"]), ("q", ["a", "b"], ["x", " "]),
                                  ("q", ["a", "b"], ["x", "y"], 2)])
def test_an_incomplete_quiz_is_refused(args):
    with pytest.raises(CourseError, match="a quiz needs"):
        quiz(*args)


def test_imports_fast():
    code = "import sys, cai_course.exercises; print([m for m in ('torch', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
