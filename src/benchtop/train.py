"""All seeds and the whole tuning grid in one training run.

A *replica* is one (seed, hyper-parameters) pair. Replicas share their code and differ in numbers only, so their
parameters are stacked and one vectorised step (``torch.func``) moves them all. ``vectorize=False`` trains them one
after the other with the same batches and the same arithmetic; the two agree to rounding (``tests/test_train.py``).
"""

import inspect
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from benchtop.report import emit

SMALL = 4_000_000  # parameters of all replicas together below which a step has too little work for a second thread


class DivergedError(RuntimeError):
    """A loss became infinite or not a number."""


@dataclass
class Fit:
    """What `fit` returns; ``history, models = fit(...)`` unpacks the two that are used most.

    ``history``: tidy frame (arm, seed, one column per hyper-parameter, step, metric, value). ``models``: trained
    modules in the order of ``replicas`` (seed and hyper-parameters, one row each). ``grid``: the values tried.
    """

    arm: str
    history: pd.DataFrame
    models: list[nn.Module]
    replicas: pd.DataFrame
    grid: dict[str, list[float]]
    steps: int
    seconds: float
    peak_bytes: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.history, self.models))


class _Loss(nn.Module):
    """A module whose forward is the loss of another one: functional_call then reaches whatever the loss uses."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args, **kwargs):
        return self.loss(self.model, *args, **kwargs)


def fit(
    make_model: Callable[..., nn.Module],
    loss: Callable[..., Tensor],
    sample: Callable[[torch.Generator], Any],
    *,
    steps: int,
    seeds: Sequence[int],
    arm: str = "model",
    evaluate: Callable[[nn.Module], dict[str, Tensor]] | None = None,
    eval_every: int = 50,
    optimiser: str = "adamw",
    vectorize: bool = True,
    device: torch.device | str = "cpu",
    **hyper: float | Sequence[float],
) -> Fit:
    """Train one model for every seed and every point of the grid.

    ``make_model()`` is called right after ``torch.manual_seed(seed)``; it gets ``seed`` if it names it.
    ``loss(model, batch)`` returns a scalar; it also gets the hyper-parameters that it names. ``sample(generator)``
    returns a batch: the generator depends on the seed alone, so a seed sees the same batches in every arm and at every
    point of the grid. ``evaluate(model)`` returns scalars, every ``eval_every`` steps and at both ends.

    ``hyper``: numbers, or sequences that span the grid. The optimisers read ``lr`` (needed), ``weight_decay``
    (decoupled, default 0) and, by name, ``beta1``, ``beta2``, ``eps`` ("adamw") or ``momentum`` ("sgd"). Parameters with
    ``requires_grad=False`` stay as they are. Sources: Loshchilov and Hutter (2019) for AdamW.

    Raises ValueError for bad arguments and DivergedError, naming arm, seed, hyper-parameters and step, for a loss that
    is not finite. A replica of a grid of several points may diverge: its history then holds NaN and `best` passes over it.
    """
    if optimiser not in OPTIMISERS:
        raise ValueError(f"unknown optimiser {optimiser!r}: expected one of {', '.join(OPTIMISERS)}")
    if "lr" not in hyper:
        raise ValueError("fit got no learning rate: pass lr=1e-3, or lr=[3e-4, 1e-3, 3e-3] to tune it")
    start = time.perf_counter()
    grid = {name: list(v) if isinstance(v, Sequence) else [v] for name, v in hyper.items()}
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    replicas = [{"seed": int(seed)} | point for seed in seeds for point in points]
    models = [_make(make_model, replica["seed"]).to(device) for replica in replicas]
    names = set(inspect.signature(loss).parameters) & set(grid)
    train = _train_stacked if vectorize else _train_one_by_one
    rows = []

    def log(step: int, metrics: dict[str, list[float]]) -> None:
        for metric, values in metrics.items():
            rows.extend(
                {"arm": arm} | r | {"step": step, "metric": metric, "value": v} for r, v in zip(replicas, values)
            )

    def stop(step: int, replica: dict[str, float]) -> None:
        if len(points) == 1:
            setting = ", ".join(f"{k}={v:g}" for k, v in replica.items())
            raise DivergedError(
                f"arm {arm!r} diverged at step {step} ({setting}): lower lr, or look at the loss of that seed"
            )

    # Measured: on a busy machine two threads made small operations ten times slower than one.
    threads, numbers = torch.get_num_threads(), sum(p.numel() for model in models for p in model.parameters())
    if numbers < SMALL:
        torch.set_num_threads(1)
    try:
        train(
            models, loss, sample, steps, replicas, names, OPTIMISERS[optimiser], evaluate, eval_every, device, log, stop
        )
    finally:
        torch.set_num_threads(threads)
    result = Fit(
        arm, pd.DataFrame(rows), models, pd.DataFrame(replicas), grid, steps, time.perf_counter() - start, _peak(device)
    )
    emit("fit", arm=arm, grid=grid, seeds=list(seeds), steps=steps, seconds=result.seconds,
         peak_bytes=result.peak_bytes, path="stacked" if vectorize else "loop")  # fmt: skip
    return result


def _make(make_model: Callable[..., nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make_model(seed=seed) if "seed" in inspect.signature(make_model).parameters else make_model()


def _peak(device: torch.device | str) -> int:
    """Peak memory in bytes: of the device under CUDA, else of this process since it began."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _generators(seeds: Sequence[int], device: torch.device | str) -> dict[int, torch.Generator]:
    return {seed: torch.Generator(device=device).manual_seed(seed) for seed in seeds}


