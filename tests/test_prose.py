"""Prose and output agree: every number in a chapter's text is in an output or the code above it, or is a fact with its source."""
import copy
import json
import re

import pytest

import check_prose
from conftest import ROOT

CHAPTERS = check_prose.chapters(ROOT)


def load(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_number_in_prose_is_shown_or_sourced(path):
    found = check_prose.check(load(path))
    assert found == [], "\n" + "\n".join(map(str, found))


def test_every_chapter_is_looked_at():
    assert {path.name for path in CHAPTERS} == {path.name for path in (ROOT / "nbs").glob("*.ipynb") if re.match(r"\d\d_|index", path.name)}


# --- a changed output is noticed ---

def change_outputs(book: dict) -> dict: # A copy whose outputs show other numbers, as after a run that came out differently
    book = copy.deepcopy(book)
    for cell in book["cells"]:
        for output in cell.get("outputs", []):
            for holder, key in [(output, "text")] + [(output.get("data", {}), key) for key in ("text/plain", "text/html")]:
                if key in holder:
                    holder[key] = re.sub(r"\d", lambda m: str((int(m[0]) + 3) % 10), "".join(holder[key]))
    return book


def without_outputs(book: dict) -> dict:
    book = copy.deepcopy(book)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    return book


def found_in(book: dict) -> set:
    return {(finding.cell, finding.text) for finding in check_prose.check(book) if finding.section != "fact"}


def test_changed_outputs_of_the_chapters_are_noticed():
    """In a copy with other outputs the numbers of the prose that lean on an output are found; a few may meet another one by chance."""
    leaning, noticed = set(), set()
    for path in CHAPTERS:
        book = load(path)
        here = found_in(without_outputs(book)) - found_in(book)
        leaning |= {(path.name, *each) for each in here}
        noticed |= {(path.name, *each) for each in here & found_in(change_outputs(book))}
    assert len(noticed) >= .8 * len(leaning), f"not noticed: {sorted(leaning - noticed)}"


def cite_an_output(book: dict): # (position of the output's cell, number, copy with a sentence about it below), or None
    """A number that only one output shows, with three digits or more, is put into the prose of a copy."""
    texts = [[check_prose.text_of_output(output) for output in cell.get("outputs", []) if "text" in output] for cell in book["cells"]]
    everything = "\n".join(check_prose.text_of_output(output) for cell in book["cells"] for output in cell.get("outputs", []))
    for position, shown in enumerate(texts):
        for text in re.findall(r"(?<![\w.,%-])0?\.\d{3,4}(?![\w.,%])", "\n".join(shown)):
            if everything.count(text.lstrip("0")) > 1:
                continue
            cited = copy.deepcopy(book)
            cited["cells"].insert(position + 1, dict(cell_type="markdown", source=f"The output above says {text}, as it should."))
            return position, text, cited
    return None


def test_a_sentence_about_an_output_fails_when_only_the_output_changes():
    """In copies of the real chapters: a number is cited, its output is changed, and the check names the sentence."""
    tried = noticed = 0
    for path in CHAPTERS:
        if (case := cite_an_output(load(path))) is None:
            continue
        position, text, cited = case
        before = found_in(cited)
        assert (position + 1, text) not in before, f"{path.name}: {text} is shown, but not found"
        for output in cited["cells"][position]["outputs"]:
            if "text" in output:
                wrong = text[:-1] + str((int(text[-1]) + 5) % 10)
                output["text"] = "".join(output["text"]).replace(text, wrong)
        tried += 1
        noticed += (position + 1, text) in found_in(cited)
    assert tried >= 4 and noticed >= .8 * tried  # another output may round to it by chance


def test_one_changed_output_is_noticed():
    book = page("## A\nThe gap is 0.37.", ("print(gap)", "gap 0.3712"))
    assert check_prose.check(book) == []
    book["cells"][1]["outputs"][0]["text"] = "gap 0.3791"
    (finding,) = check_prose.check(book)
    assert (finding.text, finding.section, finding.cell) == ("0.37", "A", 0)


# --- what counts as cover ---

def page(*cells) -> dict:
    """A notebook: text is Markdown, (source, output) is code."""
    made = []
    for cell in cells:
        if isinstance(cell, str):
            made.append(dict(cell_type="markdown", source=cell))
        else:
            source, *shown = cell
            outputs = [dict(output_type="stream", name="stdout", text=text) if isinstance(text, str) else
                       dict(output_type="display_data", data=text, metadata={}) for text in shown]
            made.append(dict(cell_type="code", source=source, outputs=outputs))
    return dict(cells=made)


def missing(*cells) -> list:
    return [finding.text for finding in check_prose.check(page(*cells))]


@pytest.mark.parametrize("prose,shown", [
    ("0.37", "0.3712"), ("0.37", ".374999"), ("0.4", "0.3712"), ("-0.37", "x = -0.371"), ("\u22120.37", "-0.371"), ("fell by 0.37", "-0.371"),
    ("37 %", "0.3712"), ("37%", "37.1%"), ("37 percent", "37.1"), ("0.37", "37.1%"), ("37.1 per cent", "0.3712"), ("1,234", "1234"),
    ("1234", "1,234.2"), ("1.2 million", "1203456"), ("4k", "4000"), ("20 thousand", "20,100"), ("1e-6", "1.0e-06"), ("0.001", "1e-3"),
    ("60-80 %", "0.6 and 0.8"), ("60 to 80 %", "60.0% 80.0%"), ("53 s", "53"), ("(0.37)", "0.37"), ("**0.37**", "0.37"), ("0.37.", "0.37"),
    ("| 0.37 | 41 |", "0.37 41"), ("3 of 40", "3 40"), ("100", "99.6")])
def test_an_output_covers_a_number(prose, shown):
    assert missing(f"## A\nIt is {prose} here.", ("x", shown)) == []


@pytest.mark.parametrize("prose,shown,found", [
    ("0.38", "0.3712", "0.38"), ("0.372", "0.37", "0.372"), ("-0.37", "0.37", "-0.37"), ("38 %", "0.3712", "38 %"), ("0.37", "37.1", "0.37"),
    ("1,235", "1234", "1,235"), ("1.3 million", "1203456", "1.3 million"), ("2 of 40", "3 40", "2"), ("3 of 41", "3 40", "41"),
    ("5 %", "0.06", "5 %"), ("13", "", "13"), ("0.5", "", "0.5"), ("12.0", "", "12.0"), ("60-80 %", "0.6", "80 %"), ("-3", "3", "-3"),
    ("1e-6", "1e-5", "1e-6"), ("37", "137 370 0.37", "37")])
def test_a_number_without_cover_is_found(prose, shown, found):
    assert missing(f"## A\nIt is {prose} here.", ("x", shown)) == [found]


def test_code_covers_but_its_comments_and_strings_do_not():
    assert missing("Steps: 400, rate 0.05, shift -2.5", ("train(steps=400, rate=5e-2, shift=-2.5)",)) == []
    assert missing("Steps: 400.", ("%time\nx = f'{400:d}'",)) == []
    assert missing("Steps: 400 and 300.", ("train()  # 400 steps\nnote = 'about 300'",)) == ["400", "300"]


def test_html_counts_as_it_is_read():
    table = {"text/html": ["<style>td {width: 77px}</style><table><tr><td>0.3", "71</td></tr></table>"], "text/plain": "..."}
    assert missing("It is 0.371.", ("x", table)) == []
    assert missing("It is 77.", ("x", table)) == ["77"]
    assert missing("It is 0.371.", ("x", {"image/png": "0.371"})) == ["0.371"]


def test_a_later_section_covers_nothing():
    assert missing("## A\nIt is 0.37.", "## B", ("x", "0.37")) == ["0.37"]
    assert missing("## A", ("x", "0.37"), "## B\nIt is 0.37.") == []
    assert missing("## A\nIt is 0.37.\n\n## B\nIt is 41.", ("x", "0.37 41")) == ["0.37"]                # one cell, two sections
    assert missing("```\n## no heading\n```\nIt is 0.37.", ("x", "0.37")) == []
    assert missing("## A\nIt is 0.37.\n\n### B", ("x", "0.37")) == []


def test_a_single_digit_from_an_earlier_section_must_be_there_as_it_is():
    assert missing("## A", ("x", "0.72"), "## B\nIt is 0.7.") == ["0.7"]
    assert missing("## A", ("x", "0.70"), "## B\nIt is 0.7, or 70 %.") == []
    assert missing("## A", ("x", "0.72"), "## B", ("x", "0.69"), "It is 0.7.") == []


@pytest.mark.parametrize("text", [
    "nine squares and 9 squares, 12 pages, 0 to 1", "`x = 55` and ``a ` 55``", "```python\nx = 55\n```", "$x = 55$ and $$55$$ and \\(55\\)",
    "a formula over two lines $x +\n55$ ends", "[the 55](55_x.ipynb)", "![55 of them](x.png)", "see https://example.org/55", "# 55 things\n### 55",
    "<img width=55>", "1. first\n22. second", "| 13 | [x](y) |", "T5, GPT-2, k3, v1.1, H100, top-55, 55abc", "Bai et al. (2022), Bradley & Terry (1952)",
    "(Schulman et al. 2016, section 3.2)", "Ouyang et al. 3.4", "Terry, 1952; since 1952; In 2017", "arXiv:2212.08073 and 2309.00267v2",
    "section 6.1, Sections 22 and 33, equation 15, eq. (14), Table 13, figure 15, chapter 16, chapters 13 to 15, lines 20-35, Appendix 14.2, Lab 33",
    "a 95 % interval, the 95% bootstrap interval, 90 % confidence bands", "(2017) and (2017, 55 pages)"])
def test_what_is_no_claim_is_left_alone(text):
    assert missing(text) == []


@pytest.mark.parametrize("text,found", [
    ("2000 games", ["2000"]), ("in 2000 games", ["2000"]), ("(of 2000 games)", ["2000"]), ("95 % of them", ["95 %"]), ("step 500", ["500"]),
    ("costs $55 and $66", ["55", "66"]), ("a `b` 55 `c`", ["55"]), ("55-token replies", ["55"]), ("x 55\n    y 66", ["55", "66"])])
def test_what_looks_like_an_exemption_but_is_none(text, found):
    assert missing(text) == found


# --- facts ---

def test_a_fact_with_its_source_covers_its_own_cell():
    cell = "It grew by 1.35 and 40 %.\n\n<!-- fact: 1.35, 40 % (Bai et al. 2022, 3.2) -->"
    assert missing(cell) == []
    assert missing(cell, "It grew by 1.35.") == ["1.35"]
    assert missing(cell.replace("by 1.35", "by 1.36")) == ["1.36", "1.35, 40 % (Bai et al. 2022, 3.2)"]


@pytest.mark.parametrize("comment,why", [("1.35", "no source"), ("1.35 ()", "no source"), ("1.35 (3.2)", "no source"), ("(Bai 2022)", "no number"),
                                         ("1.35, 7.5 (Bai 2022)", "covers 7.5, which this cell does not say")])
def test_a_careless_fact_is_found(comment, why):
    found = check_prose.check(page(f"It grew by 1.35.\n<!-- fact: {comment} -->"))
    assert any(why in finding.why for finding in found), found


def test_a_finding_says_where_and_what(capsys, tmp_path):
    path = tmp_path / "98_x.ipynb"
    path.write_text(json.dumps(page("# T", "## A\nIt is 0.37 here.\n<!-- fact: 0.5 (nobody) -->")))
    assert check_prose.main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "98_x.ipynb, cell 1, 'A': '0.37' is in no output" in said and ": It is 0.37 here." in said
    assert check_prose.main(["--facts", str(path)]) == 0
    assert capsys.readouterr().out == "98_x.ipynb, cell 1: 0.5 (nobody)\n"
