"""What happens on a worker: a chapter comes as bytes, an executed notebook and a record entry go back."""

import base64
import contextlib
import datetime
import json
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import platformdirs
import psutil

from benchtop.publish import warm
from benchtop.publish.chapter import BYTES, SECONDS, Chapter
from benchtop.report import LOG

START = 60  # seconds for imports, which the budget does not count
PATIENCE = 4  # a chapter is ended at this multiple of its budget; `benchtop check` judges the budget itself
ORDER = ("fails", "open", "holds")  # the outcome of a chapter is the first of these among its claims


@dataclass(frozen=True)
class Job:
    """One chapter to run, complete: a worker shares no disk with the runner."""

    slug: str
    profile: str
    files: dict[str, bytes]  # path in the book -> content: the chapter first, then the chapters whose technique it uses
    key: str
    kernel: bool = True
    threads: int | None = None
    seconds: float = 0.0  # ended after this many, imports included
    bytes: int = 0  # ended beyond this much memory

    @classmethod
    def of(cls, chapter: Chapter, profile: str, **options: Any) -> "Job":
        root = chapter.path.parents[2]
        lean = nbformat.from_dict(chapter.notebook)
        for cell in lean.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        files = {str(chapter.path.relative_to(root)): nbformat.writes(lean).encode()}
        files |= {str(other.path.relative_to(root)): other.path.read_bytes() for other in chapter.borrows()}
        options = {"seconds": START + PATIENCE * SECONDS[profile], "bytes": 2 * BYTES[profile]} | options
        return cls(chapter.slug, profile, files, chapter.key(profile, parameters(profile)), **options)


@dataclass
class Result:
    """What came of a job. ``error`` is empty or one line; ``traceback`` holds its last lines."""

    slug: str
    profile: str
    seconds: float = 0.0  # from the arrival of the job to its end
    entry: dict[str, Any] | None = None
    outputs: list[list[Any]] | None = None  # of each code cell, in order
    error: str = ""
    cell: int | None = None  # number among the code cells, as in [7]
    traceback: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # log.txt, executed.ipynb, figure-1.png, ...


class Failed(Exception):
    """A chapter did not run through."""

    def __init__(self, error: str, cell: int | None = None, lines: list[str] | None = None):
        super().__init__(error)
        self.error, self.cell, self.lines = error, cell, lines or []


def parameters(profile: str) -> dict[str, Any]:
    """What papermill injects."""
    return {"profile": profile}


def run_folder(slug: str, profile: str) -> Path:
    """Where the log, the executed notebook and the figures of a chapter's last run are kept."""
    return Path(platformdirs.user_cache_dir("benchtop")) / "runs" / f"{slug}-{profile}"


# ---- one chapter ----

_local = threading.local()  # a worker's thread keeps its server, and with it the imports, from chapter to chapter


def execute(job: Job) -> Result:
    """Run one chapter to its end, whatever that is; never raises for what a chapter does."""
    started = time.monotonic()
    result = Result(job.slug, job.profile)
    announce(job)
    try:
        with tempfile.TemporaryDirectory(prefix="benchtop-", ignore_cleanup_errors=True) as folder:
            run(job, Path(folder), result)
    except Failed as failure:
        result.error, result.cell, result.traceback = failure.error, failure.cell, failure.lines
    except Exception as error:  # a full disk, a missing package: this chapter fails, the others go on
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
        result.traceback = traceback.format_exc().splitlines()
    result.seconds = time.monotonic() - started
    return result


def announce(job: Job) -> None:
    """Tell the runner that the chapter has begun."""
    with contextlib.suppress(ValueError, ImportError):  # outside a Dask worker
        from distributed import get_worker

        get_worker().log_event("benchtop", {"slug": job.slug, "profile": job.profile})


