"""Run the chapters that need it, on this machine or on a cluster, and keep what they bring."""

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from benchtop.publish.chapter import MEMORY, Book, BookError, Chapter, write_atomically
from benchtop.publish.worker import Job, Result, execute, one_line, parameters

KILL_AFTER = {"smoke": 120, "laptop": 600, "gpu": 1800}  # seconds; `benchtop check` judges the budgets themselves
KILL_BEYOND = 2  # times the budget of memory
LAST_LINES = 6  # of a traceback
QUIET = {  # Dask's self-observation would take a tenth of a core from the chapters
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
}


@dataclass
class Summary:
    """What one call of `run` did; ``--json`` prints it."""

    profile: str
    jobs: int = 0  # the most chapters that ran at once
    ran: list[dict[str, Any]] = field(default_factory=list)  # slug, outcome, seconds, ...
    fresh: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)  # slug, error, cell, traceback, log
    left: list[str] = field(default_factory=list)  # not run: the run was interrupted
    wall: float = 0.0
    chapter_seconds: float = 0.0  # from arrival to end, imports included

    def __str__(self) -> str:
        left = f", {len(self.left)} not run" if self.left else ""
        return (
            f"{len(self.ran)} run, {len(self.fresh)} fresh, {len(self.failed)} failed{left}; {self.wall:.1f} s for "
            f"{self.chapter_seconds:.1f} s of chapters: speed-up {self.chapter_seconds / max(self.wall, 1e-9):.1f}"
        )


