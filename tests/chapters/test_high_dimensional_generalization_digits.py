"""The path to real data of the chapter high-dimensional-generalization, at a small size."""

import json
import os

import pytest
import torch

import benchtop as bt
from benchtop.techniques import cells, find_notebook, imports

pytestmark = pytest.mark.skipif(
    "BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs MNIST: set BENCHTOP_DATA_MIRROR to a folder that has it"
)


@pytest.fixture(scope="module")
def chapter():
    """Names of the cell that defines the networks and their tasks."""
    notebook = json.loads(find_notebook("high-dimensional-generalization").read_text(encoding="utf-8"))
    space = {}
    for source in [*map(imports, cells(notebook, "setup")), *cells(notebook, "experiment")]:
        if source.startswith(("import", "from")) or "def digits_task" in source:
            exec(source, space)
    return space


def test_students_learn_from_digits(chapter):
    P, test = 64, 1000
    x, y = chapter["digits_task"](torch.Generator().manual_seed(0), P)
    assert x.shape == (P + test, 49) and set(y.tolist()) == {-1.0, 1.0}
    assert x.mean(0).abs().max() < 1e-4

    run = bt.fit(
        lambda seed: chapter["Student"](16, chapter["digits_task"], P, seed),
        lambda model, batch: (model(model.x) - model.y).pow(2).mean(),
        lambda generator: torch.zeros(1),
        evaluate=lambda model: {"test error": (model(model.test_x) - model.test_y).pow(2).mean()},
        **{"steps": 40, "seeds": [0, 1], "optimiser": "sgd", "lr": 0.05, "momentum": 0.9, "clip": 1.0},
    )
    error = run.history.pivot(index="seed", columns="step", values="value")
    assert (error[40] < error[0]).all() and (error[40] < 1).all()  # better than the answer zero, whose error is 1


def test_labels_are_odd_against_even(chapter):
    train = bt.load("mnist").train
    rows = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(3))[: 5 + 1000]
    _, y = chapter["digits_task"](torch.Generator().manual_seed(3), 5)
    assert torch.equal(y > 0, train.y[rows] % 2 == 1)
