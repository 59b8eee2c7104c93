"""The small modules of the bench: profile, report, claims, plots, widgets, techniques."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

import benchtop as bt
from benchtop import claims, plots, profile, report, techniques, widgets


@pytest.fixture(autouse=True)
def outside_a_chapter(monkeypatch):
    monkeypatch.delenv("BENCHTOP_PROFILE", raising=False)
    monkeypatch.setattr(profile, "_active", None)


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    monkeypatch.setenv(report.LOG, str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    for module in (report, plots, widgets):
        monkeypatch.setattr(module, "display", lambda bundle, metadata=None: outputs.append((bundle, metadata)))
    return outputs


# ---- profile ----


def test_profile_keeps_tuning_and_verdict_seeds_apart():
    p = bt.Profile("laptop", seeds=10, tuning_seeds=5)
    assert p.seeds == tuple(range(100, 110))
    assert p.tuning_seeds == (0, 1, 2, 3, 4)
    assert profile.active() is p


def test_environment_wins_over_the_cell(monkeypatch, log):
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    p = bt.Profile("laptop")
    assert p.name == "smoke"
    assert p.pick(smoke=1, laptop=2, gpu=3) == 1
    assert log()[0]["name"] == "smoke"


@pytest.mark.parametrize(("call", "words"), [
    (lambda: bt.Profile("desktop"), "unknown profile 'desktop': expected one of smoke, laptop, gpu"),
    (lambda: bt.Profile("laptop").pick(laptop=1, gpu=2), "needs one value each for smoke, laptop, gpu"),
    (lambda: bt.nonsense, "benchtop has no 'nonsense'"),
])  # fmt: skip
def test_bad_profile_input_is_one_clear_line(call, words):
    with pytest.raises((ValueError, AttributeError)) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_import_is_lazy():
    code = "import sys, benchtop; print([m for m in ('torch', 'pandas', 'matplotlib', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- report ----


def test_emit_appends_json_lines_with_plain_values(log):
    report.emit("a", x=np.float64(0.5), y=np.arange(2))
    report.emit("b")
    assert log() == [{"kind": "a", "x": 0.5, "y": [0, 1]}, {"kind": "b"}]


def test_emit_names_what_it_cannot_hold(log):
    with pytest.raises(TypeError, match="cannot hold a object"):
        report.emit("a", x=object())


# ---- claims ----

FAR = pd.DataFrame(
    {"A": [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.1], "B": [2.0, 2.2, 1.8, 2.1, 2.0, 1.9, 2.0, 2.3]},
    index=range(100, 108),
)
A_BELOW_B = dict(metric="loss", better="A", than="B")


def test_interval_and_p_value_are_those_of_the_textbook():
    values = (FAR["B"] - FAR["A"]).to_numpy()
    expected = stats.bootstrap((values,), np.mean, method="BCa", random_state=0).confidence_interval
    assert claims.interval(values) == (expected.low, expected.high)
    assert claims.sign_flip(values) == pytest.approx(2 / 2**8)  # all differences positive: only the two extreme flips
    assert claims.interval(np.ones(8)) == (1.0, 1.0)


@pytest.mark.parametrize(("claim", "outcome"), [
    (bt.Claim("s", **A_BELOW_B), "holds"),
    (bt.Claim("s", metric="loss", better="B", than="A"), "fails"),
    (bt.Claim("s", metric="loss", better="B", than="A", lower_is_better=False), "holds"),
    (bt.Claim("s", **A_BELOW_B, margin=0.95), "open"),  # the mean gain is 1.02: not clearly above the margin
    (bt.Claim("s", **A_BELOW_B, margin=2.0), "fails"),
])  # fmt: skip
def test_paired_claim(claim, outcome, shown, log):
    verdict = claim.test(FAR)
    assert verdict.outcome == outcome
    entry = log()[-1]
    assert entry["outcome"] == outcome
    assert entry["seeds"] == list(range(100, 108))
    assert entry["values"]["A"] == FAR["A"].tolist()
    assert [set(bundle) for bundle, _ in shown] == [{"text/html", "text/plain"}, {"image/png", "text/plain"}]
    assert outcome in shown[1][1]["image/png"]["alt"]


def test_pairs_are_matched_by_seed_not_by_position(shown):
    noise = pd.Series(np.linspace(-50, 50, 8), index=range(100, 108))  # huge, but shared by both arms of a seed
    table = FAR.add(noise, axis=0)
    assert bt.Claim("s", **A_BELOW_B).test(table).outcome == "holds"
    table["A"] = table["A"].to_numpy()[::-1]
    assert bt.Claim("s", **A_BELOW_B).test(table).outcome == "open"


def test_agreement(shown):
    predicted = np.array([1.0, 2.0, 4.0])
    measured = predicted * (1 + 0.01 * np.linspace(0.5, 1, 8))[:, None]
    claim = bt.Claim("s")
    assert claim.matches(predicted, measured, rtol=0.02).outcome == "holds"
    assert claim.matches(predicted, measured, rtol=0.002).outcome == "fails"
    assert claim.matches(predicted, measured, rtol=0.02).effect == pytest.approx(0.0075)
    assert claim.matches(predicted, measured, rtol=0.02, scale=1.0).effect == pytest.approx(0.03)  # 4 x 0.75 %


def test_trend(shown):
    x = np.arange(4)
    y = 3 - 0.5 * x + 0.01 * np.random.default_rng(0).normal(size=(8, 4))
    assert bt.Claim("s").trend(x, y, sign=-1).outcome == "holds"
    assert bt.Claim("s").trend(x, y, sign=-1).effect == pytest.approx(0.5, abs=0.02)
    assert bt.Claim("s").trend(x, y, sign=+1).outcome == "fails"
    with pytest.raises(ValueError, match=r"expected \(seeds, 4\)"):
        bt.Claim("s").trend(x, y.T)


def test_a_bound_that_one_seed_breaks_does_not_hold(shown):
    below = np.linspace(0.1, 0.5, 12)
    assert bt.Claim("s").at_most(below, 1.0).outcome == "holds"
    below[3] = 1.1
    assert bt.Claim("s").at_most(below, 1.0).outcome == "open"
    assert bt.Claim("s").at_most(below + 2, 1.0).outcome == "fails"


def test_smoke_never_gives_a_verdict(log, capsys):
    bt.Profile("smoke")
    assert bt.Claim("s", **A_BELOW_B).test(FAR.iloc[:2].set_axis([100, 101])).outcome == "not measured"
    assert "not measured: s" in capsys.readouterr().out
    assert log()[-1]["outcome"] == "not measured"


@pytest.mark.parametrize(("call", "words"), [
    (lambda: bt.Claim("s", **A_BELOW_B).test(FAR.iloc[:5]), "5 seeds: a verdict needs at least 6"),
    (lambda: bt.Claim("s", metric="loss", better="C", than="B").test(FAR), "names the arm 'C': the results hold 'A', 'B'"),
    (lambda: bt.Claim("s", **A_BELOW_B).test(FAR.where(FAR["A"] != 1.2)), "arm 'A' has no result for seed 104"),
    (lambda: bt.Claim("s").at_most([1.0, np.nan, *[1.0] * 6], 2.0), "no finite result for seed 1"),
    (lambda: bt.Claim("s").at_most([1.0] * 8, 2.0, seeds=[1, 2]), "8 results for 2 seeds"),
    (lambda: bt.Claim("s").at_most(np.ones((8, 2)), 2.0), "one number per seed"),
])  # fmt: skip
def test_bad_results_are_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ---- plots ----

HISTORY = pd.DataFrame(
    [("A", seed, step, "loss", 10.0 / (step + 1) + seed) for seed in range(3) for step in (0, 5, 10)],
    columns=["arm", "seed", "step", "metric", "value"],
)


def test_curves_draw_the_mean_over_seeds_and_its_t_interval():
    axes = bt.curves(HISTORY, "loss").axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [11.0, 10 / 6 + 1, 10 / 11 + 1])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    half = stats.t.ppf(0.975, 2) / np.sqrt(3)
    assert band.max() == pytest.approx(11 + half)
    assert "3 seeds" in axes.get_legend().get_title().get_text()


def test_curves_separate_hyper_parameters_but_not_seeds():
    both = pd.concat([HISTORY.assign(lr=0.1), HISTORY.assign(lr=0.2)])
    assert [line.get_label() for line in bt.curves(both, "loss").axes[0].lines] == ["lr=0.1", "lr=0.2"]


def test_unknown_metric_lists_the_known():
    with pytest.raises(ValueError, match="no metric 'los' in the history: it holds 'loss'"):
        bt.curves(HISTORY, "los")


def test_show_stores_alt_text_and_refuses_a_figure_without(shown):
    fig, ax = bt.subplots()
    ax.plot([1, 2])
    bt.show(fig, alt="A rising line.", caption="n = 1")
    assert shown[0][1] == {"image/png": {"alt": "A rising line."}}
    assert shown[1][0]["text/markdown"] == "*n = 1*"
    with pytest.raises(ValueError, match="no alt text"):
        bt.show(bt.subplots()[0], alt=" ")


def test_figures_are_small_palette_pngs():
    fig, ax = bt.subplots()
    ax.plot(np.random.default_rng(0).normal(size=500))
    image = plots.png(fig)
    assert image[25] == 3  # colour type of the header: palette
    assert len(image) < 40_000


def test_figures_keep_the_colours_of_the_palette():
    fig, ax = bt.subplots()
    for k, colour in enumerate(plots.PALETTE):
        ax.plot(np.sin(np.arange(50) / 5 + k), color=colour)
        ax.fill_between(range(50), k / 7, k / 7 + 0.1, color=colour, alpha=0.2)
    seen = np.asarray(Image.open(io.BytesIO(plots.png(fig))).convert("RGB")).astype(int)
    for colour in plots.PALETTE:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(seen - wanted).max(-1).min() <= 8, f"{colour} is not in the picture"


# ---- widgets ----


def draw(**kwargs):
    fig, ax = bt.subplots(figsize=(2, 1.5))
    ax.set_title(str(kwargs))
    return fig


def test_explore_writes_one_described_frame_per_setting(shown):
    bt.explore(draw, alt="rank {rank} at depth {depth}", rank=[1, 2, 4], depth=[0.5, 1.0])
    page = shown[0][0]["text/html"]
    alts = re.findall(r'alt="([^"]*)"', page)
    assert alts[:3] == [
        "rank 1 at depth 0.5",
        "rank 1 at depth 1.0",
        "rank 2 at depth 0.5",
    ]  # row-major, as the script counts
    assert len(set(re.findall(r'src="data:image/png;base64,([^"]*)"', page))) == 6
    assert page.count(" hidden") == 5
    assert page.count('type="range"') == page.count("<label for=") == 2


def test_slider_text_is_escaped():
    page = widgets.slider_html(["eA==", "eQ=="], ['a "quoted" <b>', "b"], {"n": ['"', "<"]})
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize(("values", "words"), [
    ({}, "0 sliders"),
    ({"a": [1], "b": [1, 2], "c": [1, 2]}, "3 sliders"),
    ({"a": list(range(13))}, "13 frames"),
    ({"a": [1]}, "1 frames"),
])  # fmt: skip
def test_explore_limits(values, words):
    with pytest.raises(ValueError, match=words):
        bt.explore(draw, alt="x", **values)


def test_explore_refuses_a_heavy_slider():
    def heavy(a):
        fig, ax = bt.subplots(figsize=(8, 6))
        ax.imshow(np.random.default_rng(a).normal(size=(400, 400)))
        return fig

    with pytest.raises(ValueError, match="the limit is 120"):
        bt.explore(heavy, alt="x", a=[1, 2, 3])


# ---- techniques ----


def notebook(*tagged: tuple[str, str]) -> dict:
    return {"cells": [{"cell_type": "code", "source": s, "metadata": {"tags": [t]}} for t, s in tagged]}


def test_technique_is_imports_and_technique_cells_only(tmp_path, monkeypatch):
    path = tmp_path / "book" / "part" / "two-words.ipynb"
    path.parent.mkdir(parents=True)
    cells = notebook(
        ("setup", "import math\nraise SystemExit('set-up ran')"),
        ("technique", "def f(x):\n    return math.sqrt(x)"),
        ("experiment", "raise SystemExit('experiment ran')"),
    )
    path.write_text(json.dumps(cells))
    monkeypatch.setenv("BENCHTOP_BOOK", str(tmp_path))
    module = bt.technique("two-words")
    assert module.f(9.0) == 3.0
    assert bt.technique("two-words") is module


def test_technique_errors_name_the_cure(tmp_path, monkeypatch):
    with pytest.raises(LookupError, match="no technique cell"):
        techniques.source(notebook(("setup", "import math")), "x.ipynb")
    with pytest.raises(LookupError, match="no chapter 'nowhere' here"):
        bt.technique("nowhere")
