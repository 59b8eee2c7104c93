"""The data and sizes of the gpu profile of the chapter gradient-noise: MNIST and 50 units, few steps, on the CPU."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

import benchtop as bt
from benchtop.techniques import cells, find_notebook, source

pytestmark = pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="set BENCHTOP_DATA_MIRROR to a mirror")
ROWS = 1500


@pytest.fixture(scope="module")
def space():
    """The names of the chapter's experiment as the gpu profile sees them, on fewer pictures and on the CPU."""
    notebook = json.loads(find_notebook("gradient-noise").read_text(encoding="utf-8"))
    gpu = SimpleNamespace(
        device=torch.device("cpu"), seeds=(100, 101), tuning_seeds=(0,), pick=lambda **sizes: sizes["gpu"]
    )
    fewer = SimpleNamespace(load=lambda name, device: bt.load(name, device, size=ROWS), fit=bt.fit, batches=bt.batches)
    space = {}
    exec(source(notebook), space)
    space |= {"profile": gpu, "bt": fewer}
    for cell in cells(notebook, "experiment"):
        if any(f"def {name}(" in cell for name in ("scaled", "measure", "run")):
            exec(cell, space)
    return space


def test_the_pictures_are_scaled_by_the_training_part(space):
    assert space["train"].x.shape == (ROWS, 784) and space["widths"] == [784, *20 * [50], 10]
    assert space["train"].x.mean().item() == pytest.approx(0, abs=1e-4)
    assert space["train"].x.std().item() == pytest.approx(1, abs=1e-4)
    assert space["test"].x.mean().item() != pytest.approx(0, abs=1e-6)


def test_one_run_holds_the_arms_and_their_walk(space):
    """At the middle of the gpu profile's grid: noise moves the weights as the formula says, without it they stay."""
    lr = space["grid"][3]
    run = space["run"]("naive", "naive", lr=lr, eta=[0.0, 1.0], seeds=[0], steps=6, eval_every=3)
    width = run.history.query("metric == 'weight std'").pivot(index="step", columns="eta", values="value")
    assert width[0.0].tolist() == pytest.approx([0.1] * 3, rel=0.02)
    wanted = [space["walk_std"](0.1, lr, t, 1.0, 0.55) for t in width.index]
    assert width[1.0].tolist() == pytest.approx(wanted, rel=0.02)
    assert set(run.history["metric"]) == {"validation accuracy", "test accuracy", "weight std", "gradient norm"}
    assert run.history["value"].notna().all()
