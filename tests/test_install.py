"""The built wheel in an empty environment: the five lines of README, a fast import, the commands, and a chapter from `cai-course start`.

Nothing is fetched: the requirements are those of the environment that runs the tests, made visible by one path; the course itself is not.
"""
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from conftest import ROOT
from test_packaging import build, copy_inputs

pytestmark = pytest.mark.slow
CHAPTER = "10"  # one that needs a model, a constitution and no long training


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An environment that holds the wheel and nothing else of ours; yields its folder."""
    home = tmp_path_factory.mktemp("install")
    wheel = build(copy_inputs(home / "source"), "wheel", home / "wheel")
    venv.create(home / "env", with_pip=False, symlinks=os.name != "nt")
    python = home / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    here = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True).stdout.strip())
    done = subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (here / "requirements.pth").write_text("\n".join(sorted(theirs)) + "\n")  # a path is no site folder: an editable course there stays out
    (home / "empty").mkdir()
    return home


def python_of(place) -> Path:
    return place / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(place, *words, **options):
    python = python_of(place)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="", CAI_COURSE_WORK=str(place / "work"),
                       JUPYTER_PATH="", PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    environment.pop("PYTHONPATH", None)
    return subprocess.run([str(python), *words], cwd=place / "empty", capture_output=True, text=True, timeout=600, env=environment, **options)


def test_the_course_comes_from_the_wheel(place):
    done = run(place, "-c", "import cai_course; from cai_course.paths import data_dir; print(cai_course.__file__, data_dir(), sep='\\n')")
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(place / "env") for line in done.stdout.split())


def test_the_five_lines_of_the_readme(place):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    done = run(place, "-c", program)
    assert done.returncode == 0 and "Verdict(" in done.stdout, done.stderr


def test_the_import_is_fast_and_light(place):
    program = ("import sys, time\nstart = time.perf_counter()\nimport cai_course\nspent = time.perf_counter() - start\n"
               "print(spent, [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])")
    said = [run(place, "-c", program).stdout.split(maxsplit=1) for _ in range(3)]
    assert min(float(spent) for spent, _ in said) < 1 and all(heavy.strip() == "[]" for _, heavy in said)


@pytest.mark.parametrize("words", [["-m", "cai_course", "--help"], ["-m", "cai_course", "grade", "--help"], ["-m", "cai_course", "completion", "bash"]])
def test_the_commands_answer(place, words):
    done = run(place, *words)
    assert done.returncode == 0 and "cai-course" in done.stdout, done.stderr


def test_a_chapter_runs_from_an_installed_wheel(place):
    script = place / "env" / ("Scripts/cai-course.exe" if os.name == "nt" else "bin/cai-course")
    assert script.exists()
    done = run(place, "-m", "cai_course", "start", CHAPTER, "--no-solutions")
    (copy,) = [Path(line) for line in done.stdout.split()]
    assert copy.parent == place / "work", done.stderr
    program = ("import nbformat, sys\nfrom nbclient import NotebookClient\nbook = nbformat.read(sys.argv[1], 4)\n"
               "NotebookClient(book, timeout=500, kernel_name='python3', resources={'metadata': {'path': sys.argv[2]}}).execute()\n"
               "nbformat.write(book, sys.argv[1])")
    kernel = place / "kernels" / "python3"  # the kernel of this environment, and not that of the tests
    kernel.mkdir(parents=True, exist_ok=True)
    python = python_of(place)
    (kernel / "kernel.json").write_text(json.dumps({"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                                    "display_name": "Python 3", "language": "python"}))
    environment = dict(os.environ, JUPYTER_PATH=str(place), CAI_COURSE_WORK=str(place / "work"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([str(python), "-c", program, str(copy), str(copy.parent)], cwd=place / "empty", env=environment, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [output for cell in json.loads(copy.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
