"""Build the docs site from the notebooks as they are stored; nothing is run and nothing is fetched.

    python tools/docs_site.py [--builder quarto|sphinx] [--out FOLDER]

The top-level `_quarto.yml` says which pages there are and in which order. Each of them goes through nbdev's processors (hidden cells go,
directives are obeyed) and gets its reference from `docs_reference`. Then Quarto renders them, or, where Quarto is not on PATH, Sphinx with
myst-nb and Furo: the same pages under the same addresses, with math as MathML and the system's fonts.
"""
import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

import yaml

import docs_reference

ROOT = Path(__file__).resolve().parents[1]
EVERY_NAME = "<!-- every exported name -->"  # in reference.md; replaced by the list
WIDGETS = "application/vnd.jupyter.widget-view+json"  # needs a kernel and a script from elsewhere; the page shows the other forms
ACCESSIBLE = {'class="caption" role="heading"': 'class="caption" role="heading" aria-level="2"',
              '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="Course">',
              '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer'}
CALLOUT = re.compile(r"^::: *\{\.callout-(\w+)[^}]*\}", re.M)
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")


def settings(root: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# --- which pages, in which order ---

def navigation(root: Path) -> list[tuple[str, list[str]]]:  # [(section, [files below nbs/])]; the first section may have no name
    """The sidebar of `_quarto.yml`, flattened."""
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    parts = [("", [])]

    def walk(items, name):
        for item in items:
            if isinstance(item, str) or "href" in item or "file" in item:
                parts[-1][1].append(item if isinstance(item, str) else item.get("href") or item["file"])
            else:
                parts.append((item["section"], []))
                walk(item["contents"], item["section"])
                parts.append((name, []))
    walk(site["website"]["sidebar"]["contents"], "")
    return [part for part in parts if part[1]]


def address(name: str) -> str:  # "tools/03_ppo.ipynb" -> "tools/ppo.html", as nbdev names pages
    path = PurePosixPath(name.lower())
    return str(path.with_name(re.sub(r"^\d+[a-z0-9]*_", "", path.stem) + ".html"))


# --- nbs/ -> processed pages ---

def split_title(text: str) -> tuple[str, str, str]:  # Title, promise and the rest of a page's first cell
    match = re.match(r"\s*#\s+(.+?)\s*\n(?:\s*\n)*(?:>\s*(.+?)\s*(?:\n|$))?(.*)\Z", text + "\n", re.S)
    return (match[1], match[2] or "", match[3].strip()) if match else ("", "", text)


def front_matter(title: str, promise: str, page: str) -> str:
    return "---\n" + yaml.safe_dump({"title": title, "description": promise, "output-file": PurePosixPath(page).name},
                                    allow_unicode=True, sort_keys=False, width=1000) + "---\n"


def _prose_lines(text: str):  # Yields (line, is it outside code?)
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
            yield line, False
        elif fence:
            yield line, False
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        else:
            yield line, True


class Names:
    """Every exported name of the site and where it is explained."""
    def __init__(self, entries: list):
        self.entries, self.modules = entries, {f"cai_course.{entry.module}": entry.page for entry in entries}
        self.known = {}
        for entry in entries:
            self.known.setdefault(entry.name, []).append(entry)

    def linker(self, page: str):  # From a name to a link that works on `page`, or None
        folder = str(PurePosixPath(page).parent)

        def link(name: str):
            if name in self.modules:
                return os.path.relpath(self.modules[name], folder)
            owner, _, method = name.removeprefix("cai_course.").rpartition(".")
            entries = self.known.get(owner or method) or [e for e in self.known.get(method, []) if e.module == owner]
            here = [entry for entry in entries if entry.page == page]
            entries = here if len(here) == 1 else entries
            if len(entries) != 1:
                return None
            entry = entries[0]
            anchor = entry.anchor
            if owner and entry.name == owner:
                if method not in {getattr(each, "name", None) for each in getattr(entry.node, "body", [])} or method.startswith("_"):
                    return None
                anchor = name.removeprefix("cai_course.").lower()
            return ("" if entry.page == page else os.path.relpath(entry.page, folder)) + "#" + anchor
        return link

    def mark(self, text: str, page: str) -> str:  # Names in `code` become links, except in headings, HTML, code and other links
        link = self.linker(page)

        def one(match):
            target = match[1] and link(match[1].removesuffix("()"))
            return f"[`{match[1]}`]({target})" if target else match[0]
        return "\n".join(re.sub(r"``+.*?``+|\[[^\]\n]*\]\([^)\n]*\)|(?<!\w)`([A-Za-z_][\w.]*(?:\(\))?)`", one, line)
                         if prose and not re.match(r"\s*(#|<)", line) else line for line, prose in _prose_lines(text))


def _exported(book: dict, page: str) -> tuple[str, list]:  # Module and entries of a notebook
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    module = next((m[1] for m in (re.search(r"^#\|\s*default_exp\s+(\S+)", text, re.M) for text in code) if m), "")
    entries = [docs_reference.Entry(node.name, module, page, node, text) for text in code
               if module and re.match(r"\s*#\|\s*exports?\b", text) for node in docs_reference.public(text)]
    return module, entries


def process(root: Path, target: Path) -> Names:  # Fills `target` with the site's pages, still as notebooks and Markdown
    """Everything that both builders share."""
    pages = [name for _, names in navigation(root) for name in names]
    books, promises, entries = {}, {}, []
    for name in pages:
        path = root / "nbs" / name
        if not path.exists():
            raise SystemExit(f"docs: _quarto.yml lists {name}, which is not in nbs/. Write it, or take it out of the sidebar.")
        if name.endswith(".ipynb"):
            books[name] = json.loads(path.read_text(encoding="utf-8"))
            module, found = _exported(books[name], address(name))
            promises[module] = split_title("".join(books[name]["cells"][0]["source"]))[1]
            entries += found
    names = Names(entries)
    for name in pages:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name in books:
            book = _processed(root / "nbs" / name, names)
            (target / name).write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            title, promise, rest = split_title((root / "nbs" / name).read_text(encoding="utf-8"))
            rest = names.mark(rest, address(name)).replace(
                EVERY_NAME, docs_reference.listing(entries, promises, names.linker(address(name))))
            (target / name).write_text(f"{front_matter(title, promise, address(name))}\n{rest}\n", encoding="utf-8")
    for path in (root / "nbs").iterdir():  # style sheets, pictures
        if path.is_file() and path.suffix not in (".ipynb", ".md", ".yml"):
            shutil.copyfile(path, target / path.name)
    return names


def _processed(path: Path, names: Names) -> dict:  # The notebook as a page
    from execnb.nbio import dict2nb, mk_cell
    from nbdev.process import NBProcessor, Processor
    from nbdev.processors import (clean_magics, filter_stream_, hide_, hide_line, populate_language, rm_export, rm_header_dash, strip_ansi,
                                  strip_hidden_metadata)
    raw = json.loads(path.read_text(encoding="utf-8"))
    page = address(path.relative_to(path.parents[len(path.parts) - path.parts.index("nbs") - 2]).as_posix())
    module, entries = _exported(raw, page)
    link = names.linker(page)

    def markdown(text):
        cell = mk_cell(text, "markdown")
        cell.directives_ = {}
        return cell

    class add_reference(Processor):
        "A heading and a reference at every exported cell."
        def begin(self):
            cells = []
            for cell in self.nb.cells:
                exported = {"export", "exports"} & set(cell.directives_ if cell.cell_type == "code" else ())
                found = {node.name for node in docs_reference.public(cell.source)} if exported else set()
                here = [entry for entry in entries if entry.name in found and entry.source.endswith(cell.source)]
                if not here or not exported or "hide" in cell.directives_:
                    cells.append(cell)
                elif "exports" in exported:
                    cells += [markdown(docs_reference.before(here)), cell, markdown(docs_reference.after(here, link))]
                else:
                    cells += [markdown(docs_reference.instead(here, link)), cell]  # the cell itself goes in rm_export
            self.nb.cells = cells

    def link_names(cell):
        if cell.cell_type == "markdown":
            cell.source = names.mark(cell.source, page)

    def drop_widgets(cell):
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:
                output["data"].pop(WIDGETS, None)

    title, promise, rest = split_title("".join(raw["cells"][0]["source"]))
    raw["cells"][0]["source"] = rest
    raw["metadata"].pop("widgets", None)
    book = dict2nb(raw)
    book.path_ = path
    NBProcessor(nb=book, procs=[populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, link_names, add_reference,
                                rm_export, clean_magics, hide_, drop_widgets, strip_hidden_metadata]).process()
    cells = [dict(cell_type="raw", metadata={}, source=front_matter(title, promise, page))]
    for cell in book.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*output:\s*asis", cell.source, re.M):  # what it wrote is part of the page
            shown = ["".join(output["data"]["text/markdown"]) for output in cell.outputs if "text/markdown" in output.get("data", {})]
            cells.append(dict(cell_type="markdown", metadata={}, source=names.mark("\n\n".join(shown), page)))
        elif cell.source.strip():
            kept = dict(cell_type=cell.cell_type, metadata={k: v for k, v in cell.metadata.items() if k == "tags"}, source=cell.source)
            if cell.cell_type == "code":
                kept.update(execution_count=None, outputs=json.loads(json.dumps(cell.get("outputs", []), default=lambda x: vars(x))))
            cells.append(kept)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return dict(cells=cells, metadata=raw["metadata"], nbformat=4, nbformat_minor=5)


# --- Quarto ---

def build_quarto(root: Path, pages: Path, out: Path) -> None:
    shutil.copyfile(root / "_quarto.yml", pages / "_quarto.yml")
    subprocess.run(["quarto", "render", "--no-cache"], cwd=pages, check=True)
    _replace(pages / settings(root)["doc_path"], out)


def _replace(folder: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, out)


# --- Sphinx, when there is no Quarto ---

def _markdown_for_sphinx(text: str, page: str) -> str:
    """Quarto's Markdown -> MyST: links between pages, callouts, and the addresses of headings."""
    folder, lines, used = PurePosixPath(page).parent, [], set()

    def moved(match):
        href = match[2]
        if re.match(r"[a-z]+:|#|/", href) or not re.search(r"\.(ipynb|md|qmd)(#|$)", href):
            return match[0]
        file, _, anchor = href.partition("#")
        target = os.path.relpath(address(os.path.normpath(folder / file)), folder)
        return f"{match[1]}{target}{'#' + anchor if anchor else ''}{match[3]}"

    for line, prose in _prose_lines(text):
        if prose:
            line = re.sub(r"(\]\()([^)\s]+)(\))", moved, line)
            line = CALLOUT.sub(lambda m: ":::{" + m[1] + "}", line)
            heading = re.match(r"#{2,6}\s+(.*)", line)
            if heading:
                plain = re.sub(r"[`*$]|\]\([^)]*\)|\[", "", heading[1]).strip().lower()
                quarto = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain)))
                docutils = re.sub(r"^[-0-9]+|-+$", "", re.sub(r"[^a-z0-9]+", "-", plain))
                if quarto != docutils and quarto not in used:
                    lines += [f'<span id="{quarto}"></span>', ""]
                used.add(quarto)
        lines.append(line)
    return "\n".join(lines)


