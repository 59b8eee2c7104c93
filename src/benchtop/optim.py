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
from torch.optim.adamw import adamw as fused_adamw  # the class would import torch's compiler, over a second
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


def mover(optimiser: Optimiser, parts: list[Tensor], hyper: Hyper) -> "Mover | FusedAdamW":
    """What moves all replicas: its ``parts`` start as a copy of those given, and it is called with (grads, step, factor).

    ``parts`` and ``grads``: one tensor (replicas, *shape) for each parameter. ``hyper``: name -> tensor (replicas,).
    """
    if optimiser is adamw and parts[0].device.type == "cpu":
        return FusedAdamW(parts, hyper)
    return Mover(optimiser, parts, hyper)


def clipped(grads: list[Tensor], hyper: Hyper) -> list[Tensor]:
    """``clip`` bounds the norm of each replica's whole gradient. Source: Pascanu et al. (2013)."""
    if "clip" not in hyper:
        return grads
    norm = torch.stack([_joined([grad]).norm(dim=1) for grad in grads]).norm(dim=0)
    factor = (hyper["clip"] / (norm + 1e-6)).clamp(max=1.0)
    return [grad * factor.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]


def laid_out_like(part: Tensor, grad: Tensor) -> Tensor:
    """A copy of ``part`` in the memory layout of ``grad``, if that keeps each replica in one piece.

    A weight's gradient comes out of backward transposed: to copy it at each step would cost as much as to move by it.
    """
    whole = grad.stride(0) == grad[0].numel() and torch.empty_like(grad[0]).stride() == grad[0].stride()
    return torch.empty_like(grad if whole else part).copy_(part)


def _rows(tensor: Tensor) -> Tensor:
    """(replicas, numbers) in the order of memory, for a tensor whose replicas lie one after the other."""
    return tensor.as_strided((len(tensor), tensor[0].numel()), (tensor[0].numel(), 1))


class FusedAdamW:
    """`adamw` on a CPU: one pass over memory by torch's own kernel, where the formulas as they stand take a dozen.

    Replicas whose hyper-parameters agree are one group; if all agree, each part moves as a whole.
    """

    def __init__(self, parts: list[Tensor], hyper: Hyper):
        self.hyper, self.parts = hyper, [torch.empty_like(part).copy_(part) for part in parts]
        rows: dict[tuple, list[int]] = {}
        for i, own in enumerate(zip(*(value.tolist() for value in hyper.values()))):
            rows.setdefault(own, []).append(i)
        self.rows = list(rows.values()) if len(rows) > 1 else [[0]]
        self.groups = []  # hyper-parameters, and what moves by them: numbers of the parts, two running means, steps taken
        for own, params in zip(rows, self._pieces(self.parts)):
            own, zeros = dict(zip(hyper, own)), torch.zeros_like
            options = {"lr": own["lr"], "beta1": own.get("beta1", 0.9), "beta2": own.get("beta2", 0.999),
                       "eps": own.get("eps", 1e-8), "weight_decay": own.get("weight_decay", 0.0)}  # fmt: skip
            state = [*map(zeros, params)], [*map(zeros, params)], [], [torch.zeros(()) for _ in params]
            self.groups.append((options, params, state))

    def _pieces(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """For each group its share of every tensor, without a copy."""
        if len(self.rows) == 1:
            return [[_rows(tensor).flatten() for tensor in tensors]]
        split = [_rows(tensor).unbind() for tensor in tensors]
        return [[each[i] for each in split for i in rows] for rows in self.rows]

    def __call__(self, grads: list[Tensor], step: Tensor, factor: Tensor) -> None:
        """One step."""
        grads = [
            grad if grad.stride() == part.stride() else torch.empty_like(part).copy_(grad)
            for part, grad in zip(self.parts, clipped(grads, self.hyper))
        ]
        for (options, params, state), own in zip(self.groups, self._pieces(grads)):
            now = options | {"lr": options["lr"] * float(factor)}
            fused_adamw(params, own, *state, **now, fused=True, amsgrad=False, maximize=False)


class Mover:
    """Any optimiser, as its formulas stand; an elementwise one moves all numbers of a replica as one vector."""

    def __init__(self, optimiser: Optimiser, parts: list[Tensor], hyper: Hyper):
        self.optimiser, self.hyper = optimiser, hyper
        if optimiser.elementwise:  # what is moved: one matrix of which the parts are views, or the parts
            self.moved = [_joined(parts)]
            pieces = self.moved[0].split([part[0].numel() for part in parts], 1)
            self.parts = [piece.view(part.shape) for piece, part in zip(pieces, parts)]
        else:
            self.moved = self.parts = [part.clone() for part in parts]
        self.state = [self._each(optimiser.init)(part) for part in self.moved]

    def __call__(self, grads: list[Tensor], step: Tensor, factor: Tensor) -> None:
        """One step."""
        hyper, grads = self.hyper | {"lr": self.hyper["lr"] * factor}, clipped(grads, self.hyper)
        update = self._each(self.optimiser.update, step)
        for i, grad in enumerate([_joined(grads)] if self.optimiser.elementwise else grads):
            moved, self.state[i] = update(self.moved[i], grad, self.state[i], hyper)
            self.moved[i].copy_(moved)

    def _each(self, function: Callable, *shared: Any) -> Callable:
        """``function`` for every replica; a single one is called plainly, so that it may branch on numbers."""
        if len(self.hyper["lr"]) > 1:
            return vmap(lambda *own: function(*own, *shared))

        def alone(*own):
            return tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], own), *shared))

        return alone


def _joined(parts: list[Tensor]) -> Tensor:
    """(replicas, numbers); a parameter may be a single number, without an axis of its own."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)
