"""The GPU profile's path of the chapter on SOAP, at a small size on this machine."""

import json
import os

import pytest

from benchtop.techniques import cells, find_notebook


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs Shakespeare: set BENCHTOP_DATA_MIRROR")
def test_shakespeare_one_by_one(monkeypatch):
    """Every arm trains a deeper model on the plays, replicas one after the other, and gets a tuned setting."""
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    notebook = json.loads(find_notebook("soap").read_text(encoding="utf-8"))
    space = {"profile": "smoke", "__name__": "chapter"}
    model, sizes, recipe, tuning = cells(notebook, "experiment")[:4]
    smaller = {
        'smoke="stdlib/characters"': 'smoke="tinyshakespeare"',
        "smoke=(16, 1, 2, 16, 8)": "smoke=(16, 2, 2, 8, 4)",
        'smoke=(True, "float32")': 'smoke=(False, "float32")',
        "scale = profile.pick(smoke=1.0": "scale = profile.pick(smoke=0.2",
    }
    sources = [*cells(notebook, "setup", "technique"), model, sizes, recipe, tuning]
    text = "\n\n".join(sources)
    assert all(old in text for old in smaller)
    for old, new in smaller.items():
        text = text.replace(old, new)
    exec(text, space)
    assert space["characters"] == 65
    assert {run.path for run in space["tuned"]} == {"loop"}
    assert set(space["choice"]) == {"SOAP", "Shampoo", "AdamW", "random basis"}
    for run in space["tuned"]:
        losses = run.history.pivot_table(index="step", values="value")["value"]
        assert losses.iloc[-1] < losses.iloc[0]
