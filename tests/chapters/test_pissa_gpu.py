"""The GPU profile's path of the chapter on PiSSA, at a small size on this machine."""

import json
import os

import pytest
import torch

import benchtop as bt
from benchtop.techniques import cells, find_notebook


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs the public texts: set BENCHTOP_DATA_MIRROR")
def test_texts_and_gpt(monkeypatch):
    """One alphabet for both texts; a small GPT learns the old one and every arm adapts it to the new one."""
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    notebook = json.loads(find_notebook("pissa").read_text(encoding="utf-8"))
    space = {"profile": "smoke", "__name__": "chapter"}
    for source in cells(notebook, "setup", "technique") + cells(notebook, "experiment")[:3]:
        exec(source, space)
    old, new = space["texts"]()
    code, plays = bt.load("stdlib/characters"), bt.load("tinyshakespeare")
    assert code.decode(new[0].x[:200]) == plays.decode(plays.train.x[:200])
    assert torch.equal(new[2].x[1:50], new[2].y[:49]) and int(max(new[0].x.max(), old[0].x.max())) < 96
    space["small"] = lambda: space["GPT"](d=64, depth=1, heads=2, length=16)
    sizes, *rest = cells(notebook, "experiment")[3:10]
    for source in [sizes.replace("perceptron, digits, None, 32", "small, texts, 16, 8"), *rest]:
        exec(source, space)
    starts = {run.arm: round(run.history.query("step == 0")["value"].mean(), 4) for run in space["tuned"]}
    assert starts.keys() == space["arms"].keys()
    assert len(set(starts.values())) == 1  # every arm starts as the backbone
    assert set(space["choice"]) == set(space["arms"])
