"""Check that every number in a notebook's prose is on the page: in an output or in the code, or as a fact with its source.

    python tools/check_prose.py [NOTEBOOK ...]       prints one line per number without cover; none: all chapters
    python tools/check_prose.py --facts              prints the facts with their sources, for somebody to read

A number in a markdown cell is covered when an output of its H2 section holds a value that is equal after rounding to the digits that
the prose shows, or when the code there holds just this value. Earlier sections count too; there are many values in them, so a number
with a single digit (0.7, 40 %) must be there without rounding. A percentage is also compared with a share. A number that comes from
outside is covered by an invisible comment that names the source, on a line of its own at the end of the same cell (Markdown takes
whatever else stands on such a line for HTML):

    <!-- fact: 1.35, 40 % (Bai et al. 2022, 3.2) -->

Not looked at: code spans and blocks, math, links, headings, HTML, the numbers of lists, names with digits (T5, k3, GPT-2), years and
places of citations, numbers of sections, equations, tables, figures, lines and chapters, and the name of an interval (95 % interval).
Neither are bare whole numbers up to twelve, and -1: they count what the reader sees on the page (2 players, 9 squares) or name the
ends of a scale, and are hardly ever measured; where they are, as in "3 of 40", with a percent sign or with a decimal point, they are
looked at.
Evidence is what the code computes with or shows: numbers in its comments and strings were typed by a person like the prose.
"""
import ast
import html
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = 12  # whole numbers up to here count things
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "k": 1e3, "M": 1e6}
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_PERCENT = r"[ \u00a0]?%|[ \u00a0]percent\b|[ \u00a0]per cent\b"
IN_PROSE = re.compile(rf"(?<![\w.])(?<![A-Za-z]-)(?P<sign>(?<![\d\w)])[-\u2212])?(?P<digits>{_DIGITS})(?P<percent>{_PERCENT})?"
                      rf"(?:(?P<scale>[kM]\b|[ -](?:thousand|million|billion)\b)|(?P<unit>(?:ms|s|x|th|MB|GB|KB)\b))?(?![\w])")
IN_OUTPUT = re.compile(rf"(?<![\w.])(?P<sign>[-\u2212](?!-))?(?P<digits>{_DIGITS})(?P<percent>[ \u00a0]?%)?")
FACT = re.compile(r"<!--\s*fact:(.*?)-->", re.S)
_YEAR = r"(?:1[89]|20)\d\d[a-z]?"
_NUMBERS = r"\(?\d+(?:\.\d+)*[a-z]?\)?(?:(?:,| and|, and| to| or|-|\u2013)\s*\(?\d+(?:\.\d+)*\)?)*"
NO_PROSE = [re.compile(pattern, flags) for pattern, flags in [
    (r"<!--.*?-->", re.S), (r"^ {0,3}(```+|~~~+).*?^ {0,3}\1[^\n]*$", re.S | re.M), (r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S),
    (r"(?<!\\)\$\$.+?\$\$", re.S), (r"(?<![\\$])\$(?=\S)[^$\n]*(?:\n[^$\n]+)?(?<=\S)\$(?!\d)", 0), (r"\\\(.+?\\\)|\\\[.+?\\\]", re.S),
    (r"!?\[[^\]]*\]\([^)]*\)", 0), (r"https?://\S+", 0), (r"</?[A-Za-z][^>]*>", 0), (r"^ {0,3}#{1,6} .*$", re.M),
    (r"^\s*\d+[.)](?= )", re.M), (r"^\| *\d\d? *(?=\|)", re.M),                                  # numbers of lists and of table rows
    (rf"(?:et al\.?|[A-Z][\w'-]+),? \(?{_YEAR}(?:[,;] (?:{_NUMBERS}|[^()\n]*(?=\))))*\)?", 0),  # Bai et al. (2022), Terry 1952
    (r"et al\.? \(?\d+(?:\.\d+)+", 0), (rf"\({_YEAR}(?:,[^()]*)?\)", 0), (rf"\b(?:[Ii]n|[Ss]ince) {_YEAR}\b(?! [a-z]+s\b)", 0), (r"\b(?:arXiv:)?\d{4}\.\d{4,5}(?:v\d)?\b", 0),
    (rf"\b(?:[Ss]ections?|[Ss]ec\.|[Cc]hapters?|[Ee]quations?|[Ee]qs?\.|[Tt]ables?|[Ff]igures?|[Ff]ig\.|[Aa]ppendix|[Aa]lgorithm|[Ll]ines?|"
     rf"[Ll]ab|[Pp]ages?|pp?\.|\u00a7)\s*{_NUMBERS}", 0),
    (rf"\b9[059](?:{_PERCENT})(?: confidence)?(?= (?:confidence |bootstrap )?(?:intervals?|bands?)\b)", 0)]]


