"""Where a chapter runs: it comes as bytes; an executed notebook, a log and a record entry go back.

A server process with the heavy imports done forks one process a chapter (``multiprocessing``'s forkserver), so that only
the first chapter pays for ``import torch``. A chapter's process leads a process group of its own and ends with whoever
started it, however that ends. Jupyter is needed in the kernel only: ``Job(kernel=False)`` does without.
"""

import ast
import base64
import contextlib
import functools
import importlib
import json
import linecache
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import psutil

from benchtop.publish.chapter import BookError, Chapter
from benchtop.report import LOG, display, emit

WORST_FIRST = ("fails", "open", "holds", "not measured")
PRELOAD = (  # what nearly every chapter imports, and what a kernel needs
    *("__main__", "benchtop.publish.worker", "torch", "pandas", "scipy.stats", "matplotlib.pyplot", "threadpoolctl"),
    *(f"benchtop.{name}" for name in ("profile", "train", "claims", "plots", "widgets", "techniques", "data")),
    *("torch._dynamo", "sklearn.datasets", "ipykernel.kernelapp", "ipykernel.ipkernel"),
)
TICK = 0.5  # seconds between two looks at a chapter's memory and time
# Linux forks; elsewhere the system's frameworks do not survive a fork, and each chapter imports anew.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
STARTING = threading.Lock()  # multiprocessing looks after all children of this process whenever it starts one


@dataclass(frozen=True)
class Job:
    """One chapter to run, complete: a worker shares no disk with the runner."""

    slug: str
    profile: str
    files: dict[str, bytes]  # path in the book -> content: the chapter first, then those whose technique it uses
    key: str
    seconds: float  # it is ended after this many, imports included
    memory: float  # it is ended beyond this many bytes
    threads: int
    kernel: bool = True

    @classmethod
    def of(cls, chapter: Chapter, profile: str, **options: Any) -> "Job":
        root, lean = chapter.path.parents[2], nbformat.from_dict(chapter.notebook)
        for cell in lean.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        files = {str(chapter.path.relative_to(root)): nbformat.writes(lean).encode()}
        files |= {str(other.path.relative_to(root)): other.path.read_bytes() for other in chapter.borrows()}
        return cls(chapter.slug, profile, files, chapter.key(profile, parameters(profile)), **options)


@dataclass
class Result:
    """What came of a job. ``error`` is empty or one line."""

    slug: str
    profile: str
    entry: dict[str, Any] = field(default_factory=dict)  # of the record
    seconds: float = 0.0  # from the arrival of the job to its end
    error: str = ""
    cell: int | None = None  # where it failed, as the reader counts: the first cell on the page is cell 1
    traceback: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # log.txt, executed.ipynb, figure-1.png, ...


class Failed(Exception):
    """A chapter did not run through: one line, and the lines of its traceback."""

    def __init__(self, error: str, lines: list[str] | None = None):
        super().__init__(error)
        self.lines = lines or []


def parameters(profile: str) -> dict[str, Any]:
    """What is injected below the parameters cell."""
    return {"profile": profile}


# ---- one chapter, from its arrival to its end ----


def execute(job: Job) -> Result:
    """Run one chapter to its end, whatever that is; never raises for what a chapter does."""
    started, result = time.monotonic(), Result(job.slug, job.profile)
    try:
        with tempfile.TemporaryDirectory(prefix="benchtop-", ignore_cleanup_errors=True) as folder:
            run(job, Path(folder), result)
    except (Failed, BookError) as error:
        result.error, result.traceback = str(error), getattr(error, "lines", [])
    except Exception as error:  # a full disk, a missing package: this chapter fails, the others go on
        result.error, result.traceback = one_line(error), traceback.format_exc().splitlines()
    result.seconds = time.monotonic() - started
    return result


