"""Every notebook runs from top to bottom, as a learner runs it."""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import check_notebooks
from conftest import ROOT

NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in check_notebooks.notebooks(ROOT)]
LIMIT = 600  # seconds for one notebook; the budget of a chapter is 180 on a quiet machine


def run(name: str):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return check_notebooks.run_nbdev("nbdev_test", ROOT, "--path", name, "--n_workers", "0", check=False, timeout=LIMIT, env=environment)


@pytest.fixture(scope="module")
def runs(request):
    """Start the selected notebooks, two at a time; each test waits for its own."""
    selected = [item.callspec.params["name"] for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        yield {name: pool.submit(run, name) for name in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS, ids=lambda name: name.removeprefix("nbs/").removesuffix(".ipynb"))
def test_notebook_runs(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
    assert "Success." in done.stdout, f"{name} was not run at all:\n{done.stdout}{done.stderr}"
