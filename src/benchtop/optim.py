"""Optimisers, learning-rate schedules and clipping, as pure functions of tensors.

An optimiser is a pair: ``init(param) -> state`` and ``update(param, grad, state, hyper, step) -> (param, state)``. They
see one parameter of one model; `fit` moves all replicas with them. ``state`` is any nest of tensors, ``hyper`` holds
the numbers given to `fit` as scalar tensors (``lr`` already scheduled), ``step`` is a scalar tensor, 1 at first.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

Hyper = dict[str, Tensor]


class Optimiser(NamedTuple):
    """``elementwise``: each number moves on its own, so that one update of one long vector moves all parameters."""

    init: Callable[[Tensor], Any]
    update: Callable[[Tensor, Tensor, Any, Hyper, Tensor], tuple[Tensor, Any]]
    elementwise: bool = False
    takes: tuple[str, ...] | None = None  # the hyper-parameters it reads; None: not known, any name is accepted


def _adamw_init(param: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(param), torch.zeros_like(param)


def _adamw_update(param: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], hyper: Hyper, step: Tensor):
    """``state`` holds the running means of the gradient and of its square. Loshchilov and Hutter (2019), algorithm 2."""
    lr, beta1, beta2 = hyper["lr"], hyper.get("beta1", 0.9), hyper.get("beta2", 0.999)
    m = torch.lerp(state[0], grad, 1 - beta1)
    v = torch.lerp(state[1], grad * grad, 1 - beta2)
    scale = (v / (1 - beta2**step)).sqrt_().add_(hyper.get("eps", 1e-8))
    if "weight_decay" in hyper:
        param = param * (1 - lr * hyper["weight_decay"])
    return param - (m / scale).mul_(lr / (1 - beta1**step)), (m, v)


def _sgd_update(param: Tensor, grad: Tensor, velocity: Tensor, hyper: Hyper, step: Tensor):
    """Heavy-ball momentum, or Nesterov's if ``nesterov`` is 1. Sutskever et al. (2013), equations 1 to 4."""
    momentum, nesterov = hyper.get("momentum", 0.0), hyper.get("nesterov", 0.0)
    velocity = momentum * velocity + grad
    move = velocity + nesterov * (grad + (momentum - 1) * velocity) if "nesterov" in hyper else velocity
    if "weight_decay" in hyper:
        param = param * (1 - hyper["lr"] * hyper["weight_decay"])
    return param - hyper["lr"] * move, velocity


COMMON = ("lr", "weight_decay", "clip")
adamw = Optimiser(_adamw_init, _adamw_update, True, (*COMMON, "beta1", "beta2", "eps"))
sgd = Optimiser(torch.zeros_like, _sgd_update, True, (*COMMON, "momentum", "nesterov"))
OPTIMISERS = {"adamw": adamw, "sgd": sgd}


# ---- schedules: the factor on the learning rate at step 1..steps ----


def constant(step: int, steps: int) -> float:
    return 1.0


def cosine(step: int, steps: int) -> float:
    """From 1 at the first step towards 0 after the last. Loshchilov and Hutter (2017), equation 5."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def warmup(step: int, steps: int, share: float = 0.1) -> float:
    """Linear from 0 to 1 over the first ``share`` of the steps, then 1."""
    return min(1.0, step / max(1.0, share * steps))


def warmup_cosine(step: int, steps: int, share: float = 0.1) -> float:
    """`warmup`, then `cosine` over the steps that remain."""
    rise = int(share * steps)
    return warmup(step, steps, share) if step <= rise else cosine(step - rise, steps - rise)


SCHEDULES = {"constant": constant, "cosine": cosine, "warmup": warmup, "warmup-cosine": warmup_cosine}


# ---- moving all replicas ----


BLOCK = 2**16  # numbers moved at a time on a CPU: an update's dozen passes then run in cache


def mover(optimiser: Optimiser, flat: Tensor, shapes: list[torch.Size], hyper: Hyper) -> "Mover | FusedAdamW":
    """What moves the rows of ``flat`` (replicas, numbers): called with (flat, grad, step, factor), in place."""
    if optimiser is adamw and flat.device.type == "cpu":
        return FusedAdamW(flat, hyper)
    return Mover(optimiser, flat, shapes, hyper)


def clipped(grad: Tensor, hyper: Hyper) -> Tensor:
    """``clip`` bounds the norm of each replica's whole gradient, a row of grad. Source: Pascanu et al. (2013)."""
    if "clip" not in hyper:
        return grad
    return grad * (hyper["clip"] / (grad.norm(dim=1) + 1e-6)).clamp(max=1.0)[:, None]