def run(job: Job, folder: Path, result: Result) -> None:
    """Unpack a job in an empty folder, execute it and fill in the result. Raises Failed."""
    for name, content in job.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    chapter = Chapter(folder / next(iter(job.files)))
    if chapter.key(job.profile, parameters(job.profile)) != job.key:
        raise Failed("the benchtop of this worker is not the runner's: install one version on both, start it again")
    if len(chapter.cells("parameters")) != 1:
        raise Failed('it needs exactly one cell tagged "parameters" that says profile = "laptop"')
    log, kept = folder / "log.jsonl", folder / "kept"
    kept.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "BENCHTOP_PROFILE"}
    environment |= {LOG: str(log), "BENCHTOP_BOOK": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
    watch = Watch(job)

    def start(work: Callable[[str], int], argument: str) -> Process:
        place = {"log": str(kept / "log.txt"), "cwd": str(chapter.path.parent), "environment": environment}
        watch.process = Process(work, argument, threads=job.threads, **place)
        watch.start()
        return watch.process

    try:
        (in_kernel if job.kernel else in_plain_python)(job, chapter, folder, kept, start)
    except Failed as failure:
        if begun := sum(line["kind"] == "cell" for line in read_log(log)):
            result.cell = page_numbers(chapter)[begun - 1]
        raise (Failed(watch.reason) if watch.reason else failure) from None
    finally:
        watch.end()
        result.files = {path.name: path.read_bytes() for path in kept.iterdir()}
    result.entry = record_entry(job, read_log(log), watch.peak)


def page_numbers(chapter: Chapter) -> list[int]:
    """The place on the page of each cell that is executed; the injected one counts as the parameters cell above it."""
    places = []
    for number, cell in enumerate(chapter.notebook.cells, 1):
        if cell.cell_type == "code" and cell.source.strip():
            places += [number] * (2 if "parameters" in cell.metadata.get("tags", []) else 1)
    return places


def in_kernel(job: Job, chapter: Chapter, folder: Path, kept: Path, start: Callable) -> None:
    """Execute with papermill in a Jupyter kernel that is forked, whatever kernel the notebook names."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner
    from papermill.exceptions import PapermillExecutionError, strip_color

    class Forked(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
            self.process = start(kernel, self.parent.connection_file)
            return self.connection_info

    # Sockets in the folder: ports can clash between kernels that start together.
    names = {
        "connection_file": f"{folder}/kernel.json",
        "kernel_name": "python3",
        "transport": "ipc",
        "ip": f"{folder}/k",
    }
    manager = AsyncKernelManager(**names)
    manager.provisioner = forked = Forked(kernel_id=job.slug, kernel_spec=manager.kernel_spec, parent=manager)
    with open(kept / "log.txt", "a", encoding="utf-8") as text:
        try:
            papermill.execute_notebook(
                chapter.path, kept / "executed.ipynb", parameters(job.profile), km=manager, kernel_name="python3",
                language="python", progress_bar=False, stdout_file=text, stderr_file=text, coalesce_streams=True,
            )  # fmt: skip
        except PapermillExecutionError as error:
            lines = strip_color("\n".join(error.traceback)).splitlines()
            print(*lines, sep="\n", file=text)
            raise Failed(f"{error.ename}: {error.evalue}".splitlines()[0], lines) from None
        except Exception as error:  # nbclient and jupyter_client have several classes for a kernel that has gone
            if forked.process is None or (status := forked.process.poll()) is None:
                raise
            raise Failed(f"the kernel died{why(status)}", str(error).splitlines()) from None
        finally:
            if forked.process:
                forked.process.kill()  # at once: all that the chapter had to say is said
                forked.process.wait(10)


def in_plain_python(job: Job, chapter: Chapter, folder: Path, kept: Path, start: Callable) -> None:
    """Execute the cells one after the other in a plain process; its text and figures are kept."""
    sources = []
    for cell in chapter.cells():
        sources += [cell.source] * bool(cell.source.strip())
        if "parameters" in cell.metadata.get("tags", []):
            sources.append("\n".join(f"{name} = {value!r}" for name, value in parameters(job.profile).items()))
    (folder / "cells.json").write_text(json.dumps(sources), encoding="utf-8")
    status, log = start(plain, str(folder / "cells.json")).wait(), read_log(folder / "log.jsonl")
    images = [line["image/png"] for line in log if line["kind"] == "display" and "image/png" in line]
    for number, image in enumerate(images, 1):
        (kept / f"figure-{number}.png").write_bytes(base64.b64decode(image))
    if status:
        lines = next((line["lines"] for line in log if line["kind"] == "error"), [])
        raise Failed(lines[-1] if lines else f"the process died{why(status)}", lines)


def why(status: int) -> str:
    return " of signal 9, which is often lack of memory" if status == -signal.SIGKILL else f" with exit status {status}"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- while it runs ----


class Process:
    """A chapter's process: as much of ``subprocess.Popen`` as Jupyter's kernel manager wants."""

    stdin = stdout = stderr = None

    def __init__(self, work: Callable[[str], int], argument: str, **place: Any):
        with STARTING:
            multiprocessing.current_process().daemon = False  # a Dask worker is one, and those may have no children
            PROCESSES.set_forkserver_preload(list(PRELOAD))
            # A chapter that is killed leaves its semaphores (tqdm has one) to a process that removes them: no news.
            os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
            self._process = PROCESSES.Process(target=become, args=(work, argument), kwargs=place)
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with STARTING:
            return self._process.exitcode

    def wait(self, timeout: float = float("inf")) -> int | None:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.02)
        return status

    def send_signal(self, signum: int) -> None:
        """To the whole group: what a chapter has started ends with it."""
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:  # it has ended, or it is so young that it leads no group yet
            if self.poll() is None:
                os.kill(self.pid, signum)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    terminate = kill


class Watch(threading.Thread):
    """Measures the memory of a chapter's processes and ends them when time, memory or the runner is gone."""

    def __init__(self, job: Job):
        super().__init__(daemon=True)
        self.job, self.process, self.reason, self.peak = job, None, "", 0
        self._over, self._wanted = threading.Event(), still_wanted()

    def run(self) -> None:
        deadline = time.monotonic() + self.job.seconds
        while not self._over.wait(TICK):
            used = tree_bytes(self.process.pid)
            self.peak = max(self.peak, used)
            if time.monotonic() > deadline:
                self.reason = f"ended after {self.job.seconds:g} s, the time a {self.job.profile} run may take at most"
            elif used > self.job.memory:
                self.reason = f"ended at {used / 1e9:.1f} GB of memory, the limit is {self.job.memory / 1e9:.1f} GB"
            elif not self._wanted():
                self.reason = "ended: the runner has gone"
            if self.reason:
                return self.process.kill()

    def end(self) -> None:
        self._over.set()
        if self.process:
            self.process.kill()
            self.join()


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants; pages they share count for each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def still_wanted() -> Callable[[], bool]:
    """A function that says whether somebody still waits for the Dask task that this thread runs."""
    try:
        from distributed import get_worker

        worker = get_worker()
    except (ImportError, ValueError):  # not in a Dask worker
        return lambda: True
    key = worker.get_current_task()
    return lambda: (task := worker.state.tasks.get(key)) is not None and task.state in ("executing", "long-running")


# ---- in the chapter's own process ----


def become(work: Callable, argument: str, log: str, cwd: str, environment: dict[str, str], threads: int) -> None:
    """Turn a fresh process into a chapter's: a group, folder, environment and log of its own. Never returns."""
    code = 1
    try:
        os.setsid()
        threading.Thread(target=end_with_parent, daemon=True).start()
        null, text = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(null, 0), os.dup2(text, 1), os.dup2(text, 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        emit("begin", time=time.time())
        import threadpoolctl
        import torch

        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads)
        code = work(argument)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def kernel(connection: str) -> int:
    """A Jupyter kernel on this connection file."""
    from ipykernel.kernelapp import IPKernelApp

    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    if matplotlib := sys.modules.get("matplotlib"):  # imported before the line above
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]
    app = IPKernelApp.instance(parent_handle=os.getppid())  # one more that sees to it that no kernel is left
    app.initialize(["-f", connection, "--HistoryManager.enabled=False"])
    app.shell.events.register("pre_run_cell", lambda info: emit("cell"))
    app.shell.events.register("post_run_cell", lambda result: so_far())
    app.start()
    return 0


