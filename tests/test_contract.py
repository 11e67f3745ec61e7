"""What every change must keep: the library is the notebooks' export, notebooks are clean, nothing names the machine it was made on."""
import ast
import configparser
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import check_notebooks
from conftest import ROOT

NOTEBOOKS = check_notebooks.notebooks(ROOT)


@pytest.fixture
def copy(tmp_path):
    """A small tree in which every check passes, to be broken on purpose."""
    folder = tmp_path / "copy"
    for name in ("settings.ini", "nbs/tools/errors.ipynb", "nbs/tools/paths.ipynb", "cai_course/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    check_notebooks.run_nbdev("nbdev_export", folder)
    check_notebooks.run_nbdev("nbdev_clean", folder)
    assert [check(folder) for check in check_notebooks.CHECKS] == [[], [], [], []]
    return folder


def edit(path: Path, change) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    change(book)
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def first_code_cell(book: dict, holding: str = "") -> dict:
    return next(cell for cell in book["cells"] if cell["cell_type"] == "code" and holding in "".join(cell["source"]))


# --- the library is the export of the notebooks ---

def test_the_library_is_the_export_of_the_notebooks():
    assert check_notebooks.export_drift(ROOT) == []


def test_a_changed_module_is_found(copy):
    module = copy / "cai_course" / "errors.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nx = 1\n")
    assert check_notebooks.export_drift(copy) == [
        "cai_course/errors.py (from nbs/tools/errors.ipynb): it differs from its notebook: change the notebook, then run nbdev_export"]


def test_a_changed_notebook_is_found(copy):
    def rename(book):
        cell = first_code_cell(book, "def data_dir")
        cell["source"] = "".join(cell["source"]).replace("data_dir", "data_folder")
    edit(copy / "nbs" / "tools" / "paths.ipynb", rename)
    assert "cai_course/paths.py (from nbs/tools/paths.ipynb): it differs" in "\n".join(check_notebooks.export_drift(copy))


def test_a_forgotten_export_and_a_module_without_notebook_are_found(copy):
    (copy / "cai_course" / "errors.py").unlink()
    (copy / "cai_course" / "by_hand.py").write_text("x = 1\n")
    assert check_notebooks.export_drift(copy) == [
        "cai_course/by_hand.py: no notebook exports it: move its code into one",
        "cai_course/errors.py (from nbs/tools/errors.ipynb): it was never exported: run nbdev_export"]


# --- notebooks are clean and fit to be shown ---

def test_notebooks_are_clean():
    assert check_notebooks.unclean(ROOT) == []


@pytest.mark.parametrize("dirt", [{"execution_count": 7}, {"metadata": {"collapsed": True}}], ids=["count", "metadata"])
def test_a_dirty_notebook_is_found(copy, dirt):
    edit(copy / "nbs" / "tools" / "errors.ipynb", lambda book: first_code_cell(book).update(dirt))
    assert check_notebooks.unclean(copy) == ["nbs/tools/errors.ipynb: not clean: run nbdev_clean"]


def test_stored_outputs_hold_no_error_no_warning_and_no_machine_path():
    assert check_notebooks.bad_outputs(ROOT) == []


