"""All seeds and the whole tuning grid in one training run.

A *replica* is one (seed, hyper-parameters) pair. Replicas share their code and differ in numbers only, so their
parameters are stacked, one row each, and one vectorised step (``torch.func``) moves them all. Where that does not pay, or
a model cannot be vectorised, replicas are trained one after the other with the same batches, the same noise and the same
arithmetic; the two agree to rounding (``tests/test_train.py``).
"""

import contextlib
import inspect
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchtop import report
from benchtop.optim import OPTIMISERS, SCHEDULES, Optimiser
from benchtop.replicas import LARGE, Job, choose, train_one_by_one, train_stacked, work

try:
    import resource
except ImportError:  # Windows does not have it
    resource = None

PRECISIONS = ("float32", "tf32", "bf16")


class DivergedError(RuntimeError):
    """A loss became infinite or not a number."""


@dataclass
class Fit:
    """What `fit` returns; ``history, models = fit(...)`` unpacks the two that are used most.

    ``history``: tidy frame (arm, seed, one column per hyper-parameter, step, metric, value). ``models``: trained
    modules in the order of ``replicas`` (seed and hyper-parameters, one row each). ``grid``: the values tried. ``path``:
    "stacked" or "loop", and ``why``. ``peak_bytes`` is 0 where the system does not tell.
    """

    arm: str
    history: pd.DataFrame
    models: list[nn.Module]
    replicas: pd.DataFrame
    grid: dict[str, list[float]]
    steps: int
    seconds: float
    peak_bytes: int
    path: str = ""
    why: str = ""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.history, self.models))


