"""Draw the README's picture anew from the stored results of the whole run: python tools/readme_picture.py"""
import json
from pathlib import Path

from cai_course.plots import before_after, to_svg

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "data" / "readme" / "before_after.svg"


def figure():
    "Before and after for all measures that are not merely reported."
    results = json.loads((ROOT / "data" / "align" / "results.json").read_text(encoding="utf-8"))
    return before_after({name: row for name, row in results.items() if isinstance(row, dict) and name != "diversity"})


if __name__ == "__main__":
    PICTURE.write_text(to_svg(figure()), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {figure().alt}")
