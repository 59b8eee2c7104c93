"""The data of the chapter on maximal update parametrisation: both sizes of digits, both vocabularies."""

import json
import os

import pytest

from benchtop.techniques import cells, find_notebook

SLUG = "maximal-update-parametrization"


def run(monkeypatch, first: str, replacements: dict[str, str]) -> dict:
    """The experiment cell that begins so, and those it needs, at the size of smoke with other data."""
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    notebook = json.loads(find_notebook(SLUG).read_text(encoding="utf-8"))
    space = {"profile": "smoke", "__name__": "chapter"}
    wanted = [source for source in cells(notebook, "experiment") if source.startswith(first)]
    for source in cells(notebook, "setup", "technique") + wanted:
        for old, new in replacements.items():
            source = source.replace(old, new)
        exec(source, space)
    return space


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs public data: set BENCHTOP_DATA_MIRROR")
def test_digits_of_the_gpu_profile(monkeypatch):
    space = run(monkeypatch, "data = ", {'smoke="digits"': 'smoke="mnist"'})
    assert space["X"].shape == (32, 784) and space["XT"].shape[1] == 784
    assert 0.5 < space["X"].square().sum(1).mean() < 2
    assert set(space["Y"].tolist()) == set(space["YT"].tolist()) == set(range(5))


@pytest.mark.parametrize("name", ["characters", "bytepairs"])
def test_windows_leave_out_the_middle(monkeypatch, name):
    space = run(monkeypatch, "text = ", {'smoke="stdlib/characters"': f'smoke="stdlib/{name}"'})
    tokens, x, y = space["tokens"], *space["windows"](space["tokens"], space["torch"].tensor([4, 100]))
    assert x.shape == (2, space["k"]) and y.tolist() == [tokens[4], tokens[100]]
    counts = (x[1] * 8**0.5).round().long()
    neighbours = [*tokens[96:100].tolist(), *tokens[101:105].tolist()]
    assert counts.tolist() == [neighbours.count(i) for i in range(space["k"])]
    assert set(space["kinds"].tolist()) == {0, 1, 2, 3}
