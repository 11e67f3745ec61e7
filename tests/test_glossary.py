"""One name for one thing: the glossary names each word once, where it says a word is explained it is used, and the code keeps to it."""
import ast
import json
import re

import pytest

from conftest import ROOT

TEXT = (ROOT / "nbs" / "glossary.md").read_text(encoding="utf-8")
HAND_WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "nbs").glob("*.md"))]


def tables() -> dict:
    """{heading: rows of cells}, without the head of the table."""
    found = {}
    for part in re.split(r"^## ", TEXT, flags=re.M)[1:]:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        found[part.splitlines()[0]] = rows[2:]
    return found


TABLES = tables()
WORDS = [row for heading, rows in TABLES.items() if heading not in ("Symbols", "What other texts call it") for row in rows]
OTHERS = {other.strip(): here for others, here, *_ in TABLES["What other texts call it"] for other in others.split(",")}

ALLOWED = {"actor_critic", "query"}  # the name of a method, and a part of attention


def plain(text: str) -> str:
    return re.sub(r"[`*$]", "", text).strip().lower()


def names_of(row: list) -> list:
    return [plain(each) for each in row[0].split(",")]


def page_text(target: str) -> str:
    path = ROOT / "nbs" / target.partition("#")[0]
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


def test_the_tables_are_read():
    assert len(WORDS) > 50 and len(TABLES["Symbols"]) >= 15 and len(OTHERS) >= 12


def test_every_word_is_named_once():
    names = [name for row in WORDS for name in names_of(row)]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & {plain(other) for other in OTHERS}, "a word of the course and a name that it avoids"


def test_every_symbol_is_named_once_and_is_in_the_code():
    rows = TABLES["Symbols"]
    symbols = [symbol.strip() for row in rows for symbol in row[0].split(",")]
    assert sorted(symbols) == sorted(set(symbols))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "cai_course").glob("*.py"))
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row[1]):
            assert re.search(rf"\b{re.escape(name)}\b", code), f"nothing in the code is called {name}"


@pytest.mark.parametrize("row", WORDS, ids=lambda row: plain(row[0]))
def test_a_word_is_used_where_it_is_explained(row):
    targets = re.findall(r"\]\(([^)\s]+)\)", row[2])
    assert targets, "no page is named"
    for target in targets:
        text = page_text(target).lower()
        for name in names_of(row):
            name = name[:-5] if len(name) > 12 else name  # over-optimization, over-optimized
            stem = "[\\s_-]*".join(map(re.escape, re.split(r"[\s-]", name))).replace("y", "(?:y|ie)") if len(name) > 3 else rf"\b{re.escape(name)}"
            assert re.search(stem, text), f"{name!r} does not occur in {target}"


def test_what_is_avoided_has_a_name_in_the_course():
    known = {name for row in WORDS for name in names_of(row)}
    for other, here in OTHERS.items():
        assert any(plain(each) in known for each in re.split(r",| or ", here)), f"{other}: {here} is no word of the glossary"


def identifiers(path) -> set:
    """Names of functions, classes, arguments and fields of a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.arg):
            found.add(node.arg)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name.lower() for name in found}


@pytest.mark.parametrize("path", sorted((ROOT / "cai_course").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_the_code_keeps_to_the_names(path):
    avoided = {re.sub(r"\W+", "_", plain(other)) for other in OTHERS}
    found = {name for name in identifiers(path) - ALLOWED for other in avoided
             if name in (other, other + "s") or re.search(rf"(^|_){other}s?(_|$)", name)}
    assert not found, f"the glossary has another word for {', '.join(sorted(found))}"


@pytest.mark.parametrize("path", [each for each in HAND_WRITTEN if each.name != "corrections.md"],  # it quotes what other texts say
                         ids=lambda path: path.name)
def test_written_pages_keep_to_the_names(path):
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(encoding="utf-8"), flags=re.S).lower()
    if path.name == "glossary.md":
        text = text.split("## what other texts call it")[0]
    found = [other for other in OTHERS if " " not in other and re.search(rf"\b{re.escape(plain(other))}s?\b", text)]
    assert not found, f"the glossary has another word for {', '.join(found)}"
