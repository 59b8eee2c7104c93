"""Run the chapters that need it, on this machine or on a cluster, and keep what they bring."""

import contextlib
import copy
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import nbformat

from benchtop.publish.chapter import Book, BookError, Chapter, write_atomically
from benchtop.publish.worker import Job, Result, execute, run_folder


@dataclass
class Summary:
    """What one call of `run` did; ``--json`` prints it."""

    profile: str
    jobs: int
    ran: list[dict[str, Any]] = field(default_factory=list)  # slug, seconds, outcome, ...
    fresh: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)  # slug, error, cell, traceback, log
    left: list[str] = field(default_factory=list)  # not run, because the run was interrupted
    wall: float = 0.0
    chapter_seconds: float = 0.0

    def __str__(self) -> str:
        speed = f", {self.chapter_seconds / self.wall:.1f} x as fast as one after the other" if self.ran else ""
        left = f", {len(self.left)} not run" if self.left else ""
        return (
            f"{len(self.ran)} run, {len(self.fresh)} fresh, {len(self.failed)} failed{left}: "
            f"{self.wall:.1f} s for {self.chapter_seconds:.1f} s of chapters{speed}"
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
    say: "Progress | None" = None,
) -> Summary:
    """Execute the stale and missing chapters (all for ``everything``) and write records; outputs under ``laptop``.

    ``scheduler``: address of a Dask cluster; else a local one of ``jobs`` processes. Ctrl-C ends it within seconds; what
    has finished by then is kept. Raises BookError if another run holds one of the chapters.
    """
    started = time.monotonic()
    say = say or Progress()
    summary = Summary(profile, 0)
    with lock(book, chapters):
        todo = []
        for chapter in chapters:
            try:
                if not everything and chapter.status(profile) == "fresh":
                    summary.fresh.append(chapter.slug)
                else:
                    todo.append((expected(chapter, profile), chapter, chapter.path.read_bytes()))
                    chapter.notebook  # noqa: B018  (a file that is no notebook fails here)
            except BookError as error:
                todo = [item for item in todo if item[1] is not chapter]
                fail(summary, say, Result(chapter.slug, profile, error=str(error)))
        todo.sort(key=lambda item: -item[0])  # the longest first: nothing long is left for the end
        if todo:
            cores = os.cpu_count() or 1
            width = min(jobs or (1 if profile == "gpu" else cores), len(todo))
            with cluster(width, scheduler, say) as client:
                _run(client, todo, profile, summary, say, kernel=kernel, resources=resources,
                     threads=None if scheduler else max(1, cores // width))  # fmt: skip
    summary.wall = time.monotonic() - started
    return summary


def _run(client, todo, profile, summary, say, *, resources, **options) -> None:
    """Keep every worker busy with one chapter until none is left."""
    from distributed import wait

    say.begin(sum(item[0] for item in todo), len(todo))
    client.subscribe_topic("benchtop", lambda event: say.started(event[1]["slug"]))
    waiting, running = todo[::-1], {}
    try:
        while waiting or running:
            places = slots(client, resources)
            summary.jobs = max(summary.jobs, places)
            while waiting and len(running) < places:
                _, chapter, before = waiting.pop()
                try:
                    job = Job.of(chapter, profile, **options)
                except BookError as error:
                    fail(summary, say, Result(chapter.slug, profile, error=str(error)))
                    continue
                future = client.submit(
                    execute, job, key=("chapter", chapter.slug, time.time()), resources=resources, pure=False
                )
                running[future] = (chapter, before)
            with contextlib.suppress(TimeoutError):
                if running:
                    wait(list(running), timeout=0.5, return_when="FIRST_COMPLETED")
                else:
                    time.sleep(0.5)
            for future in [future for future in running if future.done()]:
                chapter, before = running.pop(future)
                keep(chapter, before, outcome(future, chapter, profile), summary, say)
            say.tick()
    except KeyboardInterrupt:
        summary.left = [item[1].slug for item in waiting] + [chapter.slug for chapter, _ in running.values()]
        for future in running:
            future.cancel()
    finally:
        say.end()


def outcome(future, chapter: Chapter, profile: str) -> Result:
    """The result of a finished task; a task that lost too many workers is a failure like any other."""
    try:
        return future.result(timeout=30)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Result(chapter.slug, profile, error=f"lost with its worker: {text}")


def slots(client, resources: dict[str, float] | None) -> int:
    """How many chapters can run at once: one a worker, or as many as its resources allow."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not resources:
        return len(workers)
    return sum(int(min(w["resources"].get(name, 0) // need for name, need in resources.items())) for w in workers)


def expected(chapter: Chapter, profile: str) -> float:
    """Seconds a chapter took last time, 0 if unknown."""
    entry = chapter.record(profile) or {}
    return entry.get("seconds", 0) + entry.get("import_seconds", 0)


# ---- keeping results ----


def keep(chapter: Chapter, before: bytes, result: Result, summary: Summary, say: "Progress") -> None:
    """Write what a finished chapter brought, the record last: only it makes the chapter fresh."""
    summary.chapter_seconds += result.seconds
    try:
        for name, content in result.files.items():
            path = run_folder(chapter.slug, result.profile) / name
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)
        if not result.error:
            if chapter.path.read_bytes() != before:
                result.error = "the notebook was edited while it ran: run it again"
            else:
                if result.profile == "laptop" and result.outputs is not None:
                    write_atomically(chapter.path, with_outputs(chapter.notebook, result.outputs))
                chapter.save_record(result.profile, result.entry)
    except (OSError, BookError) as error:
        result.error = f"nothing written, the old files stand: {error}"
    if result.error:
        fail(summary, say, result)
    else:
        entry = result.entry
        row = {"slug": result.slug, "wall": round(result.seconds, 2)}
        row |= {name: entry[name] for name in ("outcome", "seconds", "import_seconds", "peak_bytes", "device")}
        summary.ran.append(row)
        say.done(result.slug, f"{entry['outcome']}, {entry['seconds']:.1f} s, {entry['peak_bytes'] / 1e9:.2f} GB")


def with_outputs(notebook: nbformat.NotebookNode, outputs: list[list[Any]]) -> str:
    """The author's notebook with these outputs: nothing else of the run goes into the file."""
    notebook = copy.deepcopy(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, made in zip(code, outputs, strict=True):
        cell.execution_count = None  # a cell that is added leaves the others as they were
        cell.outputs = [nbformat.from_dict(output) for output in made]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
    return nbformat.writes(notebook) + "\n"


def fail(summary: Summary, say: "Progress", result: Result) -> None:
    log = run_folder(result.slug, result.profile) / "log.txt"
    row = {"slug": result.slug, "error": result.error, "cell": result.cell, "traceback": result.traceback[-6:]}
    summary.failed.append(row | {"log": str(log) if log.exists() else None})
    say.failed(summary.failed[-1])


# ---- one run at a time ----


@contextlib.contextmanager
def lock(book: Book, chapters: list[Chapter]) -> Iterator[None]:
    """Hold these chapters: two runs of one book may go on side by side, but never with one chapter in both.

    The system lets go of a lock when its process ends, however it ends.
    """
    folder = book.root / "_build" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        for chapter in chapters:
            file = held.enter_context(open(folder / chapter.slug, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BookError(
                    f"{chapter.slug} is being run by {file.read() or 'another run'}: wait for it or end it"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%H:%M:%S')}")
            file.flush()
        yield


# ---- the cluster ----


@contextlib.contextmanager
def cluster(width: int, scheduler: str | None, say: "Progress") -> Iterator[Any]:
    """A Dask client of the cluster at ``scheduler``, or of ``width`` local processes that end with this one."""
    import dask
    from distributed import Client, LocalCluster

    dask.config.set({"distributed.admin.log-length": 100, "distributed.comm.timeouts.connect": "10s"})
    if scheduler:
        try:
            with Client(scheduler, timeout=10) as client:
                yield client
        except OSError as error:
            raise BookError(f"no Dask scheduler at {scheduler}: start one with `dask scheduler` ({error})") from None
        return
    local = LocalCluster(
        n_workers=width, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None, silence_logs=50
    )
    client = Client(local)
    try:
        yield client
    finally:
        shut = threading.Thread(target=lambda: (client.close(3), local.close(3)), daemon=True)
        shut.start()
        shut.join(4)


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
    """A line for each chapter that ends, and on a terminal one line below them that tells how far the run is."""

    def __init__(self, write: Callable[[str], Any] | None = None):
        self.stream, self.write = sys.stderr, write
        self.live = write is None and self.stream.isatty()
        self.running: dict[str, float] = {}
        self.total = self.ended = self.failures = 0
        self.walls: list[float] = []

    def begin(self, seconds: float, chapters: int) -> None:
        self.total, self.start = chapters, time.monotonic()

    def started(self, slug: str) -> None:
        self.running[slug] = time.monotonic()

    def done(self, slug: str, text: str) -> None:
        self._ended(slug)
        self.line(f"[{self.ended}/{self.total}] {slug}: {text}{self.eta()}")

    def failed(self, row: dict[str, Any]) -> None:
        self._ended(row["slug"])
        self.failures += 1
        cell = f" in cell [{row['cell']}]" if row["cell"] else ""
        self.line(f"[{self.ended}/{self.total}] {row['slug']}: FAILED{cell}: {row['error']}")
        for line in row["traceback"]:
            self.line(f"    {line}")
        if row["log"]:
            self.line(f"    log: {row['log']}")

    def _ended(self, slug: str) -> None:
        self.ended += 1
        if slug in self.running:
            self.walls.append(time.monotonic() - self.running.pop(slug))

    def eta(self) -> str:
        """How long the rest will take at the pace so far."""
        rest = self.total - self.ended
        if not self.walls or not rest:
            return ""
        seconds = rest * (time.monotonic() - self.start) / max(1, self.ended)
        return (
            f", {rest} to go, about {seconds / 60:.0f} min"
            if seconds >= 90
            else f", {rest} to go, about {seconds:.0f} s"
        )

    def tick(self) -> None:
        if self.live:
            now = time.monotonic()
            running = ", ".join(f"{slug} {now - since:.0f} s" for slug, since in list(self.running.items())[:6])
            text = f"{self.ended}/{self.total} done, {self.failures} failed; running {running}{self.eta()}"
            print(f"\r\033[K{text[: os.get_terminal_size().columns - 1]}", end="", file=self.stream, flush=True)

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=self.stream, flush=True)

    def line(self, text: str) -> None:
        if self.write:
            self.write(text)
        else:
            print(f"\r\033[K{text}" if self.live else text, file=self.stream, flush=True)
