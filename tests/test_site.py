"""The docs site as a reader meets it: built into a temporary folder, then opened in a real browser without a network."""
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import docs_reference
import docs_site
from conftest import ROOT

PAGES = [name for _, names in docs_site.navigation(ROOT) for name in names]
TERMS = ["advantage", "baseline", "Bradley-Terry", "clipped", "constitution", "critique", "Dawid", "evasive", "gae", "glossary", "KL",
         "LoRA", "mask", "over-optimization", "position bias", "ppo_update", "red team", "reward_model", "soft label", "wilson"]
CONTRAST = ["index.html", "glossary.html", "library.html", "results.html", "tools/exercises.html", "tools/errors.html", "tools/stats.html"]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT = 2_000_000  # bytes of a page with all that it loads


# --- without a build ---

def test_written_pages_open_with_title_and_promise():
    for name in PAGES:
        if name.endswith(".md"):
            title, promise, rest = docs_site.split_title((ROOT / "nbs" / name).read_text(encoding="utf-8"))
            assert title and promise and rest, name
    written = {path.relative_to(ROOT / "nbs").as_posix() for path in (ROOT / "nbs").rglob("*.md")}
    assert written <= set(PAGES), "a written page that the sidebar does not list cannot be found"


def test_a_first_cell_that_says_more_than_the_title_keeps_the_rest():
    assert docs_site.split_title("# A\n\n> b\n\nc\n\n## d") == ("A", "b", "c\n\n## d")
    assert docs_site.split_title("# A\n> b") == ("A", "b", "")
    assert docs_site.split_title("# A\n\nc") == ("A", "", "c")
    assert docs_site.split_title("text") == ("", "", "text")


def test_addresses_are_those_of_nbdev():
    pytest.importorskip("nbdev")
    from nbdev.doclinks import _nbpath2html
    for name in PAGES:
        assert docs_site.address(name) == _nbpath2html(Path(name)).as_posix()


CELL = '''#| export
@dataclass
class Box:
    "A box. It holds things."
    size:int=3 # How many fit, at least 1
    name:str|None=None # `None`: without a name

    def fill(self,
        things:list, # What goes in, shape `(n,)`
        *, strict:bool=False, # Refuse what is too much?
    ) -> int: # How many went in
        """Put things in.

        Raises `CourseError` if nothing fits.
        Source: nobody (2020).
        """
        # not the docment of anything

    @property
    def full(self) -> bool: # True at the top
        "Is it full?"

def pour(a, /, b:str="x|y", *rest, c=1, **more) -> dict: # All of it
    "Pour <b> into `a`, *slowly*."

# What is above belongs to it
def one(
    # Two lines above,
    # one meaning
    x:int,
    y=(1,
       2), # At the end of a default
): return x
'''


def test_the_reference_reads_what_stands_beside_the_arguments():
    box, pour, one = docs_reference.public(CELL)
    assert docs_reference.fields(box, CELL) == [("size", "int", "3", "How many fit, at least 1"),
                                                ("name", "str | None", "None", "`None`: without a name")]
    rows, returns = docs_reference.arguments(box.body[3], CELL)
    assert rows == [("things", "list", "", "What goes in, shape `(n,)`"), ("strict", "bool", "False", "Refuse what is too much?")]
    assert returns == ("int", "How many went in")
    rows, returns = docs_reference.arguments(pour, CELL)
    assert [(name, default) for name, _, default, _ in rows] == [("a", ""), ("b", "'x|y'"), ("*rest", ""), ("c", "1"), ("**more", "")]
    assert returns == ("dict", "All of it") and not any(note for *_, note in rows)
    assert docs_reference.signature(pour, "pour") == "pour(a, /, b: str = 'x|y', *rest, c=1, **more) -> dict"
    rows, returns = docs_reference.arguments(one, CELL)
    assert [note for *_, note in rows] == ["Two lines above, one meaning", "At the end of a default"] and returns == ("", "")
    assert docs_reference.signature(one, "one" * 40).startswith("one" * 40 + "(\n    x: int,\n    y=(1, 2),\n)")


def test_the_reference_as_html():
    entries = [docs_reference.Entry(node.name, "boxes", "boxes.html", node, CELL) for node in docs_reference.public(CELL)]
    text = docs_reference.body(entries[0], {"CourseError": "errors.html#courseerror"}.get)
    assert "from cai_course.boxes import Box" in text and 'id="box.fill"' in text
    assert '<p><strong>Raises</strong> <a href="errors.html#courseerror"><code>CourseError</code></a> if nothing fits.</p>' in text
    assert "<p><strong>Source:</strong> nobody (2020).</p>" in text
    assert "<code>str | None</code>" in text and "Box.full -&gt; bool" in text
    assert "Pour &lt;b&gt; into <code>a</code>, <em>slowly</em>." in docs_reference.body(entries[1], lambda name: None)
    assert entries[0].summary == "A box" and docs_reference.before(entries[:1]) == "### Box"
    assert '<span id="pour">' in docs_reference.before(entries) and "### Box, pour, one" in docs_reference.before(entries)


