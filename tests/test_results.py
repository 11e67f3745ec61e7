"""What the chapters show was measured with the code as it is: no experiment without a result, no stale one, no stray file."""
import importlib
import json
import math
import re

import pytest

from cai_course.experiments import EXPERIMENTS, experiment_names, find_experiment, judge_rows, load_result
from cai_course.paths import data_dir, model_dir
from cai_course.runs import fingerprint
from conftest import ROOT

NAMES = sorted(experiment_names())


def test_the_course_measures_its_claims():
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_stored_and_is_what_the_code_gives_now(name):
    result = load_result(name)
    assert not result.stale, result.why


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_verdict_follows_from_the_stored_rows(name):
    result = load_result(name)
    assert [row["seed"] for row in result.rows] == result.config["seeds"] == list(range(len(result.rows)))
    found, word = judge_rows(find_experiment(name), result.rows)
    assert word == result.verdict
    wide = max(found.high - found.low, 1e-9) if math.isfinite(found.high - found.low) else 1e-9
    for end in ("value", "low", "high"):  # random numbers may differ between versions of NumPy
        assert getattr(result.estimate, end) == pytest.approx(getattr(found, end), abs=.05 * wide)


@pytest.mark.parametrize("name", ["models/skills.json", "align/results.json"])
def test_the_tables_were_measured_with_the_models_that_ship(name):
    """Experiments carry the digits of their models themselves; for the two tables they stand in `data/measured_with.json`."""
    measured = json.loads((data_dir() / "measured_with.json").read_text(encoding="utf-8"))[name]
    assert measured and (data_dir() / name).exists()
    for model, digits in measured.items():
        assert fingerprint(model_dir(model)) == digits, (
            f"data/{name} was measured with another {model}: measure it again as data/README.md says, then store the model's digits")


def shown_cards() -> list:
    """[(chapter, name of the experiment, the card as it is stored)]"""
    found = []
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                card = "".join(output.get("data", {}).get("text/plain", ""))
                name = re.match(r"Experiment ([a-z0-9-]+)\n  claim ", card)
                if name: found.append((path.stem, name[1], card))
    return found


@pytest.mark.parametrize("chapter, name, card", [pytest.param(*each, id=f"{each[0][:2]}-{each[1]}") for each in shown_cards()])
def test_a_chapter_shows_the_card_of_what_is_stored(chapter, name, card):
    if name in NAMES:  # chapters also make experiments of their own, for the page
        assert card == repr(load_result(name)), f"run {chapter} again"


WORDS = ("agrees", "disagrees", "inconclusive")


def verdicts_in_prose(book: dict) -> list:
    """[(cell, sentence, verdict in italics, verdicts of the experiments and the words that its section has shown)]; other rounds and definitions left out."""
    found, shown = [], set()
    for position, cell in enumerate(book["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cards = "\n".join("".join(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", []))
            shown |= {load_result(name).verdict for name in re.findall(r"^Experiment ([a-z0-9-]+)$", cards, re.M) if name in NAMES}
            printed = " ".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
            shown |= {word for word in re.findall(r"\w+", printed) if word in WORDS}
            continue
        if re.match(r"## ", source): shown = set()
        for sentence in re.split(r"(?<=[.:;])\s+", source):
            if re.search(r"earlier\s+round|three\s+seeds\s+were|\bsays\b|its\s+labelers\s+was", sentence): continue
            found += [(position, sentence, word, frozenset(shown)) for word in re.findall(r"\*([a-z]+)\*", sentence) if word in WORDS]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_a_verdict_in_prose_is_one_that_its_section_shows(path):
    wrong = [each for each in verdicts_in_prose(json.loads(path.read_text(encoding="utf-8"))) if each[2] not in each[3]]
    assert not wrong, "\n".join(f"cell {cell}: {sentence!r} says {word}, shown are {sorted(shown)}" for cell, sentence, word, shown in wrong)


def test_verdicts_in_prose_are_found_and_turned_ones_noticed():
    books = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]
    found = [each for book in books for each in verdicts_in_prose(book)]
    assert len(found) >= 20
    turned = [each for each in found if WORDS[(WORDS.index(each[2]) + 1) % 3] not in each[3]]
    assert len(turned) >= len(found) / 2  # a section may show several verdicts


def test_every_stored_file_belongs_to_an_experiment():
    folder = data_dir() / "experiments"
    stored = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    assert stored == {f"{name}.json" for name in NAMES}
    for name in NAMES:
        assert json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["name"] == name


def test_names_read_from_the_source_are_those_that_the_modules_make():
    for module in sorted(set(experiment_names().values())):
        importlib.import_module(f"cai_course.{module}")
    made = {name for name, each in EXPERIMENTS.items() if each.run.__module__.startswith("cai_course.")}
    assert {name for name in made if name in NAMES} == set(NAMES)


def test_the_results_page_lists_every_claim_below_its_chapter_and_open_ones_once_more():
    book = json.loads((ROOT / "nbs" / "results.ipynb").read_text(encoding="utf-8"))
    [page] = ["".join(output["data"]["text/markdown"]) for cell in book["cells"] for output in cell.get("outputs", []) if "text/markdown" in output["data"]]
    head, *chapters = re.split(r"^## (?=\d\d: )", page, flags=re.M)
    glance, left = head.split("## What did not come out as predicted")
    under = {part[:2]: part for part in chapters}
    for name in NAMES:
        result, chapter = load_result(name), find_experiment(name).chapter
        assert f"`{name}`" in under[chapter] and re.search(rf"From chapter \[.*\]\({chapter}_", under[chapter]), name
        claim = result.claim.replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")
        rows = [line for line in left.splitlines() if f"| {claim} |" in line]
        assert len(rows) == (result.verdict != "agrees") and all(f"**{result.verdict}**" in row and f"]({chapter}_" in row for row in rows), name
    counts = [[int(each) for each in line.split("|")[2:5]] for line in glance.splitlines() if re.match(r"\| \[\d\d:", line)]
    assert [sum(column) for column in zip(*counts)] == [sum(load_result(name).verdict == word for name in NAMES) for word in WORDS]