def _due(step: int, steps: int, every: int) -> bool:
    return step % every == 0 or step == steps


# ---- optimisers: pure functions of one tensor, with numbers or stacked tensors as hyper-parameters ----


def adamw(param: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int, h: dict[str, Any]):
    """One AdamW update; ``state`` holds the running means of the gradient and of its square."""
    beta1, beta2, eps = h.get("beta1", 0.9), h.get("beta2", 0.999), h.get("eps", 1e-8)
    m = beta1 * state[0] + (1 - beta1) * grad
    v = beta2 * state[1] + (1 - beta2) * grad * grad
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    param = param * (1 - h["lr"] * h.get("weight_decay", 0.0))
    return param - h["lr"] * m_hat / (v_hat.sqrt() + eps), (m, v)


def sgd(param: Tensor, grad: Tensor, state: tuple[Tensor, Tensor], step: int, h: dict[str, Any]):
    """One step of gradient descent with heavy-ball momentum and decoupled weight decay."""
    velocity = h.get("momentum", 0.0) * state[0] + grad
    return param * (1 - h["lr"] * h.get("weight_decay", 0.0)) - h["lr"] * velocity, (velocity, state[1])


OPTIMISERS: dict[str, Callable] = {"adamw": adamw, "sgd": sgd}


# ---- the two ways to train ----


