"""The report: every text of a model is shown as text, the page needs nothing else, the same run gives the same page."""
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cai_course.errors import CourseError
from cai_course.report import MEASURES, STAGES, render_report, results_text, show_figure, visible

FIGURE = {"value": .5, "low": .4, "high": .6, "n": 20}
RESULTS = {measure: {stage: FIGURE for stage in STAGES} for measure in MEASURES}
ATTACKS = [
    "<script>document.title = 'HACKED'</script>",
    "<img src=x onerror=\"document.title='HACKED'\">",
    "</td></table></style><svg onload=\"document.title='HACKED'\">",
    "<!-- --!><iframe srcdoc=\"<script>parent.document.title='HACKED'</script>\"></iframe>",
    "{{ 7 * 7 }}{% raw %}{{ config }}",
    "\" onmouseover=\"document.title='HACKED'",
    "&lt;script&gt;document.title='HACKED'&lt;/script&gt;",
    "\x00<scr\x00ipt>document.title='HACKED'</script>",
    "javascript:document.title='HACKED'",
]


def page(attack, **more):
    """A report in which every place that can hold foreign text holds the attack."""
    return render_report(
        title=f"run {attack}", summary=f"summary {attack}", results=RESULTS, differences=dict.fromkeys(MEASURES, FIGURE), notes=[attack],
        tables=[{"caption": attack, "head": [attack], "rows": [[attack]], "text": True}],
        transcripts=[{"caption": attack, "stages": list(STAGES), "rows": [
            {"prompt": attack, "replies": {stage: {"text": attack, "verdict": attack} for stage in STAGES}}]}],
        chains=[{"prompt": attack, "steps": [{"name": attack, "text": attack}]}], settings=[(attack, attack)], **more)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_becomes_markup(attack):
    plain, attacked = Tags(page("harmless")), Tags(page(attack))
    assert attacked.tags == plain.tags and attacked.attributes == plain.attributes
    assert attacked.text.count(visible(attack)) >= 12


def test_the_page_needs_nothing_else():
    text = page("harmless")
    assert not re.search(r"(src|href|url)\s*[=(]", text)
    assert "default-src 'none'" in text and text.startswith("<!DOCTYPE html>") and text.count("<html") == 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Show a page in headless Chromium; returns the document after its scripts, had there been any."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here; the parser test above still holds")

    def show(text):
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run([program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000",
                               "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
        if "<html" not in done.stdout:
            pytest.skip(f"Chromium does not run here: {done.stderr[-300:]}")
        return done.stdout
    return show


def test_in_a_browser_the_attacks_are_text(browser):
    text = page("\n".join(ATTACKS))
    without_policy = re.sub(r"<meta http-equiv.*?>", "", text)
    for each in (text, without_policy): # the escaping must hold without the policy, too
        document = browser(each)
        title = re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]
        assert title.startswith("run ") and "<script" not in document.lower() and not re.search(r"<(img|iframe)\b", document)
        assert "<script>document.title = 'HACKED'</script>" in html.unescape(document)


def test_the_browser_would_have_noticed(browser):
    broken = page("harmless").replace("harmless", ATTACKS[0], 30)
    assert "<title>HACKED</title>" in browser(re.sub(r"<meta http-equiv.*?>", "", broken))
    assert "<title>HACKED</title>" not in browser(broken), "the policy should have stopped the script"


def test_visible():
    assert visible("a\x00b\x1b[31m") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}[31m"
    assert visible("line\r\nline\ttab") == "line\nline\ttab"
    assert visible("\ud800") == "?" and visible(None) == "" and visible(3) == "3"


def test_figures():
    assert show_figure(FIGURE) == "0.500 [0.400, 0.600]" and show_figure(FIGURE, sign=True) == "+0.500 [+0.400, +0.600]"
    assert show_figure(None) == "-" and show_figure(dict(FIGURE, low=None)) == "0.500 [?, 0.600]"


def test_table():
    text = results_text(RESULTS, dict.fromkeys(MEASURES, dict(FIGURE, value=-.1)))
    lines = text.splitlines()
    assert len(lines) == 2 + len(MEASURES) and all(measure in text for measure in MEASURES) and "-0.100" in text
    assert lines[2].split()[0] == "harm"
    partly = results_text({"harm": {"base": FIGURE}, "seconds": 1., "peak_memory_mb": 3.})
    assert len(partly.splitlines()) == 3
    with pytest.raises(CourseError, match="none of"):
        results_text({"seconds": 1.})


def test_the_same_input_gives_the_same_page():
    assert page("x") == page("x")