def run(job: Job, folder: Path, result: Result) -> None:
    """Unpack a job in an empty folder, execute it and fill in the result. Raises Failed."""
    server = forking_server(job.threads)
    for name, content in job.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    chapter = Chapter(folder / next(iter(job.files)))
    if chapter.key(job.profile, parameters(job.profile)) != job.key:
        raise Failed(
            "the bench of this worker is not the runner's: install one version on both; if it was edited just now, run again"
        )
    if not chapter.cells("parameters"):
        raise Failed('no parameters cell: tag the cell `profile = "laptop"` with "parameters"')
    log, kept = folder / "log.jsonl", run_folder(job.slug, job.profile)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    watch = Watch(job)
    environment = {LOG: str(log), "BENCHTOP_BOOK": str(folder), "IPYTHONDIR": str(folder / "ipython")}

    def start(what: str, **arguments: str) -> warm.Process:
        process = server.start(what, log=kept / "log.txt", cwd=chapter.path.parent, env=environment, **arguments)
        watch.begin(process)
        return process

    try:
        if job.kernel:
            result.outputs = in_kernel(job, chapter, folder, kept, start)
        else:
            in_plain_python(job, chapter, folder, kept, start, log)
    except Failed as failure:
        raise (Failed(watch.reason, failure.cell) if watch.reason else failure) from None
    finally:
        watch.end()
        result.files = {path.name: path.read_bytes() for path in kept.iterdir()}
    result.entry = entry(job, read_log(log), watch.peak)


def forking_server(threads: int | None) -> warm.Server:
    """This thread's forking process; a new one if the old one has gone."""
    if getattr(_local, "server", None) is None or not warm.FORK or not _local.server.alive():
        _local.server = warm.Server(threads)
    return _local.server


def in_kernel(job: Job, chapter: Chapter, folder: Path, kept: Path, start: Callable[..., warm.Process]) -> list[Any]:
    """Execute with papermill in a Jupyter kernel; the outputs of each of the author's code cells."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError, strip_color

    class Forked(LocalProvisioner):
        """Kernels are forked from imports that are done, whatever kernel the notebook names."""

        async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
            self.process = start("kernel", connection=self.parent.connection_file)
            return self.connection_info

    sockets = {"transport": "ipc", "ip": f"{folder}/k"}  # ports can clash between kernels that start together
    manager = AsyncKernelManager(connection_file=f"{folder}/kernel.json", kernel_name="python3", **sockets)
    manager.provisioner = kernel = Forked(kernel_id=job.slug, kernel_spec=manager.kernel_spec, parent=manager)
    notebook = nbformat.from_dict(chapter.notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(warm.GOODBYE))
    nbformat.write(notebook, folder / "in.ipynb")
    done = kept / "executed.ipynb"
    with open(kept / "log.txt", "a", encoding="utf-8") as text:
        try:
            papermill.execute_notebook(
                folder / "in.ipynb", done, parameters(job.profile), km=manager, kernel_name="python3", language="python",
                cwd=chapter.path.parent, progress_bar=False, stdout_file=text, stderr_file=text, coalesce_streams=True,
            )  # fmt: skip
        except PapermillExecutionError as error:
            lines = strip_color("\n".join(error.traceback)).splitlines()
            print(*lines, sep="\n", file=text)
            line = f"{error.ename}: {error.evalue}".splitlines()[0]
            raise Failed(line, last_started(done), lines) from None
        except (DeadKernelError, RuntimeError) as error:  # RuntimeError: it died before it could answer
            if kernel.process is None or (status := kernel.process.poll()) is None:
                raise
            raise Failed(f"the kernel died{why(status)}", last_started(done), str(error).splitlines()) from None
        finally:
            if kernel.process:
                kernel.process.kill()  # at once: all that the chapter had to say is said
                kernel.process.wait(10)
    code = [cell for cell in nbformat.read(done, as_version=4).cells if is_own_code(cell)]
    return [cell.outputs for cell in code[:-1]]


def is_own_code(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])


def last_started(done: Path) -> int | None:
    """The number of the cell that papermill began last, among the author's code cells."""
    cells = filter(is_own_code, nbformat.read(done, as_version=4).cells) if done.exists() else []
    return max((n for n, cell in enumerate(cells, 1) if cell.metadata.papermill.start_time), default=None)


def why(status: int) -> str:
    return " of signal 9, which is often lack of memory" if status == -9 else f" with exit status {status}"


