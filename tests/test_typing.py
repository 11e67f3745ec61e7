"""What an editor says to somebody who uses the library: the programs of README and of the library page pass, a wrong one does not."""
import json
import re
import shutil
import subprocess
import sys
from importlib import util

import pytest

from conftest import ROOT

PYRIGHT = shutil.which("pyright") or (util.find_spec("pyright") and f"{sys.executable} -m pyright")
needs_pyright = pytest.mark.skipif(not PYRIGHT, reason="pyright is not installed (pip install 'pyright[nodejs]')")
WRONG = """from cai_course.stats import estimate, paired_difference
from cai_course.models import load_policy
estimate(3).nothing
load_policy(["pocket-t5"], value_head="yes")
load_policy("pocket-t5").write("a")
"""


def blocks() -> str:
    pages = [ROOT / "nbs" / "library.md", ROOT / "README.md"]
    return "\n".join(re.findall(r"^```python\n(.*?)^```", "".join(path.read_text(encoding="utf-8") for path in pages), re.M | re.S))


def complaints(folder, program: str) -> list:
    (folder / "program.py").write_text(program, encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}), encoding="utf-8")
    command = [sys.executable, "-m", "pyright"] if " -m " in PYRIGHT else [PYRIGHT]
    done = subprocess.run([*command, "--outputjson", "--pythonpath", sys.executable],
                          cwd=folder, capture_output=True, text=True, timeout=600)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot run here: {done.stderr[-200:]}")
    return [each["message"] for each in json.loads(done.stdout)["generalDiagnostics"] if each["severity"] == "error"]


@needs_pyright
@pytest.mark.slow
def test_what_the_pages_show_passes_the_type_checker(tmp_path):
    assert complaints(tmp_path, blocks()) == []


@needs_pyright
@pytest.mark.slow
def test_a_wrong_program_does_not_pass(tmp_path):
    assert len(complaints(tmp_path, WRONG)) >= 4
