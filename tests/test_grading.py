"""What a teacher fears about a grading command: a right answer refused, a wrong one passed, one learner's code that stops the rest or sees too much."""
import ast
import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from cai_course import grading
from cai_course.cli import completion_script, main, make_parser
from cai_course.errors import CourseError
from cai_course.grading import Grade, find_submissions, grade_csv, grade_folder, grade_table, mistake_table, needed_for, run_tasks, tasks_of

HEAD = ["from cai_course.practice import ch09", "from cai_course.exercises import BLANK"]
RIGHT = "def printed_t(a, sd_a, b, sd_b, n):\n    return (a - b) / ((sd_a**2 + sd_b**2) / (n - 1)) ** .5"
GRADE = "ch09.printed_t.grade(printed_t)"


def book(*cells, head=HEAD) -> dict:
    return {"cells": [{"cell_type": "code", "source": text} for text in (*head, *cells)]}


def put(folder, name, *cells, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(book(*cells, **options)), encoding="utf-8")
    return path


def needed(source: str, *names) -> list:
    return [ast.unparse(each) for each in needed_for(ast.parse(source).body, set(names))]


# --- reading a notebook backwards ---

def test_only_what_an_answer_needs_is_kept():
    assert needed("a = 1\nb = 2\nc = a", "c") == ["a = 1", "c = a"]
    assert needed("import os\nimport sys\nx = sys.path\nprint(x)", "x") == ["import sys", "x = sys.path"]
    assert needed("x = []\nx.append(1)\ny = 2", "x") == ["x = []", "x.append(1)"]
    assert needed("d = {}\nd['a'] = 1\nd['b'].c = 2", "d") == ["d = {}", "d['a'] = 1", "d['b'].c = 2"]
    assert needed("import torch\ntorch.manual_seed(0)\ntorch.save(x)\ny = torch.rand(1)", "y") == [
        "import torch", "torch.manual_seed(0)", "y = torch.rand(1)"]
    assert needed("k = 3\ndef f(x):\n    return g(x) * k\ndef g(x):\n    return x\nslow()", "f") == [
        "k = 3", "def f(x):\n    return g(x) * k", "def g(x):\n    return x"]
    assert needed("for i in range(3):\n    total = i", "total") and needed("if True:\n    def f(): return 1", "f")
    assert needed("with open('x') as f:\n    y = f.read()", "y") and needed("a, (b, *c) = 1, (2, 3)", "c") and needed("(y := 3)", "y") == []
    assert needed("from math import *\nx = sqrt(2)", "x") == ["from math import *", "x = sqrt(2)"]


def test_magics_do_not_stop_the_reading():
    text = "%matplotlib inline\n!pip list\nx = 1\nprinted_t?\n" + RIGHT
    (task,) = tasks_of(book("%%bash\nrm nothing", "%%time\ny = 2", text, "this is no Python", GRADE))
    assert task.exercise == "09-printed-t" and RIGHT.split("(")[0] in task.needed[-1] and "y = 2" in task.above


@pytest.mark.parametrize("head, line", [
    (["from cai_course.practice import ch09 as c"], "c.printed_t.grade(printed_t)"),
    (["import cai_course.practice.ch09 as c"], "print(c.printed_t.grade(printed_t))"),
    (["from cai_course.practice.ch09 import printed_t as m"], "r = m.grade(printed_t)")])
def test_an_exercise_goes_by_many_names(head, line):
    (task,) = tasks_of(book(RIGHT, line, head=head))
    assert task.exercise == "09-printed-t"


def test_what_is_no_exercise_of_the_course_is_no_task():
    lines = ["class Mine:\n    def grade(self, x): return 1", "Mine().grade(2)", "ch09.nothing.grade(3)", "ch77.x.grade(1)", "ch09.printed_t.grade()"]
    assert tasks_of(book(*lines, head=[*HEAD, "from cai_course.practice import ch77"])) == []