def test_names_become_links_where_they_are_names():
    entries = [docs_reference.Entry(node.name, "boxes", "boxes.html", node, CELL) for node in docs_reference.public(CELL)]
    names = docs_site.Names(entries + [docs_reference.Entry("pour", "other", "tools/other.html", entries[1].node, CELL)])
    link = names.linker("tools/page.html")
    assert link("Box") == "../boxes.html#box" and link("Box.fill") == "../boxes.html#box.fill" and link("cai_course.boxes") == "../boxes.html"
    assert link("pour") is None, "two modules have it"
    assert names.linker("boxes.html")("pour") == "#pour" and link("boxes.pour") == "../boxes.html#pour"
    assert link("Box.nothing") is None and link("size") is None
    text = "# `Box`\n\nA `Box` and `Box()` and [`Box`](x) and `` `Box` ``.\n\n```\n`Box`\n```\n<p>`Box`</p>"
    marked = names.mark(text, "index.html")
    assert marked.count("](boxes.html#box)") == 2 and "A [`Box`](boxes.html#box) and [`Box()`](boxes.html#box)" in marked


def test_what_quarto_writes_differently_is_translated():
    text = ("[a](../03_ppo.ipynb#x) [b](glossary.md) [c](https://example.org/a.ipynb) [d](#e)\n\n## 1. The `dials`: a_b!\n\n"
            "::: {.callout-note}\nhello\n:::\n\n```\n[a](b.ipynb)\n# no heading\n```")
    shown = docs_site._markdown_for_sphinx(text, "tools/stats.html")
    assert "[a](../ppo.html#x) [b](glossary.html) [c](https://example.org/a.ipynb) [d](#e)" in shown
    assert '<span id="the-dials-a_b"></span>' in shown and ":::{note}\nhello\n:::" in shown and "[a](b.ipynb)\n# no heading" in shown


def test_a_page_that_is_not_there_is_named(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "_quarto.yml").write_text("website: {sidebar: {contents: [gone.md]}}")
    with pytest.raises(SystemExit, match="gone.md"):
        docs_site.process(tmp_path, tmp_path / "out")


def test_a_formula_that_cannot_be_drawn_is_named():
    from sphinx.util.docutils import docutils_namespace  # noqa: F401  (part of the extra `docs`)
    found = {}

    class App:
        def add_html_math_renderer(self, name, inline_renderers, block_renderers):
            found.update(inline=inline_renderers[0], block=block_renderers[0])
    docs_site.setup(App())
    from docutils import nodes

    class Visitor:
        body = []
    with pytest.raises(nodes.SkipNode):
        found["inline"](Visitor, nodes.math("", r"\sigma(x)"))
    assert "<math" in Visitor.body[0]
    with pytest.raises(SystemExit, match="nosuchsign"):
        found["block"](Visitor, nodes.math_block("", r"\nosuchsign{x}"))


def test_the_results_page_shows_what_is_stored():
    from cai_course.stats import Estimate
    book = json.loads((ROOT / "nbs" / "results.ipynb").read_text(encoding="utf-8"))
    shown = "".join("".join(output["data"]["text/markdown"]) for cell in book["cells"] for output in cell.get("outputs", []))
    stored = sorted((ROOT / "data" / "experiments").glob("*.json"))
    for path in stored:
        record = json.loads(path.read_text(encoding="utf-8"))
        (line,) = [line for line in shown.splitlines() if f"`{record['name']}`" in line]
        assert f"| {Estimate.from_dict(record['estimate']):.3g} | {len(record['rows'])} | **{record['verdict']}** |" in line, (
            "results.ipynb is out of date: make notebooks ARGS=nbs/results.ipynb (last of all, after the other notebooks)")
    assert "not measured yet" not in shown and "(out of date)" not in shown


