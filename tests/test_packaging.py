"""The wheel holds the library and its data, nothing else; Makefile, hook and README do what they say."""
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

import check_notebooks
from conftest import ROOT

BUILD_INPUTS = ("cai_course", "data", "constitutions", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in",
                "constraints.txt")
LIMIT = 25 * 1024 * 1024  # bytes
MAKE = shutil.which("make")


def shipped(source: Path, name: str) -> set[str]:
    """Files below one of the data folders, as the wheel should name them."""
    return {"cai_course/_assets/" + p.relative_to(source).as_posix() for p in (source / name).rglob("*")
            if p.is_file() and not any(part.startswith((".", "__pycache__")) for part in p.relative_to(source).parts)}


def copy_inputs(folder: Path) -> Path:
    (folder / "nbs").mkdir(parents=True)
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):  # chapters go into the wheel, the other pages do not
        shutil.copyfile(notebook, folder / "nbs" / notebook.name)
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(source: Path, kind: str, target: Path) -> Path:
    done = subprocess.run([sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(target), str(source)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = target.iterdir()
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_inputs(tmp_path_factory.mktemp("build") / "source")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_library_and_its_data_and_nothing_else(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {p.relative_to(source).as_posix() for pattern in ("*.py", "py.typed") for p in (source / "cai_course").rglob(pattern)}
    chapters = {f"cai_course/_assets/nbs/{p.name}" for p in (source / "nbs").glob("[0-9]*.ipynb")}
    assert "cai_course/practice/__init__.py" in modules and len(chapters) >= 13
    wanted = modules | shipped(source, "data") | shipped(source, "constitutions") | chapters
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < LIMIT


def test_the_wheel_states_requirements_script_and_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    config = parser["DEFAULT"]
    dev = config["dev_requirements"].split() + config["docs_requirements"].split()   # the extra `docs` lists the latter again
    assert metadata.count("Requires-Dist: ") == len(config["requirements"].split() + dev + config["docs_requirements"].split())
    assert "Requires-Python: >=" + config["min_python"] in metadata and "License-Expression: Apache-2.0" in metadata
    assert "cai-course = cai_course.cli:main" in entry_points and "cai_course = cai_course._modidx:d" in entry_points


def test_an_unpacked_wheel_finds_its_own_data(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = ("from cai_course.paths import data_dir, constitutions_dir\n"
               "from cai_course.start import chapter_notebooks\n"
               "print(data_dir(), constitutions_dir(), chapter_notebooks()['00_pocket_world'].parent, sep='\\n')")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert done.stdout.split() == [str(tmp_path.resolve() / "cai_course" / "_assets" / name) for name in ("data", "constitutions", "nbs")], done.stderr


def test_a_wheel_from_the_source_archive_is_the_same(wheel, source, tmp_path):
    archive = build(source, "sdist", tmp_path / "out")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")  # novm: 3.10.12 and 3.11.4 have it, too
    (folder,) = (tmp_path / "unpacked").iterdir()
    again = build(folder, "wheel", tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        contents = [{name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name} for archive in (first, second)]
    assert contents[0] == contents[1]


# --- versions of Python ---

def newer_than(oldest: str, *paths) -> str:
    """What vermin says about code that a Python of that version cannot run; empty if there is none."""
    done = subprocess.run([str(Path(sys.executable).with_name("vermin")), "--no-tips", "--eval-annotations", "-vvv", f"-t={oldest}-", *map(str, paths)],
                          capture_output=True, text=True, timeout=600)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_nothing_needs_a_newer_python_than_settings_ini_says(tmp_path):
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    oldest = config["DEFAULT"]["min_python"]
    new = tmp_path / "new.py"
    new.write_text("import tomllib\n", encoding="utf-8")  # came with 3.11
    assert "tomllib" in newer_than(oldest, new)
    cells = tmp_path / "cells"
    cells.mkdir()
    for path in check_notebooks.notebooks(ROOT):
        sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        lines = [line for source in sources for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        (cells / f"{path.stem}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert newer_than(oldest, *(ROOT / name for name in ("cai_course", "tools", "benchmarks", "tests", "setup.py")), cells) == ""


# --- make ---

needs_make = pytest.mark.skipif(MAKE is None, reason="the program make is not installed")


def environment_is_current() -> bool:
    return make("--question", "venv").returncode == 0


def make(*arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    return subprocess.run([MAKE, "--no-print-directory", *arguments], cwd=cwd, capture_output=True, text=True, **options)


@needs_make
def test_make_alone_lists_every_target():
    listed = set(re.findall(r"^  make (\w+) ", make().stdout, re.M))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert listed == set(phony.split())


@needs_make
def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    checkout = copy_inputs(tmp_path / "course")
    shutil.copyfile(ROOT / "Makefile", checkout / "Makefile")
    old = tmp_path / "oldpython"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo Python 3.8.18 && exit 0\nexit 1\n")
    old.chmod(0o755)
    for python, found in ((old, "Python 3.8.18"), (tmp_path / "nowhere", "is missing;")):
        done = make("align", f"PYTHON={python}", cwd=checkout)
        assert done.returncode != 0 and found in done.stderr
        assert "needs Python 3.10 or newer" in done.stderr and "make PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_a_current_environment_is_reused_at_once(tmp_path):
    """With its stamp in place make goes straight to work; with an older stamp it would install first."""
    checkout = copy_inputs(tmp_path / "course")
    shutil.copyfile(ROOT / "Makefile", checkout / "Makefile")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script = checkout / ".venv" / "bin" / "cai-course"
    script.write_text("#!/bin/sh\necho aligned \"$@\"\n")
    script.chmod(0o755)
    number = subprocess.run("pwd -P | cksum | cut -d' ' -f1", shell=True, cwd=checkout, capture_output=True, text=True).stdout.strip()
    stamp = checkout / ".venv" / f".installed-{number}"
    stamp.touch()
    done = make("align", "ARGS=--name a", cwd=checkout)
    assert done.stdout == "aligned align --name a\n", done.stderr
    os.utime(stamp, (1, 1))
    assert "Installing the course" in make("--dry-run", "align", cwd=checkout).stdout
    stamp.unlink()
    assert "Installing the course" in make("--dry-run", "align", cwd=checkout).stdout


@needs_make
def test_clean_leaves_runs_and_work_alone(tmp_path):
    checkout = copy_inputs(tmp_path / "course")
    shutil.copyfile(ROOT / "Makefile", checkout / "Makefile")
    mine = [checkout / place for place in ("work/.ipynb_checkpoints/03.ipynb", "runs/first/__pycache__/x.pyc", ".venv/lib/__pycache__/y.pyc")]
    made = [checkout / place for place in ("nbs/.ipynb_checkpoints/03.ipynb", "tests/__pycache__/z.pyc", "build/lib/a.py")]
    for file in mine + made:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert make("clean", cwd=checkout).returncode == 0
    assert all(file.exists() for file in mine) and not any(file.exists() for file in made)


@needs_make
def test_an_environment_without_pip_is_made_anew(tmp_path):
    """Where Python's venv package is incomplete, `python3 -m venv` fails half way and leaves a Python without pip behind."""
    checkout = copy_inputs(tmp_path / "course")
    shutil.copyfile(ROOT / "Makefile", checkout / "Makefile")
    half = checkout / ".venv/bin/python"
    half.parent.mkdir(parents=True)
    half.write_text("#!/bin/sh\n[ \"$2\" = pip ] && exit 1\nexit 0\n")
    half.chmod(0o755)
    asked = tmp_path / "python"
    asked.write_text("#!/bin/sh\n[ \"$2\" = venv ] && echo \"venv $3 $4\" && exit 1\nexit 0\n")
    asked.chmod(0o755)
    assert "venv --clear .venv" in make("venv", f"PYTHON={asked}", cwd=checkout).stdout


# --- the docs, JupyterLab, the hook, the README ---

@pytest.mark.slow
def test_the_docs_can_be_prepared(tmp_path):
    """Everything that `make docs` does before it calls Quarto: imports and exported cells run, signatures are drawn."""
    copy = tmp_path / "course"
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs", "work"))
    for name in ("settings.ini", "_quarto.yml", "cai_course/__init__.py", "cai_course/_modidx.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(n_workers=1)"], cwd=copy, capture_output=True,
                          text=True, env=dict(os.environ, PYTHONSAFEPATH="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Failed to create YAML" not in done.stderr, "a list with `key: value` in a title cell is read as front matter:\n" + done.stderr[:500]
    prepared = {p.relative_to(copy / "_proc") for p in (copy / "_proc").rglob("*.ipynb")}
    assert prepared == {p.relative_to(ROOT / "nbs") for p in check_notebooks.notebooks(ROOT)}

@pytest.mark.slow
@needs_make
def test_lab_opens_on_the_first_page(tmp_path):
    if not environment_is_current():
        pytest.skip("make would install first: run make venv, then this test again")
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen(
            [MAKE, "--no-print-directory", "lab",
             "ARGS=--no-browser --port=0 --allow-root --ServerApp.ip=127.0.0.1 --IdentityProvider.token=secret"],
            cwd=ROOT, stdout=log, stderr=log, env=dict(os.environ, **{f"JUPYTER_{kind}_DIR": str(tmp_path) for kind in ("RUNTIME", "CONFIG", "DATA")}),
            start_new_session=True)
        try:
            base = None
            for _ in range(240):
                text = (tmp_path / "log").read_text()
                match = re.search(r"(http://127\.0\.0\.1:[1-9]\d*/lab/tree/nbs/index\.ipynb)", text)
                if match or server.poll() is not None:
                    base = match and match[1]
                    break
                time.sleep(0.25)
            assert base, text
            server_url = base.split("/lab/")[0]
            for _ in range(40):  # the address is printed a moment before the door opens
                try:
                    page = urllib.request.urlopen(f"{base}?token=secret", timeout=20).read().decode()
                    break
                except urllib.error.URLError:
                    time.sleep(0.25)
            else:
                pytest.fail(f"nothing answers at {server_url}\n" + (tmp_path / "log").read_text())
            assert "jupyter-config-data" in page
            found = urllib.request.urlopen(f"{server_url}/api/contents/nbs/index.ipynb?content=0&token=secret", timeout=20).read().decode()
            assert '"path": "nbs/index.ipynb"' in found
            for _ in range(60):  # trusted in the background: only then does JupyterLab show stored pictures
                page = json.load(urllib.request.urlopen(f"{server_url}/api/contents/nbs/index.ipynb?token=secret", timeout=20))
                if all(cell["metadata"].get("trusted") for cell in page["content"]["cells"] if cell["cell_type"] == "code"):
                    break
                time.sleep(0.5)
            else:
                pytest.fail("index.ipynb is not trusted")
        finally:
            os.killpg(server.pid, 15)
            server.wait(timeout=20)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="the hook uses .venv, which make creates")
def test_the_hook_judges_what_would_be_committed(tmp_path):
    copy = tmp_path / "copy"
    for name in ("tools", ".githooks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "nbs/tools/errors.ipynb", "cai_course/__init__.py"):  # one notebook is enough
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    (copy / ".gitignore").write_text(".venv\n__pycache__/\n")
    quiet = dict(cwd=copy, check=True, capture_output=True)
    check_notebooks.run_nbdev("nbdev_export", copy)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@example.org", GIT_COMMITTER_NAME="a",
                       GIT_COMMITTER_EMAIL="a@example.org")
    quiet["env"] = environment
    subprocess.run(["git", "init", "-q"], **quiet)
    subprocess.run(["git", "config", "core.hooksPath", ".githooks"], **quiet)
    subprocess.run(["git", "add", "-A"], **quiet)
    commit = dict(cwd=copy, capture_output=True, text=True, env=environment)
    first = subprocess.run(["git", "commit", "-qm", "clean"], **commit)
    assert first.returncode == 0, first.stdout + first.stderr
    module = copy / "cai_course" / "errors.py"
    good = module.read_text(encoding="utf-8")
    module.write_text(good + "\nx = 1\n", encoding="utf-8")
    subprocess.run(["git", "add", "-A"], **quiet)
    module.write_text(good, encoding="utf-8")  # mended in the folder, but not in what would be committed
    second = subprocess.run(["git", "commit", "-qm", "drifted"], **commit)
    assert second.returncode != 0 and "cai_course/errors.py (from nbs/tools/errors.ipynb): it differs" in second.stdout + second.stderr


@pytest.mark.slow
def test_the_library_lines_of_the_readme_run(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    assert "Verdict(" in done.stdout


def test_the_readme_is_short_and_leads_with_the_main_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    commands = re.findall(r"^make (align|test|lab)\b", text, re.M)
    assert commands[:3] == ["align", "test", "lab"] or commands[:2] == ["align", "test"]