def test_the_last_answer_counts():
    (task,) = tasks_of(book("f = 1", GRADE.replace("(printed_t)", "(f)"), RIGHT, GRADE))
    assert task.answer == "printed_t"


# --- running it ---

@pytest.fixture(scope="module")
def class_room(tmp_path_factory):
    """Nine learners, and what was found; one run serves several tests, for each notebook gets a process."""
    folder = tmp_path_factory.mktemp("class")
    put(folder, "ada/09_evaluation.ipynb", "while_training = [].nothing", RIGHT, GRADE)          # a cell that fails, but the answer does not need it
    put(folder, "bob/homework/09_evaluation.ipynb", RIGHT.replace("(n - 1)", "n"), GRADE)
    put(folder, "cleo_09_evaluation.ipynb", "printed_t = BLANK", GRADE)
    put(folder, "dan/a.ipynb", "printed_t = lambda *a: [None for _ in iter(int, 1)]", GRADE, "def other(before, after): return 0.", "ch09.paired_error.grade(other)")
    put(folder, "eve/a.ipynb", "import os\nprinted_t = lambda *a: os._exit(0)", GRADE, "other = BLANK", "ch09.paired_error.grade(other)")
    put(folder, "fay/a.ipynb", "import sys, os\nprint('loud' * 10000)\nos.write(1, b'{}')\nprint(input())", "raise SystemExit", "undefined + 1", GRADE)
    put(folder, "gus/a.ipynb", "def trick():\n    ch09.printed_t = None\n    return 1\nprinted_t = trick()", GRADE)
    put(folder, "hal/09_evaluation.ipynb", RIGHT, GRADE)
    put(folder, "hal/old/09_evaluation.ipynb", "printed_t = BLANK", GRADE)
    put(folder, "hal/.ipynb_checkpoints/09_evaluation.ipynb", "nonsense")
    put(folder, "hal/09_evaluation.bak-1.ipynb", "nonsense")
    (folder / "ida.ipynb").write_text("{", encoding="utf-8")
    return grade_folder(folder, limit=10)


def test_each_learner_gets_what_is_theirs(class_room):
    found = {each.learner: each for each in class_room if each.exercise == "09-printed-t"}
    assert {who: each.status for who, each in found.items()} == {
        "ada": "passed", "bob": "wrong", "cleo": "blank", "dan": "too slow", "eve": "error", "fay": "error", "gus": "wrong", "hal": "passed"}
    assert found["bob"].mistake and found["bob"].message and found["bob"].file == os.path.join("bob", "homework", "09_evaluation.ipynb")
    assert "10 s" in found["dan"].message and "ended" in found["eve"].message


def test_what_hangs_or_dies_does_not_take_the_next_answer_with_it(class_room):
    found = {each.learner: each.status for each in class_room if each.exercise == "09-paired-error"}
    assert found["dan"] == "wrong" and found["eve"] == "blank" and found["ada"] == "missing"


def test_an_unreadable_file_is_a_line_and_not_the_end(class_room):
    (line,) = [each for each in class_room if each.status == "unreadable"]
    assert line.learner == "ida" and "no notebook" in line.message and line.exercise == ""


def test_the_tables_say_it(class_room):
    text = grade_table(class_room)
    assert text.splitlines()[0].split() == ["learner", "09", "solved"] and "ida: ida.ipynb: it is no notebook" in text
    total = len([each for each in class_room if each.learner == "ada"])
    assert ["ada", f"1/{total}", f"1/{total}"] in [line.split() for line in text.splitlines()]
    (line,) = [line for line in mistake_table(class_room).splitlines() if line.startswith("09-printed-t")]
    assert line.startswith("09-printed-t: 2 of 8 solved: ") and "too slow (1)" in line
    rows = list(csv.DictReader(io.StringIO(grade_csv(class_room))))
    assert [row["learner"] for row in rows] == sorted(row["learner"] for row in rows) and rows[0]["09-printed-t"] == "passed"
    assert rows[0]["solved"] == "1"


