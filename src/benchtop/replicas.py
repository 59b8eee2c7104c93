"""The two ways to train replicas, all at once or one after the other, and the choice between them."""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from benchtop import report
from benchtop.batching import ReplicaRules, branch
from benchtop.optim import FusedAdamW, Mover, Optimiser, laid_out_like, mover

# Floating-point operations of one replica's step (forward and backward) above which stacking does not pay on a CPU, nor
# a single thread: the time then goes into arithmetic and no longer into starting operations. Measured on 2 cores, 16
# replicas: perceptrons of width 512 (110 million) broke even, 1024 (420 million) were 1.4 times faster one by one.
LARGE = 80_000_000
UNFIT = (RuntimeError, ValueError, TypeError, NotImplementedError)  # what vmap raises where it does not fit
GRAPH_AFTER = 3  # eager steps on CUDA before the step is captured: libraries set themselves up in them


class _Call(nn.Module):
    """A module whose forward calls a function on another one: functional_call then reaches whatever the function uses."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args, **kwargs):
        return self.function(self.model, *args, **kwargs)


@dataclass
class Job:
    """What both ways need to know."""

    loss: Callable
    sample: Callable
    steps: int
    replicas: list[dict[str, float]]
    named: list[str]  # hyper-parameters that the loss takes
    optimiser: Optimiser
    schedule: Callable[[int, int], float]
    evaluate: Callable | None
    every: int
    device: torch.device
    precision: str
    arm: str
    log: Callable
    diverged: Callable
    shown: Sequence[str] = ()  # hyper-parameters that the evaluation takes

    def due(self, step: int) -> bool:
        return self.evaluate is not None and (step % self.every == 0 or step == self.steps)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def column(self, name: str, replicas: list[dict[str, float]]) -> Tensor:
        return torch.tensor([float(r[name]) for r in replicas], device=self.device)

    def mover(self, parts: list[Tensor], replicas: list[dict[str, float]]) -> Mover | FusedAdamW:
        hyper = {name: self.column(name, replicas) for name in replicas[0] if name != "seed"}
        return mover(self.optimiser, parts, hyper)

    def keys(self, replicas: list[dict[str, float]]) -> Tensor:
        return branch(
            torch.tensor(0, device=self.device), torch.tensor([r["seed"] for r in replicas], device=self.device)
        )

    def clock(self) -> Tensor:
        """(steps + 1, 2), double precision: row t holds the step t and the factor on lr.

        Made at once: to copy two numbers to a GPU at each step, the host would have to wait for the GPU.
        """
        rows = [(float(t), self.schedule(t, self.steps) if t else 0.0) for t in range(self.steps + 1)]
        return torch.tensor(rows, dtype=torch.float64, device=self.device)

    @contextlib.contextmanager
    def rules(self, key: Tensor, stacked: bool) -> Iterator[None]:
        """The replica's own randomness and the precision asked for, around a loss or an evaluation."""
        with ReplicaRules(key, stacked), torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
            yield

    def progress(self, total: int) -> tqdm:
        """A bar for who waits longer than three seconds; silent where nobody looks."""
        watched = sys.stderr.isatty() or report.in_notebook()
        hidden = not watched or report.LOG in os.environ
        return tqdm(total=total, desc=self.arm, delay=3, disable=hidden, leave=False)


def _step_key(key: Tensor, step: Tensor) -> Tensor:
    return branch(key, step.long())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Flops(TorchDispatchMode):
    """``total`` of the floating-point operations run inside. PyTorch's own counter imports its compiler: over a second."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else that import comes with the first operation here too
        return False


def work(job: Job, model: nn.Module) -> float:
    """Floating-point operations of one replica's step, counted on a copy; the model and its statistics stay untouched."""
    replica = job.replicas[0]
    state = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in model.named_parameters()}
    state |= {name: t.clone() for name, t in model.named_buffers()}
    state = {f"model.{name}": t for name, t in state.items()}
    batch = job.sample(job.generator(replica["seed"]))
    torch.manual_seed(replica["seed"])
    with _Flops() as counter, job.rules(job.keys([replica])[0], stacked=False):
        value = functional_call(_Call(model, job.loss), state, (batch,), {n: float(replica[n]) for n in job.named})
        torch.autograd.grad(value, [t for t in state.values() if t.requires_grad], allow_unused=True)
    return counter.total


