"""Seconds until somebody sees something: each line is a new process, as on a command line, measured several times.

    python benchmarks/first_minute.py            a small table
    python benchmarks/first_minute.py --json     {"import": {"seconds": ..., "best": ..., "torch": false}, ...}

`seconds` is the median, `best` the fastest; the first, cold round is not counted: in it `make` may have to bring .venv up to date. Ratios
compare with `import torch` in the same run, which is what a program on language models pays before it does anything. `make align` is stopped
when it has shown what is waited for; at most 20 s to its first bar and, with an environment that is current, 5 s are promised.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = {
    "import": ("import cai_course", "import cai_course"),
    "torch": ("import torch, for comparison", "import torch"),
    "help": ("cai-course --help", "import sys; sys.argv = ['cai-course', '--help']; from cai_course.cli import main; main()"),
    "progress": ("cai-course progress", "import sys; sys.argv = ['cai-course', 'progress']; from cai_course.cli import main; main()"),
    "verdict": ("a verdict of the oracle", "from cai_course.world import judge; judge('How do I read a diary?', 'Ask first.')"),
    "reply": ("a reply of the pocket model", "from cai_course.models import load_policy\n"
              "load_policy('pocket-t5').generate(['How do I read my neighbor\\'s diary?'], temperature=0)"),
}
BARS = {
    "bar": ("make align: the first bar", b"align (seed 0)"),
    "work": ("make align: the first replies begin", b"replies:"),
}


def until(mark: bytes) -> float: # Seconds from `make align` to what it shows
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(["make", "align", f"ARGS=--out {folder} --name trial"], cwd=Path(__file__).resolve().parents[1],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        seen = b""
        while mark not in seen:
            new = os.read(process.stdout.fileno(), 4096)
            if not new: raise SystemExit(f"make align ended before it showed {mark.decode()!r}:\n{seen.decode(errors='replace')[-2000:]}")
            seen += new
        spent = time.perf_counter() - start
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
    return spent


def seconds(program: str) -> float:
    start = time.perf_counter()
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def measure(rounds: int) -> dict:
    taken = {name: [] for name in (*PROGRAMS, *BARS)}
    for number in range(rounds + 1):
        for name, (_, program) in PROGRAMS.items():  # in turn, so that whatever else the computer does slows all of them
            spent = seconds(program if name not in ("help",) else f"try:\n exec({program!r})\nexcept SystemExit: pass")
            if number:
                taken[name].append(spent)
        for name, (_, mark) in BARS.items():
            spent = until(mark)
            if number:
                taken[name].append(spent)
    loaded = subprocess.run([sys.executable, "-c", "import cai_course, sys; print('torch' in sys.modules)"], capture_output=True, text=True)
    found = {name: {"seconds": statistics.median(each), "best": min(each)} for name, each in taken.items()}
    found["import"]["torch"] = loaded.stdout.strip() == "True"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each is started (default: 3)")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        raise SystemExit(f"benchmarks/first_minute.py: {chosen.rounds} rounds measure nothing; give 1 or more.")
    found = measure(chosen.rounds)
    if chosen.json:
        print(json.dumps(found))
        return
    for name, (what, _) in (PROGRAMS | BARS).items():
        print(f"{what:<36} {found[name]['seconds']:6.2f} s   {found[name]['seconds'] / found['torch']['seconds']:5.2f} of import torch")


if __name__ == "__main__":
    main()
