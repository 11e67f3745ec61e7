"""What a maintainer fears about a learner's folder: work overwritten, a solution that leaks, a name that leads elsewhere."""
import json
import os
import subprocess
import sys

import nbformat
import pytest

from cai_course import exercises, start as module
from cai_course.errors import CourseError
from cai_course.exercises import EXERCISES, Check, Exercise, work_dir
from cai_course.start import chapter_notebooks, find_chapter, practice_exercises, progress_table, progress_text, start
from conftest import ROOT

SECRET = "def center(x):\n    return x - x.mean() # <secret>"


@pytest.fixture(autouse=True)
def own_work(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("CAI_COURSE_SOLUTIONS", raising=False)
    before = dict(EXERCISES)
    yield
    EXERCISES.clear()
    EXERCISES.update(before)
    exercises.show_solutions(True)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of two chapters, the second of which holds a card, and a practice package beside it."""
    (tmp_path / "course" / "nbs").mkdir(parents=True)
    (tmp_path / "course" / "data").mkdir()
    monkeypatch.setattr(module, "data_dir", lambda: tmp_path / "course" / "data")
    write("03_ppo", "# PPO\n\nSee [the end](99_end.ipynb#last) and [nothing](98_gone.ipynb) and [far](https://example.org/a.ipynb).")
    write("99_end", "# The end", card=center())
    return tmp_path / "course" / "nbs"


def center() -> Exercise:
    return Exercise("99-center", "Center x", "easy", 2, Check(lambda f: f(3.), lambda x: x, {}), ("a", "b"), SECRET)


def write(name: str, text: str, card=None) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    if card is not None:
        page = nbformat.v4.new_output("execute_result", data={"text/html": card._repr_html_(), "text/plain": repr(card)})
        book.cells.append(nbformat.v4.new_code_cell("ch99.center", outputs=[page]))
    nbformat.write(book, module.data_dir().parent / "nbs" / f"{name}.ipynb")


# --- copies ---

def test_a_copy_keeps_outputs_and_leads_to_the_same_pages(course):
    (copy,) = start("3")
    assert copy == work_dir() / "03_ppo.ipynb"
    (cell,) = nbformat.read(copy, 4).cells
    assert "[nothing](98_gone.ipynb)" in cell.source and "(https://example.org/a.ipynb)" in cell.source
    (link,) = [part.split("#")[0] for part in cell.source.split("](") if "99_end" in part]
    assert (copy.parent / link).resolve() == (course / "99_end.ipynb").resolve()
    (copy,) = start("99")
    assert json.loads(copy.read_text()) == json.loads((course / "99_end.ipynb").read_text())


@pytest.mark.parametrize("name", ["03", "3", 3, "ppo", "PPO", "03_ppo", "03_ppo.ipynb", " 03 "])
def test_a_chapter_goes_by_many_names(course, name):
    assert find_chapter(name) == "03_ppo"


@pytest.mark.parametrize("name", ["", "4", "po", "../03_ppo", "03_", "index", "0003x", "-3", "²", "*", "03/"])
def test_an_unknown_chapter_is_refused_with_a_list_and_nothing_is_copied(course, name):
    with pytest.raises(CourseError, match="there are 03_ppo, 99_end"):
        start(["3", name])
    assert not work_dir().exists()


def test_nothing_named_and_everything(course):
    with pytest.raises(CourseError, match="no chapter was named; there are 03_ppo, 99_end"):
        start([])
    assert [path.name for path in start("all")] == ["03_ppo.ipynb", "99_end.ipynb"]


def test_a_learners_file_is_never_overwritten(course):
    assert [path.name for path in start(["3", "ppo", "99"])] == ["03_ppo.ipynb", "99_end.ipynb"]
    mine = work_dir() / "03_ppo.ipynb"
    mine.write_text("mine")
    assert start(["3", "99"]) == [] and mine.read_text() == "mine"
    (again,) = start("3", force=True)
    assert again == mine and "# PPO" in mine.read_text() and (work_dir() / "03_ppo.bak-1.ipynb").read_text() == "mine"
    mine.write_text("mine too")
    start("3", force=True)
    assert [(work_dir() / f"03_ppo.bak-{n}.ipynb").read_text() for n in (1, 2)] == ["mine", "mine too"]
    start("3", force=True)
    assert len(list(work_dir().glob("03_ppo.bak-*"))) == 3


def test_two_processes_at_once_lose_nothing(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "03_ppo.ipynb").write_text("mine")
    code = "from cai_course.start import start\nfor _ in range(5): start('3', force=True)"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert (work_dir() / "03_ppo.bak-1.ipynb").read_text() == "mine"
    assert len(list(work_dir().glob("03_ppo.bak-*.ipynb"))) == 10


def test_a_folder_that_cannot_be_written_is_named(course, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAI_COURSE_WORK", str(tmp_path / "file" / "below"))
    with pytest.raises(CourseError, match="cannot be written.*CAI_COURSE_WORK"):
        start("3")


def test_a_course_without_chapters_says_so(course, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "data_dir", lambda: tmp_path / "nowhere" / "data")
    with pytest.raises(CourseError, match="no chapter was found"):
        chapter_notebooks()


# --- without solutions ---

def test_a_copy_without_solutions_holds_none_and_draws_none(course):
    with_it, = start("99")
    assert "&lt;secret&gt;" in with_it.read_text()
    without, = start("99", solutions=False, force=True)
    assert "secret" not in without.read_text() and "Hint 2" in without.read_text()
    book = nbformat.read(without, 4)
    nbformat.validate(book)
    assert book.cells[0].cell_type == "markdown" and book.cells[1].source == module.HIDE
    card = center()
    assert "secret" in card._repr_html_()
    exec(book.cells[1].source, {})                             # what the learner's kernel does first
    assert "secret" not in card._repr_html_()


@pytest.mark.parametrize("name", sorted(chapter_notebooks()))
def test_no_chapter_leaks_a_solution(name):
    """In the real chapters: no line that only a solution holds is left in any output of the copy."""
    import html
    copy, = start(name, solutions=False)
    nbformat.validate(nbformat.read(copy, 4))
    shown = json.dumps([cell.get("outputs", []) for cell in json.loads(copy.read_text(encoding="utf-8"))["cells"]])
    assert "<summary>Solution" not in shown
    for each in practice_exercises():
        assert json.dumps(html.escape(each.solution))[1:-1] not in shown, each.id


def test_real_copies_differ_from_the_chapters_only_in_links():
    for name, path in chapter_notebooks().items():
        copy, = start(name)
        old, new = (json.loads(p.read_text(encoding="utf-8")) for p in (path, copy))
        assert [c for c in old["cells"] if c["cell_type"] == "code"] == [c for c in new["cells"] if c["cell_type"] == "code"]
        assert [len("".join(c["source"]).splitlines()) for c in old["cells"]] == [len("".join(c["source"]).splitlines()) for c in new["cells"]]


# --- progress ---

def test_progress_of_every_exercise(monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    card = center()
    monkeypatch.setattr(module, "practice_exercises", lambda: [card])
    row = dict(id="99-center", title="Center x", chapter="99", difficulty="easy", minutes=2, passed=False, attempts=0)
    assert progress_table() == [row]
    card.grade(lambda x: x + 1)
    card.grade(lambda x: x)
    assert progress_table() == [{**row, "passed": True, "attempts": 2}]
    assert progress_text() == "Chapter 99: 1 of 1 solved\n  [x] 99-center  Center x (easy, 2 min, 2 attempts)\n1 of 1 exercises solved. All of them."
    more = progress_text([row, {**row, "id": "98-x", "chapter": "98", "attempts": 1, "minutes": 5}])
    assert "[ ] 98-x       Center x (easy, 5 min, 1 attempt)" in more and more.endswith("0 of 2 exercises solved; about 7 minutes to go.")
    assert progress_text([]) == "There are no exercises."


def test_the_table_lists_every_practice_module():
    modules = sorted(path.stem[2:] for path in (ROOT / "cai_course" / "practice").glob("ch[0-9][0-9].py"))
    rows = progress_table()
    assert sorted({row["chapter"] for row in rows}) == modules
    assert [row["id"] for row in rows] == [each.id for each in practice_exercises()]
    assert len({row["id"] for row in rows}) == len(rows)


def test_progress_of_exercises_that_are_gone_is_no_error(monkeypatch):
    work_dir().mkdir()
    (work_dir() / "progress.json").write_text(json.dumps(dict(version=1, exercises={"77-gone": dict(passed=True, attempts=1)})))
    assert all(row["id"] != "77-gone" for row in progress_table())


# --- updates never touch it ---

def test_work_is_ignored_by_git_and_kept_by_clean():
    assert "work/" in (ROOT / ".gitignore").read_text().splitlines()
    recipe = (ROOT / "Makefile").read_text().split("clean:")[1].split("\n\n")[0]
    assert " work" not in recipe.split("\n", 1)[1]


def test_imports_fast():
    code = "import sys, cai_course.start; print([m for m in ('torch', 'ipywidgets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stderr