def in_plain_python(
    job: Job, chapter: Chapter, folder: Path, kept: Path, start: Callable[..., warm.Process], log: Path
) -> None:
    """Execute the cells one after the other in a plain process; its text and figures are kept."""
    sources = [cell.source for cell in chapter.cells()]
    place = next(i for i, cell in enumerate(chapter.cells()) if "parameters" in cell.metadata.get("tags", []))
    sources[place] += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters(job.profile).items())
    (folder / "cells.json").write_text(json.dumps([*sources, warm.GOODBYE]), encoding="utf-8")
    status = start("plain", cells=str(folder / "cells.json")).wait()
    lines = read_log(log)
    images = [line["image/png"] for line in lines if line["kind"] == "display" and "image/png" in line]
    for number, image in enumerate(images, 1):
        (kept / f"figure-{number}.png").write_bytes(base64.b64decode(image))
    if status:
        trace = next((line["lines"] for line in lines if line["kind"] == "error"), [])
        cell = max((line["number"] for line in lines if line["kind"] == "cell"), default=None)
        raise Failed(trace[-1] if trace else f"the process died{why(status)}", cell, trace)


# ---- while it runs ----


class Watch(threading.Thread):
    """Measures the memory of a chapter's processes and ends them when time, memory or the runner is gone."""

    def __init__(self, job: Job):
        super().__init__(daemon=True)
        self.job, self.process, self.reason, self.peak = job, None, "", 0
        self._over = threading.Event()
        self._cancelled = cancelled_on_dask()

    def begin(self, process: warm.Process) -> None:
        self.process, self._deadline = process, time.monotonic() + self.job.seconds
        self.start()

    def end(self) -> None:
        self._over.set()
        if self.process:
            self.process.kill()
            self.join()

    def run(self) -> None:
        while not self._over.wait(0.2):
            used = tree_bytes(self.process.pid)
            self.peak = max(self.peak, used)
            if time.monotonic() > self._deadline:
                self.reason = f"ended after {self.job.seconds:g} s: its time limit"
            elif used > self.job.bytes:
                self.reason = f"ended at {used / 1e9:.1f} GB of memory: its limit is {self.job.bytes / 1e9:.1f} GB"
            elif self._cancelled():
                self.reason = "ended: the runner has gone"
            if self.reason:
                self.process.kill()
                return


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants; pages they share count for each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def cancelled_on_dask():
    """A function that says whether nobody waits any more for the task that runs in this thread."""
    try:
        from distributed import get_worker

        worker = get_worker()
        key = worker.get_current_task()
    except (ImportError, ValueError, AttributeError):
        return lambda: False
    return lambda: (task := worker.state.tasks.get(key)) is None or task.state not in ("executing", "long-running")


# ---- the record ----


def read_log(log: Path) -> list[dict[str, Any]]:
    """Entries that the chapter emitted; a line torn by a dying process is left out."""
    entries = []
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def entry(job: Job, log: list[dict[str, Any]], peak: int) -> dict[str, Any]:
    """The record entry of a finished run."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "kind"} for line in log if line["kind"] == kind]

    profiles, ends = of("profile"), of("end")
    if not profiles:
        raise Failed("the chapter never made its Profile: the set-up needs `profile = bt.Profile(profile)`")
    for said in profiles:
        if said["name"] != job.profile:
            raise Failed(f"the chapter ran in profile {said['name']!r}, asked was {job.profile!r}: do not set it twice")
    end, claims = ends[-1], of("claim")
    outcomes = {claim["outcome"] for claim in claims}
    return {
        "key": job.key,
        "parameters": parameters(job.profile),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "outcome": next((word for word in ORDER if word in outcomes), "not measured"),
        "seconds": round(end["time"] - profiles[0]["started"], 2),
        "import_seconds": round(profiles[0]["started"] - log_start(log), 2),
        "peak_bytes": end["cuda_bytes"] or max(peak, end["peak_bytes"]),
        **{name: end[name] for name in ("device", "python", "torch", "benchtop")},
        "data": {line["name"]: line["checksum"] for line in of("data")},
        "claims": claims,
        "fits": of("fit"),
        "tuning": of("tuning"),
    }


def log_start(log: list[dict[str, Any]]) -> float:
    return next(line["time"] for line in log if line["kind"] == "begin")