def plain(cells: str) -> int:
    """Execute code cells one after the other, as a script would; 1 if one fails, with its traceback in the log."""
    import matplotlib

    matplotlib.use("agg")
    sys.modules["__main__"] = module = types.ModuleType("__main__")  # where pickle looks for a chapter's classes
    module.display = lambda *things: print(*things, sep="\n")
    for number, source in enumerate(json.loads(Path(cells).read_text(encoding="utf-8")), 1):
        emit("cell")
        try:
            run_cell(source, f"<cell [{number}]>", module.__dict__)
            show_figures()
            so_far()
        except BaseException as error:
            trace = error.__traceback__
            while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:  # begin in the chapter's code
                trace = trace.tb_next
            text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
            print(text)
            emit("error", lines=text.splitlines())
            return 1
    return 0


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Run one cell; the value of a last expression is printed, where a notebook would show it."""
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    tree = ast.parse(source, name)
    shown = tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = [tree.body.pop()] if shown else []
    exec(compile(tree, name, "exec"), namespace)
    exec(compile(ast.Interactive(last), name, "single"), namespace)


def show_figures() -> None:
    """Show the figures that a cell has left open, as a notebook would."""
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        for number in pyplot.get_fignums():
            plots = importlib.import_module("benchtop.plots")
            image = base64.b64encode(plots.png(pyplot.figure(number))).decode()
            display({"image/png": image, "text/plain": "[figure]"})


def so_far() -> None:
    """Tell the log the time, the machine and the memory after each cell; the last such line counts."""
    import torch

    import benchtop

    cuda = torch.cuda.is_initialized()
    emit(
        "end",
        time=time.time(),
        device=torch.cuda.get_device_name() if cuda else processor(),
        python=platform.python_version(),
        torch=torch.__version__,
        benchtop=benchtop.__version__,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        cuda_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )


@functools.cache
def processor() -> str:
    """What the machine calls its processor, and how many cores it has."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.M)
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# ---- the record ----


