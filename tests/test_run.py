"""The runner on small books made here: what it keeps, and each fault caused on purpose."""

import base64
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from benchtop.publish import run as runner
from benchtop.publish import warm, worker
from benchtop.publish.chapter import Book, BookError, Chapter
from benchtop.publish.run import Progress, run

pytestmark = pytest.mark.slow

SETUP = "import os, signal, subprocess, time\nimport benchtop as bt\nprofile = bt.Profile(profile)"
CLAIM = (
    'bt.Claim("small", paper="none").at_most([0.1, 0.2, 0.3, 0.1, 0.2, 0.15, 0.25, 0.12], 1.0, seeds=range(100, 108))'
)


def write(root, slug, *cells, setup=SETUP, parameters=("parameters",)):
    """A small chapter; its cells [1] and [2] are parameters and set-up."""
    tagged = [
        new_code_cell('profile = "laptop"', metadata={"tags": list(parameters)}),
        new_code_cell(setup, metadata={"tags": ["setup"]}),
    ]
    notebook = new_notebook(
        cells=[new_markdown_cell("# Title"), *tagged, *map(new_code_cell, cells)],
        metadata={"benchtop": {"slug": slug}, "kernelspec": {"name": "of-somebody-else", "display_name": "?"}},
    )
    path = root / "book" / "part" / f"{slug}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return Chapter(path)


def make_book(root: Path) -> Book:
    (root / "book" / "records").mkdir(parents=True)
    (root / "_config.yml").write_text("repository: {url: https://example.org/a/b}\n")
    return Book(root)


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")  # as under `make test`: the parameter must win over it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return make_book(tmp_path)