def test_the_readme_states_the_time_and_the_memory_of_the_stored_run():
    found = json.loads((ROOT / "data" / "align" / "results.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"took {found['seconds'] / 60:.0f} minutes" in text and f"{found['peak_memory_mb'] / 1000:.1f} GB of memory" in text


def test_the_readme_states_the_stored_speeds():
    "Written by `benchmarks/rlhf.py --json`; the README rounds to a tenth."
    files = sorted((ROOT / "benchmarks" / "results").glob("rlhf-*.json"))
    rows = [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in rows:
        cells = f"| {row['seconds']:.1f} s | {row['trl_seconds']:.1f} s, {row['ratio']:.1f} times as long | {row['floor']:.1f} s |"
        assert cells in text, (row["size"], row["setting"])


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".ipynb")])
def test_every_picture_of_a_notebook_says_what_it_shows(name):
    for number, cell in enumerate(json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"]):
        outputs = cell.get("outputs", [])
        if any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})):
            cell["source"] = "".join(cell["source"])
            alt = docs_site._code_for_sphinx(cell)["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert alt.strip(), f"cell {number} draws a figure without words: `#| fig-alt: ...`, or new_figure(alt=...)"


def test_every_command_that_a_written_page_names_exists():
    from cai_course.cli import make_parser
    (commands,) = [action.choices for action in make_parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name in PAGES:
        if name.endswith(".md"):
            text = (ROOT / "nbs" / name).read_text(encoding="utf-8")
            for command in re.findall(r"`cai-course ([a-z-]+)", text):
                assert command in commands, f"{name}: there is no cai-course {command}"
            for target in re.findall(r"`make ([a-z]+)", text):
                assert target in targets, f"{name}: there is no make {target}"


def test_the_workflow_pins_everything():
    text = (ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)["jobs"]["build"]
    for used in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", used), f"{used}: name the commit"
    assert any(re.fullmatch(r"\d+\.\d+\.\d+", str(step.get("with", {}).get("version", ""))) for step in job["steps"]), "Quarto's version"
    assert "latest" not in job["runs-on"] and any("-c constraints.txt" in step.get("run", "") for step in job["steps"])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """What both builders share, made where neither the course nor PyTorch can be imported, as in the workflow."""
    pytest.importorskip("nbdev")
    target = tmp_path_factory.mktemp("prepared")
    program = ("import sys, pathlib\n"
               "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'cai_course', 'sphinx']))\n"
               "sys.path.insert(0, 'tools')\n"
               "import docs_site\n"
               "docs_site.process(docs_site.ROOT, pathlib.Path(sys.argv[1]))")
    done = subprocess.run([sys.executable, "-c", program, str(target)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.mark.slow
def test_every_page_is_prepared_for_both_builders(prepared):
    for name in PAGES:
        if name.endswith(".md"):
            _, head, text = (prepared / name).read_text(encoding="utf-8").split("---\n", 2)
            assert yaml.safe_load(head)["title"] and docs_site.EVERY_NAME not in text
            continue
        before, after = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (ROOT / "nbs", prepared))
        head = yaml.safe_load(after["cells"][0]["source"].strip("-\n"))
        assert head["title"] and head["output-file"] == Path(docs_site.address(name)).name
        shown = "\n".join(cell["source"] for cell in after["cells"])
        assert not re.search(r"^#\|\s*(export|hide|default_exp)", shown, re.M), name
        first = docs_site.split_title("".join(before["cells"][0]["source"]))[2]
        assert first.split("\n")[0] in shown, f"{name}: the rest of the first cell is lost"
        pictures = [sum(kind.startswith("image/") for cell in book["cells"] for output in cell.get("outputs", [])
                        for kind in output.get("data", {})) for book in (before, after)]
        assert pictures[0] == pictures[1], f"{name}: a figure is lost"


@pytest.mark.slow
def test_quarto_gets_all_pages_and_its_site_is_kept(tmp_path, monkeypatch, capsys):
    """A stand-in for Quarto: it notes what it was given and writes one page."""
    program = tmp_path / "bin" / "quarto"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n[ \"$1\" = render ] && mkdir -p _docs/tools && find . -type f > _docs/index.html\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.html").touch()
    docs_site.main(["--out", str(tmp_path / "out")])
    given = (tmp_path / "out" / "index.html").read_text().split()
    assert {f"./{name}" for name in [*PAGES, "_quarto.yml", "styles.css", "site.scss", "math.woff2", "favicon.svg"]} <= set(given)
    assert not (tmp_path / "out" / "old.html").exists() and "quarto was not found" not in capsys.readouterr().out


@pytest.mark.slow
def test_every_block_of_the_library_page_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "nbs" / "library.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 8
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "trial" / "report.html").exists()


# --- the site, built ---

class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loads, self.images, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if found.get("id"):
            self.ids.append(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "manifest"):
            self.loads.append(found["href"])
        if tag == "img":
            self.images.append(found)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site as `make docs` builds it where there is no Quarto."""
    pytest.importorskip("furo", reason="the extra `docs` is not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "docs_site.py"), "--builder", "sphinx", "--out", str(out)],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Sphinx" in done.stdout
    return out


@pytest.fixture(scope="session")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


@pytest.mark.slow
def test_without_quarto_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docs_site.shutil, "which", lambda name: None)
    monkeypatch.setattr(docs_site, "build", lambda root, out, builder: (out.mkdir(), (out / "index.html").touch()))
    docs_site.main(["--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "quarto was not found" in said and "Sphinx" in said and "1 pages" in said


@pytest.mark.slow
def test_the_sidebar_is_that_of_quarto(site, pages):
    assert {docs_site.address(name) for name in PAGES} <= set(pages)
    text = (site / "index.html").read_text(encoding="utf-8")
    sidebar = text[text.index('class="sidebar-tree"'):]
    wanted = [docs_site.address(name) for name in PAGES if name != "index.ipynb"]
    assert [href for href in re.findall(r'class="reference internal" href="([^"#]+)"', sidebar) if href in wanted][:len(wanted)] == wanted
    for section, _ in docs_site.navigation(ROOT):
        assert section in sidebar


@pytest.mark.slow
def test_every_internal_link_leads_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            if target in pages:
                if parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                    broken.append(f"{name}: {link}: no such place")
            elif not (site / target).is_file():
                broken.append(f"{name}: {link}")
    assert broken == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere_and_no_page_is_heavy(site, pages):
    for name, page in pages.items():
        assert not [load for load in page.loads if urlsplit(load).scheme in ("http", "https") or load.startswith("//")], name
        loaded = {os.path.normpath(os.path.join(os.path.dirname(name), urlsplit(load).path)) for load in page.loads}
        size = (site / name).stat().st_size + sum((site / each).stat().st_size for each in loaded if not each.startswith("data:"))
        assert size <= LIMIT, f"{name}: {size} bytes"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"]?http", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_every_picture_is_described(pages):
    missing = [f"{name}: {image['src']}" for name, page in pages.items() for image in page.images
               if not image.get("alt", "").strip() or image["alt"].startswith("_images/")]
    assert missing == []


@pytest.mark.slow
def test_every_exported_name_is_in_the_reference_and_explained(pages):
    from cai_course._modidx import d
    known = {f"{module}.{name}" for module, names in ((m.removeprefix("cai_course."), n) for m, n in d["syms"].items())
             for name in (each.removeprefix(f"cai_course.{module}.") for each in names)
             if "." not in name and not name.startswith("_") and not module.startswith("practice.")}
    links = pages["reference.html"].links
    for each in known:
        module, name = each.rsplit(".", 1)
        assert any(link.endswith("#" + name.lower()) for link in links), f"{each} is not in the reference"
    text = " ".join("".join(page.text) for page in pages.values())
    assert all(f"from cai_course.{each.rsplit('.', 1)[0]} import {each.rsplit('.', 1)[1]}" in text for each in known)


@pytest.mark.slow
def test_directives_do_not_show(pages):
    for name, page in pages.items():
        assert not re.search(r"^#\|", "".join(page.text), re.M), name


# --- in a browser ---

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here; the tests above still read every page")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture
def visit(browser, address):
    """Open a page; complaints of the page and requests that fail or leave the site are collected."""
    opened = []

    def open_page(name, **options):
        page = browser.new_page(reduced_motion="reduce", **options)
        page.set_default_timeout(120_000)
        page.complaints = []
        page.on("console", lambda m: page.complaints.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.complaints.append(f"error: {error}"))
        page.on("requestfailed", lambda r: page.complaints.append(f"failed: {r.url}: {r.failure}")
                if r.failure != "net::ERR_ABORTED" else None)  # the test itself went on to the next page
        page.on("response", lambda r: page.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: page.complaints.append(f"outside: {r.url}")
                if not r.url.startswith((address, "data:", "blob:")) else None)
        opened.append(page)
        page.goto(address + name)
        return page
    yield open_page
    for page in opened:
        page.close()


@pytest.mark.slow
def test_every_page_opens_without_a_complaint_and_fits_a_phone(visit, pages, address):
    page = visit("index.html")
    for name in pages:
        page.goto(address + name)
        assert page.complaints == [], name
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 || image.loading == 'lazy')"), name
    page.set_viewport_size({"width": 360, "height": 740})
    for name in pages:
        page.goto(address + name)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 361, f"{name} is wider than a phone"


@pytest.mark.slow
def test_no_words_of_a_figure_are_cut_off(visit, site):
    """A title that is longer than its figure loses its end; up to half a letter is forgiven."""
    page, cut = visit("index.html"), []
    for path in sorted((site / "_images").glob("*.svg")):
        page.set_content(f"<body style='margin: 0'>{path.read_text(encoding='utf-8').partition('<svg')[2].join(('<svg', ''))}</body>")
        cut += page.evaluate("""name => {
            const sheet = document.querySelector('svg').getBoundingClientRect();
            return [...document.querySelectorAll('svg g[id^="text_"]')].map(each => [each.getBoundingClientRect(), each])
                .filter(([box]) => box.width && (box.left < sheet.left - 5 || box.right > sheet.right + 5
                                                 || box.top < sheet.top - 5 || box.bottom > sheet.bottom + 5))
                .map(([box, each]) => `${name}: ${each.textContent.trim() || each.innerHTML.slice(0, 80)}`)}""", path.name)
    assert cut == []


@pytest.mark.slow
def test_search_finds_what_people_look_for(visit):
    for term in TERMS:
        page = visit(f"search.html?q={term.replace(' ', '+')}")
        page.wait_for_selector("#search-results ul.search li a")
        page.wait_for_function("/found|matching/.test(document.querySelector('#search-results').innerText)")
        hits = page.eval_on_selector_all("#search-results ul.search li a", "links => links.map(link => link.href)")
        assert hits and page.complaints == [], term
        page.close()
    page = visit("search.html?q=zzyzzyva")
    page.wait_for_function("/did not match/.test(document.body.innerText)")
    assert page.query_selector("#search-results ul.search li") is None


@pytest.mark.slow
def test_an_exported_name_is_found_where_it_is_explained(visit):
    page = visit("search.html?q=ppo_update")
    page.wait_for_selector("#search-results ul.search li a")
    hits = page.eval_on_selector_all("#search-results ul.search li a", "links => links.map(link => link.getAttribute('href'))")
    assert any(re.search(r"\bppo\.html", hit) for hit in hits)


@pytest.mark.slow
def test_formulas_are_drawn_with_the_font_of_the_site(visit):
    page = visit("ppo.html")
    page.evaluate("document.fonts.ready")
    boxes = page.eval_on_selector_all("math", "all => all.map(each => [each.getBoundingClientRect().width, each.textContent])")
    assert len(boxes) > 10 and all(width > 3 for width, _ in boxes)
    assert not [text for _, text in boxes if "\\" in text or "$" in text]
    assert page.evaluate("[...document.fonts].some(font => font.family.includes('Course Math') && font.status == 'loaded')")
    assert "$$" not in page.inner_text("article")


@pytest.mark.slow
def test_dark_mode_follows_the_reader_and_the_button(visit):
    def darkness(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b, 0)")
    light, dark = visit("ppo.html", color_scheme="light"), visit("ppo.html", color_scheme="dark")
    assert darkness(light) > 600 and darkness(dark) < 200
    for _ in range(3):
        if darkness(light) < 200:
            break
        light.click(".content-icon-container .theme-toggle")
    assert darkness(light) < 200


@pytest.mark.slow
def test_a_link_to_a_function_opens_its_reference(visit):
    page = visit("ppo.html#rollout.check")
    page.wait_for_function("document.getElementById('rollout.check').closest('details').open")
    assert page.evaluate("document.getElementById('rollout.check').getBoundingClientRect().height") > 0


@pytest.mark.slow
def test_code_can_be_copied(visit):
    page = visit("ppo.html")
    page.wait_for_selector("button.copybtn", state="attached")
    assert len(page.query_selector_all("button.copybtn")) > 10


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(visit, pages, address, scheme):
    """Every rule on every page; contrast, which takes minutes on a long page, in both colors on pages that hold one of each thing."""
    axe = pytest.importorskip("axe_playwright_python")
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    page, found = visit("index.html", color_scheme=scheme), {}
    for name in pages if scheme == "light" else CONTRAST:
        rules = {"color-contrast": {"enabled": name in CONTRAST}}
        page.goto(address + name)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        page.evaluate(script)
        report = page.evaluate("rules => axe.run(document, {resultTypes: ['violations'], rules})", rules)
        for fault in report["violations"]:
            if fault["impact"] in ("serious", "critical"):
                found.setdefault(fault["id"], []).append(f"{name}: {fault['nodes'][0]['html'][:160]}")
    assert found == {}


@pytest.mark.slow
def test_axe_would_have_found_one(visit):
    axe = pytest.importorskip("axe_playwright_python")
    page = visit("glossary.html")
    page.evaluate("document.querySelector('article p').style.color = '#ccc'; document.querySelector('article').append(new Image())")
    page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    report = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert {"color-contrast", "image-alt"} <= {fault["id"] for fault in report["violations"]}