def fit(
    make_model: Callable[..., nn.Module],
    loss: Callable[..., Tensor],
    sample: Callable[[torch.Generator], Any],
    *,
    steps: int,
    seeds: Sequence[int],
    arm: str = "model",
    evaluate: Callable[..., dict[str, Tensor]] | None = None,
    eval_every: int = 50,
    optimiser: str | Optimiser | tuple[Callable, Callable] = "adamw",
    schedule: str | Callable[[int, int], float] = "constant",
    vectorize: bool | None = None,
    precision: str = "float32",
    threads: int | None = None,
    device: torch.device | str = "cpu",
    **hyper: float | Sequence[float],
) -> Fit:
    """Train one model for every seed and every point of the grid.

    ``make_model()`` is called right after ``torch.manual_seed(seed)``; it gets ``seed`` if it names it.
    ``loss(model, batch)`` returns a scalar; it also gets the hyper-parameters that it names. ``sample(generator)``
    returns a batch: the generator depends on the seed alone, so a seed sees the same batches in every arm and at every
    point of the grid. ``evaluate(model)`` returns scalars, every ``eval_every`` steps and at both ends; like the loss it
    also gets the hyper-parameters that it names.

    ``hyper``: numbers, or sequences that span the grid. The optimisers read ``lr`` (needed), ``weight_decay``
    (decoupled, default 0), ``clip`` (bound on the norm of a replica's gradient) and "adamw" ``beta1``, ``beta2``, ``eps``,
    "sgd" ``momentum`` and ``nesterov`` (1 or 0). ``optimiser`` may be a pair of functions, see `benchtop.optim`.
    ``schedule``: "constant", "cosine", "warmup", "warmup-cosine" (a tenth of the steps), or a function (step, steps) ->
    factor on lr. Parameters with ``requires_grad=False`` stay as they are.

    ``vectorize``: None chooses by a rule (see `LARGE`) and a trial, True stacks, False trains one by one: ``run.path``
    and ``run.why`` tell, and so does the record. Dropout and ``rand_like``/``randn_like`` in the loss draw from the
    replica's own generator (`ReplicaRules`); draw other noise in ``sample``. Running statistics are kept per replica.
    ``precision``: "float32", "tf32" (CUDA) or "bf16" (autocast of the loss; parameters stay float32).
    ``threads`` of the CPU: None leaves all to work above `LARGE` and one to smaller work, because two, on a machine that
    others use too, made small operations ten times slower; on a quiet machine two may pay.

    Raises ValueError for bad arguments and DivergedError, naming arm, seed, hyper-parameters and step, for a loss that
    is not finite. A replica of a grid of several points may diverge: its metrics are NaN from then on and `best` passes over it.
    """
    start = time.perf_counter()
    optimiser, schedule = _named(optimiser, OPTIMISERS, "optimiser"), _named(schedule, SCHEDULES, "schedule")
    optimiser = optimiser if isinstance(optimiser, Optimiser) else Optimiser(*optimiser)
    grid = {name: list(v) if isinstance(v, Sequence) else [v] for name, v in hyper.items()}
    signature = inspect.signature(loss).parameters
    _check(grid, signature, optimiser, precision)
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    replicas = [{"seed": int(seed)} | point for seed in seeds for point in points]
    models = [_make(make_model, replica["seed"]).to(device) for replica in replicas]
    rows, dead = [], {}  # dead: which replica diverged at which step

    def log(step: int, metrics: dict[str, list[float]]) -> None:
        for metric, values in metrics.items():
            for i, (replica, value) in enumerate(zip(replicas, values)):
                value = math.nan if dead.get(i, math.inf) <= step else value  # its accuracy, say, would look finite
                rows.append({"arm": arm} | replica | {"step": step, "metric": metric, "value": value})

    def diverged(step: int, i: int) -> None:
        dead.setdefault(i, step)
        if len(points) == 1:
            setting = ", ".join(f"{k}={v:g}" for k, v in replicas[i].items())
            raise DivergedError(
                f"arm {arm!r} diverged at step {step} ({setting}): lower lr, or look at the loss of that seed"
            )

    shown = set(inspect.signature(evaluate).parameters) & set(grid) if evaluate else ()
    job = Job(loss, sample, steps, replicas, sorted(set(signature) & set(grid)), optimiser, schedule, evaluate, eval_every,
               torch.device(device), precision, arm, log, diverged, sorted(shown))  # fmt: skip
    all_threads = torch.get_num_threads()
    with _matmul_precision(precision):
        load = work(job, models[0])
        stack, why = choose(job, models, vectorize, load)
        if threads or load < LARGE:
            torch.set_num_threads(threads or 1)
        try:
            why += (train_stacked if stack else train_one_by_one)(job, models)
        finally:
            torch.set_num_threads(all_threads)
    result = Fit(arm, pd.DataFrame(rows), models, pd.DataFrame(replicas), grid, steps, time.perf_counter() - start,
                 _peak(job.device), "stacked" if stack else "loop", why)  # fmt: skip
    report.emit("fit", arm=arm, grid=grid, seeds=list(seeds), steps=steps, seconds=result.seconds,
                peak_bytes=result.peak_bytes, path=result.path, why=why)  # fmt: skip
    return result


def _named(value: Any, known: dict[str, Any], what: str) -> Any:
    if isinstance(value, str) and value not in known:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")
    return known[value] if isinstance(value, str) else value


def _check(grid: dict[str, list], signature: Any, optimiser: Optimiser, precision: str) -> None:
    if "lr" not in grid:
        raise ValueError("fit got no learning rate: pass lr=1e-3, or lr=[3e-4, 1e-3, 3e-3] to tune it")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    takes_any = optimiser.takes is None or any(p.kind is p.VAR_KEYWORD for p in signature.values())
    stray = set() if takes_any else set(grid) - set(optimiser.takes) - set(signature)
    if stray:
        raise ValueError(
            f"fit got {', '.join(sorted(stray))}: neither the loss names it nor the optimiser reads it "
            f"(it reads {', '.join(optimiser.takes)})"
        )


def _make(make_model: Callable[..., nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make_model(seed=seed) if "seed" in inspect.signature(make_model).parameters else make_model()


def _peak(device: torch.device) -> int:
    """Peak memory in bytes: of the device under CUDA, else of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """TF32 on CUDA exactly when asked for; nothing on a CPU."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


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
    report.emit("tuning", arms=record)
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