def _train_stacked(models, loss, sample, steps, replicas, names, update, evaluate, every, device, log, stop) -> None:
    wrapped = [_Loss(model, loss) for model in models]
    frozen = {name for name, p in wrapped[0].named_parameters() if not p.requires_grad}
    stacked, buffers = stack_module_state(wrapped)
    fixed = {name: stacked.pop(name).detach() for name in frozen} | buffers
    params = {name: p.detach() for name, p in stacked.items()}
    skeleton = wrapped[0].to(device)
    hyper = {
        name: torch.tensor([float(r[name]) for r in replicas], device=device) for name in replicas[0] if name != "seed"
    }
    passed = {name: hyper[name] for name in names}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    generators = _generators(dict.fromkeys(r["seed"] for r in replicas), device)
    repeat = len(replicas) // len(generators)

    def objective(trained, fixed, passed, batch):
        return functional_call(skeleton, (trained, fixed), (batch,), passed)

    step_all = vmap(grad_and_value(objective))

    def metrics(trained, fixed):
        return functional_call(_Loss(skeleton.model, evaluate), (trained, fixed), ())

    def measure(step: int) -> None:
        if evaluate is not None:
            skeleton.eval()
            with torch.no_grad():
                measured = vmap(metrics)(params, fixed)
            skeleton.train()
            log(step, {name: value.tolist() for name, value in measured.items()})

    dead: set[int] = set()
    measure(0)
    for step in range(1, steps + 1):
        batches = [sample(generator) for generator in generators.values()]
        batch = _stack(batches, repeat)
        grads, losses = step_all(params, fixed, passed, batch)
        finite = losses.isfinite()
        if not finite.all():
            for i in (~finite).nonzero().flatten().tolist():
                if i not in dead:
                    dead.add(i)
                    stop(step, replicas[i])
        for name, p in params.items():
            h = {k: v.view(-1, *[1] * (p.dim() - 1)) for k, v in hyper.items()}
            params[name], state[name] = update(p, grads[name], state[name], step, h)
        if _due(step, steps, every):
            measure(step)
    _write_back(models, params)


def _train_one_by_one(models, loss, sample, steps, replicas, names, update, evaluate, every, device, log, stop) -> None:
    measured: dict[int, dict[str, list[float]]] = {}
    for model, replica in zip(models, replicas):
        generator = _generators([replica["seed"]], device)[replica["seed"]]
        h = {name: float(value) for name, value in replica.items() if name != "seed"}
        params = [p for p in model.parameters() if p.requires_grad]
        state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
        for step in range(steps + 1):
            if step:
                value = loss(model, sample(generator), **{name: h[name] for name in names})
                if not math.isfinite(value.item()):
                    stop(step, replica)
                grads = torch.autograd.grad(value, params, allow_unused=True)
                with torch.no_grad():
                    for k, (p, g) in enumerate(zip(params, grads)):
                        new, state[k] = update(p, torch.zeros_like(p) if g is None else g, state[k], step, h)
                        p.copy_(new)
            if evaluate is not None and _due(step, steps, every):
                model.eval()
                with torch.no_grad():
                    for metric, value in evaluate(model).items():
                        measured.setdefault(step, {}).setdefault(metric, []).append(float(value))
                model.train()
    for step, metrics in sorted(measured.items()):
        log(step, metrics)


