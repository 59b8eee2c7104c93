"""Deep linear networks against a naive re-derivation: NumPy loops over examples and layers, SciPy for the gradient flow."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

import benchtop as bt

PEER = "naive re-derivation: NumPy gradient descent example by example, SciPy's integrators for the flow and the time"
WHAT = "forward, gradients, five steps of gradient descent, the course of decoupled modes, learning times"

saxe = bt.technique("saxe-deep-linear")


@pytest.fixture
def task():
    """(weights, x, y): three layers of weights, eleven examples."""
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=g) / 2 for shape in ((5, 4), (6, 5), (3, 6))]
    return weights, torch.randn(11, 4, generator=g), torch.randn(11, 3, generator=g)


def forward(weights, x):
    """The layers' activities for one example, input first."""
    activities = [x]
    for W in weights:
        activities.append(np.array([sum(row[i] * activities[-1][i] for i in range(len(row))) for row in W]))
    return activities


def gradients(weights, xs, ys):
    """Back-propagation of half the squared error, summed over examples."""
    total = [np.zeros_like(W) for W in weights]
    for x, y in zip(xs, ys):
        activities = forward(weights, x)
        delta = activities[-1] - y
        for l in reversed(range(len(weights))):
            total[l] += np.outer(delta, activities[l])
            delta = weights[l].T @ delta
    return total


def test_forward_gradients_and_five_steps(task, agree):
    weights, x, y = task
    net = saxe.DeepLinear([W.clone() for W in weights], y.T @ x, x.T @ x)
    naive = [W.numpy().copy() for W in weights]
    agree(net(x), np.stack([forward(naive, row)[-1] for row in x.numpy()]))
    for _ in range(5):
        ours = torch.autograd.grad(saxe.squared_error(net), list(net.W))
        theirs = gradients(naive, x.numpy(), y.numpy())
        for W, V, a, b in zip(net.W, naive, ours, theirs):
            agree(a, b)
            W.data -= 0.01 * a
            V -= 0.01 * b
    for W, V in zip(net.W, naive):
        agree(W, V)


@pytest.mark.parametrize("layers", [2, 3, 4, 6])
def test_gradient_flow_of_the_whole_matrices_follows_the_closed_form(layers, agree):
    """The flow of every weight, which knows nothing of modes, against u(t)."""
    g = torch.Generator().manual_seed(5)
    sigma31 = torch.randn(4, 3, generator=g)
    u0 = torch.tensor([0.02, 0.05, 0.1])
    start = [W.numpy() for W in saxe.decoupled(sigma31, u0, layers, 5, g)]
    shapes, times = [W.shape for W in start], np.linspace(0, 4, 9)

    def unpack(flat):
        cuts = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
        return [piece.reshape(shape) for piece, shape in zip(np.split(flat, cuts), shapes)]

    def chain(weights, size):
        total = np.eye(size)
        for W in weights:
            total = W @ total
        return total

    def flow(_, flat):
        W = unpack(flat)
        gap = sigma31.numpy() - chain(W, 3)
        up = [chain(W[l + 1 :], len(W[l])) for l in range(len(W))]
        return np.concatenate([(up[l].T @ gap @ chain(W[:l], 3).T).ravel() for l in range(len(W))])

    flat = np.concatenate([W.ravel() for W in start])
    solution = solve_ivp(flow, (0, 4), flat, t_eval=times, rtol=1e-10, atol=1e-12).y.T
    U, s, Vh = np.linalg.svd(sigma31.numpy(), full_matrices=False)
    theirs = np.stack([np.diag(U.T @ chain(unpack(row), 3) @ Vh.T) for row in solution])
    agree(saxe.strength_at(times[:, None], u0.numpy(), s, layers), theirs)


@pytest.mark.parametrize("layers", [2, 3, 4, 9, 101])
def test_learning_time_is_the_integral_of_the_equation(layers, agree):
    n, s, tau = layers - 1, 0.8, 7.0
    theirs, _ = quad(lambda u: tau / (n * u ** (2 - 2 / n) * (s - u)), 0.1, 0.75, epsrel=1e-12)
    agree(saxe.learning_time(0.1, 0.75, s, layers, tau), theirs)


def test_products_of_orthogonal_layers_are_isometries_and_gaussian_ones_are_not():
    g = torch.Generator().manual_seed(0)
    spectrum = {}
    for start in (saxe.orthogonal, saxe.scaled_gaussian):
        total = np.eye(20)
        for _ in range(16):
            total = start(20, 20, g).numpy() @ total
        spectrum[start.__name__] = np.linalg.svd(total, compute_uv=False)
    np.testing.assert_allclose(spectrum["orthogonal"], 1.0)
    assert (spectrum["scaled_gaussian"] < 0.1).mean() > 0.5
