"""The GPU profile's path of the chapter on lottery tickets: LeNet-300-100 on MNIST, few images and steps, on the CPU."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

import benchtop as bt
from benchtop.techniques import cells, find_notebook, source

ROWS = 240


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs MNIST: set BENCHTOP_DATA_MIRROR")
def test_mnist_is_searched_and_tuned():
    notebook = json.loads(find_notebook("lottery-ticket").read_text(encoding="utf-8"))
    gpu = SimpleNamespace(
        device=torch.device("cpu"), pick=lambda **sizes: sizes["gpu"], seeds=(100,), tuning_seeds=(0,)
    )

    def first(name, device):
        return [type(part)(part.x[:ROWS], part.y[:ROWS]) for part in bt.load(name, device)]

    space = {}
    exec(source(notebook), space)
    space |= {"profile": gpu, "bt": SimpleNamespace(load=first, fit=bt.fit, best=bt.best, batches=bt.batches)}
    data, pictures, sizes, *rest = cells(notebook, "experiment")[:8]
    for cell in (data, pictures, sizes):
        exec(cell, space)
    assert space["widths"] == (784, 300, 100, 10) and space["rounds"] == 12
    assert [tuple(part.x.shape) for part in space["parts"]] == [(ROWS, 784)] * 3
    space |= {"steps": 3, "every": 3, "grid": [1e-3, 2e-3], "middle": 2}
    for cell in rest:
        exec(cell, space)
    tickets, names = space["tickets"], space["names"]
    assert len(tickets) == 3 and [int(layer.mask.sum()) for layer in space["layers"](tickets[2][0])] == [
        150_528,
        19_200,
        810,
    ]
    assert space["choice"].keys() == {"dense", *names[:3]} and space["settings"].keys() == {"dense", *names}