@dataclass(frozen=True)
class Number:
    """A number as it is written."""
    text: str # As written, such as "1.35" or "40 %"
    value: float # Without sign, percent as written
    digits: int # Digits after the point that it shows; negative for 1.2 million
    negative: bool = False
    percent: bool = False
    counts: bool = False # A bare whole number up to twelve, which counts things

    @property
    def significant(self) -> int: # Digits that it shows, without leading zeros; 40 shows two if it is no percentage
        return len(str(round(self.value * 10. ** self.digits)).strip("0") if self.percent else str(round(self.value * 10. ** self.digits)))


@dataclass(frozen=True)
class Finding:
    """A number of the prose that nothing covers, or a fact comment that is wrong."""
    cell: int # Position in the notebook
    section: str # Title of its H2 section
    text: str # The number, or the comment
    line: str # Where it stands
    why: str

    def __str__(self) -> str:
        return f"cell {self.cell}, {self.section!r}: {self.text!r} {self.why}: {self.line}"


def blank_out(text: str) -> str: # Same length, same lines
    """Replace by spaces whatever is not prose."""
    for pattern in NO_PROSE:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def _number(match: re.Match) -> Number:
    groups = match.groupdict()
    digits = groups["digits"].replace(",", "")
    mantissa, _, exponent = digits.lower().partition("e")
    shown = len(mantissa.partition(".")[2]) - int(exponent or 0)
    scale = SCALES[groups["scale"].strip(" -")] if groups.get("scale") else 1
    shown -= len(str(int(scale))) - 1
    return Number(match[0].strip(), float(digits) * scale, shown, bool(groups["sign"]), bool(groups["percent"]))


def numbers_in_prose(text: str) -> list: # (Number, line) pairs of a markdown text
    found, clean = [], blank_out(text)
    lines = text.split("\n")
    for row, line in enumerate(clean.split("\n")):
        matches = list(IN_PROSE.finditer(line))
        for i, match in enumerate(matches):
            number = _number(match)
            after = matches[i + 1] if i + 1 < len(matches) else None
            between = line[match.end():after.start()] if after else ""
            before = line[matches[i - 1].end():match.start()] if i else ""
            if after and after["percent"] and re.fullmatch(r" ?(?:-|\u2013|to|and|or|,) ?", between):  # 60-80 %, 4 and 6 %
                number = Number(number.text, number.value, number.digits, number.negative, True)
            part = any(re.fullmatch(r" (?:of|out of|in|/)(?: the| every)? ", gap) for gap in (between, before))
            counts = (number.digits == 0 and "." not in match["digits"] and number.value <= (1 if number.negative else SMALL)
                      and not (number.percent or part or match["scale"]))
            number = Number(number.text, number.value, number.digits, number.negative, number.percent, counts)
            found.append((number, lines[row].strip()))
    return found


def text_of_output(output: dict) -> str:
    """What a reader sees of an output as text."""
    parts = ["".join(output.get("text", ""))]
    data = output.get("data", {})
    if "text/html" in data:  # with tags gone; the plain form of a table cuts columns
        page = re.sub(r"<(style|script)\b.*?</\1>", " ", "".join(data["text/html"]), flags=re.S)
        parts.append(html.unescape(re.sub(r"<[^>]+>", " ", page)))
    for kind in ("text/plain", "text/markdown", "text/latex"):
        parts.append("".join(data.get(kind, "")))
    return "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", part) for part in parts)


def numbers_in_code(source: str) -> list: # Values of the numeric literals, signed
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)
    tree, values = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            node = ast.Constant(-node.operand.value) if isinstance(node.operand.value, (int, float)) else node
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            values.append(float(node.value))
    return values