def _code_for_sphinx(cell: dict) -> dict:
    """Quarto's cell options -> what myst-nb reads from a cell's metadata."""
    options = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*?)\s*$", cell["source"], re.M))
    cell["source"] = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip("\n")
    tags, alt = [], options.get("fig-alt", "").strip("\"'")
    if options.get("echo") == "false":
        tags.append("remove-input")
    if options.get("output") == "false":
        tags.append("remove-output")
    for output in cell["outputs"]:
        drawing = "".join(output.get("data", {}).get("image/svg+xml", ""))
        label = re.search(r'<svg[^>]* aria-label="([^"]*)"', drawing)
        alt = alt or (label[1].replace("&quot;", '"').replace("&#x27;", "'").replace("&amp;", "&") if label else "")
    cell["metadata"] = {"tags": tags, **({"mystnb": {"image": {"alt": alt}}} if alt else {})}
    return cell


def _page_for_sphinx(path: Path, name: str, config) -> dict:  # A notebook for myst-nb, whatever the page was written as
    if name.endswith(".ipynb"):
        book = json.loads(path.read_text(encoding="utf-8"))
    else:
        _, head, rest = path.read_text(encoding="utf-8").split("---\n", 2)
        cells = [dict(cell_type="raw", metadata={}, source=f"---\n{head}---\n"), dict(cell_type="markdown", metadata={}, source=rest)]
        book = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    page, cells = address(name), []
    for cell in book["cells"]:
        if cell["cell_type"] == "raw":
            meta = yaml.safe_load(cell["source"].strip().strip("-"))
            promise = f'\n\n<p class="promise">{docs_reference.inline(meta["description"])}</p>' if meta["description"] else ""
            cell = dict(cell_type="markdown", metadata={}, source=f"# {meta['title']}{promise}")
        elif cell["cell_type"] == "markdown":
            cell = {**cell, "source": _markdown_for_sphinx(cell["source"], page)}
        else:
            cell = _code_for_sphinx(cell)
        cells.append(cell)
    origin = f"{config['git_url']}/blob/{config['branch']}/nbs/{name}"
    cells.append(dict(cell_type="markdown", metadata={}, source=f'<p class="origin">This page is <a href="{origin}">nbs/{name}</a>.</p>'))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {**book, "cells": cells, "metadata": {"kernelspec": kernel, "language_info": {"name": "python", "pygments_lexer": "python3"}}}