@pytest.mark.parametrize("output, said", [
    ({"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}, "is an error, KeyError"),
    ({"output_type": "stream", "name": "stderr", "text": ["UserWarning: old\n"]}, "went to stderr"),
    ({"output_type": "stream", "name": "stdout", "text": ["saved to /ho", "me/ada/runs/a\n"]}, "path of this machine: /home/ada"),
    ({"output_type": "display_data", "data": {"text/html": ["<a href='/tm", "p/x.png'>"]}, "metadata": {}}, "path of this machine: /tmp/x.png"),
    ({"output_type": "execute_result", "data": {"text/plain": "PosixPath('/Us" "ers/ada')"}, "metadata": {}, "execution_count": None},
     "path of this machine"),
], ids=["error", "stderr", "home", "tmp", "mac"])
def test_an_output_unfit_to_be_shown_is_found(copy, output, said):
    edit(copy / "nbs" / "tools" / "errors.ipynb", lambda book: first_code_cell(book).update(outputs=[output]))
    (found,) = check_notebooks.bad_outputs(copy)
    assert found.startswith("nbs/tools/errors.ipynb, cell ") and said in found


def test_ordinary_outputs_pass(copy):
    text = "work/mine and 3/tmp and https://example.org/home/page and a/root/b\n"
    output = {"output_type": "stream", "name": "stdout", "text": [text]}
    edit(copy / "nbs" / "tools" / "errors.ipynb", lambda book: first_code_cell(book).update(outputs=[output]))
    assert check_notebooks.bad_outputs(copy) == []


def test_cells_hold_imports_or_code_but_not_both():
    assert check_notebooks.mixed_imports(ROOT) == []


def test_a_mixed_cell_is_found(copy):
    def mix(book):
        cell = first_code_cell(book, "class CourseError")
        cell["source"] = "".join(cell["source"]).replace("class", "import os\nclass", 1)
    edit(copy / "nbs" / "tools" / "errors.ipynb", mix)
    (found,) = check_notebooks.mixed_imports(copy)
    assert found.startswith("nbs/tools/errors.ipynb, cell ")


def test_an_import_inside_a_function_makes_a_mixed_cell_too(copy):
    edit(copy / "nbs" / "tools" / "errors.ipynb", lambda book: book["cells"].append(
        {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "id": "late",
         "source": "limit = above\ndef late():\n    import os\n    return os"}))
    (found,) = check_notebooks.mixed_imports(copy)
    assert found.startswith("nbs/tools/errors.ipynb, cell ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_title_and_promise_and_is_small(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    first = book["cells"][0]
    assert first["cell_type"] == "markdown", "the first cell is the title"
    lines = [line for line in "".join(first["source"]).splitlines() if line.strip()]
    assert lines[0].startswith("# "), "the first line is `# Title`"
    assert len(lines) > 1 and lines[1].startswith("> "), "the second line is `> one-line promise`"
    assert not lines[1].rstrip().endswith('"'), "a promise that ends with a quote makes the exported docstring a syntax error"
    assert path.stat().st_size <= 400_000, f"{path.stat().st_size} bytes; a chapter stays under 400 KB: fewer or smaller figures"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_a_heading_before_its_first_exported_cell(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.search(r"^## ", source, re.M):
            return
        if cell["cell_type"] == "code" and re.match(r"\s*#\|\s*exports?\b", source) and re.search(r"^\s*(def|class|@)", source, re.M):
            pytest.fail("search on the docs site indexes by `## ` headings: put one before the first exported cell")


# --- the parts fit together ---

def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_the_version_is_the_same_everywhere():
    import cai_course
    assert cai_course.__version__ == settings()["version"]
    assert re.search(rf"^## {re.escape(settings()['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_every_requirement_is_capped_and_pinned_inside_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            assert pin.url is None and "+" not in specifier.version, f"{line}: no hosts and no local builds"
            pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    for text in (settings()["requirements"] + " " + settings()["dev_requirements"]).split():
        requirement = Requirement(text)
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, f"{text}: state a range with both ends"
        for version in pins[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(version), f"{text} does not allow the pinned {version}"


def test_the_sidebar_lists_every_chapter():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))

    def entries(node):
        for item in node:
            yield from entries(item["contents"]) if isinstance(item, dict) else [item]

    listed = list(entries(site["website"]["sidebar"]["contents"]))
    pages = [p.relative_to(ROOT / "nbs").as_posix() for p in [*NOTEBOOKS, *(ROOT / "nbs").glob("*.md")]]
    # The practice notebooks hold answers and checks; a chapter shows their cards, so the sidebar leaves them out.
    assert sorted(listed) == sorted(page for page in pages if not page.startswith("practice/"))
    assert yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8")) == {"metadata-files": ["../_quarto.yml"]}
    assert site["project"]["output-dir"] == settings()["doc_path"]


def test_links_of_readme_and_index_lead_somewhere():
    index = "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"])
    for folder, text in ((ROOT, (ROOT / "README.md").read_text(encoding="utf-8")), (ROOT, (ROOT / "CONTRIBUTING.md").read_text()), (ROOT / "nbs", index)):
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert re.match(r"https?://", target) or (folder / target).exists(), f"{target} does not exist under {folder.name}"


def test_no_docstring_is_cut_in_two():
    "A second text below the first is no part of it: `help()` would stop in the middle of a sentence."
    for path in sorted((ROOT / "cai_course").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                second = node.body[1].value if len(node.body) > 1 and isinstance(node.body[1], ast.Expr) else None
                assert not (isinstance(second, ast.Constant) and isinstance(second.value, str)), f"{path.name}: {node.name}"


def test_light_modules_import_without_torch():
    modules = [name for name in ("errors", "paths", "world", "stats", "constitution", "exercises", "start", "plots", "cli")
               if (ROOT / "cai_course" / f"{name}.py").exists()]
    program = ("import importlib, sys\n"
               f"for name in {modules}:\n"
               "    importlib.import_module('cai_course.' + name)\n"
               "    assert 'torch' not in sys.modules, name + ' imports torch'\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# --- nothing names a machine ---

def project_files() -> list[Path]:
    """Every file that is, or could be, committed."""
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listing.returncode == 0 and (ROOT / ".git").exists():
        names = listing.stdout.decode().split("\0")
    else:  # an unpacked archive
        ignored = {".venv", ".git", "__pycache__", "_docs", "_proc", "runs", "work", "dist", "build", ".hypothesis", ".ipynb_checkpoints"}
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not ignored & set(p.relative_to(ROOT).parts)
                 and not any(part.endswith(".egg-info") for part in p.parts)]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


PRIVATE_HOST = re.compile(r"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b|\w[\w-]*\.(?:internal|corp|lan|localdomain)\b")
OUTSIDE = re.compile(r"\.\./+share" "d")  # real data beside the checkout: only .ci/run may know of it
FAKE_PATHS = {Path("tests/test_contract.py"), Path("tests/test_paths.py")}  # made-up paths that checks must find


def machine_names(text: str) -> list[str]: # What in a text belongs to one machine only
    here = socket.gethostname()
    found = [m[0] for pattern in (check_notebooks.MACHINE_PATH, PRIVATE_HOST) for m in pattern.finditer(text)]
    if len(here) >= 6 and here not in ("localhost", "localhost.localdomain") and here in text:
        found.append(here)
    if str(ROOT) in text:
        found.append(str(ROOT))
    return found


def text_of(path: Path) -> str:
    content = path.read_bytes()
    return "" if b"\0" in content[:8192] else content.decode("utf-8", "replace")


def test_no_file_names_a_machine():
    files = project_files()
    assert ROOT / "settings.ini" in files
    found = {}
    for path in files:
        name = path.relative_to(ROOT)
        text = text_of(path)
        names = [] if name in FAKE_PATHS else machine_names(text)
        if name.as_posix() != ".ci/run":
            names += [m[0] for m in OUTSIDE.finditer(text)]
        if names:
            found[name.as_posix()] = sorted(set(names))
    assert found == {}


@pytest.mark.parametrize("text", ["cd /ho" "me/ada/course", "open('/ro" "ot/x')", "/Us" "ers/ada/x", r"C:\Us" r"ers\ada", "file:" "///opt/x",
                                  "http://10.0" ".3.7:8080/", "mirror.int" "ernal/simple", f"see {ROOT}/nbs"])
def test_a_machine_name_is_found(text):
    assert machine_names(text)


@pytest.mark.parametrize("text", ["runs/home/x", "https://pypi.org/project/cai_course/", "127.0.0.1:8888", "work/mine.ipynb", "version 1.10.0.3",
                                  "$HOME/course", "~/course", "<root>/tmp"])
def test_ordinary_text_passes(text):
    assert machine_names(text) == []
