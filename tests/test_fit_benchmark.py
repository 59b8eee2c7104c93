"""The benchmark of the seeds engine: its ways do the same training, its table and bars are right, its page shows the file."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchtop.publish import site

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """benchmarks/fit.py, cut to two seeds and a few steps."""
    spec = importlib.util.spec_from_file_location("fit_benchmark", ROOT / "benchmarks" / "fit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SEEDS", range(2))
    for training in module.TRAININGS.values():
        training["steps"] = 6
    return module


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_all_ways_do_the_same_training(bench, name, tmp_path):
    loop, fit = bench.run_loop(name, "cpu", bench.SEEDS)["losses"], bench.run_fit(name, "cpu", 1)["losses"]
    assert loop == pytest.approx(fit, rel=1e-4)
    assert loop[0] != pytest.approx(loop[1], rel=1e-3), "seeds must differ"
    if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
        bench.prepare(name, "cpu", tmp_path / "start.npz")
        found = bench.run_jax(name, "cpu", tmp_path / "start.npz")
        assert loop == pytest.approx(found["losses"], rel=1e-3)
        assert found["seconds"] > found["without compilation"] > 0


def rounds(loop, fit, jax, compiled, losses=(1.0, 2.0)):
    def each(seconds, **more):
        return [{"seconds": s, "losses": [1.0, 2.0], "peak_bytes": 2e8} | more for s in seconds]

    ours = each(fit, losses=list(losses), path="stacked", why="small")
    theirs = [found | {"without compilation": c} for found, c in zip(each(jax), compiled)]
    return {"loop": each(loop), "fit": ours, "jax": theirs}


def test_ratios_are_medians_within_rounds(bench):
    # the machine slows down by ten in the last round: within rounds the ratios stay what they are
    found = bench.summary("mlp", rounds([6, 6, 60], [1, 1.2, 10], [2, 2, 20], [0.5, 0.5, 5]))
    assert found["times as fast as"] == {"loop": 6.0, "jax": 2.0, "jax without compilation": 0.5}
    assert (found["ways"]["fit"]["seconds"], found["ways"]["fit"]["path"]) == (1.2, "stacked")
    assert bench.misses({"mlp": found}, "cpu") == []
    lines = bench.table({"mlp": found}).splitlines()
    assert [line.split()[-3] for line in lines[1:]] == ["6.00x", "1.00x", "2.00x", "0.50x"]


def test_a_missed_bar_and_another_loss_are_named(bench):
    slow = bench.summary("mlp", rounds([4], [1], [0.5], [0.1], losses=(1.0, 2.1)))
    assert bench.misses({"mlp": slow}, "cpu") == [
        "mlp: 4.00x the loop, the bar is 5x",
        "mlp: takes 2.00 times as long as JAX, the bar is 1.5",
        "mlp: fit ends at another loss (3.3e-02 apart)",
    ]


def test_a_measurement_that_takes_too_long_ends_in_one_line(bench, tmp_path):
    options = SimpleNamespace(device="cpu", file=tmp_path / "x", limit=0.01)
    with pytest.raises(SystemExit, match=r"mlp, fit: over 0.01 s \(load .* raise --limit"):
        bench.measure("mlp", "fit", 1, options)


def test_the_page_shows_the_numbers_of_the_file_and_says_what_is_missing(bench, tmp_path):
    def page():
        return site.render("speed", SimpleNamespace(book=SimpleNamespace(root=tmp_path)), "book/page")

    assert "not measured yet" in page()
    file = tmp_path / "benchmarks" / "fit.json"
    file.parent.mkdir()
    found = bench.summary("mlp", rounds([6.5], [1.25], [2], [0.5])) | {"threads": {"loop": 1, "fit": 2}}
    about = {"device": "2 cores, made up", "torch": "9.9", "python": "3.99", "date": "2030-01-01", "repeats": 1}
    file.write_text(json.dumps({"cpu": about | {"trainings": {"mlp": found}}}))
    shown = page()
    for piece in (
        "2 cores, made up",
        "torch 9.9",
        "2030-01-01",
        "6.50",
        "1.25",
        "5.2",
        "200 MB",
        "perceptron 64-128-128-10",
    ):
        assert piece in shown, piece
    assert "On a GPU: not measured yet" in shown
