"""SOAP and Shampoo against their definition on the flattened weight: one long vector, one Kronecker basis, in NumPy."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

import benchtop as bt

PEER = "naive re-derivation: Kronecker products in NumPy, Gram-Schmidt, the update order of nikhilvyas/SOAP"
WHAT = "twelve steps of SOAP (two-sided, one-sided, vector) and of Shampoo; all replicas at once against one by one"

soap = bt.technique("soap")
HYPER = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9}
STEPS, EPS, SHARE = 12, 1e-8, 1e-5


def gram_schmidt(A: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span the same nested spaces as those of A."""
    out = []
    for column in A.T:
        for _ in range(2):  # once more for the rounding
            column = column - sum((q @ column) * q for q in out)
        out.append(column / np.linalg.norm(column))
    return np.array(out).T


def eigenvectors(P: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(P)[1][:, ::-1]


def naive_soap(W, gradient, f, largest):
    """The momentum lives in the current basis and is carried over; the first gradient only makes the bases."""
    sides = [n <= largest for n in W.shape]
    grams, bases = [np.zeros((n, n)) for n in W.shape], [np.eye(n) for n in W.shape]
    m, V, lr, b1, b2 = np.zeros(W.size), np.zeros(W.shape), *HYPER.values()
    for t in range(STEPS):
        G = gradient(W)
        if t:
            K = np.kron(*bases)  # columns: the basis of row-major vec(W)
            g = K.T @ G.ravel()
            m, V = b1 * m + (1 - b1) * g, b2 * V + (1 - b2) * g.reshape(W.shape) ** 2
            step = (m / (1 - b1**t)) / (np.sqrt(V.ravel() / (1 - b2**t)) + EPS)
            W = W - lr * (K @ step).reshape(W.shape)
            m = K @ m
        grams = [b2 * P + (1 - b2) * g for P, g in zip(grams, (G @ G.T, G.T @ G))]
        for d, rotated in enumerate(sides):
            if rotated and t == 0:
                bases[d] = eigenvectors(grams[d])
            elif rotated and t % f == 0:
                rank = np.argsort([-q @ grams[d] @ q for q in bases[d].T])
                damped = grams[d] + SHARE * np.trace(grams[d]) * np.eye(len(grams[d]))
                V, bases[d] = np.take(V, rank, axis=d), gram_schmidt(damped @ bases[d][:, rank])
        m = np.kron(*bases).T @ m
    return W


def naive_shampoo(W, gradient, f):
    grams, roots = [np.zeros((n, n)) for n in W.shape], None
    m, v, lr, b1, b2 = 0.0, 0.0, *HYPER.values()
    for t in range(1, STEPS + 1):
        G = gradient(W)
        m, v = b1 * m + (1 - b1) * G, b2 * v + (1 - b2) * G**2
        grams = [b2 * P + (1 - b2) * g for P, g in zip(grams, (G @ G.T, G.T @ G))]
        if t % f == 1:
            damped = [P + SHARE * np.trace(P) * np.eye(len(P)) for P in grams]
            roots = np.kron(*[fractional_matrix_power(P, -0.5) for P in damped])
        adam = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + EPS)
        direction = roots @ m.ravel()
        W = W - lr * np.linalg.norm(adam) * (direction / np.linalg.norm(direction)).reshape(W.shape)
    return W


def ours(optimiser, W, gradient):
    W = torch.tensor(W)
    state = optimiser.init(W)
    for t in range(1, STEPS + 1):
        W, state = optimiser.update(W, torch.tensor(gradient(W.numpy())), state, HYPER, torch.tensor(float(t)))
    return W


@pytest.fixture(params=[(4, 4), (5, 4), (3, 4)], ids=str)
def task(request):
    """A start and a gradient that is not linear.

    The sides differ by one at most: in a larger null space of the first gradient, the axes are a matter of choice.
    """
    m, n = request.param
    rng = np.random.default_rng(m)
    W, A, B, C = rng.normal(size=(m, n)), rng.normal(size=(m, m)), rng.normal(size=(n, n)), rng.normal(size=(m, n))
    return W, lambda W: A.T @ np.tanh(A @ W @ B - C) @ B.T + 0.3 * np.cos(7 * W)


@pytest.mark.parametrize("f", [1, 4])
@pytest.mark.parametrize("largest", [3, 4, 9])
def test_soap(task, f, largest, agree):
    W, gradient = task
    agree(ours(soap.soap(f, largest), W, gradient), naive_soap(W, gradient, f, largest))


@pytest.mark.parametrize("f", [2, 5])
def test_shampoo(task, f, agree):
    W, gradient = task
    agree(ours(soap.shampoo(f), W, gradient), naive_shampoo(W, gradient, f))


@pytest.mark.parametrize("build", [soap.soap, soap.shampoo])
def test_a_vector_gets_adam(build, agree):
    w = torch.nn.Parameter(torch.linspace(-1, 2, 7))
    adam = torch.optim.Adam([w], lr=HYPER["lr"], betas=(HYPER["beta1"], HYPER["beta2"]))
    state, mine, late = build().init(w.detach()), w.detach().clone(), build is soap.soap
    for t in range(1, STEPS + 1):
        mine, state = build().update(mine, mine**3, state, HYPER, torch.tensor(float(t)))
        if t > late:  # SOAP's first gradient moves nothing
            w.grad = w.detach() ** 3
            adam.step()
    agree(mine, w)


@pytest.mark.parametrize("optimiser", [soap.soap(3), soap.shampoo(3)], ids=["soap", "shampoo"])
def test_all_replicas_at_once(optimiser, agree):
    def losses(vectorize):
        return bt.fit(
            lambda: torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)),
            lambda model, x: (model(x) - x.sin()).square().mean(),
            lambda generator: torch.randn(20, 6, generator=generator),
            steps=8, seeds=[0, 1], lr=[0.01, 0.03], beta1=0.8, beta2=0.9, optimiser=optimiser, vectorize=vectorize, eval_every=4,
            evaluate=lambda model: {"size": sum(p.square().sum() for p in model.parameters())},
        ).history["value"]  # fmt: skip

    agree(torch.tensor(losses(True)), torch.tensor(losses(False)))
