"""Execute chapters and keep what they measured: in parallel processes, one record a run, nothing lost when killed."""

import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat

import benchtop
from benchtop.publish.chapter import BookError, Chapter, write_atomically
from benchtop.report import LOG

WORST_FIRST = ("fails", "open", "holds", "not measured")
KILL_AFTER = {"smoke": 120, "laptop": 600, "gpu": 1800}  # seconds a cell may take before its kernel is ended


@dataclass(frozen=True)
class Result:
    """How the run of one chapter ended; ``error`` is one line, empty when it went well."""

    slug: str
    seconds: float
    outcome: str = ""
    error: str = ""


def run(chapters: Sequence[Chapter], profile: str, *, everything: bool = False, jobs: int = 1) -> Iterator[Result]:
    """Execute the chapters whose record is missing or stale (all with ``everything``); yield results as they end.

    Each chapter has a process and a kernel of its own, with its share of the cores. A chapter that fails leaves its old
    record and notebook as they were, and the others go on.
    """
    todo = [c for c in chapters if everything or c.status(profile) != "fresh"]
    threads = max(1, (os.cpu_count() or 1) // jobs) if profile != "smoke" else 1
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        pending = {pool.submit(run_one, chapter.path, profile, threads): chapter for chapter in todo}
        for future in as_completed(pending):
            try:
                yield future.result()
            except Exception as error:  # the process itself died: out of memory, killed
                yield Result(pending[future].slug, 0.0, error=f"its process died: {error}")


def run_one(path: Path, profile: str, threads: int) -> Result:
    """Execute one chapter in this process's kernel and write its record; laptop runs renew the stored outputs too."""
    chapter, started = Chapter(path), time.time()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.pop("BENCHTOP_PROFILE", None)  # the parameter decides here, and the run checks that it did
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        os.environ[LOG] = str(log)
        try:
            key = chapter.key(profile)  # before the run: a file edited meanwhile makes the result stale, as it should
            executed = execute(chapter, profile, Path(folder))
            entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            entry = record_entry(entries, profile, key, started)
        except BookError as error:
            return Result(chapter.slug, time.time() - started, error=str(error))
    if profile == "laptop":
        write_atomically(path, nbformat.writes(executed) + "\n")
    chapter.save_record(profile, entry)
    return Result(chapter.slug, entry["seconds"], entry["outcome"])


def execute(chapter: Chapter, profile: str, folder: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs and no trace of papermill. Raises BookError that names the failing cell."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    if len(chapter.cells("parameters")) != 1:
        raise BookError(f'{chapter.slug} needs exactly one cell tagged "parameters" that says profile = "laptop"')
    target = folder / "executed.ipynb"
    try:
        papermill.execute_notebook(
            chapter.path, target, {"profile": profile}, kernel_name="python3", language="python", progress_bar=False, log_output=False,
            cwd=chapter.path.parent, execution_timeout=KILL_AFTER[profile],
        )  # fmt: skip
    except PapermillExecutionError as error:
        last = str(error.evalue).strip().splitlines()
        raise BookError(f"{chapter.slug} cell {error.cell_index}: {error.ename}: {last[0] if last else ''}") from None
    except Exception as error:  # a kernel that died or ran out of time; nbclient has several classes for them
        raise BookError(f"{chapter.slug}: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from None
    return clean(nbformat.read(target, as_version=4), chapter.notebook)


def clean(executed: nbformat.NotebookNode, original: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The original with the new outputs: a second run changes outputs only."""
    cells = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    fresh = nbformat.from_dict(original)
    for old, new in zip(fresh.cells, cells):
        if old.cell_type == "code":
            old.outputs, old.execution_count = new.outputs, None
            for output in old.outputs:
                if "execution_count" in output:
                    output["execution_count"] = None
    return fresh


def record_entry(entries: list[dict[str, Any]], profile: str, key: str, started: float) -> dict[str, Any]:
    """The record of a run from its log. Raises BookError if the notebook did not take the parameter."""
    profiles = [e for e in entries if e["kind"] == "profile"]
    if [p["name"] for p in profiles[-1:]] != [profile]:
        used = profiles[-1]["name"] if profiles else "none"
        raise BookError(
            f"profile {profile!r} was asked for and {used} was used: the set-up needs profile = bt.Profile(profile)"
        )
    import torch

    def of(kind: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == kind]

    outcomes = [c["outcome"] for c in of("claim")]
    device = torch.cuda.get_device_name() if profile == "gpu" else platform.processor() or platform.machine()
    return {
        "key": key,
        "outcome": min(outcomes, key=WORST_FIRST.index, default="not measured"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - profiles[0]["started"], 1),
        "import_seconds": round(profiles[0]["started"] - started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "benchtop": benchtop.__version__,
        "data": {d["name"]: d["checksum"] for d in of("data")},
        "claims": of("claim"),
        "tuning": of("tuning"),
        "fits": of("fit"),
    }
