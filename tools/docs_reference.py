"""What the docs site says about an exported function or class, read from its source: nothing is imported and nothing is run.

Parameters, their shapes and units, what is returned and raised and where a formula comes from all stand in the notebook's cell:
docments (the comment beside an argument) and a docstring with `Raises` and `Source`. Here they become a table and a few lines of HTML,
which Quarto and Sphinx show alike.
"""
import ast
import functools
import html
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass
from typing import Callable

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
WIDTH = 96  # a signature longer than this gets one line for each argument


@dataclass
class Entry:
    """One exported name."""
    name: str
    module: str  # "ppo", "practice.ch03"
    page: str  # "ppo.html", relative to the site's root
    node: ast.AST
    source: str  # the cell that it was read from

    @property
    def anchor(self) -> str:  # the id that Quarto gives to a heading of this name
        return self.name.lower()

    @property
    def summary(self) -> str:  # first sentence of the docstring
        text = " ".join((ast.get_docstring(self.node) or "").split("\n\n")[0].split())
        return re.split(r"(?<=[a-z)`'\]])\. (?=[A-Z`])", text)[0]


def public(source: str) -> list:  # The definitions in a cell that other people may use
    return [node for node in _parse(source).body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]


def _parse(source: str) -> ast.Module:
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))  # magics are not Python


# --- what stands beside the arguments ---

@functools.lru_cache(maxsize=64)
def _comments(source: str) -> tuple[dict, set]:  # {line: comment}, and the lines that hold nothing else
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[:token.start[1]].strip():
                alone.add(token.start[0])
    return found, alone


def _notes(places: list[tuple[str, int]], source: str) -> dict:  # {name: its docment}; `places` are (name, line where it ends)
    comments, alone = _comments(source)
    owner = {line: name for name, line in places}  # several on a line: the comment belongs to the last, as in fastcore
    notes = {}
    for line, name in owner.items():
        if line in comments:
            notes[name] = comments[line]
            continue
        above = []
        while line - 1 in alone:
            line -= 1
            above.insert(0, comments[line])
        notes[name] = " ".join(above)
    return notes


def _text(node) -> str:
    return "" if node is None else ast.unparse(node)


