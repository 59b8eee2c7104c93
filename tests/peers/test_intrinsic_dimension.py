"""The projections as explicit matrices, a perceptron written out by hand, and its training by hand."""

import math

import scipy.linalg
import torch
from torch import nn

import benchtop as bt

PEER = "naive re-derivation: SciPy's Hadamard matrix, a perceptron without autograd, gradient descent in all weights"
WHAT = "Fastfood and dense maps, forward, gradient, five steps of gradient descent alone and in a batch of slices"

IN, HIDDEN, OUT, COLUMNS, RATE = 3, 4, 2, 7, 0.3
book = bt.technique("intrinsic-dimension")
D = HIDDEN * IN + HIDDEN + OUT * HIDDEN + OUT


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


def data():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(9, IN, generator=generator), torch.randn(9, OUT, generator=generator)


def matrix(P):
    """The explicit (D, columns) matrix of a projection, from its random parts."""
    if isinstance(P, book.Dense):
        return P.P
    n = len(P.G)
    H = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float64)
    permutation = torch.zeros(n, n)
    permutation[torch.arange(n), P.Pi] = 1
    B = torch.zeros(n, len(P.B))
    B[torch.arange(len(P.B)), torch.arange(len(P.B))] = P.B
    return (H @ torch.diag(P.G) @ permutation @ H @ B)[:D]


def unpack(theta):
    parts = theta.split([HIDDEN * IN, HIDDEN, OUT * HIDDEN, OUT])
    return parts[0].view(HIDDEN, IN), parts[1], parts[2].view(OUT, HIDDEN), parts[3]


def forward(theta, x):
    W, b, V, c = unpack(theta)
    return torch.tanh(x @ W.T + b) @ V.T + c


def gradient(theta, x, y):
    """Of half the mean squared error over examples, by the chain rule."""
    W, b, V, c = unpack(theta)
    h = torch.tanh(x @ W.T + b)
    error = (h @ V.T + c - y) / len(x)
    back = (error @ V) * (1 - h * h)
    return torch.cat([(back.T @ x).flatten(), back.sum(0), (error.T @ h).flatten(), error.sum(0)])


def loss(model, batch, d):
    return (model(batch[0], d) - batch[1]).square().sum(1).mean() / 2


def slices():
    for projection in (book.Dense, book.Fastfood):
        yield book.Subspace(net(), projection, COLUMNS, torch.Generator().manual_seed(5))


def theta_of(model, z):
    return nn.utils.parameters_to_vector(model.net.parameters()) + matrix(model.P) @ z


def test_projections(agree):
    z = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(6))
    for model in slices():
        agree(model.P(z), matrix(model.P) @ z)
    g = torch.randn(2 ** math.ceil(math.log2(D)), generator=torch.Generator().manual_seed(5))
    agree(model.P.G, g / (math.sqrt(D) * g.square().sum().sqrt()))


def test_forward_and_gradient(agree):
    x, y = data()
    for model in slices():
        model.z.data = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(6))
        for d in (3, COLUMNS):
            inside = (torch.arange(COLUMNS) < d).double()
            theta = theta_of(model, model.z.detach() * inside)
            agree(model(x, d), forward(theta, x))
            wanted = inside * (matrix(model.P).T @ gradient(theta, x, y))
            agree(torch.autograd.grad(loss(model, (x, y), d), model.z)[0], wanted)


def test_five_steps_alone_and_in_a_batch(agree):
    """Descent on z is descent on theta with every step projected by P P^T."""
    x, y = data()
    for model in slices():
        kind, by_hand = type(model.P), {}
        for d in (3, COLUMNS):
            P, theta = matrix(model.P)[:, :d], theta_of(model, torch.zeros(COLUMNS))
            for _ in range(5):
                theta = theta - RATE * P @ (P.T @ gradient(theta, x, y))
            by_hand[d] = theta
        again = lambda kind=kind: book.Subspace(net(), kind, COLUMNS, torch.Generator().manual_seed(5))  # noqa: E731
        run = bt.fit(
            again, loss, lambda generator: (x, y), steps=5, seeds=[0, 1], lr=RATE, d=[3, COLUMNS], optimiser="sgd"
        )
        assert run.path == "stacked"
        for trained, d in zip(run.models, run.replicas["d"]):
            agree(theta_of(trained, trained.z.detach() * (torch.arange(COLUMNS) < d)), by_hand[d])


def test_dimension_by_a_search_on_the_curve(agree):
    import numpy as np

    dims, level = np.array([10, 30, 70, 200]), 0.6
    curves = np.array([[0.1, 0.3, 0.7], [0.5, 0.4, 0.8], [0.7, 0.5, 0.75], [0.8, 0.55, 0.9]])
    fine = np.linspace(np.log2(10), np.log2(200), 200_001)
    first = []
    for curve in curves.T:
        height = np.interp(fine, np.log2(dims), curve)
        first.append(fine[(height >= level).argmax()] if (height >= level).any() else fine[-1])
    agree(book.intrinsic_dimension(dims, curves, level), torch.tensor(np.array(first)), rtol=1e-4)
