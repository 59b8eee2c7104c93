"""The GPU profile's path of the chapter on the intrinsic dimension, MNIST and LeNet, at a small size on this machine."""

import json
import os

import pytest
import torch

from benchtop.techniques import cells, find_notebook


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="needs MNIST: set BENCHTOP_DATA_MIRROR")
def test_mnist_and_lenet(monkeypatch):
    """LeNet has its own number of weights, slices of it train, and shuffled pixels keep theta_0 and P of the seed."""
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")
    notebook = json.loads(find_notebook("intrinsic-dimension").read_text(encoding="utf-8"))
    space = {"profile": "smoke", "__name__": "chapter"}
    load, convolution, shuffle, training, direct, slices, *_ = cells(notebook, "experiment")
    load = load.replace('smoke="digits"', 'smoke="mnist"').replace("[(5,), (9,)]", "[(5, 5), (20, 20)]")
    for source in [*cells(notebook, "setup", "technique"), load, convolution, shuffle, training]:
        exec(source, space)
    assert space["side"] == 28 and space["D_of"]["CNN"] == 44_426  # as the last d of the authors' loop over LeNet says
    for name in ("validation", "test"):
        space[name] = space[name]._replace(x=space[name].x[:40], y=space[name].y[:40])
    space["common"] |= {"steps": 2, "eval_every": 2}
    for source in (direct, slices):
        exec(source, space)
    assert 0 < space["level"] < 1
    for name, frame in space["accuracy"].items():
        assert frame.shape == (2, 2) and frame.notna().all(axis=None), name
    runs = [
        space["train_slices"]("FC", space["nets"]["FC 5-5"], space["Fastfood"], {20: 1.0, 40: 1.0}, (0, 1), wrap, 2.0)
        for wrap in (lambda model: model, space["Shuffled"])
    ]
    plain, mixed = runs[0].models[0], runs[1].models[0].model
    assert plain.P.G.equal(mixed.P.G) and plain.P.Pi.equal(mixed.P.Pi)
    assert all(a.equal(b) for a, b in zip(plain.net.parameters(), mixed.net.parameters()))
    assert not plain.z.equal(mixed.z) and plain.z[:20].abs().min() > 0 and plain.z[20:].abs().max() == 0  # d = 20


def test_convolution_is_that_of_torch():
    notebook = json.loads(find_notebook("intrinsic-dimension").read_text(encoding="utf-8"))
    space = {"profile": "smoke", "__name__": "chapter"}
    for source in [*cells(notebook, "setup"), cells(notebook, "experiment")[1]]:
        exec(source, space)
    for channels, size, k in ((1, 8, 3), (2, 6, 2)):
        torch.manual_seed(0)
        layer, x = space["Convolution"](channels, 4, k).double(), torch.randn(3, channels, size, size).double()
        torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias))
