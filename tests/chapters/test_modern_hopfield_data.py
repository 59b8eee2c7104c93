"""The path that only the gpu profile takes, at a small size: bags of MNIST digits behind the convolutional encoder."""

import json
import os

import pytest
import torch

import benchtop as bt
from benchtop import profile
from benchtop.techniques import cells, find_notebook

PARTS = ("make_bags", "poolings = ", "class BagNet", "held_out = ")  # what names the cells that define the experiment


class Tiny(profile.Profile):
    """Data sets of the gpu profile, everything else as in smoke."""

    def pick(self, **sizes):
        return sizes["gpu" if isinstance(sizes["gpu"], str) else "smoke"]


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="BENCHTOP_DATA_MIRROR names no folder with MNIST")
def test_pooling_of_mnist_bags(monkeypatch):
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    monkeypatch.setattr(bt, "Profile", Tiny, raising=False)
    monkeypatch.setattr(profile, "_active", None)
    notebook = json.loads(find_notebook("modern-hopfield").read_text(encoding="utf-8"))
    parts = [cell for cell in cells(notebook, "experiment") if any(word in cell for word in PARTS)]
    space = {"profile": "gpu"}
    for source in (cells(notebook, "setup")[1], *cells(notebook, "technique"), *parts):
        exec(source, space)
    assert space["data"].train.x.shape[1:] == (1, 28, 28)
    rows, y = space["make_bags"](space["data"].test, 50, seed=1)
    nines = (space["data"].test.y[rows] == 9).sum(1)
    assert (nines == y).all() and y.sum() == 25
    scored = {}
    for arm, pooling in space["poolings"].items():
        run = bt.fit(
            lambda pooling=pooling: space["BagNet"](pooling),
            space["loss"],
            space["sample"],
            steps=1,
            seeds=[0],
            lr=1e-3,
        )
        scored[arm] = (
            space["metrics"](run.models[0]) if arm == "Hopfield" else space["loss"](run.models[0], batch(space))
        )
    assert set(scored.pop("Hopfield")) == {"validation AUC", "test AUC"}
    assert all(value.isfinite() for value in scored.values())


def batch(space):
    return space["sample"](torch.Generator().manual_seed(0))