def _toctrees(parts: list, titles: dict) -> str:  # `titles`: {file: title of its page}
    def docname(name):
        page, number = address(name).removesuffix(".html"), re.match(r"\d\d(?=_)", name)
        return f"{number[0]} · {titles[name]} <{page}>" if number else page  # chapters go by their numbers in the text
    return "\n\n".join("```{toctree}\n:hidden:\n" + (f":caption: {section}\n" if section else "") + "\n"
                       + "\n".join(docname(name) for name in names if name != "index.ipynb") + "\n```" for section, names in parts
                       if names != ["index.ipynb"])


def build_sphinx(root: Path, pages: Path, out: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils
    config, site = settings(root), yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    parts = navigation(root)
    with tempfile.TemporaryDirectory() as folder:
        source, built, titles = Path(folder, "source"), Path(folder, "built"), {}
        for _, names in parts:
            for name in names:
                book = _page_for_sphinx(pages / name, name, config)
                titles[name] = book["cells"][0]["source"].split("\n")[0].removeprefix("# ")
                path = source / Path(address(name)).with_suffix(".ipynb")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(book), encoding="utf-8")
        front = source / "index.ipynb"
        book = json.loads(front.read_text(encoding="utf-8"))
        book["cells"].append(dict(cell_type="markdown", metadata={}, id="toctrees", source=_toctrees(parts, titles)))
        front.write_text(json.dumps(book), encoding="utf-8")
        static = source / "_static"
        static.mkdir()
        extra = [path for path in pages.iterdir() if path.is_file() and path.suffix not in (".ipynb", ".md", ".scss")]
        for path in extra:
            shutil.copyfile(path, static / path.name)
        options = dict(
            project=config["title"], author=config["author"], copyright=config["copyright"], language="en",
            extensions=["myst_nb", "sphinx_copybutton", "docs_site"], root_doc="index", highlight_language="python",
            html_theme="furo", html_title=site["title"], html_static_path=["_static"], html_css_files=["styles.css"],
            html_theme_options={"navigation_with_keys": True}, html_show_sourcelink=False, html_copy_source=False, html_use_index=False,
            html_math_renderer="mathml", pygments_style="a11y-high-contrast-light", pygments_dark_style="a11y-high-contrast-dark",
            nb_execution_mode="off", nb_merge_streams=True, nb_ipywidgets_js={}, nb_render_markdown_format="myst",
            myst_enable_extensions=["dollarmath", "colon_fence"], myst_all_links_external=True,
            suppress_warnings=["misc.highlighting_failure", "myst.header", "mystnb.unknown_mime_type", "mystnb.mime_type"],
        )
        if any(path.name == "favicon.svg" for path in extra):
            options["html_favicon"] = "_static/favicon.svg"
        (source / "conf.py").write_text("".join(f"{name} = {value!r}\n" for name, value in options.items()), encoding="utf-8")
        with patch_docutils(), docutils_namespace():
            app = Sphinx(str(source), str(source), str(built), str(Path(folder, "doctrees")), "html", status=None, warning=sys.stderr,
                         warningiserror=True)
            app.build(force_all=True)
        if app.statuscode:
            raise SystemExit("docs: Sphinx warned (see above); a page of the site would be broken. Mend the notebook that it names.")
        for path in built.rglob("*.html"):  # what screen readers miss in Sphinx's and Furo's pages
            text = path.read_text(encoding="utf-8")
            for plain, better in ACCESSIBLE.items():
                text = text.replace(plain, better)
            path.write_text(text, encoding="utf-8")
        (built / ".nojekyll").touch()
        shutil.rmtree(built / "_sources", ignore_errors=True)
        for spare in (".buildinfo", "objects.inv"):
            (built / spare).unlink(missing_ok=True)
        _replace(built, out)