def read_log(log: Path) -> list[dict[str, Any]]:
    """Entries that the chapter emitted; a line torn by a dying process is left out."""
    entries = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def record_entry(job: Job, log: list[dict[str, Any]], peak: int) -> dict[str, Any]:
    """The record of a finished run. Raises Failed if the chapter did not take the parameter."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "kind"} for line in log if line["kind"] == kind]

    profiles, claims = of("profile"), of("claim")
    if {said["name"] for said in profiles} != {job.profile}:
        used = " and ".join(said["name"] for said in profiles) or "none"
        raise Failed(
            f"{job.profile!r} was asked for and {used} was used: the set-up needs profile = bt.Profile(profile)"
        )
    begin, end = of("begin")[0], of("end")[-1]
    return {
        "key": job.key,
        "parameters": parameters(job.profile),
        "outcome": min((claim["outcome"] for claim in claims), key=WORST_FIRST.index, default="not measured"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(end["time"] - profiles[0]["started"], 1),
        "import_seconds": round(profiles[0]["started"] - begin["time"], 1),
        "peak_bytes": end["cuda_bytes"] or max(peak, end["peak_bytes"]),
        **{name: end[name] for name in ("device", "python", "torch", "benchtop")},
        "data": {line["name"]: line["checksum"] for line in of("data")},
        "claims": claims,
        "tuning": of("tuning"),
        "fits": of("fit"),
    }