def _stack(batches: list[Any], repeat: int) -> Any:
    """Batches of the seeds as one batch of the replicas, structure kept (tensor, tuple, list or dict)."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.stack(batches).repeat_interleave(repeat, dim=0) if repeat > 1 else torch.stack(batches)
    if isinstance(first, dict):
        return {key: _stack([b[key] for b in batches], repeat) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_stack(list(parts), repeat) for parts in zip(*batches))
    raise ValueError(
        f"sample returned a {type(first).__name__}: expected a tensor, or a tuple, list or dict of tensors"
    )


def _write_back(models: list[nn.Module], params: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for i, model in enumerate(models):
            own = dict(model.named_parameters())
            for name, stacked in params.items():
                own[name.removeprefix("model.")].copy_(stacked[i])


# ---- choosing and comparing ----


class Choice(dict):
    """arm -> tuned hyper-parameters, to be passed on: ``fit(..., **choice["LoRA"])``; `record` says how they were found."""

    def __init__(self, values: dict[str, dict[str, float]], record: dict[str, Any]):
        super().__init__(values)
        self._record = record

    def record(self) -> dict[str, Any]:
        """Per arm: grid, values, edge (names at the edge of their grid), seeds, steps, metric, points, budget, diverged."""
        return self._record


def best(runs: Sequence[Fit] | Fit, metric: str, *, lower_is_better: bool = True) -> Choice:
    """The point of the grid with the best mean over seeds at the last step, for each arm.

    ``metric`` must come from validation data. A point at which any seed diverged is passed over. Prints one line per arm and
    says when a value sits at the edge of its grid: then the grid is too small. Raises ValueError if every point diverged.
    """
    values, record = {}, {}
    for run in [runs] if isinstance(runs, Fit) else runs:
        last = _last(run, metric)
        score = last.groupby(list(run.grid), sort=False)["value"].agg(lambda v: v.mean(skipna=False))
        alive = score[score.map(math.isfinite)]
        if alive.empty:
            raise ValueError(
                f"arm {run.arm!r}: {metric} is not finite anywhere on the grid; widen it towards smaller lr"
            )
        point = alive.idxmin() if lower_is_better else alive.idxmax()
        chosen = dict(zip(run.grid, point if isinstance(point, tuple) else (point,)))
        edge = [n for n, tried in run.grid.items() if len(tried) > 1 and chosen[n] in (min(tried), max(tried))]
        seeds = run.replicas["seed"].unique().tolist()
        values[run.arm] = {name: float(value) for name, value in chosen.items()}
        record[run.arm] = {
            "grid": run.grid, "values": values[run.arm], "edge": edge, "seeds": seeds, "steps": run.steps, "metric": metric,
            "points": len(score), "budget": len(score) * len(seeds) * run.steps, "diverged": len(score) - len(alive),
        }  # fmt: skip
        tuned = (
            ", ".join(f"{n} = {chosen[n]:g}" for n, tried in run.grid.items() if len(tried) > 1) or "nothing to tune"
        )
        note = f"; AT THE EDGE of its grid: {', '.join(edge)}, widen it" if edge else ""
        print(f"{run.arm}: {tuned}, mean {metric} {alive[point]:.4g} over {len(seeds)} tuning seeds{note}")
    emit("tuning", arms=record)
    return Choice(values, record)


def final(runs: Sequence[Fit], metric: str) -> pd.DataFrame:
    """The last value of a metric, one row per seed and one column per arm. Each run has one grid point."""
    columns = {}
    for run in runs:
        last = _last(run, metric)
        if last["seed"].duplicated().any():
            raise ValueError(
                f"arm {run.arm!r} still has a grid: choose with best() and run the verdict seeds at one point"
            )
        columns[run.arm] = last.set_index("seed")["value"]
    return pd.DataFrame(columns)


def _last(run: Fit, metric: str) -> pd.DataFrame:
    known = run.history["metric"].unique() if len(run.history) else []
    if metric not in known:
        raise ValueError(
            f"arm {run.arm!r} has no metric {metric!r}: evaluate returned {', '.join(map(repr, known)) or 'nothing'}"
        )
    rows = run.history[run.history["metric"] == metric]
    return rows[rows["step"] == rows["step"].max()]


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v for q (..., T, d), k (..., S, d), v (..., S, e); ``scale`` defaults to 1/sqrt(d).

    ``causal`` hides keys later than the query; ``mask`` (broadcast to (..., T, S)) is boolean, True where a query may
    look, or is added to the scores. Two matrix products: ``scaled_dot_product_attention`` has no batching rule on CPU
    and would loop over the replicas. Source: Vaswani et al. (2017), equation 1.
    """
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1) @ v


def batches(part: Sequence[Tensor], size: int, length: int | None = None) -> Callable[[torch.Generator], Any]:
    """A ``sample`` for `fit`: ``size`` rows of ``part`` at random, with replacement, as the same kind of tuple.

    With ``length``, for text and series: ``size`` windows of so many consecutive rows, each tensor (size, length, ...).
    """
    n, device = len(part[0]), part[0].device
    if length is not None and length > n:
        raise ValueError(f"batches got length={length} for {n} rows: a window cannot be longer than the data")
    make = part._make if hasattr(part, "_make") else tuple

    def sample(generator: torch.Generator) -> Any:
        rows = torch.randint(n - (length or 1) + 1, (size,), generator=generator, device=device)
        if length is not None:
            rows = rows[:, None] + torch.arange(length, device=device)
        return make(tensor[rows] for tensor in part)

    return sample