def test_learners_code_sees_no_key_no_home_and_no_input(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("CAI_COURSE_WORK", str(tmp_path / "work"))
    spy = ("import os\ndef printed_t(*a):\n    raise ValueError(str((os.environ.get('SOME_API_KEY'), "
           "os.path.expanduser('~') == os.getcwd(), os.listdir(os.getcwd()))))")
    (said,) = run_tasks(tasks_of(book(spy, GRADE)))
    assert "(None, True, [])" in said["message"]
    assert not (tmp_path / "work").exists(), "nobody's progress changed"


def test_a_limit_and_a_folder_are_checked_first(tmp_path):
    with pytest.raises(CourseError, match="positive"):
        grade_folder(tmp_path, limit=0)
    with pytest.raises(CourseError, match="no folder"):
        grade_folder(tmp_path / "gone")
    with pytest.raises(CourseError, match="no notebook below"):
        grade_folder(tmp_path)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    put(tmp_path, "elsewhere/x.ipynb", RIGHT)
    put(tmp_path, "class/a.ipynb", RIGHT)
    try:
        (tmp_path / "class" / "b.ipynb").symlink_to(tmp_path / "elsewhere" / "x.ipynb")
        (tmp_path / "class" / "c").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("this system makes no links")
    assert [path.name for _, path in find_submissions(tmp_path / "class")] == ["a.ipynb"]


def test_names_of_learners(tmp_path):
    for name in ("09_evaluation_ada.ipynb", "bob-09_evaluation.ipynb", "09_evaluation.ipynb", "c\x1b[31md.ipynb", "eve/x.ipynb"):
        put(tmp_path, name, RIGHT)
    assert sorted(learner for learner, _ in find_submissions(tmp_path)) == ["09_evaluation", "ada", "bob", "c [31md", "eve"]


def test_a_spreadsheet_runs_no_name():
    assert grade_csv([Grade("=1+1", "09-x", "passed")]).splitlines()[1] == "'=1+1,passed,1"


# --- the command line ---

def test_grade_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grading, "run_tasks", lambda tasks, limit: [dict(status="passed", message="", mistake="")] * len(tasks))
    put(tmp_path, "ada/09_evaluation.ipynb", RIGHT, GRADE)
    assert main(["grade", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "ada" in said.out and "09-printed-t: 1 of 1 solved" in said.out and "1 of 1: ada" in said.err
    assert main(["grade", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"learner", "exercise", "status", "message", "mistake", "file"} == set(rows[0])
    assert main(["grade", str(tmp_path), "--csv"]) == 0 and capsys.readouterr().out.startswith("learner,09-")
    assert main(["grade", str(tmp_path), "--csv", "--json"]) == 2 and main(["grade", str(tmp_path / "gone")]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


def commands() -> dict:
    (found,) = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    return found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_every_option(shell):
    script = completion_script(shell)
    for name, parser in commands().items():
        assert name in script
        for action in parser._actions:
            for option in action.option_strings:
                assert not option.startswith("--") or (f"-l {option[2:]}" if shell == "fish" else option) in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("words, wanted", [(["al"], "align"), (["pretrain", "--only", "pocket-b"], "pocket-bert"), (["grade", "--j"], "--json"),
                                           (["constitution", "c"], "check"), (["experiment", "x", "--fr"], "--fresh")])
def test_the_tab_key_in_bash(words, wanted):
    program = (completion_script("bash") + f"\nCOMP_WORDS=(cai-course {' '.join(words)}); COMP_CWORD={len(words)}\n_cai_course\necho \"${{COMPREPLY[@]}}\"")
    done = subprocess.run(["bash"], input=program, text=True, capture_output=True)
    assert done.stdout.strip() == wanted, done.stderr


def test_grading_imports_without_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, cai_course.grading; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