def choose(job: Job, models: list[nn.Module], vectorize: bool | None, load: float) -> tuple[bool, str]:
    """Stack the replicas? And why. A rule and not a stopwatch: the same call must give the same bits."""
    if vectorize is not None:
        return vectorize, f"vectorize={vectorize}"
    if len(models) == 1:
        return False, "one replica"
    size = f"{load / 1e6:.3g} million operations a step and replica"
    if load > LARGE and job.device.type == "cpu":
        return False, f"{size}: above {LARGE / 1e6:g} million stacking does not pay on a CPU"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            stack = _Stack(job, models[:2], job.replicas[:2])
            stack.step(stack.batch([job.generator(r["seed"]) for r in job.replicas[:2]], 1), *job.clock()[1])
        except UNFIT as error:  # one's own mistake shows in the loop
            return False, f"vmap cannot take this model or loss ({str(error).splitlines()[0][:160]})"
    for warning in caught:
        if "batching rule for" in str(warning.message):
            return False, f"no batching rule for {str(warning.message).split('batching rule for ')[1].split('. ')[0]}"
    return True, size


class _Stack:
    """Replicas as one: ``parts`` holds a tensor (replicas, *shape) for each trained parameter, in the order of ``names``."""

    def __init__(self, job: Job, models: list[nn.Module], replicas: list[dict[str, float]]):
        self.job, self.models, self.replicas, self.skeleton = job, models, replicas, models[0]
        own = [dict(model.named_parameters()) for model in models]
        self.names = [name for name, p in own[0].items() if p.requires_grad]
        self.parts = [torch.stack([ps[name].detach() for ps in own]) for name in self.names]
        self.fixed, self.dims = {}, {}
        for name, p in own[0].items():
            if not p.requires_grad:  # held once if all replicas share it, say a pre-trained backbone
                same = all(torch.equal(p, ps[name]) for ps in own)
                self.fixed[name] = p.detach() if same else torch.stack([ps[name].detach() for ps in own])
                self.dims[name] = None if same else 0
        buffers = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([bs[name] for bs in buffers]) for name in buffers[0]}
        self.keys = job.keys(replicas)
        self.passed = {name: job.column(name, replicas) for name in job.named}
        self.shown = {name: job.column(name, replicas) for name in job.shown}
        self.mover = None  # made at the first step, when the layout of the gradients is known

    def _mapped(self, function: Callable) -> Callable:
        return vmap(function, in_dims=(0, 0, self.dims, 0, 0, 0))

    def _call(
        self, function: Callable, parts: list, buffers: dict, fixed: dict, key: Tensor, args: tuple, passed: dict
    ):
        own = dict(zip(self.names, parts)) | fixed | buffers
        own = {f"model.{name}": tensor for name, tensor in own.items()}
        with self.job.rules(key, stacked=True):
            return functional_call(_Call(self.skeleton, function), own, args, passed)

    def _loss(self, parts, buffers, fixed, key, batch, passed):
        return self._call(self.job.loss, parts, buffers, fixed, key, (batch,), passed).float()

    def _metrics(self, parts, buffers, fixed, key, _, shown):
        return self._call(self.job.evaluate, parts, buffers, fixed, key, (), shown)

    def batch(self, generators: list[torch.Generator], repeat: int) -> Any:
        """The batches of the seeds, each repeated for the points of the grid."""
        sample = self.job.sample
        if isinstance(sample, Batches):  # one gather for all
            return sample.take(torch.stack([sample.rows(g) for g in generators]).repeat_interleave(repeat, 0))
        return _stack([sample(g) for g in generators], repeat)

    def gradient(self, batch: Any, step: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients like ``parts``, and the losses (replicas,).

        Replicas do not touch one another, so that the gradient of the sum of their losses holds the gradient of each.
        """
        parts = [part.detach().requires_grad_() for part in self.parts]
        keys = _step_key(self.keys, step)
        losses = self._mapped(self._loss)(parts, self.buffers, self.fixed, keys, batch, self.passed)
        grads = torch.autograd.grad(losses.sum(), parts, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parts, grads)], losses.detach()

    def step(self, batch: Any, step: Tensor, factor: Tensor) -> Tensor:
        """Move all replicas; their losses before the move."""
        grads, losses = self.gradient(batch, step)
        if self.mover is None:
            parts = [laid_out_like(part, grad) for part, grad in zip(self.parts, grads)]
            self.mover = self.job.mover(parts, self.replicas)
            self.parts = self.mover.parts
        self.mover(grads, step, factor)
        return losses

    def measure(self, step: Tensor) -> dict[str, list[float]]:
        keys = _step_key(self.keys, step)
        with _evaluating(self.skeleton):
            try:
                values = self._mapped(self._metrics)(self.parts, self.buffers, self.fixed, keys, keys, self.shown)
                return {name: value.tolist() for name, value in values.items()}
            except UNFIT:
                pass  # numbers made outside torch, say: then one model at a time, where a real mistake shows
        self.write_back()
        each = [_measure(self.job, *one) for one in zip(self.models, keys, self.job.replicas)]
        return {name: [values[name] for values in each] for name in each[0]}

    def write_back(self) -> None:
        with torch.no_grad():
            for i, model in enumerate(self.models):
                own = dict(model.named_parameters())
                for name, part in zip(self.names, self.parts):
                    own[name].copy_(part[i])
                for name, buffer in model.named_buffers():
                    buffer.copy_(self.buffers[name][i])


class _Captured:
    """`_Stack.step` on a CUDA device: some eager steps, the rest replays of one captured CUDA graph.

    Batch, step and factor enter through tensors that stay where they are; metrics and random rows remain outside. What
    cannot be captured goes on eagerly, and ``note`` says so. Never measured on a GPU yet; the tests record and replay the
    step on a CPU and, where there is a GPU, compare it with eager steps.
    """

    def __init__(self, stack: _Stack):
        self.stack, self.stream, self.graph = stack, torch.cuda.Stream(), None
        self.calls, self.note = 0, "too few steps for a CUDA graph"

    def __call__(self, *now: Any) -> Tensor:
        self.calls += 1
        if self.calls == GRAPH_AFTER + 1:
            self.capture(now)
        if self.graph:
            for old, new in zip(tree_leaves(self.inputs), tree_leaves(now)):
                old.copy_(new)
            self.graph.replay()
            return self.losses
        self.stream.wait_stream(torch.cuda.current_stream())  # warm-up belongs on the stream of the capture
        with torch.cuda.stream(self.stream):
            losses = self.stack.step(*now)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def capture(self, now: tuple) -> None:
        mover, graph = self.stack.mover, torch.cuda.CUDAGraph()
        state = list(mover.state)  # a copy: the step puts new tensors into the list itself
        self.inputs = tree_map(torch.clone, now)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.losses = self.stack.step(*self.inputs)
                for old, new in zip(tree_leaves(state), tree_leaves(mover.state)):
                    old.copy_(new)
            self.graph, self.note = graph, "the step is a CUDA graph"
        except RuntimeError as error:  # nothing ran while it was recorded, so that the same step can be taken eagerly
            self.note = f"no CUDA graph ({str(error).splitlines()[0][:160]})"
        mover.state = state


def _on_cuda(job: Job) -> bool:
    return job.device.type == "cuda"


def train_stacked(job: Job, models: list[nn.Module]) -> str:
    """Train all at once; returns what there is to add about the way."""
    stack = _Stack(job, models, job.replicas)
    generators = [job.generator(seed) for seed in dict.fromkeys(r["seed"] for r in job.replicas)]
    repeat = len(models) // len(generators)
    cuda, clock = _on_cuda(job), job.clock()
    take = _Captured(stack) if cuda else stack.step
    failed = torch.zeros(len(models), dtype=torch.float64, device=job.device)  # the first step with a bad loss
    if job.due(0):
        job.log(0, stack.measure(clock[0, 0]))
    with job.progress(job.steps) as bar:
        for step in range(1, job.steps + 1):
            losses = take(stack.batch(generators, repeat), *clock[step])
            failed = torch.where((failed == 0) & ~losses.isfinite(), clock[step, 0], failed)
            if not cuda or job.due(step) or step == job.steps:  # reading a number makes the host wait for the device
                for i in failed.nonzero().flatten().tolist():
                    job.diverged(int(failed[i]), i)
            if job.due(step):
                job.log(step, stack.measure(clock[step, 0]))
            bar.update()
    stack.write_back()
    return f"; {take.note}" if cuda else ""


def train_one_by_one(job: Job, models: list[nn.Module]) -> str:
    """The same, one after the other."""
    measured: dict[int, list[dict[str, float]]] = {}
    clock = job.clock()
    with job.progress(job.steps * len(models)) as bar:
        for i, (model, replica) in enumerate(zip(models, job.replicas)):
            torch.manual_seed(replica["seed"])  # for whatever noise ReplicaRules does not know
            generator, key = job.generator(replica["seed"]), job.keys([replica])[0]
            passed = {name: float(replica[name]) for name in job.named}
            params = [p for p in model.parameters() if p.requires_grad]
            mover = job.mover([p.detach()[None] for p in params], [replica])
            for p, part in zip(params, mover.parts):
                p.data = part[0]
            for step in range(job.steps + 1):
                if step:
                    with job.rules(_step_key(key, clock[step, 0]), stacked=False):
                        value = job.loss(model, job.sample(generator), **passed)
                    if not math.isfinite(value.item()):
                        job.diverged(step, i)
                    grads = torch.autograd.grad(value, params, allow_unused=True)
                    grads = [(torch.zeros_like(p) if g is None else g)[None] for p, g in zip(params, grads)]
                    with torch.no_grad():
                        mover(grads, *clock[step])
                    bar.update()
                if job.due(step):
                    measured.setdefault(step, []).append(_measure(job, model, _step_key(key, clock[step, 0]), replica))
            for p in params:
                p.data = p.data.clone()  # a trained model owns its numbers
    for step, each in sorted(measured.items()):
        job.log(step, {name: [values[name] for values in each] for name in each[0]})
    return ""


def _measure(job: Job, model: nn.Module, key: Tensor, replica: dict[str, float]) -> dict[str, float]:
    shown = {name: float(replica[name]) for name in job.shown}
    with _evaluating(model), job.rules(key, stacked=False):
        return {name: float(value) for name, value in job.evaluate(model, **shown).items()}


def _stack(batches: list[Any], repeat: int) -> Any:
    """Batches of the seeds as one batch of the replicas, structure kept (tensor, tuple, list or dict)."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.stack(batches).repeat_interleave(repeat, dim=0) if repeat > 1 else torch.stack(batches)
    if isinstance(first, dict):
        return {key: _stack([b[key] for b in batches], repeat) for key in first}
    if isinstance(first, tuple | list):
        parts = [_stack(list(parts), repeat) for parts in zip(*batches)]
        return first._make(parts) if hasattr(first, "_make") else type(first)(parts)
    raise ValueError(
        f"sample returned a {type(first).__name__}: expected a tensor, or a tuple, list or dict of tensors"
    )


class Batches:
    """A ``sample`` in two halves, so that `fit` gathers the rows of all seeds at once; made by `batches`."""

    def __init__(self, part: Sequence[Tensor], size: int, length: int | None):
        self.part, self.size, self.length = part, size, length

    def rows(self, generator: torch.Generator) -> Tensor:
        last = len(self.part[0]) - (self.length or 1) + 1
        rows = torch.randint(last, (self.size,), generator=generator, device=self.part[0].device)
        return rows if self.length is None else rows[:, None] + torch.arange(self.length, device=rows.device)

    def take(self, rows: Tensor) -> Any:
        make = self.part._make if hasattr(self.part, "_make") else tuple
        return make(tensor[rows] for tensor in self.part)

    def __call__(self, generator: torch.Generator) -> Any:
        return self.take(self.rows(generator))


def batches(part: Sequence[Tensor], size: int, length: int | None = None) -> Batches:
    """A ``sample`` for `fit`: ``size`` rows of ``part`` at random, with replacement, as the same kind of tuple.

    With ``length``, for text and series: ``size`` windows of so many consecutive rows, each tensor (size, length, ...).
    The data stay where they are, once for all replicas; only rows are copied.
    """
    if length is not None and length > len(part[0]):
        raise ValueError(
            f"batches got length={length} for {len(part[0])} rows: a window cannot be longer than the data"
        )
    return Batches(part, size, length)
