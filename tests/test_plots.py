"""What a maintainer fears about figures: global state, changing bytes, missing text, silent NaN, unescaped labels."""
import base64
import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from cai_course.errors import CourseError
from cai_course.plots import (ROLES, baseline, before_after, figure_html, legend, line_with_band, new_figure, role_name,
                              role_style, set_alt, style_axes, to_data_uri, to_svg, training_curves)
from cai_course.stats import Estimate, estimate, wilson
from conftest import ROOT

RESULTS = {"harm": {"base": wilson(90, 100), "sl_cai": wilson(30, 100), "rl_cai": wilson(0, 100)},
           "help": {"base": wilson(99, 100).as_dict(), "rl_cai": wilson(98, 100).as_dict()}}


def history(seeds=(0,), gold=True):
    return [dict(seed=s, step=t, proxy=t + s * .1, kl=.1 * t, **({"gold": float(-(t - 3)**2)} if gold else {}))
            for s in seeds for t in range(8)]


def svg_of(fig):
    svg = to_svg(fig)
    ET.fromstring(svg)                                                # well-formed
    return svg


def test_same_data_same_bytes_and_no_date():
    assert svg_of(before_after(RESULTS)) == svg_of(before_after(RESULTS))
    code = ("from cai_course.plots import *; from cai_course.stats import wilson; import hashlib;"
            "f = before_after({'harm': {'base': wilson(90, 100)}});"
            "print(hashlib.sha256(to_svg(f).encode()).hexdigest())")
    shas = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(shas) == 1 and len(shas.pop()) == 65
    assert "<dc:date>" not in to_svg(training_curves(history()))


def test_no_global_state():
    before = dict(matplotlib.rcParams)
    to_svg(before_after(RESULTS))
    assert dict(matplotlib.rcParams) == before
    code = "import sys, cai_course.plots; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_roles_are_distinct():
    looks = [tuple(role_style(r).values()) for r in ROLES if r not in ("proxy",)]
    assert len(set(looks)) == len(looks)
    assert role_style("proxy") == role_style("reward_model")            # one thing, one look
    assert role_name("rl_cai") == "RL-CAI" and role_name("dpo") == "dpo"


def test_line_is_the_mean_and_band_the_range():
    fig, ax = new_figure("x", "y")
    line = line_with_band(ax, [0, 1], [[0., 4.], [2., 6.], [1., 5.]], "policy")
    assert line.get_ydata().tolist() == [1., 5.] and line.get_label() == "policy (3 seeds)"
    box = ax.collections[0].get_datalim(ax.transData)
    assert (box.y0, box.y1) == (0., 6.)
    assert line_with_band(ax, [0, 1], [0., 4.]).get_label() == "policy"
    assert len(ax.collections) == 1                                     # one run: no band


@pytest.mark.parametrize("x,runs,message", [
    ([0, 1], [[1.]], "match x"), ([0, 1], [[1., math.nan]], "NaN"), ([], [[]], "match x"),
    ([0, 1], [[1., 2.], [3.]], "equal rows"), ([0, 1], [["a", "b"]], "numbers")])
def test_line_bad_input(x, runs, message):
    with pytest.raises(CourseError, match=message):
        line_with_band(new_figure()[1], x, runs)


def test_before_after_numbers_and_alt():
    fig = before_after(RESULTS, "harm falls")
    assert "harm: base 0.900 [" in fig.alt and "help: base 0.990" in fig.alt and fig.alt.startswith("harm falls. ")
    ax, = fig.axes
    assert "95% intervals, 100 prompts, 1 seed" in ax.get_xlabel()
    dots = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "None"]
    assert sorted(dots) == sorted([.9, .3, 0., .99, .98])
    svg = svg_of(fig)
    assert 'role="img"' in svg and "harm falls" in svg


def test_before_after_survives_odd_but_legal_input():
    loose = estimate([5.] * 3)                                          # unbounded interval
    fig = before_after({"length": {"base": loose, "new<b>$x$": Estimate(4., 3., 5., 3, 2)}})
    assert "nan" not in fig.alt and "inf" not in fig.alt and "3 prompts, 1 to 2 seeds" in fig.axes[0].get_xlabel()
    assert "new<b>" not in svg_of(fig)
    assert svg_of(before_after({"only": {"base": {"value": .5, "low": .4, "high": .6}}}))


@pytest.mark.parametrize("bad", [{}, None, [], {"harm": {}}, {"harm": {"base": .5}},
                                 {"harm": {"base": {"value": math.nan}}},
                                 {"harm": {"base": {"low": 0, "high": 1}}}])
def test_before_after_bad_input(bad):
    with pytest.raises(CourseError, match="estimate|Estimate"):
        before_after(bad)


def test_training_curves_panels_and_best_step():
    fig = training_curves(history((0, 1)))
    assert len(fig.axes) == 3 and "Gold is highest at step 3." in fig.alt
    assert "(2 seeds)" in svg_of(fig)
    assert len(training_curves(history(gold=False)).axes) == 2


def test_training_curves_skips_missing_values():
    rows = history()
    rows[2]["gold"] = None
    rows[4]["proxy"] = math.nan
    rows += [{"step": 99, "note": "saved"}, {"proxy": 1.}]
    fig = training_curves(rows)
    lines = [[line for line in ax.lines if len(line.get_xdata()) > 2][0] for ax in fig.axes]
    assert [len(line.get_xdata()) for line in lines] == [7, 7, 8]
    uneven = training_curves(history((0,)) + history((1,))[:5])         # a run that was cut: shared steps only
    assert len(uneven.axes[0].lines[0].get_xdata()) == 5


@pytest.mark.parametrize("bad", [[], None, [{}], [{"step": 1}], [{"step": None, "proxy": 1.}], "text",
                                 [{"seed": 0, "step": 1, "kl": 1.}, {"seed": 1, "step": 2, "kl": 1.}]])
def test_training_curves_bad_input(bad):
    with pytest.raises(CourseError, match="history"):
        training_curves(bad)


def test_uri_html_and_alt_are_escaped():
    fig, ax = new_figure("x", "y", "t")
    style_axes(ax), baseline(ax, .5, "optimum"), legend(ax)
    set_alt(fig, '"><script>alert(1)</script>')
    assert "<script" not in svg_of(fig) and "<script" not in figure_html(fig)
    uri = to_data_uri(fig)
    assert base64.b64decode(uri.split(",", 1)[1]).decode() == to_svg(fig)
    assert fig._repr_svg_() == to_svg(fig)


def test_plain_matplotlib_figures_work_too():
    from matplotlib.figure import Figure
    fig = Figure()
    fig.subplots().plot([1, 2])
    assert to_svg(fig).startswith("<svg") and 'alt=""' in figure_html(fig)


def test_size_and_panels():
    fig, axes = new_figure(rows=3)
    assert len(axes) == 3 and fig.get_size_inches().tolist() == [5., 3.] and fig.dpi == 120
    assert np.ndim(new_figure()[1]) == 0


def test_the_picture_of_the_readme_shows_the_stored_results():
    sys.path.insert(0, str(ROOT / "tools"))
    try: import readme_picture
    finally: sys.path.pop(0)
    label = ET.fromstring(readme_picture.PICTURE.read_text(encoding="utf-8")).get("aria-label")
    assert label == readme_picture.figure().alt, "run python tools/readme_picture.py"
