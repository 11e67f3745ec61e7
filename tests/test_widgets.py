"""The chapters in JupyterLab, in a headless browser: open one, run it from the menu, find no error; in chapter 01 click a square, too."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT

BOARD = "01_tictactoe"  # its test runs the chapter as well
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
PATIENCE = 600  # seconds for a whole chapter; it needs one or two minutes on a quiet machine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(what, seconds: float, message: str, every: float = .5):
    """The first true answer of `what`, asked again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = what()
        if answer:
            return answer
        time.sleep(every)
    pytest.fail(message() if callable(message) else message)


def stop(process: subprocess.Popen) -> None:
    """End a process and its children, which share its group."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def chromium():
    """The browser's program; without one, nothing else is started."""
    pytest.importorskip("websocket", reason="websocket-client, which JupyterLab brings along, is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine; the widget's logic is tested in test_tictactoe.py")
    return program


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chromium):
    """JupyterLab on copies of the first page and of the chapters without their outputs; yields its address."""
    home = tmp_path_factory.mktemp("lab")
    (home / "nbs").mkdir()
    for name in ["index", *CHAPTERS]:
        book = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        nbformat.write(book, home / "nbs" / f"{name}.ipynb")
    port = free_port()
    environment = dict(os.environ, HOME=str(home), OMP_NUM_THREADS="1", CAI_COURSE_WORK=str(home / "work"),
                       **{name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                                                              "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")})
    environment.pop("IN_TEST", None)
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
                                   f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home}",
                                   "--IdentityProvider.token=secret", "--LabApp.expose_app_in_browser=True"],
                                  cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)

    def answers():
        assert server.poll() is None, (home / "lab.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=secret", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False
    try:
        wait_for(answers, 180, "JupyterLab did not start")
        yield f"http://127.0.0.1:{port}/lab/tree/nbs/index.ipynb?token=secret"
    finally:
        stop(server)


class Page:
    """One tab of a headless Chromium, driven by its own protocol."""

    def __init__(self, address: str):
        import websocket
        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.number = 0

    def call(self, method: str, **arguments) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": arguments}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def js(self, expression: str):
        """The value of an expression, awaited if it is a promise; None if it throws."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def click(self, element: str) -> None:
        """A real click in the middle of an element, by a pointer and not by a script; `element` is JavaScript, or a CSS selector."""
        found = element if element.startswith("[...") else f"document.querySelector({json.dumps(element)})"
        seen = []

        def rests():  # JupyterLab goes on scrolling and drawing for a while
            self.js(f"{found}.scrollIntoView({{block: 'center'}})")
            box = json.loads(self.js(f"JSON.stringify({found}.getBoundingClientRect())"))
            seen.append((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2))
            hit = f"{found}.contains(document.elementFromPoint({seen[-1][0]}, {seen[-1][1]}))"
            return len(seen) > 2 and seen[-1] == seen[-2] == seen[-3] and self.js(hit)
        wait_for(rests, 30, lambda: f"{element} does not come to rest under the pointer: {seen[-3:]}")
        where = dict(zip("xy", seen[-1]))
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)


@pytest.fixture(scope="module")
def page(tmp_path_factory, chromium, lab):
    """JupyterLab in a browser, as it stands when it has been started."""
    home = tmp_path_factory.mktemp("browser")
    with open(home / "log", "w") as log:
        browser = subprocess.Popen([chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                                    "--window-size=1200,1000", "--remote-debugging-port=0", f"--user-data-dir={home / 'profile'}", "about:blank"],
                                   stdout=log, stderr=log, start_new_session=True, env=dict(os.environ, HOME=str(home)))
    try:
        seen = home / "profile" / "DevToolsActivePort"
        end = time.monotonic() + 120
        while not (seen.exists() and seen.read_text().strip()):
            if browser.poll() is not None or time.monotonic() > end:
                pytest.skip(f"Chromium does not run here: {(home / 'log').read_text()[-300:]}")
            time.sleep(.5)
        port = seen.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as reply:
            target = next(t for t in json.load(reply) if t["type"] == "page")
        tab = Page(target["webSocketDebuggerUrl"])
        tab.call("Page.enable")
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)  # JupyterLab acts on the notebook that has the focus
        tab.call("Page.navigate", url=lab)
        wait_for(lambda: tab.js("jupyterapp.restored.then(() => true)"), 240, "JupyterLab did not open")
        yield tab
    finally:
        stop(browser)


def panel(name: str) -> str:  # JavaScript for the tab of a notebook
    return f"[...jupyterapp.shell.widgets('main')].find(w => w.context?.path == 'nbs/{name}.ipynb')"


@pytest.fixture
def open_chapter(page):
    """Open a notebook and wait until its kernel is ready; it is closed, and its kernel ended, after the test."""
    opened = []

    def open_it(name: str) -> None:
        opened.append(name)
        page.js(f"jupyterapp.commands.execute('docmanager:open', {{path: 'nbs/{name}.ipynb'}}).then(() => true)")
        ready = f"(() => {{ const s = {panel(name)}?.sessionContext; return !!s?.isReady && s.session?.kernel?.status == 'idle' }})()"
        wait_for(lambda: page.js(ready), 240, f"{name} did not open with a kernel")
        page.js(f"jupyterapp.shell.activateById({panel(name)}.id)")
    yield open_it
    for name in opened:
        page.js(f"(async () => {{ const p = {panel(name)}; await p.context.save(); await p.sessionContext.shutdown(); p.dispose() }})()")


def run_from_the_menu(page: Page, name: str) -> float: # Seconds until every cell has run
    """Run > Run All Cells, by the pointer; fails at the first error, and when the kernel dies or a cell never runs."""
    state = (f"(() => {{ const p = {panel(name)}, s = p.sessionContext;"
             " const cells = p.content.widgets.map(c => c.model).filter(m => m.type == 'code' && m.sharedModel.getSource().trim());"
             " return {status: s.session?.kernel?.status ?? 'none', all: cells.length, left: cells.filter(m => m.executionCount == null).length,"
             " errors: cells.flatMap(m => (m.toJSON().outputs ?? []).filter(o => o.output_type == 'error').map("
             "   o => m.sharedModel.getSource() + '\\n' + o.traceback.join('\\n')))} })()")
    before = page.js(state)
    assert before and before["left"] == before["all"] > 0, f"{name}: some cells seem to have run before: {before}"
    page.click("[...document.querySelectorAll('.lm-MenuBar-item')].find(e => e.textContent.trim() == 'Run')")
    entry = "[...document.querySelectorAll('.lm-Menu-item')].find(e => e.textContent.startsWith('Run All Cells'))"
    wait_for(lambda: page.js(f"!!{entry}"), 30, "the menu Run did not open")
    start = time.monotonic()
    page.click(entry)
    seen = {}

    def done():
        nonlocal seen
        seen = page.js(state) or seen
        if seen.get("errors"):
            pytest.fail(f"{name}: {re.sub(chr(27) + r'.[0-9;]*m', '', seen['errors'][0])[-3000:]}")
        assert seen.get("status") not in ("dead", "restarting", "autorestarting", "none"), f"{name}: the kernel is gone: {seen}"
        return seen.get("left") == 0 and seen["status"] == "idle"
    wait_for(done, PATIENCE, lambda: f"{name}: {seen.get('left')} of {seen.get('all')} cells did not run in {PATIENCE} s", every=1)
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHAPTERS if name != BOARD])
def test_a_chapter_runs_from_the_menu_without_an_error(page, open_chapter, name):
    open_chapter(name)
    run_from_the_menu(page, name)


@pytest.mark.slow
def test_an_error_in_a_chapter_would_be_found(page, open_chapter):
    open_chapter("index")
    page.js(f"{panel('index')}.content.widgets.find(c => c.model.type == 'code').model.sharedModel.setSource('1 / 0')")
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        run_from_the_menu(page, "index")


def texts(page: Page) -> list[str]: # What stands on the nine squares
    return page.js("[...document.querySelectorAll('.cai-board button')].map(b => b.textContent.trim())") or []


def stones(page: Page) -> str: # Such as "X...O...."
    return "".join(t if t in ("X", "O") else "." for t in texts(page))


def save_picture(page: Page, path: Path) -> None:
    import base64
    path.write_bytes(base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"]))


@pytest.mark.slow
def test_click_a_square_and_the_agent_answers(page, open_chapter, tmp_path):
    open_chapter(BOARD)
    run_from_the_menu(page, BOARD)

    # Scroll to the cell whose output is the board; JupyterLab draws only what is near the window.
    page.js(f"(() => {{ const n = {panel(BOARD)}.content;"
            " const i = n.widgets.findIndex(c => /^PlayBoard\\(/m.test(c.model.sharedModel.getSource())); return n.scrollToItem(i, 'center') })()")
    wait_for(lambda: len(texts(page)) == 9, 120, "no board with nine squares appeared")
    assert stones(page) == "." * 9
    assert all(re.fullmatch(r"[+-]\d\.\d|0\.0", t) for t in texts(page)), f"each free square shows what it is worth: {texts(page)}"

    page.click(".cai-board button:nth-child(5)")
    wait_for(lambda: stones(page).count("O") == 1, 60, lambda: f"no answer to the click: {texts(page)}")
    assert stones(page)[4] == "X" and stones(page).count("X") == 1
    before = stones(page)
    page.click(".cai-board button:nth-child(5)")  # taken: nothing may happen
    time.sleep(2)
    assert stones(page) == before
    said = page.js("document.querySelector('.cai-said').textContent")
    assert "Your move: you are X." in said

    # A trained opponent thinks otherwise of the same position: the colors change, the stones do not. End is minimax, one before it the last network.
    colors = "JSON.stringify([...document.querySelectorAll('.cai-board button')].map(b => b.style.backgroundColor))"
    early = page.js(colors)
    page.js("document.querySelector('.cai-who .noUi-handle, .cai-who input').focus()")
    for key, code in (("End", 35), ("ArrowLeft", 37)):
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
    wait_for(lambda: page.js(colors) != early, 60, "moving the slider to the last network changed no color")
    assert stones(page) == before
    if os.environ.get("CAI_COURSE_PICTURES"):
        save_picture(page, Path(os.environ["CAI_COURSE_PICTURES"]) / "widget.png")
