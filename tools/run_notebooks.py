"""Run notebooks from top to bottom, store their outputs, clean them and export the library.

    python tools/run_notebooks.py              every notebook
    python tools/run_notebooks.py nbs/03*.ipynb    only these
"""
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from check_notebooks import notebooks, run_nbdev  # noqa: E402

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
CELL_LIMIT = 600  # seconds; a cell that needs more does not belong in a chapter


def run(path: Path) -> float: # Seconds it took
    start = time.monotonic()
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=CELL_LIMIT, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}).execute()
    book.metadata = KERNEL
    for cell in book.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    temporary = path.with_name(f".{path.name}.tmp")
    nbformat.write(book, temporary)
    os.replace(temporary, path)
    return time.monotonic() - start


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # stored figures do not depend on how many cores made them
    run_nbdev("nbdev_export", ROOT)
    for path in [Path(name).resolve() for name in names] or notebooks(ROOT):
        print(f"{path.relative_to(ROOT)} ...", end=" ", flush=True)
        print(f"{run(path):.0f} s", flush=True)
        run_nbdev("nbdev_clean", ROOT, "--fname", str(path))
    run_nbdev("nbdev_export", ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