def setup(app) -> dict:  # Sphinx calls it: formulas become MathML, which browsers draw themselves
    def draw(tex, display):
        from latex2mathml.converter import convert
        drawn = convert(tex, display=display)
        unknown = re.search(r"\\[A-Za-z]+", drawn)
        if unknown:
            raise SystemExit(f"docs: the formula {tex!r} holds {unknown[0]}, which cannot be drawn as MathML. Write it another way.")
        return drawn

    def inline(visitor, node):
        from docutils.nodes import SkipNode
        visitor.body.append(draw(node.astext(), "inline"))
        raise SkipNode

    def block(visitor, node):
        from docutils.nodes import SkipNode
        visitor.body.append(f'<div class="formula">{draw(node.astext(), "block")}</div>')
        raise SkipNode
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def build(root: Path, out: Path, builder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        pages = Path(folder)
        process(root, pages)
        (build_quarto if builder == "quarto" else build_sphinx)(root, pages, out)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builder", choices=["quarto", "sphinx"], help="default: quarto if it is on PATH")
    parser.add_argument("--out", type=Path, default=ROOT / settings(ROOT)["doc_path"], help="default: what settings.ini names")
    chosen = parser.parse_args(arguments)
    builder = chosen.builder or ("quarto" if shutil.which("quarto") else "sphinx")
    if builder == "sphinx":
        why = "" if chosen.builder else "The program quarto was not found on PATH. "
        print(f"{why}Building the site with Sphinx and Furo: the same pages, from packages alone.", flush=True)
    build(ROOT, chosen.out.resolve(), builder)
    print(f"{len(list(chosen.out.rglob('*.html')))} pages. Open {os.path.relpath(chosen.out)}/index.html in a browser.")


if __name__ == "__main__":
    main()
