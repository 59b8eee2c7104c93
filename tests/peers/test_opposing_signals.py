"""Lanczos on Hessian-vector products in forward mode, finite differences, and loops over examples."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

import benchtop as bt

PEER = "scipy ARPACK (eigsh) on forward-mode products with the Hessian; naive re-derivation with loops"
WHAT = "data, forward, gradient, five steps of descent, Hessian, sharpness of both models, search, antiphase, spike"

N, D, P, ALPHA, KAPPA = 30, 4, 0.2, 64.0, 0.3
book = bt.technique("opposing-signals")


def model(one_answer=False):
    made = book.TwoLayer(N, D, P, ALPHA, KAPPA, torch.Generator().manual_seed(2), one_answer)
    made.b.data += 0.4 * torch.randn(D + 1, generator=torch.Generator().manual_seed(3))
    made.keep[[0, 9, 20]] = 0
    return made.double()


class Network(nn.Module):
    """Two layers of tanh units on random data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("x", 2 * torch.randn(25, 6))
        self.register_buffer("y", torch.arange(25) % 3)
        self.register_buffer("keep", torch.ones(25))

    def forward(self):
        return F.cross_entropy(self.body(self.x), self.y, reduction="none")


def gradient(b, c, x, y, keep):
    """Of the training loss in (b, c), one example at a time."""
    g_b, g_c = torch.zeros_like(b), torch.zeros_like(c)
    for row, target, weight in zip(x, y, keep):
        error = c * (b @ row) - target
        g_b += weight * error * c * row / keep.sum()
        g_c += weight * error * (b @ row) / keep.sum()
    return g_b, g_c


def lanczos(made):
    """The largest eigenvalue by ARPACK; its products with vectors are derivatives of the gradient along them."""
    sparse = pytest.importorskip("scipy.sparse.linalg")
    parameters = dict(made.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def loss(own):
        each = functional_call(made, own, ())
        return (made.keep * each).sum() / made.keep.sum()

    def product(v):
        pieces = torch.as_tensor(v).flatten().split(sizes)
        along = {name: piece.view(p.shape) for (name, p), piece in zip(parameters.items(), pieces)}
        return torch.cat([g.flatten() for g in jvp(grad(loss), (parameters,), (along,))[1].values()]).detach().numpy()

    operator = sparse.LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)
    return torch.tensor(sparse.eigsh(operator, 1, which="LA")[0][0])


@pytest.mark.parametrize("one_answer", [False, True])
def test_the_data(agree, one_answer):
    made = model(one_answer)
    half = round(P * N / 2)
    for i, (row, target) in enumerate(zip(made.x, made.y)):
        side = 1 if i < half else -1 if i < 2 * half else 0
        assert row[-1] == side * math.sqrt(ALPHA) and made.side[i] == side
        answer = KAPPA * math.sqrt(ALPHA) * (side if one_answer else abs(side))
        agree(target, made.beta @ row[:-1] + answer)
    agree(made.ordinary(), sum((made.c * w - v) ** 2 for w, v in zip(made.b[:-1], made.beta)) / 2)


def test_forward_gradient_and_five_steps(agree):
    made = model()
    b, c = made.b.detach().clone(), made.c.detach().clone()
    agree(made(), torch.stack([(c * (b @ row) - target) ** 2 / 2 for row, target in zip(made.x, made.y)]))
    found = torch.autograd.grad(book.training_loss(made), [made.b, made.c])
    for ours, theirs in zip(found, gradient(b, c, made.x, made.y, made.keep)):
        agree(ours, theirs)
    losses, curve, sharp = book.watch(made, 0.05, 5, level=math.inf)
    agree(torch.tensor(sharp), lanczos(model()))  # at the first step: its loss lies below infinity
    agree(torch.tensor(curve), (losses * made.keep).sum(1) / made.keep.sum())
    for step in range(6):
        agree(losses[step], torch.stack([(c * (b @ row) - target) ** 2 / 2 for row, target in zip(made.x, made.y)]))
        if step == 5:
            break
        g_b, g_c = gradient(b, c, made.x, made.y, made.keep)
        b, c = b - 0.05 * g_b, c - 0.05 * g_c
    agree(made.b, b)


def test_hessian_by_finite_differences(agree):
    made = model()
    w, step = torch.cat([made.b.detach(), made.c.detach()[None]]), 1e-4
    columns = []
    for i in range(D + 2):
        ends = []
        for sign in (1, -1):
            moved = w.clone()
            moved[i] += sign * step
            ends.append(torch.cat([g.reshape(-1) for g in gradient(moved[:-1], moved[-1], made.x, made.y, made.keep)]))
        columns.append((ends[0] - ends[1]) / (2 * step))
    agree(book.hessian(made), torch.stack(columns))


def test_sharpness_by_lanczos(agree):
    agree(book.sharpness(model(), 300), lanczos(model()))
    agree(torch.linalg.eigvalsh(book.hessian(model()))[-1], lanczos(model()))
    agree(book.sharpness(Network(), 1000), lanczos(Network()))


def test_search_antiphase_and_spike(agree):
    losses = torch.rand(12, 9, generator=torch.Generator().manual_seed(8)) + torch.linspace(0.5, 0, 12)[:, None]
    edge, step, up, down = book.opposing(losses, 2)
    means = [sum(row) / 9 for row in losses.tolist()]
    assert edge == next(t for t in range(11) if means[t + 1] > means[t])
    rises = {t: sum(sorted((losses[t + 1] - losses[t]).tolist())[-2:]) for t in range(edge, 11)}
    assert step == max(rises, key=rises.get)
    ranked = sorted(range(9), key=lambda i: losses[step + 1, i] - losses[step, i])
    assert up.tolist() == ranked[-2:] and down.tolist() == ranked[:2]
    a, b = losses[:, 0].tolist(), losses[:, 1].tolist()
    pairs = [(a[t + 1] - a[t], b[t + 1] - b[t]) for t in range(3, 11) if t != 6]
    agree(torch.tensor(book.antiphase(a, b, 3, 6)), torch.tensor(np.corrcoef(*zip(*pairs))[0, 1]))
    worst = max(math.log2(means[t] / min(means[:t])) for t in range(1, 12))
    agree(torch.tensor(book.spike(np.array(means))), torch.tensor(worst))
