"""Planted mistakes: do the checks of a chapter notice when its technique is wrong?

The technique cells are changed in one place at a time through the syntax tree; the chapter's check cells run on each
mutant in a forked process with limits on time and memory. A mutant whose checks print what they always print has
survived. A survivor that means the same as the original is listed in the chapter's metadata with the reason:
``equivalent_mutants: [{mutant: "Layer.forward: a + b -> b + a", reason: "addition commutes"}]``.

Source of the idea: DeMillo, Lipton and Sayward (1978), "Hints on test data selection".
"""

import ast
import contextlib
import copy
import io
import multiprocessing
import os
import re
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchtop.publish.chapter import BookError, Chapter, parse
from benchtop.techniques import imports

WANTED = 0.8  # the share of planted mistakes that the checks must catch
EXCUSED = 1 / 3  # the largest share that may be listed as equivalent
BUDGET = 20.0  # seconds a chapter on one core
PATIENCE = 1.0  # a mutant may take this many seconds more than three times what the original takes
MEMORY = 2 << 30  # bytes a mutant may allocate


# ---- the mistakes: each function yields what may stand in place of a node ----

OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
TURNED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
GUARD = 1e-6  # smaller constants protect against 0/0: no honest check can tell 1e-12 from 2e-12
UNDONE = {  # functions that a mistake leaves out
    *("abs", "exp", "expm1", "log", "log1p", "logsumexp", "sqrt", "rsqrt", "square", "sign", "clamp", "clip"),
    *("softmax", "log_softmax", "normalize", "layer_norm"),
    *("sigmoid", "logsigmoid", "tanh", "relu", "gelu", "silu", "softplus"),
}
NORMS = {"LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "BatchNorm2d", "Softmax"}  # modules left out likewise
DIVIDED = {"mean": "sum", "nanmean": "nansum", "var": "sum", "std": "sum"}
TRANSPOSED = {"T", "mT", "H", "mH"}
UNORDERED = {"isinstance", "issubclass", "hasattr", "getattr", "setattr", "super", "print", "register_buffer"}


def flip(node: ast.AST) -> Iterator[ast.AST]:
    """a + b -> a - b, a * b -> a / b, a += b -> a -= b, -a -> a."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPPOSITE:
        yield _with(node, op=OPPOSITE[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield node.operand


def turn(node: ast.AST) -> Iterator[ast.AST]:
    """a < b -> a > b, a == b -> a != b, not a -> a."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in TURNED:
                yield _with(node, ops=[*node.ops[:i], TURNED[type(op)](), *node.ops[i + 1 :]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand


def drop(node: ast.AST) -> Iterator[ast.AST]:
    """A term or a factor goes: a + b -> a, a + b -> b, a - b -> -b, a * b -> a, a / b -> a, a ** b -> a."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow):
            yield node.left
        if isinstance(node.op, ast.Add | ast.Mult):
            yield node.right
        if isinstance(node.op, ast.Sub):
            yield ast.UnaryOp(ast.USub(), node.right)
    if isinstance(node, ast.AugAssign):
        yield ast.Pass()


def double(node: ast.AST) -> Iterator[ast.AST]:
    """A number becomes twice itself (zero becomes one), a truth value its opposite."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif node.value == 0 and isinstance(node.value, int | float):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, int | float) and abs(node.value) > GUARD:
            yield ast.Constant(2 * node.value)


def swap(node: ast.AST) -> Iterator[ast.AST]:
    """f(a, b) -> f(b, a): two neighbours among the positional arguments."""
    if isinstance(node, ast.Call) and _name(node.func) not in UNORDERED:
        for i, (a, b) in enumerate(zip(node.args, node.args[1:])):
            if not {type(a), type(b)} & {ast.Constant, ast.Starred, ast.Lambda}:
                yield _with(node, args=[*node.args[:i], b, a, *node.args[i + 2 :]])


def transpose(node: ast.AST) -> Iterator[ast.AST]:
    """a.T -> a, a.transpose(0, 1) -> a, a @ b -> a @ b.mT."""
    if isinstance(node, ast.Attribute) and node.attr in TRANSPOSED:
        yield node.value
    if isinstance(node, ast.Call) and _name(node.func) in ("t", "transpose", "adjoint"):
        yield _argument(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        right = node.right
        turned = isinstance(right, ast.Attribute) and right.attr in TRANSPOSED
        if not turned:  # a @ b.T -> a @ b comes from the first line
            yield _with(node, right=ast.Attribute(right, "mT", ast.Load()))


def bare(node: ast.AST) -> Iterator[ast.AST]:
    """abs, exp, softmax, a norm or its module ... are left out; a mean becomes a sum."""
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name in UNDONE and (inner := _argument(node)) is not None:
            yield inner
        if name in NORMS and isinstance(node.func, ast.Attribute):
            yield _with(node, func=_with(node.func, attr="Identity"))
        if name in DIVIDED and isinstance(node.func, ast.Attribute):
            kept = [k for k in node.keywords if k.arg not in ("unbiased", "correction")]
            yield _with(node, func=_with(node.func, attr=DIVIDED[name]), keywords=kept)


def attach(node: ast.AST) -> Iterator[ast.AST]:
    """a.detach() -> a, and what stood under no_grad no longer does."""
    if isinstance(node, ast.Call) and _name(node.func) == "detach":
        yield _argument(node)
    if isinstance(node, ast.With) and any(_undifferentiated(item.context_expr) for item in node.items):
        yield ast.If(ast.Constant(True), node.body, [])
    if isinstance(node, ast.FunctionDef) and any(map(_undifferentiated, node.decorator_list)):
        yield _with(node, decorator_list=[d for d in node.decorator_list if not _undifferentiated(d)])


OPERATORS = (flip, turn, drop, double, swap, transpose, bare, attach)


def _with(node: ast.AST, **changes: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _argument(call: ast.Call) -> ast.expr | None:
    """What a function works on: ``x`` of ``torch.exp(x)`` and of ``x.exp()``."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if owner is not None and not (isinstance(owner, ast.Name | ast.Attribute) and _is_module(owner)):
        return owner
    return call.args[0] if call.args and not isinstance(call.args[0], ast.Starred) else None


def _is_module(node: ast.expr) -> bool:
    return ast.unparse(node) in {"torch", "F", "np", "numpy", "math", "bt", "nn.functional", "torch.nn.functional",
                                 "torch.linalg", "np.linalg", "torch.special"}  # fmt: skip


def _undifferentiated(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in ("no_grad", "inference_mode")


# ---- where they are planted ----


@dataclass(frozen=True)
class Mutant:
    """One planted mistake. ``name`` says what it is and does not move when lines do; ``where`` is its place today."""

    name: str
    where: str
    cell: int  # which of the technique cells
    code: types.CodeType = field(repr=False)


def mutants(chapter: Chapter) -> list[Mutant]:
    """Every planted mistake of the technique cells, in the order of the page."""
    found, seen = [], {}
    for k, cell in enumerate(_technique(chapter)):
        number = 1 + chapter.notebook.cells.index(cell)
        tree = parse(cell.source)
        for scope, node, put, around in _sites(tree, "", None, None):
            old = _words(around)
            for operator in OPERATORS:
                for new in operator(node):
                    put(new)
                    words = _words(new if around is node else around)
                    text = f"{scope}: {old} -> {words}" if scope else f"{old} -> {words}"
                    if words != old and (code := _compiled(tree, f"{chapter.path.name} cell {number}")):
                        seen[text] = seen.get(text, 0) + 1
                        name = f"{text} #{seen[text]}" if seen[text] > 1 else text
                        found.append(Mutant(name, f"cell {number} line {node.lineno}", k, code))
                    put(node)
    return found


def _technique(chapter: Chapter) -> list[Any]:
    return chapter.cells("technique")


def _sites(node: ast.AST, scope: str, around: ast.AST | None, put) -> Iterator[tuple]:
    """Walk what can be wrong: not docstrings, annotations, names of errors or the words of a message.

    Yields the scope (``Layer.forward``), the node, a function that puts another in its place, and the smallest
    expression that says enough about it to name the change.
    """
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}" if scope else node.name
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.BinOp | ast.Compare | ast.Call | ast.Subscript | ast.UnaryOp | ast.stmt | ast.arguments):
        around = node
    if put is not None and isinstance(node, ast.expr | ast.stmt):
        shown = node if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) else around
        yield scope, node, put, shown
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "bases", "decorator_list", "msg", "ctx", "func_type", "type_params"):
            continue
        if isinstance(value, list):
            for i, child in enumerate(value):
                if isinstance(child, ast.AST):
                    yield from _sites(child, scope, around, lambda new, at=value, i=i: at.__setitem__(i, new))
        elif isinstance(value, ast.AST):
            yield from _sites(value, scope, around, lambda new, name=name: setattr(node, name, new))


def _words(node: ast.AST) -> str:
    """The first line of a node as text."""
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).strip().split("\n")[0]


def _compiled(tree: ast.Module, name: str) -> types.CodeType | None:
    try:
        return compile(ast.fix_missing_locations(copy.deepcopy(tree)), name, "exec")
    except (SyntaxError, ValueError, TypeError):  # the change makes no program: nobody could make this mistake
        return None


# ---- the trial ----


@dataclass(frozen=True)
class Report:
    """What became of the mutants of a chapter."""

    caught: list[str]
    survived: list[tuple[str, str]]  # (name, where)
    equivalent: list[str]  # survived and listed with a reason
    unfounded: list[str]  # listed as equivalent, but caught or no longer there
    seconds: float

    @property
    def score(self) -> float:
        """Caught of all that are not equivalent, 0 to 1."""
        judged = len(self.caught) + len(self.survived)
        return len(self.caught) / judged if judged else 0.0

    @property
    def planted(self) -> int:
        return len(self.caught) + len(self.survived) + len(self.equivalent)

    @property
    def passed(self) -> bool:
        return self.score >= WANTED and not self.unfounded and len(self.equivalent) <= EXCUSED * self.planted

    def lines(self) -> Iterator[str]:
        """The survivors, with their places, then the score."""
        width = max((len(where) for _, where in self.survived), default=0)
        for name, where in self.survived:
            yield f"survived  {where:{width}}  {name}"
        for name in self.unfounded:
            yield f"listed as equivalent, but caught or no longer there: {name}"
        judged = len(self.caught) + len(self.survived)
        yield (
            f"{len(self.caught)} of {judged} planted mistakes caught ({self.score:.0%}, at least {WANTED:.0%} wanted), "
            f"{len(self.equivalent)} equivalent, {self.seconds:.1f} s of processor time"
        )


def mutate(chapter: Chapter) -> Report:
    """Plant every mistake in turn and run the checks on it. Raises BookError if they do not run on the original."""
    if not chapter.cells("technique") or not chapter.cells("check"):
        raise BookError(f"{chapter.path.name} has no technique or no check cell: tag the cells of the two sections")
    outcome, value = apart(lambda: _survey(chapter), seconds=30 * BUDGET, memory=4 * MEMORY)
    if outcome != "done":
        raise BookError(f"{chapter.path.name}: its checks cannot run on the technique alone: {value}")
    return value


def _survey(chapter: Chapter) -> Report:
    started = time.process_time()
    technique = [_code(chapter, cell) for cell in _technique(chapter)]
    setup = compile("\n".join(imports(cell.source) for cell in chapter.cells("setup")), "set-up", "exec")
    checks = [_code(chapter, cell) for cell in chapter.cells("check")]
    expected = _printed(setup, technique, checks, seed=0)  # loads what is loaded late, so that no mutant waits for it
    began = time.perf_counter()
    if _printed(setup, technique, checks, seed=1) != expected:
        raise BookError("they print something else with other global seeds; give each random call a generator=")
    patience = PATIENCE + 3 * (time.perf_counter() - began)
    listed = {entry["mutant"] for entry in chapter.meta.get("equivalent_mutants", [])}
    report = Report([], [], [], [], 0.0)
    for mutant in mutants(chapter):
        planted = [*technique[: mutant.cell], mutant.code, *technique[mutant.cell + 1 :]]
        outcome, text = apart(
            lambda planted=planted: _printed(setup, planted, checks, seed=0, expected=expected), patience
        )
        if outcome != "done" or text != expected:
            report.caught.append(mutant.name)
        elif mutant.name in listed:
            report.equivalent.append(mutant.name)
        else:
            report.survived.append((mutant.name, mutant.where))
    used = os.times()
    report.unfounded.extend(sorted(listed - set(report.equivalent)))
    seconds = time.process_time() - started + used.children_user + used.children_system
    return Report(report.caught, report.survived, report.equivalent, report.unfounded, seconds)


def _code(chapter: Chapter, cell: Any) -> types.CodeType:
    return compile(parse(cell.source), f"{chapter.path.name} cell {1 + chapter.notebook.cells.index(cell)}", "exec")


class _Differs(Exception):
    """The checks have printed something that the original never prints."""


class _Compare(io.StringIO):
    """Stops at the first character that departs from what is expected: most mutants are caught within one check."""

    def __init__(self, expected: str | None):
        super().__init__()
        self.expected = expected

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.expected is not None and not self.expected.startswith(self.getvalue()):
            raise _Differs
        return written


def _printed(setup, technique: list, checks: list, *, seed: int, expected: str | None = None) -> str:
    """What the checks print on this technique. Raises what they raise."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    module = types.ModuleType("benchtop.planted")
    sys.modules[module.__name__] = module  # dataclasses and pickling look a class's module up by name
    for code in (setup, *technique):
        exec(code, module.__dict__)
    with contextlib.redirect_stdout(_Compare(expected)) as out:
        for code in checks:
            exec(code, module.__dict__)
    return out.getvalue()


def apart(work: Callable[[], Any], seconds: float, memory: int = MEMORY) -> tuple[str, Any]:
    """Do ``work`` in a forked process, where it can neither hurt this one nor last for ever.

    Returns ("done", its value), ("error", one line) or ("timeout", one line). Needs an operating system that forks.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise BookError("planted mistakes need an operating system that forks: use Linux, macOS or WSL")
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(work, send, seconds, memory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads: none is used in the child
        child.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else ("timeout", f"still running after {seconds:.0f} s")
    except EOFError:
        return "error", "the process died"
    finally:
        child.kill()
        child.join()
        receive.close()


def blame(error: BaseException) -> str:
    """One line on an error: the cell and line of the chapter it came from, if any, its type and message."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if re.search(r"cell \d+$", f.filename)]
    where = f"{frames[-1].filename} line {frames[-1].lineno}: " if frames else ""
    words = str(error) if isinstance(error, BookError) else f"{type(error).__name__}: {error}"
    return (where + words).split("\n")[0]


def _child(work: Callable[[], Any], send, seconds: float, memory: int) -> None:
    import resource

    import torch

    os.environ.pop("BENCHTOP_RECORD", None)
    os.environ["MPLBACKEND"] = "agg"
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    with contextlib.suppress(ValueError, OSError):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, -1))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, -1))  # ends it even if nobody is left to do so
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            result = "done", work()
        except BaseException as error:
            result = "error", blame(error)
        send.send(result)
    os._exit(0)  # no clean-up of what the parent owns
