"""muP against the package of its authors, which scales a plain network and the optimiser's groups instead."""

import pytest
import torch
from torch import nn

import benchtop as bt

PEER = "mup 1.0, set_base_shapes with MuReadout and MuSGD"
WHAT = "start, forward, hidden layers, gradients, five steps of SGD, at three widths"

mup = pytest.importorskip("mup", reason="needs the package mup: install the extra peers")
ours = bt.technique("maximal-update-parametrization")
BASE = 8


class Plain(nn.Module):
    """The network as one would write it for that package."""

    def __init__(self, n):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, n), nn.Linear(n, n), mup.MuReadout(n, 3, bias=False)

    def hidden(self, x):
        h = self.one(x)
        return [h, self.two(torch.tanh(h))]

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)[-1]))


@pytest.fixture(params=[BASE, 32, 40], ids="n={}".format)
def pair(request):
    """(ours, theirs) with one start: the plain weights are ours times the multipliers that the package does not keep."""
    n = request.param
    net = ours.ABCNet((5, n, n, 3), ours.muP(2), BASE, generator=torch.Generator().manual_seed(n))
    theirs = Plain(n)
    mup.set_base_shapes(theirs, Plain(BASE), delta=Plain(2 * BASE))
    with torch.no_grad():
        for layer, m, w in zip((theirs.one, theirs.two), net.m, net.w):
            layer.weight.copy_(m * w)
            layer.bias.zero_()
        theirs.out.weight.copy_(net.m[2] * net.w[2] * n / BASE)  # its forward pass divides by n / base
    return net, theirs


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(11, 5, generator=g), torch.randn(11, 3, generator=g)


def loss(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def test_forward_gradients_and_five_steps(pair, batch, agree):
    net, theirs = pair
    eta, optimiser = 0.1, mup.MuSGD(theirs.parameters(), lr=0.1)
    start = net(batch[0]).detach()
    for _ in range(5):
        agree(net(batch[0]), theirs(batch[0]))
        for one, two in zip(net.hidden(batch[0]), theirs.hidden(batch[0])):
            agree(one, two)
        optimiser.zero_grad()
        loss(theirs, batch).backward()
        gradients = torch.autograd.grad(loss(net, batch), [*net.w, *net.beta])
        plain = [theirs.one.weight.grad, theirs.two.weight.grad, theirs.out.weight.grad / net.s**-1]
        for m, g, other in zip([*net.m[:2], net.m[2]], gradients, plain):
            agree(g / m, other)
        optimiser.step()
        with torch.no_grad():
            for p, g in zip([*net.w, *net.beta], gradients):
                p -= net.rate(eta) * g
    agree(net(batch[0]), theirs(batch[0]))
    assert (net(batch[0]) - start).abs().max() > 0.1


def test_the_package_starts_with_the_same_spread():
    """Standard deviation of each matrix as it acts, at four times the base width."""
    n, base = 1024, 256
    theirs = Plain(n)
    mup.set_base_shapes(theirs, Plain(base), delta=Plain(2 * base))
    net = ours.ABCNet((5, n, n, 3), ours.muP(2), base, generator=torch.Generator().manual_seed(0))
    for layer in (theirs.one, theirs.two):
        mup.init.normal_(layer.weight, std=1.0 if layer is theirs.one else base**-0.5)
    mup.init.normal_(theirs.out.weight, std=base**-0.5)
    acting = [theirs.one.weight, theirs.two.weight, theirs.out.weight * base / n]
    for m, w, other in zip(net.m, net.w, acting):
        assert (m * w).std().item() == pytest.approx(other.std().item(), rel=0.1)
