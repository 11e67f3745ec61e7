"""The house as CONTRIBUTING draws it: modules import downwards, and every arrow has its reason."""
import ast
import re

import pytest

from conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The house")[1].split("\n## ")[0]
FLOORS = [line.split() for line in re.search(r"```\n(.*?)```", TEXT, re.S)[1].splitlines()]
HEIGHT = {name: -number for number, floor in enumerate(FLOORS) for name in floor}
ROWS = {row[0].strip("` "): set(re.findall(r"`(\w+)`", row[1])) for row in re.findall(r"^\| (`\w+`) \| (.*?) \| .+ \|$", TEXT, re.M)}
GROUND = {name for floor in FLOORS[-2:] for name in floor} | {"experiments"}
MODULES = sorted(path.stem for path in (ROOT / "cai_course").glob("[a-z]*.py"))


def arrows(module: str) -> list:
    """(module that is imported, function that does it or "")."""
    found = []

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            inside = function or (child.name if isinstance(child, ast.FunctionDef) else "")
            if isinstance(child, ast.ImportFrom) and (child.level == 1 or (child.module or "").split(".")[0] == "cai_course"):
                name = (child.module or "").removeprefix("cai_course").lstrip(".").split(".")[0]
                found.extend((each, inside) for each in ([name] if name else [alias.name for alias in child.names]))
            visit(child, inside)
    visit(ast.parse((ROOT / "cai_course" / f"{module}.py").read_text(encoding="utf-8")), "")
    return [(name, function) for name, function in found if name in HEIGHT or name in MODULES]


def test_every_module_has_its_place():
    assert sorted(HEIGHT) == MODULES
    assert set(ROWS) <= set(MODULES) and len(ROWS) >= 12


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    level = [name for name, function in arrows(module) if HEIGHT[name] >= HEIGHT[module] and not function
             and (HEIGHT[name] > HEIGHT[module] or module not in GROUND)]
    assert level == [], f"{module} imports {', '.join(level)}, which stand no lower"


def test_there_is_no_circle():
    """On the lowest floors modules may lean on a neighbor, but not in a circle."""
    below = {module: {name for name, function in arrows(module) if not function} for module in MODULES}
    left = set(MODULES)
    while left:
        free = {module for module in left if not below[module] & left - {module}}
        assert free, f"a circle among {sorted(left)}"
        left -= free


@pytest.mark.parametrize("module", MODULES)
def test_every_arrow_is_explained(module):
    """Those that go down; an import from above, in a function, belongs to an experiment."""
    drawn = ROWS.get(module, set())
    real = {name for name, _ in arrows(module) if HEIGHT[name] < HEIGHT[module]} - GROUND
    assert real <= drawn, f"CONTRIBUTING does not say why {module} stands on {', '.join(sorted(real - drawn))}"
    assert drawn <= real, f"CONTRIBUTING says that {module} stands on {', '.join(sorted(drawn - real))}, which it does not import"


def test_promises_about_three_modules():
    assert not {name for name, _ in arrows("ppo")} & {"models", "world", "tictactoe", "rlhf"}
    assert not re.search(r"^\s*(import|from) (torch|transformers)\b", (ROOT / "cai_course" / "world.py").read_text(encoding="utf-8"), re.M)
    for module in MODULES:
        text = (ROOT / "cai_course" / f"{module}.py").read_text(encoding="utf-8")
        if module not in ("models", "fused", "pretrain"):
            assert not re.search(r"^\s*(import|from) peft\b", text, re.M), f"{module}: adapters belong into models"