def arguments(node, source: str) -> tuple[list, tuple]:  # [(name, type, default, note)], and (type, note) of what is returned
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [(arg, arg.arg, default) for arg, default in zip(plain, defaults)]
    rows += [(a.vararg, "*" + a.vararg.arg, None)] if a.vararg else []
    rows += [(arg, arg.arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    rows += [(a.kwarg, "**" + a.kwarg.arg, None)] if a.kwarg else []
    places = [(name, (default or arg).end_lineno) for arg, name, default in rows]
    end = node.returns.end_lineno if node.returns else node.args and max([node.lineno, *(line for _, line in places)])
    notes = _notes(places + ([("return", end)] if node.returns else []), source)
    rows = [(name, _text(arg.annotation), _text(default), notes.get(name, "")) for arg, name, default in rows
            if name not in ("self", "cls")]
    return rows, (_text(node.returns), notes.get("return", ""))


def fields(node: ast.ClassDef, source: str) -> list:  # [(name, type, default, note)] of a dataclass
    found = [each for each in node.body if isinstance(each, ast.AnnAssign) and not _text(each.target).startswith("_")]
    notes = _notes([(_text(each.target), each.end_lineno) for each in found], source)
    return [(_text(each.target), _text(each.annotation), _text(each.value), notes.get(_text(each.target), "")) for each in found]


def signature(node, name: str, bound: bool = False) -> str:  # `name(a: int, b=1) -> str`
    parts = [text for text in _arguments_as_text(node.args) if not (bound and text in ("self", "cls"))]
    tail = f" -> {_text(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){tail}"
    return line if len(line) <= WIDTH or not parts else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){tail}"


def _arguments_as_text(a: ast.arguments) -> list[str]:
    def one(arg, default, stars=""):
        text = stars + arg.arg + (f": {_text(arg.annotation)}" if arg.annotation else "")
        return text if default is None else text + (" = " if arg.annotation else "=") + _text(default)

    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    parts = [one(arg, default) for arg, default in zip(plain, defaults)]
    if a.posonlyargs:
        parts.insert(len(a.posonlyargs), "/")
    if a.vararg:
        parts.append(one(a.vararg, None, "*"))
    elif a.kwonlyargs:
        parts.append("*")
    parts += [one(arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    return parts + ([one(a.kwarg, None, "**")] if a.kwarg else [])


# --- HTML ---

def inline(text: str, link: Callable = lambda name: None) -> str:  # Escaped, with `code` marked and known names linked
    def code(match):
        name = match[1]
        target = link(name.removesuffix("()"))
        marked = f"<code>{html.escape(name)}</code>"
        return f'<a href="{target}">{marked}</a>' if target else marked

    def words(text):
        return re.sub(r"(?<![\w*])\*(\S(?:[^*\n]*\S)?)\*(?![\w*])", r"<em>\1</em>", html.escape(text, quote=False))
    return "".join(code(re.fullmatch(r"`([^`]+)`", part)) if re.fullmatch(r"`[^`]+`", part) else words(part)
                   for part in re.split(r"(`[^`\n]+`)", text))


def docstring(node, link: Callable) -> str:  # Paragraphs; `Raises` and `Source` begin one of their own
    text = re.sub(r"(?<=\S)\n(?=(?:Raises|Source:) ?)", "\n\n", ast.get_docstring(node) or "")
    paragraphs = []
    for each in re.split(r"\n\s*\n", text):
        if each.strip():
            body = inline(" ".join(each.split()), link)
            paragraphs.append("<p>" + re.sub(r"^(Raises|Source:)", r"<strong>\1</strong>", body) + "</p>")
    return "\n".join(paragraphs)


def table(rows: list, returns: tuple, link: Callable, label: str, head: str = "parameter") -> str:
    """A table of parameters; empty if nothing is known about them."""
    if not any(kind or note for _, kind, _, note in rows) and not any(returns):
        return ""
    code = lambda text: f"<code>{html.escape(text)}</code>" if text else ""
    lines = [f'<th scope="row">{code(name)}</th><td>{code(kind)}</td><td>{code(default)}</td><td>{inline(note, link)}</td>'
             for name, kind, default, note in rows]
    if any(returns):
        lines.append(f'<th scope="row">returns</th><td>{code(returns[0])}</td><td></td><td>{inline(returns[1], link)}</td>')
    top = "".join(f'<th scope="col">{each}</th>' for each in (head, "type", "default", "what it is"))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(label)}"><table class="parameters" '
            f'data-quarto-disable-processing="true"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def _method(node, owner: str, source: str, link: Callable) -> str:
    kinds = {_text(each) for each in node.decorator_list}
    name = f"{owner}.{node.name}"
    rows, returns = arguments(node, source)
    if kinds & {"property", "cached_property", "functools.cached_property"}:
        rows, shown = [], name + (f" -> {returns[0]}" if returns[0] else "")
    else:
        shown = signature(node, owner if node.name == "__call__" else name, bound=True)
    return (f'<div class="method" id="{html.escape(name.lower())}"><pre><code>{html.escape(shown)}</code></pre>\n'
            f"{docstring(node, link)}\n{table(rows, returns, link, 'Parameters of ' + name)}</div>")


def body(entry: Entry, link: Callable) -> str:  # Import line, docstring, table, methods
    node, source = entry.node, entry.source
    parts = [f"<p><code>from cai_course.{entry.module} import {entry.name}</code></p>", docstring(node, link)]
    if isinstance(node, ast.ClassDef):
        methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
        maker = next((each for each in methods if each.name == "__init__"), None)
        rows = fields(node, source) or (arguments(maker, source)[0] if maker else [])
        parts.append(table(rows, ("", ""), link, f"Fields of {entry.name}", "field" if fields(node, source) else "parameter"))
        parts += [_method(each, entry.name, source, link) for each in methods
                  if not each.name.startswith("_") or each.name == "__call__"]
    else:
        parts.append(table(*arguments(node, source), link, f"Parameters of {entry.name}"))
    return "\n".join(part for part in parts if part)


def before(entries: list[Entry]) -> str:  # Markdown: the heading above a cell, and a place to link to for each name in it
    names = [entry.name for entry in entries]
    if len(names) == 1:
        return f"### {names[0]}"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return "".join(f'<span id="{entry.anchor}"></span>' for entry in entries) + f"\n\n### {shown}"


def after(entries: list[Entry], link: Callable) -> str:  # Markdown below a cell whose source is shown: one fold for each name
    return "\n\n".join(f'<details class="reference"><summary><code>{entry.name}</code>: parameters, returns, errors</summary>\n'
                       f"{body(entry, link)}\n</details>" for entry in entries)


def instead(entries: list[Entry], link: Callable) -> str:  # Markdown in place of a cell whose source is hidden
    parts = []
    for entry in entries:
        if isinstance(entry.node, ast.ClassDef):
            shown = f"class {entry.name}" + (f"({', '.join(map(_text, entry.node.bases))})" if entry.node.bases else "")
        else:
            shown = signature(entry.node, entry.name)
        parts.append(f"### {entry.name}\n\n```python\n{shown}\n```\n\n{body(entry, link)}")
    source = textwrap.dedent(re.sub(r"^#\|.*\n", "", entries[0].source, flags=re.M)).strip()
    folded = f'<details class="reference"><summary>Source</summary>\n\n```python\n{source}\n```\n\n</details>'
    return "\n\n".join([*parts, folded])


def listing(entries: list[Entry], promises: dict, link: Callable) -> str:  # Markdown: every name, by module
    lines = []
    for module in dict.fromkeys(entry.module for entry in entries):
        here = [entry for entry in entries if entry.module == module]
        lines.append(f"## cai_course.{module}\n\n<p>{inline(promises.get(module, '').rstrip('.'), link)} "
                     f'(<a href="{here[0].page}">page of <code>{module}</code></a>).</p>\n')
        rows = "".join(f'<tr><th scope="row"><a href="{entry.page}#{entry.anchor}"><code>{entry.name}</code></a></th>'
                       f"<td>{inline(entry.summary, link)}</td></tr>" for entry in here)
        lines.append(f'<table class="parameters" data-quarto-disable-processing="true"><thead><tr><th scope="col">name</th>'
                     f'<th scope="col">what it does</th></tr></thead><tbody>{rows}</tbody></table>\n')
    return "\n".join(lines)
