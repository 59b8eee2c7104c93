"""The data path that only the gpu profile of the chapter takes: whitened MNIST, at a small size."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

import benchtop as bt
from benchtop.techniques import cells, find_notebook, source

pytestmark = pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="set BENCHTOP_DATA_MIRROR to a mirror")
ROWS = 1200


@pytest.fixture
def space():
    """The names of the chapter's depth experiment, with the sizes of gpu on fewer pictures and on the CPU."""
    notebook = json.loads(find_notebook("saxe-deep-linear").read_text(encoding="utf-8"))
    gpu = SimpleNamespace(device=torch.device("cpu"), pick=lambda **sizes: sizes["gpu"])
    fewer = SimpleNamespace(load=lambda name, device: bt.load(name, device, size=ROWS), fit=bt.fit)
    space = {}
    exec(source(notebook), space)
    space |= {"profile": gpu, "bt": fewer, "everything": lambda generator: torch.zeros(())}
    for cell in cells(notebook, "experiment"):
        if "def digits_task" in cell or "def train(" in cell:
            exec(cell, space)
    return space


def test_mnist_is_whitened_and_trains(space):
    assert space["data"].name == "mnist" and len(space["data"].train.x) == ROWS
    sigma31 = space["digits_task"](0)
    assert sigma31.shape == (10, space["width"])
    assert torch.linalg.matrix_norm(sigma31, 2).item() == pytest.approx(1)
    assert not torch.equal(sigma31, space["digits_task"](1)), "each seed takes its own half"
    space["cap"] = 2
    run = space["train"]("orthogonal", 3, [0], [0.25, 0.5])
    left = run.history[run.history["metric"] == "left"].pivot(index="step", columns="lr", values="value")
    assert (left.diff().dropna() < 0).all(axis=None)
    assert set(run.history[run.history["metric"] == "iterations"]["value"]) <= {1, 2, 3, 4}


def test_the_inputs_are_white(space):
    """Sigma^31 of the white inputs, and their correlation, from the inputs themselves."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 12, generator=g) @ torch.randn(12, 12, generator=g), torch.arange(200) % 4
    centred = x - x.mean(0)
    U, _, _ = torch.linalg.svd(centred, full_matrices=False)
    white = U[:, :5]  # orthonormal columns: their correlation is I
    target = torch.nn.functional.one_hot(y).float()
    theirs = torch.linalg.svdvals((target - target.mean(0)).T @ white)
    ours = torch.linalg.svdvals(space["whitened"](x, y, 5))
    torch.testing.assert_close(ours, theirs / theirs[0], rtol=1e-4, atol=1e-4)