class Evidence:
    """The values that outputs and code have shown."""

    def __init__(self):
        self.shown, self.written = [], []  # of outputs, of code; both signed

    def add_output(self, text: str) -> None:
        for match in IN_OUTPUT.finditer(text):
            number = _number(match)
            value = -number.value if number.negative else number.value
            self.shown += [value, value / 100] if number.percent else [value]

    def add_code(self, source: str) -> None:
        self.written += numbers_in_code(source)

    def take(self, other: "Evidence") -> None:
        self.shown += other.shown
        self.written += other.written

    def covers(self, number: Number, rounded: bool = True) -> bool:
        """Does an output round to this number, or does the code hold it? With `rounded=False` an output must hold it as it stands."""
        near = .5 * 10. ** -number.digits if rounded else 0.
        return any(_near(values, wanted, tolerance * scale) for wanted, scale in _readings(number)
                   for values, tolerance in ((self._read(self.shown, number), near), (self._read(self.written, number), 0.)))

    def _read(self, values: list, number: Number) -> list: # Prose may drop a minus ("fell by 0.3") but not invent one
        return values if number.negative else [abs(value) for value in values]


def _readings(number: Number) -> list: # (value, scale): a percentage may stand for a share
    value = -number.value if number.negative else number.value
    return [(value, 1.)] + ([(value / 100, .01)] if number.percent else [])


def _near(values: list, wanted: float, tolerance: float) -> bool:
    tolerance += 1e-9 * max(abs(wanted), tolerance)
    return any(abs(value - wanted) <= tolerance for value in values)


def facts(text: str) -> list: # (comment, numbers, source) of a markdown cell
    found = []
    for match in FACT.finditer(text):
        body = " ".join(match[1].split())
        claim, _, source = body.partition("(")
        numbers = [_number(m) for m in IN_PROSE.finditer(claim)]
        found.append((body, numbers, source.rstrip(") ").strip()))
    return found


def _same(fact: Number, number: Number) -> bool:
    return (fact.value, fact.negative) == (number.value, number.negative)


def sections(book: dict) -> list: # (cell number, section number, section title, cell type, text or cell)
    """The notebook in reading order; a markdown cell with several H2 headings is cut at them."""
    rows, section, title = [], 0, "(top)"
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "markdown":
            fenced = False
            part = []
            for line in "".join(cell["source"]).split("\n"):
                fenced ^= bool(re.match(r" {0,3}(```|~~~)", line))
                if not fenced and line.startswith("## "):
                    rows.append((number, section, title, "markdown", "\n".join(part)))
                    section, title, part = section + 1, line[3:].strip(), []
                part.append(line)
            rows.append((number, section, title, "markdown", "\n".join(part)))
        elif cell["cell_type"] == "code":
            rows.append((number, section, title, "code", cell))
    return rows


def check(book: dict) -> list: # `Finding`s, in reading order
    """Numbers of the prose that nothing on the page covers."""
    rows, findings, before = sections(book), [], Evidence()
    for section in range(rows[-1][1] + 1 if rows else 0):
        here, evidence = [row for row in rows if row[1] == section], Evidence()
        for _, _, _, kind, cell in here:
            if kind == "code":
                evidence.add_code("".join(cell["source"]))
                for output in cell.get("outputs", []):
                    evidence.add_output(text_of_output(output))
        for number, _, title, kind, text in here:
            if kind != "markdown":
                continue
            known = [(n, source) for _, given, source in facts("".join(book["cells"][number]["source"])) for n in given]
            for each, line in numbers_in_prose(text):
                covered = any(source and _same(fact, each) for fact, source in known)
                if not (each.counts or covered or evidence.covers(each) or before.covers(each, each.significant > 1)):
                    findings.append(Finding(number, title, each.text, line, "is in no output and no code of its section or before"))
        before.take(evidence)
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"])
        written = [each for each, _ in numbers_in_prose(text)]
        for body, given, source in facts(text):
            problems = [] if given else ["names no number"]
            problems += [] if re.search(r"[A-Za-z]{3}", source) else ["names no source: write `<!-- fact: 1.35 (who, year, where) -->`"]
            problems += [f"covers {fact.text}, which this cell does not say" for fact in given if not any(_same(fact, w) for w in written)]
            findings += [Finding(number, "fact", body, "", problem) for problem in problems]
    return findings


def chapters(root: Path) -> list: # Paths of the notebooks that are checked
    """The chapters and the index."""
    return sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb")) + [root / "nbs" / "index.ipynb"]


def main(words: list) -> int: # Exit status
    only_facts = "--facts" in words
    status = 0
    for path in [Path(word) for word in words if word != "--facts"] or chapters(ROOT):
        book = json.loads(path.read_text(encoding="utf-8"))
        if only_facts:
            for number, cell in enumerate(book["cells"]):
                for body, _, _ in facts("".join(cell["source"])) if cell["cell_type"] == "markdown" else []:
                    print(f"{path.name}, cell {number}: {body}")
            continue
        for finding in check(book):
            print(f"{path.name}, {finding}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