def run(
    book: Book,
    chapters: list[Chapter],
    profile: str,
    *,
    everything: bool = False,
    jobs: int | None = None,
    scheduler: str | None = None,
    resources: dict[str, float] | None = None,
    kernel: bool = True,
    progress: "Progress | None" = None,
) -> Summary:
    """Execute the stale and missing chapters (all for ``everything``) and write records; outputs under ``laptop``.

    ``scheduler``: address of a Dask cluster; else ``jobs`` chapters at once here (default: one a core, one for gpu).
    ``resources``: what a chapter takes of a worker. ``kernel=False``: in plain Python, notebooks are not touched.
    Ctrl-C ends it within seconds and keeps what has finished. Raises BookError if another run holds the book.
    """
    started, progress, summary = time.monotonic(), progress or Progress(), Summary(profile)
    todo: list[tuple[float, Chapter]] = []
    with lock(book):
        for chapter in chapters:
            try:
                if not everything and chapter.status(profile) == "fresh":
                    summary.fresh.append(chapter.slug)
                else:
                    chapter.key(profile)  # of a corrupt notebook there is none
                    todo.append((seconds_last_time(chapter, profile), chapter))
            except BookError as error:
                fail(book, summary, progress, Result(chapter.slug, profile, error=str(error)))
        todo.sort(key=lambda item: item[0])  # from its end: the longest first, nothing long is left for the end
        if todo:
            cores = os.cpu_count() or 1
            width = min(jobs or (1 if profile == "gpu" else cores), len(todo))
            limits = {"seconds": KILL_AFTER[profile], "memory": KILL_BEYOND * MEMORY[profile] * 1e9}
            threads = 1 if profile == "smoke" else 2 if scheduler else max(1, cores // width)
            options = {"threads": threads, "kernel": kernel} | limits
            with cluster(width, scheduler, resources) as client:
                run_all(client, book, [chapter for _, chapter in todo], summary, progress, resources, options)
    summary.wall = time.monotonic() - started
    return summary


def run_all(client, book, waiting, summary, progress, resources, options) -> None:
    """Keep every worker busy with one chapter until none is left."""
    from distributed import wait

    running: dict[Any, Chapter] = {}
    progress.begin(len(waiting))
    try:
        while waiting or running:
            places = slots(client, resources)
            summary.jobs = max(summary.jobs, min(places, len(waiting) + len(running)))
            while waiting and len(running) < places:
                job = Job.of(chapter := waiting.pop(), summary.profile, **options)
                name = f"{chapter.slug}-{uuid.uuid4().hex}"
                running[client.submit(execute, job, key=name, resources=resources, pure=False)] = chapter
            progress.tick([chapter.slug for chapter in running.values()])
            if running:
                with contextlib.suppress(TimeoutError):
                    wait(list(running), timeout=1, return_when="FIRST_COMPLETED")
            else:
                time.sleep(1)  # workers may come yet
            for future in [future for future in running if future.done()]:
                chapter = running.pop(future)
                keep(book, chapter, result_of(future, chapter, summary.profile), summary, progress)
    except (KeyboardInterrupt, OSError) as error:  # OSError: the scheduler has gone
        summary.left = sorted(chapter.slug for chapter in [*waiting, *running.values()])
        progress.line("interrupted" if isinstance(error, KeyboardInterrupt) else f"no scheduler any more: {error}")
        with contextlib.suppress(OSError):
            client.cancel(list(running), force=True)


def result_of(future: Any, chapter: Chapter, profile: str) -> Result:
    """The result of a finished task; a chapter that has lost too many workers is a failure like any other."""
    try:
        return future.result(timeout=60)
    except Exception as error:
        return Result(chapter.slug, profile, error=f"lost with its worker: {one_line(error)}")


def slots(client: Any, resources: dict[str, float] | None) -> int:
    """How many chapters can run at once: one a worker, or as many as the resources of all workers allow."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not resources:
        return len(workers)
    return sum(int(min(w["resources"].get(name, 0) // need for name, need in resources.items())) for w in workers)


def seconds_last_time(chapter: Chapter, profile: str) -> float:
    return (chapter.record(profile) or {}).get("seconds", float("inf"))


# ---- keeping results ----


def keep(book: Book, chapter: Chapter, result: Result, summary: Summary, progress: "Progress") -> None:
    """Write what a finished chapter brought, the record last: only it makes the chapter fresh."""
    summary.chapter_seconds += result.seconds
    try:
        for name, content in result.files.items():
            write_atomically(log_folder(book, result) / name, content)
        if not result.error:
            now = Chapter(chapter.path)  # its prose may have been edited meanwhile
            if now.key(result.profile, parameters(result.profile)) != result.entry["key"]:
                result.error = "the notebook was edited while it ran: run it again"
            else:
                if result.profile == "laptop" and "executed.ipynb" in result.files:
                    executed = nbformat.reads(result.files["executed.ipynb"].decode(), as_version=4)
                    write_atomically(chapter.path, nbformat.writes(with_outputs(now.notebook, executed)) + "\n")
                now.save_record(result.profile, result.entry)
    except (OSError, BookError) as error:
        result.error = f"not kept, the old files stand: {error}"
    if result.error:
        fail(book, summary, progress, result)
    else:
        names = ("outcome", "seconds", "import_seconds", "peak_bytes", "device")
        summary.ran.append(row := {"slug": result.slug} | {name: result.entry[name] for name in names})
        memory = row["peak_bytes"] / 1e9
        progress.ended(f"{row['slug']}: {row['outcome']}, {row['seconds']:.1f} s, {memory:.2f} GB")


def with_outputs(notebook: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The author's notebook with these outputs: a second run changes outputs only, and no trace of papermill."""
    fresh = nbformat.from_dict(notebook)
    made = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    pairs = zip(*([cell for cell in cells if cell.cell_type == "code"] for cells in (fresh.cells, made)), strict=True)
    for number, (cell, done) in enumerate(pairs, 1):
        cell.outputs, cell.execution_count = done.outputs, number  # nbval asks for a number where there are outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number
    return fresh


def log_folder(book: Book, result: Result) -> Path:
    """Where log, executed notebook and figures of a chapter's last run are kept."""
    return book.root / "_build" / "runs" / result.profile / result.slug


def fail(book: Book, summary: Summary, progress: "Progress", result: Result) -> None:
    log = log_folder(book, result) / "log.txt"
    row = {"slug": result.slug, "error": result.error, "cell": result.cell, "traceback": result.traceback[-LAST_LINES:]}
    summary.failed.append(row | {"log": str(log) if result.files and log.exists() else None})
    where = f"cell {result.cell}: " if result.cell else ""
    lines = [*row["traceback"], *([f"log: {log}"] if summary.failed[-1]["log"] else [])]
    progress.ended(f"{result.slug}: FAILED, {where}{result.error}", lines, failed=True)


@contextlib.contextmanager
def lock(book: Book) -> Iterator[None]:
    """Hold the book: one run at a time. The system lets go of the lock when its process ends, however it ends."""
    path = book.root / "_build" / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise BookError(f"this book is being run by {holder}: wait for it or end it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%H:%M:%S')}")
        file.flush()
        yield


# ---- the cluster ----


@contextlib.contextmanager
def cluster(width: int, scheduler: str | None, resources: dict[str, float] | None) -> Iterator[Any]:
    """A Dask client of the cluster at ``scheduler``, or of ``width`` workers in this process.

    Local workers are threads: what a chapter computes is in a process of its own anyway, and its imports are shared.
    """
    import dask
    from distributed import Client, LocalCluster

    dask.config.set({"distributed.comm.timeouts.connect": "10s", **QUIET})
    if scheduler:
        try:
            client, local = Client(scheduler, timeout=10), None
        except OSError as error:
            raise BookError(f"no Dask scheduler at {scheduler}: start one with `dask scheduler` ({error})") from None
    else:
        local = LocalCluster(
            n_workers=width, threads_per_worker=1, processes=False, memory_limit=0, resources=resources or {},
            dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0", silence_logs=50,
        )  # fmt: skip
        client = Client(local)

    def close() -> None:
        for one in filter(None, (client, local)):
            with contextlib.suppress(OSError, TimeoutError):
                one.close(2)

    try:
        yield client
    finally:
        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(1.5)  # Ctrl-C is to end the run within 5 s


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A request to end (SIGTERM) counts as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- what one sees ----


class Progress:
    """A line for each chapter that ends; on a terminal, one line below them that tells how far the run is."""

    def __init__(self, write: Callable[[str], Any] | None = None):
        self.write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self.live = write is None and sys.stderr.isatty()
        self.total = self.done = self.failures = 0
        self.start = time.monotonic()

    def begin(self, chapters: int) -> None:
        self.total, self.start = chapters + self.done, time.monotonic()

    def line(self, text: str) -> None:
        self.write(("\r\033[K" if self.live else "") + text)

    def ended(self, text: str, details: list[str] | None = None, failed: bool = False) -> None:
        self.done, self.failures = self.done + 1, self.failures + failed
        self.line(f"{text} [{self.done}/{max(self.total, self.done)}{self.rest()}]")
        for detail in details or []:
            self.line(f"    {detail}")

    def rest(self) -> str:
        """How long the chapters that are left will take at the pace so far."""
        left = self.total - self.done
        if not self.done or left <= 0:
            return ""
        seconds = left * (time.monotonic() - self.start) / self.done
        return f", about {seconds / 60:.0f} min to go" if seconds >= 90 else f", about {seconds:.0f} s to go"

    def tick(self, running: list[str]) -> None:
        if self.live:
            names = ", ".join(running[:5]) + (f" and {len(running) - 5} more" if len(running) > 5 else "")
            text = (
                f"{self.done}/{self.total} done, {self.failures} failed{self.rest()}; running {names or 'nothing yet'}"
            )
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\033[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