class FusedAdamW:
    """`adamw` on a CPU: one pass over memory by torch's own kernel, where the formulas as they stand take a dozen.

    Rows whose hyper-parameters agree are one group of ``torch.optim.AdamW`` and move in one call.
    """

    def __init__(self, flat: Tensor, hyper: Hyper):
        """``hyper``: name -> tensor (replicas,)."""
        self.hyper, self.rows = hyper, [torch.nn.Parameter(row) for row in flat]  # they share the numbers of flat
        groups: dict[tuple, list] = {}
        for row, *own in zip(self.rows, *(value.tolist() for value in hyper.values())):
            groups.setdefault(tuple(own), []).append(row)
        self.lrs, options = [], []
        for own, rows in groups.items():
            own = dict(zip(hyper, own))
            self.lrs.append(own["lr"])
            options.append({"params": rows, "betas": (own.get("beta1", 0.9), own.get("beta2", 0.999)),
                            "eps": own.get("eps", 1e-8), "weight_decay": own.get("weight_decay", 0.0)})  # fmt: skip
        self.optimiser = torch.optim.AdamW(options, fused=True)

    def __call__(self, flat: Tensor, grad: Tensor, step: Tensor, factor: Tensor) -> None:
        """One step; ``flat`` moves because the rows are its rows."""
        for row, own in zip(self.rows, clipped(grad, self.hyper)):
            row.grad = own
        for group, lr in zip(self.optimiser.param_groups, self.lrs):
            group["lr"] = lr * float(factor)
        self.optimiser.step()


class Mover:
    """Moves the parameters of all replicas in place: a matrix with one row per replica, one column per number."""

    def __init__(self, optimiser: Optimiser, flat: Tensor, shapes: list[torch.Size], hyper: Hyper):
        """``hyper``: name -> tensor (replicas,). One replica alone is a matrix of one row and needs no vmap."""
        self.optimiser, self.shapes, self.hyper = optimiser, shapes, hyper
        if optimiser.elementwise:
            self.blocks = _blocks(flat)
            self.state = [optimiser.init(flat[block]) for block in self.blocks]
        else:
            self.state = [self._each(optimiser.init)(part) for part in self._parts(flat)]

    def __call__(self, flat: Tensor, grad: Tensor, step: Tensor, factor: Tensor) -> None:
        """One step."""
        hyper, grad = self.hyper | {"lr": self.hyper["lr"] * factor}, clipped(grad, self.hyper)
        if self.optimiser.elementwise:
            for i, block in enumerate(self.blocks):
                own = {name: value[block[0], None] for name, value in hyper.items()}
                moved, self.state[i] = self.optimiser.update(flat[block], grad[block], self.state[i], own, step)
                flat[block] = moved
            return
        moved, state = [], []
        for param, g, old in zip(self._parts(flat), self._parts(grad), self.state):
            param, new = self._each(self.optimiser.update, step)(param, g, old, hyper)
            moved.append(param.flatten(1))
            state.append(new)
        self.state = state
        flat.copy_(torch.cat(moved, 1))

    def _parts(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes], 1)
        return [piece.unflatten(1, shape) if shape else piece[:, 0] for piece, shape in zip(pieces, self.shapes)]

    def _each(self, function: Callable, *shared: Any) -> Callable:
        """``function`` for every replica; a single one is called plainly, so that it may branch on numbers."""
        if len(self.hyper["lr"]) > 1:
            return vmap(lambda *own: function(*own, *shared))

        def alone(*own):
            return tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], own), *shared))

        return alone


def _blocks(flat: Tensor) -> list[tuple[slice, slice]]:
    """Slices of rows and columns of about `BLOCK` numbers each; one block on a GPU."""
    rows, columns = flat.shape
    if flat.device.type != "cpu":
        return [(slice(None), slice(None))]
    high, wide = max(1, BLOCK // columns), min(columns, BLOCK)
    return [(slice(i, i + high), slice(j, j + wide)) for i in range(0, rows, high) for j in range(0, columns, wide)]