def start(book: Book, *arguments: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """``benchtop run`` in a process group of its own, and a word by which all its processes can be found."""
    mark = uuid.uuid4().hex
    env = os.environ | {"BENCHTOP_TEST": mark, "XDG_CACHE_HOME": str(book.root / "cache")} | environment
    command = [sys.executable, "-m", "benchtop.publish.cli", "run", *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=book.root, env=env, text=True, start_new_session=True, **output), mark


def living(mark: str) -> list[psutil.Process]:
    """Processes that descend from the run with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("BENCHTOP_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(condition, seconds: float = 60) -> float:
    """Wait until the condition holds; the seconds it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begin


# ---- one run in which everything happens at once ----

HUNGRY = "food = bytearray(900_000_000)\nfood[::4096] = b'x' * len(food[::4096])\ntime.sleep(60)"
KILL_WORKER = """
if not os.path.exists({flag!r}):
    open({flag!r}, "w").close()
    os.kill(int(open(f"/proc/{{os.getppid()}}/status").read().split("PPid:")[1].split()[0]), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Ten chapters, eight of them ill, run together on two workers."""
    root = tmp_path_factory.mktemp("everything")
    book, patch = make_book(root), pytest.MonkeyPatch()
    write(root, "good", "print(6 * 7)", 'data = bt.load("digits")', CLAIM)
    write(root, "raises", "x = 1", "def f():\n    return 1 / 0\nf()", CLAIM)
    write(root, "hangs", "time.sleep(100)")
    write(root, "dies", "os.kill(os.getpid(), signal.SIGKILL)")
    write(root, "hungry", HUNGRY)
    write(root, "deaf", CLAIM, setup='import benchtop as bt\nbt.Profile("laptop")')
    write(root, "untagged", CLAIM, parameters=())
    write(root, "unparsable", "this is no Python")
    edited = write(root, "edited", CLAIM)
    change = f'open({str(edited.path)!r}, "a").write(" ")'
    write(root, "edited", change, CLAIM)
    write(root, "fells-worker", KILL_WORKER.format(flag=str(root / "flag")), CLAIM)
    litter = "print(subprocess.Popen(['sleep', '1000']).pid)"
    write(root, "litters", f'{litter}\nopen({str(root / "litter")!r}, "w").write(str(os.getpid()))', CLAIM)
    (root / "book" / "part" / "torn.ipynb").write_text('{"cells": [')
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    patch.setattr(worker, "START", 10)
    patch.setattr(worker, "PATIENCE", 0)  # so that every chapter has 10 s
    patch.setattr(worker, "BYTES", worker.BYTES | {"smoke": 400_000_000})  # a chapter is ended at twice that
    files = {path: path.read_bytes() for path in root.glob("book/part/*")}
    lines = []
    summary = run(book, book.select(), "smoke", jobs=2, say=Progress(lines.append))
    patch.undo()
    return {"book": book, "root": root, "summary": summary, "lines": lines, "files": files}


@pytest.mark.parametrize(("slug", "cell", "words"), [
    ("raises", 4, "ZeroDivisionError: division by zero"),
    ("hangs", 3, "ended after 10 s: its time limit"),
    ("dies", 3, "the kernel died of signal 9, which is often lack of memory"),
    ("hungry", 3, "GB of memory: its limit is 0.8 GB"),
    ("deaf", None, "the chapter ran in profile 'laptop', asked was 'smoke'"),
    ("untagged", None, 'no parameters cell: tag the cell `profile = "laptop"` with "parameters"'),
    ("unparsable", None, "unparsable.ipynb, code cell 3, line 1 is not Python: invalid syntax"),
    ("edited", None, "the notebook was edited while it ran: run it again"),
    ("torn", None, "torn.ipynb is not a notebook: restore it with `git checkout"),
])  # fmt: skip
def test_a_fault_is_named_with_its_cell_and_nothing_is_kept_of_it(everything, slug, cell, words):
    (row,) = [row for row in everything["summary"].failed if row["slug"] == slug]
    assert words in row["error"]
    assert row["cell"] == cell
    assert not (everything["root"] / "book" / "records" / f"{slug}.json").exists()


def test_the_others_go_on_and_smoke_leaves_every_notebook_alone(everything):
    summary, files = everything["summary"], everything["files"]
    assert sorted(row["slug"] for row in summary.ran) == ["fells-worker", "good", "litters"]
    assert len(summary.failed) == 9
    assert all(path.read_bytes() == before for path, before in files.items() if path.stem != "edited")
    assert {path.stem for path in everything["root"].glob("book/records/*")} == {"fells-worker", "good", "litters"}


def test_the_report_shows_chapter_cell_last_lines_of_the_traceback_and_the_log(everything):
    text = "\n".join(everything["lines"])
    assert "raises: FAILED in cell [4]: ZeroDivisionError: division by zero" in text
    assert "    ----> 2     return 1 / 0" in text.replace("→", ">")
    (row,) = [row for row in everything["summary"].failed if row["slug"] == "raises"]
    assert "ZeroDivisionError" in Path(row["log"]).read_text()
    executed = nbformat.read(Path(row["log"]).with_name("executed.ipynb"), as_version=4)
    assert executed.cells[-1].source == warm.GOODBYE
    assert "3 run, 0 fresh, 9 failed: " in str(everything["summary"])


def test_a_chapter_whose_worker_is_killed_runs_again_elsewhere(everything):
    assert (everything["root"] / "flag").exists()
    assert "fells-worker" in {row["slug"] for row in everything["summary"].ran}


def test_what_a_chapter_leaves_running_ends_with_it(everything):
    kernel = int((everything["root"] / "litter").read_text())
    log = everything["root"] / "cache" / "benchtop" / "runs" / "litters-smoke" / "log.txt"
    sleeper = int(log.read_text().split()[0])
    assert not {kernel, sleeper} & set(psutil.pids())


def test_the_record_of_a_run(everything):
    entry = everything["book"].chapters()["good"].record("smoke")
    assert entry["outcome"] == entry["claims"][0]["outcome"] == "not measured"
    assert entry["parameters"] == {"profile": "smoke"}
    assert set(entry["data"]) == {"digits"}
    assert 0 < entry["seconds"] < 20
    assert 50e6 < entry["peak_bytes"] < 2e9
    assert entry["key"] == everything["book"].chapters()["good"].key("smoke")
    assert {"date", "import_seconds", "device", "python", "torch", "benchtop", "fits", "tuning"} <= set(entry)


# ---- what is kept ----


def test_a_laptop_run_stores_outputs_and_nothing_else(book):
    chapter = write(book.root, "good", "print('a')\nprint('b')", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", CLAIM)  # fmt: skip
    before = nbformat.read(chapter.path, as_version=4)
    summary = run(book, book.select(), "laptop")
    assert [row["outcome"] for row in summary.ran] == ["holds"]
    after = nbformat.read(chapter.path, as_version=4)
    assert [output.text for output in after.cells[3].outputs] == ["a\nb\n"]
    assert "image/png" in after.cells[4].outputs[0].data, "an open figure is shown, as in any kernel"
    for cell in after.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert after == before
    assert Chapter(chapter.path).status("laptop") == "fresh"
    assert run(book, book.select(), "laptop").fresh == ["good"]
    stored = chapter.path.read_bytes()
    run(book, book.select(), "laptop", everything=True)
    assert len(chapter.path.read_bytes()) == len(stored), "a second run changes outputs only"


def test_without_jupyter_the_same_record_and_the_figures(book, tmp_path):
    """On a machine where no part of Jupyter can be imported."""
    block = tmp_path / "block"
    block.mkdir()
    names = ["ipykernel", "IPython", "jupyter_client", "nbclient", "papermill", "zmq.eventloop"]
    (block / "sitecustomize.py").write_text(f"import sys\nfor name in {names}: sys.modules[name] = None\n")
    figure = 'import matplotlib.pyplot as plt\nbt.show(plt.figure(), alt="nothing")\nplt.plot([1, 2])'
    classes = "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n6 * 7"
    chapter = write(book.root, "good", "%matplotlib inline\n" + classes, figure, CLAIM)
    write(book.root, "raises", "def f():\n    return 1 / 0", "f()")
    before = chapter.path.read_bytes()
    process, _ = start(book, "--profile", "laptop", "--no-kernel", "--json", PYTHONPATH=str(block))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    (failed,) = json.loads(output)["failed"]
    assert (failed["cell"], failed["error"]) == (4, "ZeroDivisionError: division by zero")
    assert "    return 1 / 0" in failed["traceback"]
    entry = Chapter(chapter.path).record("laptop")
    assert (entry["outcome"], entry["claims"][0]["n"], entry["parameters"]) == ("holds", 8, {"profile": "laptop"})
    assert chapter.path.read_bytes() == before
    kept = book.root / "cache" / "benchtop" / "runs" / "good-laptop"
    assert "42\n" in (kept / "log.txt").read_text()
    assert "holds: small" in (kept / "log.txt").read_text()
    pictures = sorted(kept.glob("figure-*.png"))
    assert len(pictures) == 3, "one shown, one left open, the claim's forest plot"
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_borrowed_technique_travels_along_and_counts_for_freshness(book):
    lender = write(book.root, "lender", 'raise RuntimeError("only the technique of this chapter is wanted")')
    notebook = lender.notebook
    notebook.cells.append(new_code_cell("def answer():\n    return 42", metadata={"tags": ["technique"]}))
    nbformat.write(notebook, lender.path)
    write(book.root, "borrower", 'print(bt.technique("lender").answer())', CLAIM)
    assert [c.slug for c in book.select(["borrower"])[0].borrows()] == ["lender"]
    assert not run(book, book.select(["borrower"]), "smoke").failed
    assert book.select(["borrower"])[0].status("smoke") == "fresh"
    notebook.cells[-1].source = "def answer():\n    return 43"
    nbformat.write(notebook, lender.path)
    assert book.select(["borrower"])[0].status("smoke") == "stale"


def test_a_worker_with_another_version_of_the_bench_says_so(book):
    job = worker.Job.of(write(book.root, "good", CLAIM), "smoke")
    result = worker.execute(worker.Job(**(vars(job) | {"key": "of another version"})))
    assert result.error.startswith("the bench of this worker is not the runner's: install one version on both")


# ---- full disk, torn files, two runs at once ----


def test_a_full_disk_leaves_the_old_files_and_fails_the_chapter(book, monkeypatch):
    """The limit on the size of files makes the system refuse the write, as a full disk does."""
    chapter = write(book.root, "good", "print('x' * 400_000)", CLAIM)
    chapter.save_record("smoke", {"key": "old"})
    before, old = chapter.path.read_bytes(), chapter.record_path.read_bytes()
    keep, limits = runner.keep, resource.getrlimit(resource.RLIMIT_FSIZE)

    def keep_on_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, limits[1]))
        try:
            keep(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(runner, "keep", keep_on_a_full_disk)
    summary = run(book, book.select(), "laptop")
    (row,) = summary.failed
    assert "nothing written, the old files stand: [Errno 27] File too large" in row["error"]
    assert (chapter.path.read_bytes(), chapter.record_path.read_bytes()) == (before, old)
    assert not list(book.root.glob("book/**/.*")), "no half-written file is left"


def test_two_runs_of_one_chapter_do_not_mix_and_two_of_different_chapters_do(book):
    for slug in ("one", "two"):
        write(book.root, slug, CLAIM)
    with runner.lock(book, book.select(["one"])):
        with pytest.raises(BookError, match=rf"one is being run by process {os.getpid()} on .*: wait for it or end it"):
            run(book, book.select(), "smoke")
        with runner.lock(book, book.select(["two"])):
            pass
    with runner.lock(book, book.select()):
        pass


# ---- the end of the runner ----


@pytest.mark.parametrize("moment", ["at the start", "first chapter runs", "some have finished"])
def test_a_killed_runner_tears_nothing_leaves_nothing_and_goes_on_where_it_was(book, moment):
    for slug in ("a", "b", "c"):
        write(book.root, slug, "print('some text')", "time.sleep(1)", CLAIM)
    process, mark = start(book, "--profile", "laptop", "--jobs", "1")
    records = book.root / "book" / "records"
    if moment == "at the start":
        time.sleep(1.0)
    elif moment == "first chapter runs":
        until(lambda: list(book.root.glob("cache/benchtop/runs/*/executed.ipynb")))
    else:
        until(lambda: list(records.glob("[abc].json")))
    process.kill()
    process.wait()
    until(lambda: not living(mark), 15)
    for chapter in book.select():
        chapter.notebook.cells  # noqa: B018  (raises if torn)
        chapter.records()
    finished = [chapter.slug for chapter in book.select() if chapter.status("laptop") == "fresh"]
    assert bool(finished) == (moment == "some have finished")
    assert run(book, book.select(), "laptop", jobs=1).fresh == finished
    assert {chapter.status("laptop") for chapter in book.select()} == {"fresh"}


@pytest.mark.parametrize("whom", ["the runner", "everybody in the terminal"])
def test_ctrl_c_stops_within_five_seconds_and_ends_the_kernels(book, whom):
    write(book.root, "slow", "time.sleep(100)")
    write(book.root, "waits", "time.sleep(100)")
    process, mark = start(book, "--profile", "smoke", "--jobs", "1")
    until(lambda: list(book.root.glob("cache/benchtop/runs/*/executed.ipynb")))
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGINT) if whom == "the runner" else os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - begin < 5
    until(lambda: not living(mark), 5 - (time.monotonic() - begin))
    assert process.returncode == 130
    assert "0 run, 0 fresh, 0 failed, 2 not run" in output
    assert "Traceback" not in errors


