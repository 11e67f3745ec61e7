"""A process that has imported everything once and forks a child for each command, so that a run can be killed at any instant.

Speaks JSON lines: reads {"words": [...], "kill_after": seconds, "kill_at_rename": n, "folder": name, "signal": name}, answers
{"status": exit status or minus the signal, "seconds": ..., "said": text}. The child runs the same `main` as the command line.
"""
import json
import os
import signal
import sys
import tempfile
import time


def run(command):
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            status = 70
            signal.signal(signal.SIGINT, signal.default_int_handler) # a shell starts background jobs with Ctrl-C ignored
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                if "kill_at_rename" in command:
                    die_at_rename(command["kill_at_rename"], command.get("folder", "fast-check"), command.get("signal", "KILL"))
                from cai_course.cli import main

                try:
                    status = main(command["words"])
                except SystemExit as leave:
                    status = leave.code
            except BaseException as error:
                import traceback

                traceback.print_exception(error)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        deadline = start + command["kill_after"] if "kill_after" in command else None
        sent = False
        while True:
            done, state = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if deadline is not None and not sent and time.monotonic() >= deadline:
                os.kill(pid, getattr(signal, "SIG" + command.get("signal", "KILL")))
                sent = True
            time.sleep(.002)
        seconds = time.monotonic() - start
        out.seek(0)
        said = out.read().decode("utf-8", "replace")
    status = -os.WTERMSIG(state) if os.WIFSIGNALED(state) else os.WEXITSTATUS(state)
    return {"status": status, "seconds": seconds, "said": said}


def die_at_rename(number, folder, name):
    """Send a signal to this process right before (even number) or after (odd) the rename number // 2 into the run folder."""
    real, count = os.replace, 0

    def replace(*places, **options):
        nonlocal count
        if os.path.basename(os.path.dirname(places[1])) != folder:
            return real(*places, **options)
        at, count = count, count + 1
        if at == number // 2 and number % 2 == 0:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        real(*places, **options)
        if at == number // 2 and number % 2 == 1:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
    os.replace = replace


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    import cai_course.cai, cai_course.cli, cai_course.judge, cai_course.models, cai_course.plots, cai_course.reward, cai_course.rlhf  # noqa: E401, F401
    import jinja2, peft, transformers  # noqa: E401, F401

    for name in sys.argv[1:]: # a first use brings in what is imported lazily
        transformers.AutoConfig.from_pretrained(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
