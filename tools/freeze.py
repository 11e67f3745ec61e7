"""Print constraints.txt: every version in this environment, without hosts, paths or local build suffixes."""
import re
import subprocess
import sys

HEAD = """\
# Every version that the course was tested with (Python 3.11). Python 3.10 is served by the ranges of settings.ini:
# some of these versions refuse it.
# `make constraints` writes this file from what .venv holds: install there first, run the tests, then commit it.
"""
NOT_OURS = {"pip", "wheel", "cai-course"}
OLDER_PYTHON = {  # last version for a Python that the pinned one refuses
    "soupsieve": ("2.8.4", 'python_full_version < "3.11.5"', 'python_full_version >= "3.11.5"'),
}


def constraints(
    frozen: str, # What `pip freeze --all --exclude-editable` prints
) -> str: # The text of constraints.txt
    lines = []
    for line in frozen.splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)(\+\S+)?", line.strip())
        if match is None:
            raise SystemExit(f"freeze: {line!r} is not a released version; install it from the index first.")
        name, version = match[1], match[2]
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in NOT_OURS:
            continue
        if key in OLDER_PYTHON:
            older, old_marker, new_marker = OLDER_PYTHON[key]
            lines += [f"{name}=={version}; {new_marker}", f"{name}=={older}; {old_marker}"]
        else:
            lines.append(f"{name}=={version}" + '; python_version >= "3.11"')
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable", "--disable-pip-version-check"]
    print(constraints(subprocess.run(command, check=True, capture_output=True, text=True).stdout), end="")