# ---- other machines ----


@pytest.fixture
def scheduler(tmp_path):
    """A Dask scheduler whose workers share neither folder nor cache with the book; yields a function to add workers."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(home / "cache"), "HOME": str(home)}
    environment.pop("BENCHTOP_BOOK", None)
    started = []

    def dask(*arguments):
        command = [sys.executable, "-m", "dask", *arguments]
        log = open(home / f"{len(started)}.log", "w")  # noqa: SIM115  (closed with the process)
        started.append(subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log))

    file = home / "scheduler.json"
    dask("scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    until(file.exists)
    until(lambda: file.read_text().endswith("}"))
    address = json.loads(file.read_text())["address"]
    yield address, lambda *options: dask("worker", address, "--nthreads", "1", "--no-dashboard", *options)
    for process in started[::-1]:
        for child in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()


def test_a_cluster_that_shares_no_disk_and_one_chapter_for_each_gpu(book, scheduler, tmp_path):
    address, add_worker = scheduler
    add_worker("--name", "with-gpu", "--resources", "GPU=1")
    add_worker("--name", "without")
    for slug in ("a", "b", "c"):
        write(book.root, slug, "print(os.getcwd())\nprint(time.time())\ntime.sleep(1)\nprint(time.time())", CLAIM)
    summary = run(book, book.select(), "laptop", scheduler=address, resources={"GPU": 1})
    assert (len(summary.ran), summary.jobs) == (3, 1)
    spans = []
    for chapter in book.select():
        here, begin, end = chapter.notebook.cells[3].outputs[0].text.split()
        assert not here.startswith(str(book.root))
        spans.append((float(begin), float(end)))
    spans.sort()
    assert all(a[1] < b[0] for a, b in zip(spans, spans[1:])), "one chapter at a time on the one GPU"
    assert "holds" in (book.root / "cache/benchtop/runs/a-laptop/log.txt").read_text(), "logs come back too"


def test_chapters_end_when_a_runner_of_a_cluster_is_killed(book, scheduler):
    address, add_worker = scheduler
    add_worker()
    pid = book.root / "pid"
    write(book.root, "slow", f'open({str(pid)!r}, "w").write(str(os.getpid()))\ntime.sleep(100)')
    process, _ = start(book, "--profile", "smoke", "--scheduler", address)
    until(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    until(lambda: not psutil.pid_exists(int(pid.read_text())), 20)


def test_an_address_without_a_scheduler_is_named(book):
    write(book.root, "good", CLAIM)
    with pytest.raises(BookError, match="no Dask scheduler at tcp://127.0.0.1:9: start one with `dask scheduler`"):
        run(book, book.select(), "smoke", scheduler="tcp://127.0.0.1:9")


# ---- pieces ----


def test_a_warm_server_takes_its_chapter_along(tmp_path):
    cells = tmp_path / "cells.json"
    cells.write_text(json.dumps(["import time", "time.sleep(100)"]))
    server = warm.Server(1)
    process = server.start("plain", log=tmp_path / "log", cwd=tmp_path, env={}, cells=str(cells))
    assert process.poll() is None
    assert psutil.Process(process.pid).num_threads() >= 1
    server.process.kill()
    until(lambda: not psutil.pid_exists(process.pid), 5)
    assert process.wait(5) == -signal.SIGKILL
    assert not server.alive()
    with pytest.raises(RuntimeError, match="the process that starts chapters has ended"):
        server.start("plain", log=tmp_path / "log", cwd=tmp_path, env={}, cells=str(cells))


def test_a_forking_server_has_one_thread(tmp_path):
    """A fork copies the calling thread only; locks that others hold would never be released."""
    cells = tmp_path / "cells.json"
    cells.write_text("[]")
    server = warm.Server(1)
    assert server.start("plain", log=tmp_path / "log", cwd=tmp_path, env={}, cells=str(cells)).wait(10) == 0
    assert psutil.Process(server.process.pid).num_threads() == 1
    server.close()


def test_outcome_of_a_chapter_is_the_worst_of_its_claims(book):
    job = worker.Job.of(write(book.root, "good", CLAIM), "laptop")
    end = {"kind": "end", "time": 12.0, "device": "d", "python": "p", "torch": "t", "benchtop": "b"}
    log = [{"kind": "begin", "time": 9.0}, {"kind": "profile", "name": "laptop", "started": 10.0}]
    log += [end | {"peak_bytes": 5, "cuda_bytes": None}]
    for outcomes, overall in [(["holds", "open"], "open"), (["open", "fails", "holds"], "fails"), ([], "not measured")]:
        entry = worker.entry(job, log + [{"kind": "claim", "outcome": o} for o in outcomes], peak=7)
        assert entry["outcome"] == overall
        assert (entry["seconds"], entry["import_seconds"], entry["peak_bytes"]) == (2.0, 1.0, 7)
    on_gpu = [*log[:-1], end | {"peak_bytes": 5, "cuda_bytes": 9}]
    assert worker.entry(job, on_gpu, peak=7)["peak_bytes"] == 9
    with pytest.raises(worker.Failed, match="never made its Profile"):
        worker.entry(job, log[:1], peak=0)


def test_pictures_in_the_log_of_a_plain_run_are_not_text(tmp_path, monkeypatch, capsys):
    from benchtop import report

    monkeypatch.setenv(report.LOG, str(tmp_path / "log"))
    report.display({"image/png": base64.b64encode(b"picture").decode(), "text/plain": "[figure: x]"})
    assert capsys.readouterr().out == "[figure: x]\n"
    assert base64.b64decode(worker.read_log(tmp_path / "log")[0]["image/png"]) == b"picture"
