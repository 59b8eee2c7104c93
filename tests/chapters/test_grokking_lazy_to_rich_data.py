"""The public data of the gpu profile, at a small size: the same cells, MNIST in place of digits."""

import copy
import os
import re

import nbformat
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import benchtop as bt
from benchtop.techniques import find_notebook


class Small:
    """Names and rates of the gpu profile, sizes of smoke."""

    device = torch.device("cpu")

    def pick(self, *, smoke, laptop, gpu):
        return smoke if isinstance(smoke, int) else gpu


@pytest.mark.skipif("BENCHTOP_DATA_MIRROR" not in os.environ, reason="MNIST is read from BENCHTOP_DATA_MIRROR")
def test_the_scaled_network_learns_mnist_at_the_rate_of_the_gpu_profile():
    space = dict(profile=Small(), bt=bt, torch=torch, nn=nn, F=F, copy=copy)
    cells = [c.source for c in nbformat.read(find_notebook("grokking-lazy-to-rich"), 4).cells]
    exec(next(c for c in cells if "class Scaled" in c), space)
    rate = float(re.search(r"Scaled, .*lr=profile\.pick\(.*?gpu=([\d.]+)\)", "\n".join(cells), re.DOTALL).group(1))
    assert space["pictures"]["train"].shape == (50, 784)
    run = bt.fit(space["Scaled"], space["scaled_loss"], lambda generator: torch.empty(0), steps=30, seeds=[0], lr=rate,
                 alpha=[0.25, 1.0], optimiser="sgd", evaluate=space["picture_errors"], eval_every=30)  # fmt: skip
    errors = run.history.pivot(index="step", columns=["metric", "alpha"], values="value")
    assert (errors.loc[0] == 1).all()  # the start is subtracted
    assert (errors.loc[30, "train error"] < 0.9).all()
