"""Every exercise of the course: its check knows right from wrong, its solution runs, and its chapter shows all of it."""
import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from cai_course.exercises import Exercise, Quiz, is_blank
from conftest import ROOT

CHAPTERS = {path.stem[:2]: path for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))}
MODULES = sorted(path.stem[2:] for path in (ROOT / "cai_course" / "practice").glob("ch[0-9][0-9].py"))
NOT_YET = set()  # chapters that still wait for their exercises


def things(number: str, kind: type) -> dict:
    """{name: object} that a practice module defines."""
    module = import_module(f"cai_course.practice.ch{number}")
    return {name: thing for name, thing in vars(module).items() if isinstance(thing, kind)}


def every_exercise() -> list:
    return [pytest.param(number, name, id=thing.id) for number in MODULES for name, thing in things(number, Exercise).items()]


@pytest.fixture(autouse=True)
def own_work(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_COURSE_WORK", str(tmp_path / "work"))
    yield
    assert not (tmp_path / "work").exists(), "a test of an exercise recorded progress"


def test_every_chapter_has_a_practice_module():
    assert set(CHAPTERS) - set(MODULES) == NOT_YET, "a new chapter needs exercises; one that has them leaves NOT_YET"
    assert set(MODULES) <= set(CHAPTERS), "exercises without a chapter"


def test_ids_are_unique():
    ids = [thing.id for number in MODULES for thing in things(number, Exercise).values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("number", MODULES)
def test_a_chapter_has_enough_exercises_and_a_quiz(number):
    exercises, quizzes = things(number, Exercise), things(number, Quiz)
    assert len(exercises) >= 4 and len(quizzes) >= 1
    assert all(thing.id.startswith(f"{number}-") for thing in exercises.values())


@pytest.mark.parametrize("number", MODULES)
def test_a_quiz_explains_every_choice_and_only_one_is_right(number):
    for name, quiz in things(number, Quiz).items():
        results = [quiz.choose(i) for i in range(len(quiz.choices))]
        assert [r.passed for r in results].count(True) == 1, name
        assert len({r.message for r in results}) == len(results), f"{name}: two choices share an explanation"


@pytest.mark.parametrize("number,name", every_exercise())
def test_solution_passes_and_named_mistakes_fail_with_their_own_hint(number, name):
    exercise = things(number, Exercise)[name]
    assert exercise.audit() == []
    mistakes = exercise.check.mistakes
    assert len(mistakes) >= 3, "name at least three wrong answers that really occur"
    hints = [hint for _, hint in mistakes.values()]
    assert all(hint.strip() for hint in hints) and len(set(hints)) == len(hints), "each mistake needs a hint of its own"
    for mistake, (wrong, hint) in mistakes.items():
        result = exercise.grade(wrong, record=False)
        assert (result.passed, result.mistake, result.message) == (False, mistake, hint)


@pytest.mark.parametrize("number,name", every_exercise())
def test_the_folded_solution_runs_by_itself_and_passes(number, name):
    exercise = things(number, Exercise)[name]
    space = {}
    exec(compile(exercise.solution, exercise.id, "exec"), space)
    names = [each.name if hasattr(each, "name") else target.id for each in ast.parse(exercise.solution).body
             for target in getattr(each, "targets", [getattr(each, "target", each)])
             if hasattr(each, "name") or isinstance(target, ast.Name)]
    result = exercise.grade(space[names[-1]], record=False)
    assert result.passed, str(result)


# --- what the chapter shows ---

def code_cells(path: Path) -> list:
    """[(syntax tree, source, text of the stored outputs)] of the code cells."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = re.sub(r"^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]), flags=re.M)
        shown = []
        for output in cell["outputs"]:
            shown += ["".join(output.get("text", ""))] + ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
        found.append((ast.parse(source).body, source, "\n".join(shown)))
    return found


def dotted(node) -> str: # "ch03.clipped_side.grade" of such an expression, else ""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) and dotted(node.value) else ""


def defines(body: list, name: str) -> bool:
    return any(getattr(node, "name", "") == name or name in [dotted(t) for t in getattr(node, "targets", [])] for node in body)


def shown_wrongly(cells: list, number: str, name: str, title: str) -> list: # What the chapter lacks for one exercise
    """Card, blank and grade in this order, each with its stored output."""
    full, problems = f"ch{number}.{name}", []
    cards = [i for i, (body, _, shown) in enumerate(cells) if body and isinstance(body[-1], ast.Expr) and dotted(body[-1].value) == full]
    grades = [(i, node.value) for i, (body, _, _) in enumerate(cells) for node in body[-1:]
              if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and dotted(node.value.func) == f"{full}.grade"]
    if len(cards) != 1 or len(grades) != 1:
        return [f"{full} needs one card (a cell that ends with it) and one grade cell, found {len(cards)} and {len(grades)}"]
    (card,), ((grade, call),) = cards, grades
    if title not in cells[card][2]:
        problems.append(f"the stored card of {full} does not show its title; run the chapter again")
    answer = dotted(call.args[0]) if call.args else ""
    blanks = [i for i, (body, source, _) in enumerate(cells) if defines(body, answer) and re.search(r"\bBLANK\b|\.\.\.", source)]
    if not answer or not any(card < i < grade for i in blanks):
        problems.append(f"no cell between card and grade of {full} defines {answer or 'its answer'!r} with a BLANK")
    if "Not solved yet." not in cells[grade][2]:
        problems.append(f"the stored output of {full}.grade(...) is not 'Not solved yet.': {cells[grade][2][:80]!r}")
    return problems


@pytest.mark.parametrize("number,name", every_exercise())
def test_the_solution_can_be_pasted_over_the_blank(number, name):
    "What the chapter grades is what the solution defines, under the same name."
    (answer,) = [dotted(node.args[0]) for body, _, _ in code_cells(CHAPTERS[number]) for part in body for node in ast.walk(part)
                 if isinstance(node, ast.Call) and dotted(node.func) == f"ch{number}.{name}.grade"]
    assert defines(ast.parse(things(number, Exercise)[name].solution).body, answer), f"the solution does not define {answer}"


@pytest.mark.parametrize("number,name", every_exercise())
def test_the_chapter_shows_card_blank_and_grade(number, name):
    title = things(number, Exercise)[name].title
    assert shown_wrongly(code_cells(CHAPTERS[number]), number, name, title) == []


@pytest.mark.parametrize("number", MODULES)
def test_the_chapter_shows_every_quiz(number):
    cells = code_cells(CHAPTERS[number])
    for name, quiz in things(number, Quiz).items():
        shown = [text for body, _, text in cells if body and isinstance(body[-1], ast.Expr) and dotted(body[-1].value) == f"ch{number}.{name}"]
        assert len(shown) == 1, f"ch{number}.{name} is shown {len(shown)} times"
        assert quiz.question in shown[0], f"the stored output of ch{number}.{name} is an older one"


# --- the checks above find what they are for ---

def page(*cells) -> list:
    return [(ast.parse(source).body, source, shown) for source, shown in cells]


CARD, BLANKED, GRADED = ("ch98.center", "Center x"), ("def center(x):\n    return BLANK", ""), ("ch98.center.grade(center)", "Not solved yet. Fill in")


def test_a_complete_page_passes():
    assert shown_wrongly(page(CARD, BLANKED, GRADED), "98", "center", "Center x") == []
    assert shown_wrongly(page(CARD, ("center = BLANK", ""), GRADED), "98", "center", "Center x") == []


@pytest.mark.parametrize("cells,says", [
    ((BLANKED, GRADED), "needs one card"), ((CARD, BLANKED), "needs one card"), ((CARD, GRADED), "with a BLANK"),
    ((BLANKED, CARD, GRADED), "with a BLANK"), ((CARD, GRADED, BLANKED), "with a BLANK"),
    ((CARD, ("def center(x):\n    return x - x.mean()", ""), GRADED), "with a BLANK"),
    ((CARD, BLANKED, (GRADED[0], "Correct.")), "not 'Not solved yet.'"), ((CARD, BLANKED, (GRADED[0], "")), "not 'Not solved yet.'"),
    (((CARD[0], "Scale x"), BLANKED, GRADED), "does not show its title"),
    ((CARD, BLANKED, ("ch98.center.grade(3)", GRADED[1])), "with a BLANK"),
    ((CARD, BLANKED, ("ch98.scale.grade(center)", GRADED[1])), "needs one card")])
def test_an_incomplete_page_is_found(cells, says):
    assert says in "\n".join(shown_wrongly(page(*cells), "98", "center", "Center x"))


def test_blanks_of_the_chapters_are_blank():
    """What `grade` is given in the chapters is recognized as a blank, not only printed as one once."""
    from cai_course.exercises import BLANK
    for number in MODULES:
        for body, source, _ in code_cells(CHAPTERS[number]):
            for node in body:
                if isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return) and dotted(node.body[-1].value) == "BLANK" \
                        and not node.decorator_list and len(node.body) == 1:
                    space = {"BLANK": BLANK}
                    exec(compile(ast.Module([node], []), "<blank>", "exec"), space)
                    assert is_blank(space[node.name]) or is_blank(space[node.name](*[1.] * len(node.args.args)))
