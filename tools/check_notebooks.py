"""Check the notebooks of a tree: the library is their export, they are clean, and their outputs can be shown to anybody.

    python tools/check_notebooks.py [TREE]     prints what is wrong and exits with 1, or prints nothing and exits with 0

The tree is never written to: export and cleaning happen in a temporary copy.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

# Absolute paths of somebody's machine. Written so that this file does not hold one itself.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|Users|root|tmp|private/var|var/folders|work|mnt|opt/wheels|opt/pypi)/[\w.-]+"
                          r"|\b[A-Z]:\\+Users\\+\w+|\bfile:///\w")
UNSEEN = {".ipynb_checkpoints", "_proc", "_docs"}


def notebooks(root: Path) -> list[Path]: # Every notebook that nbdev reads, sorted
    found = (root / "nbs").rglob("*.ipynb")
    return sorted(p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts))


def run_nbdev(
    command: str, # `nbdev_export`, `nbdev_clean` or `nbdev_test`
    root: Path, # Tree whose settings.ini counts
    *arguments: str,
    check: bool = True, # Raise if the command fails?
    **options, # For `subprocess.run`
) -> subprocess.CompletedProcess:
    program = shutil.which(command, path=str(Path(sys.executable).parent)) # called from Python, it would not read its arguments
    if program is None:
        raise SystemExit(f"{command} was not found beside {sys.executable}; make venv installs it.")
    done = subprocess.run([program, *arguments], cwd=root, text=True, capture_output=True, **options)
    if check and done.returncode:
        raise SystemExit(f"{command} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done


@contextmanager
def copy_of(root: Path, *names: str):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            source, target = root / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(*UNSEEN, "__pycache__"))
            else:
                shutil.copyfile(source, target)
        yield Path(folder)


def _modules(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def export_drift(root: Path) -> list[str]: # One line per module that is not what its notebook exports
    """Compare the library with a fresh export of its notebooks."""
    with copy_of(root, "settings.ini", "nbs") as fresh:
        (fresh / "cai_course").mkdir()
        shutil.copyfile(root / "cai_course" / "__init__.py", fresh / "cai_course" / "__init__.py")
        run_nbdev("nbdev_export", fresh)
        wanted, found = _modules(fresh / "cai_course"), _modules(root / "cai_course")
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            source = _notebook_of(wanted.get(name, b"") or found.get(name, b""))
            why = ("no notebook exports it: move its code into one" if name not in wanted else
                   "it was never exported: run nbdev_export" if name not in found else
                   "it differs from its notebook: change the notebook, then run nbdev_export")
            lines.append(f"cai_course/{name}{source}: {why}")
    return lines


def _notebook_of(module: bytes) -> str:
    match = re.search(rb"File to edit: \.\./(\S+\.ipynb)", module)
    return f" (from {match[1].decode()})" if match else ""


def unclean(root: Path) -> list[str]: # One line per notebook that nbdev_clean would change
    """Find notebooks that hold execution counts, editor metadata or memory addresses."""
    with copy_of(root, "settings.ini", "nbs") as copy:
        run_nbdev("nbdev_clean", copy)
        return [f"{path.relative_to(root)}: not clean: run nbdev_clean" for path in notebooks(root)
                if path.read_bytes() != (copy / path.relative_to(root)).read_bytes()]


def bad_outputs(root: Path) -> list[str]: # One line per output that should not be published
    """Find stored outputs that hold an error, something written to stderr, or a path of the machine that made them."""
    lines = []
    for path in notebooks(root):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            for output in cell.get("outputs", []):
                place = f"{path.relative_to(root)}, cell {number}"
                if output["output_type"] == "error":
                    lines.append(f"{place}: the stored output is an error, {output.get('ename')}: {output.get('evalue')}")
                    continue
                text = _text(output)
                if output.get("name") == "stderr":
                    lines.append(f"{place}: the stored output went to stderr (a warning or a progress bar): {text.strip()[:80]!r}")
                match = MACHINE_PATH.search(text)
                if match:
                    lines.append(f"{place}: the stored output holds a path of this machine: {match[0]}")
    return lines


def _text(output: dict) -> str:
    parts = [output.get("text", "")] + [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/p")]
    return "\n".join("".join(part) if isinstance(part, list) else part if isinstance(part, str) else json.dumps(part) for part in parts)


def mixed_imports(root: Path) -> list[str]: # One line per cell that holds imports and other code
    """Find cells that mix imports with code. Building the docs runs every cell that imports, be it inside a function, and
    every exported one, but no other: the code beside an import runs without the cells above it, and fails."""
    lines = []
    for path in notebooks(root):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            source = re.sub(r"^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]), flags=re.M)  # magics are not Python
            if cell["cell_type"] != "code" or re.search(r"^#\|\s*eval:\s*false", source, re.M):
                continue
            body, imports = ast.parse(source).body, (ast.Import, ast.ImportFrom)
            alone = all(isinstance(node, imports) for node in body)
            seen = body if re.search(r"^#\|\s*export", source, re.M) else [node for top in body for node in ast.walk(top)]
            if not alone and any(isinstance(node, imports) for node in seen):
                lines.append(f"{path.relative_to(root)}, cell {number}: imports and other code in one cell: give the imports their own")
    return lines


CHECKS = (export_drift, unclean, bad_outputs, mixed_imports)


def main(root: Path) -> int: # Exit status
    problems = [line for check in CHECKS for line in check(root)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else os.curdir).resolve()))
