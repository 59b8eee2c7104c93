"""The runner on small books made here: freshness, records, and each fault caused on purpose."""

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
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from benchtop import report
from benchtop.publish import run as runner
from benchtop.publish import worker
from benchtop.publish.chapter import SECONDS, Book, BookError, Chapter, bare_code, used_modules, write_atomically
from benchtop.publish.run import Progress, Summary, run

SETUP = "import os, signal, subprocess, time\nimport benchtop as bt\nprofile = bt.Profile(profile)"
CLAIM = (
    'bt.Claim("small", paper="none").at_most([0.1, 0.2, 0.3, 0.1, 0.2, 0.15, 0.25, 0.12], 1.0, seeds=range(100, 108))'
)


def write(root, slug, *cells, setup=SETUP, parameters=("parameters",)):
    """A small chapter: title, parameters and set-up are cells 1 to 3 of the page."""
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# Title"),
            new_code_cell('profile = "laptop"', metadata={"tags": list(parameters)}),
            new_code_cell(setup, metadata={"tags": ["setup"]}),
            *map(new_code_cell, cells),
        ],
        metadata={"benchtop": {"slug": slug}, "kernelspec": {"name": "of-somebody-else", "display_name": "?"}},
    )
    path = root / "book" / "part" / f"{slug}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return Chapter(path)


def make_book(root: Path) -> Book:
    (root / "book" / "part").mkdir(parents=True)
    (root / "_config.yml").write_text("repository: {url: https://example.org/a/b}\n")
    return Book(root)


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHTOP_PROFILE", "smoke")  # as under `make test`: the parameter must win over it
    monkeypatch.chdir(tmp_path)
    return make_book(tmp_path)


def command(book: Book, *arguments: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """``benchtop`` in a process group of its own, and a word by which all its processes can be found."""
    mark = uuid.uuid4().hex
    words = [sys.executable, "-m", "benchtop.publish.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(words, cwd=book.root, env=os.environ | {"MARK": mark} | environment, **pipes), mark


def living(mark: str) -> list[psutil.Process]:
    """Processes that descend from the command with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# ---- freshness ----


def test_prose_comments_and_docstrings_do_not_make_a_chapter_stale(tmp_path):
    one = write(tmp_path, "one", 'def f():\n    """Doc."""\n    return 1  # why\n').key("laptop")
    assert write(tmp_path, "one", "def f():\n\n    return 1").key("laptop") == one
    assert write(tmp_path, "one", "def f():\n    return 2").key("laptop") != one
    assert write(tmp_path, "one", "def f():\n    return 1").key("smoke") != one
    assert bare_code('x = "# no comment"  # comment\n') == 'x = "# no comment"'


def test_the_key_covers_helpers_through_one_another_and_data(tmp_path, monkeypatch):
    from benchtop import data
    from benchtop.publish import chapter as module

    through = set(used_modules("import benchtop as bt\nbt.Claim"))
    assert {"benchtop.claims", "benchtop.plots", "benchtop.report"} <= through
    assert "benchtop.train" not in used_modules("import benchtop as bt\nbt.show")
    chapter = write(tmp_path, "one", "bt.show", 'data = bt.load("digits")')
    before, digest = chapter.key("laptop"), module.module_digest
    monkeypatch.setattr(module, "module_digest", lambda m: "changed" if m == "benchtop.report" else digest(m))
    assert module.Chapter(chapter.path).key("laptop") != before  # read anew: one object keeps what it knows
    monkeypatch.setattr(module, "module_digest", digest)
    monkeypatch.setattr(data, "checksums", lambda names: dict.fromkeys(names, "other"))
    assert module.Chapter(chapter.path).key("laptop") != before


def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- one run in which everything goes wrong at once ----

HUNGRY = "food = bytearray(900_000_000)\nfood[::4096] = b'x' * len(food[::4096])\ntime.sleep(60)"


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Eleven chapters, nine of them ill, run together, two at a time."""
    root = tmp_path_factory.mktemp("everything")
    book, patch, lines = make_book(root), pytest.MonkeyPatch(), []
    patch.setenv("BENCHTOP_PROFILE", "laptop")  # the parameter must win over it
    write(root, "good", "print(6 * 7)", 'data = bt.load("digits")', CLAIM)
    write(root, "raises", "x = 1", "def f():\n    return 1 / 0\nf()", CLAIM)
    write(root, "dies", "os.kill(os.getpid(), signal.SIGKILL)")
    write(root, "hungry", HUNGRY)
    write(root, "deaf", CLAIM, setup='import benchtop as bt\nbt.Profile("laptop")')
    write(root, "silent", "1", setup="")
    write(root, "untagged", CLAIM, parameters=())
    write(root, "unparsable", "this is no Python")
    edited = write(root, "edited", CLAIM)
    change = (
        f"import pathlib\np = pathlib.Path({str(edited.path)!r})\np.write_text(p.read_text().replace('1.0', '2.0'))"
    )
    write(root, "edited", change, CLAIM)
    sleeper = "child = subprocess.Popen(['sleep', '1000'])\nprint(os.getpid(), child.pid)"
    write(root, "litters", sleeper, CLAIM)
    (root / "book" / "part" / "torn.ipynb").write_text('{"cells": [')
    files = {path: path.read_bytes() for path in root.glob("book/part/*")}
    patch.setattr(runner, "MEMORY", {"smoke": 0.45})  # GB; a chapter is ended at twice that
    summary = run(book, book.select(), "smoke", jobs=2, progress=Progress(lines.append))
    patch.undo()
    return {"book": book, "root": root, "summary": summary, "lines": lines, "files": files}


@pytest.mark.parametrize(("slug", "cell", "words"), [
    ("raises", 5, "ZeroDivisionError: division by zero"),
    ("dies", 4, "the kernel died of signal 9, which is often lack of memory"),
    ("hungry", 4, "GB of memory, the limit is 0.9 GB"),
    ("deaf", None, "'smoke' was asked for and laptop was used: the set-up needs profile = bt.Profile(profile)"),
    ("silent", None, "'smoke' was asked for and none was used"),
    ("untagged", None, 'it needs exactly one cell tagged "parameters" that says profile = "laptop"'),
    ("unparsable", None, "unparsable.ipynb cell 4 is not Python: invalid syntax"),
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
    assert sorted(row["slug"] for row in summary.ran) == ["good", "litters"]
    assert len(summary.failed) == 9
    assert all(path.read_bytes() == before for path, before in files.items() if path.stem != "edited")
    assert {path.stem for path in everything["root"].glob("book/records/*")} == {"good", "litters"}
    assert "2 run, 0 fresh, 9 failed; " in str(summary)
    assert summary.jobs == 2


def test_the_report_shows_chapter_cell_last_lines_of_the_traceback_and_the_log(everything):
    text = "\n".join(everything["lines"])
    assert "raises: FAILED, cell 5: ZeroDivisionError: division by zero [" in text
    assert "    ----> 2     return 1 / 0" in text
    (row,) = [row for row in everything["summary"].failed if row["slug"] == "raises"]
    assert len(row["traceback"]) == runner.LAST_LINES
    assert f"    log: {row['log']}" in text
    assert "ZeroDivisionError" in Path(row["log"]).read_text()
    executed = nbformat.read(Path(row["log"]).with_name("executed.ipynb"), as_version=4)
    assert any(output.output_type == "error" for cell in executed.cells for output in cell.get("outputs", []))


def test_what_a_chapter_leaves_running_ends_with_it(everything):
    log = everything["root"] / "_build" / "runs" / "smoke" / "litters" / "log.txt"
    kernel, sleeper = map(int, log.read_text().split()[:2])
    assert gone(kernel) and gone(sleeper)


def test_the_record_of_a_run(everything):
    chapter = everything["book"].chapters()["good"]
    entry = chapter.record("smoke")
    assert entry["outcome"] == entry["claims"][0]["outcome"] == "not measured"
    assert entry["parameters"] == {"profile": "smoke"}
    assert set(entry["data"]) == {"digits"}
    assert 0 < entry["seconds"] < 60
    assert 50e6 < entry["peak_bytes"] < 2e9
    assert entry["key"] == chapter.key("smoke", entry["parameters"])
    assert {"date", "import_seconds", "device", "python", "torch", "benchtop", "fits", "tuning"} <= set(entry)


def test_a_chapter_past_its_time_limit_is_ended(book, monkeypatch):
    monkeypatch.setattr(runner, "KILL_AFTER", {"smoke": 3})
    write(book.root, "hangs", "time.sleep(100)")
    begin = time.monotonic()
    (row,) = run(book, book.select(), "smoke").failed
    assert row["error"] == "ended after 3 s, the time a smoke run may take at most"
    assert time.monotonic() - begin < 60


# ---- what is kept ----


def test_a_laptop_run_stores_outputs_and_nothing_else(book):
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    chapter = write(book.root, "good", "print('a')\nprint('b')", figure, CLAIM)
    before = nbformat.read(chapter.path, as_version=4)
    summary = run(book, book.select(), "laptop")
    assert [row["outcome"] for row in summary.ran] == ["holds"], summary.failed
    after = nbformat.read(chapter.path, as_version=4)
    assert [output.text for output in after.cells[3].outputs] == ["a\nb\n"]
    assert "image/png" in after.cells[4].outputs[0].data, "an open figure is shown, as in any kernel"
    code = [cell for cell in after.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "nbval asks for the numbers"
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    assert after == before
    assert Chapter(chapter.path).status("laptop") == "fresh"
    assert run(book, book.select(), "laptop").fresh == ["good"]


def test_prose_that_is_edited_while_a_chapter_runs_is_kept(book):
    chapter = write(book.root, "good", "print(1)", CLAIM)
    job = worker.Job.of(chapter, "laptop", threads=1, seconds=60, memory=4e9)
    executed = nbformat.from_dict(chapter.notebook)
    executed.cells[3].outputs = [new_output("stream", text="1\n")]
    files = {"executed.ipynb": nbformat.writes(executed).encode()}
    entry = dict.fromkeys(("outcome", "device"), "x") | {"seconds": 1, "import_seconds": 1, "peak_bytes": 1}
    chapter.path.write_text(chapter.path.read_text().replace("# Title", "# Another title"))
    result = worker.Result("good", "laptop", entry=entry | {"key": job.key}, files=files)
    runner.keep(book, chapter, result, summary := Summary("laptop"), Progress(lambda line: None))
    assert not summary.failed
    cells = nbformat.read(chapter.path, as_version=4).cells
    assert (cells[0].source, cells[3].outputs[0].text) == ("# Another title", "1\n")


def test_without_jupyter_the_same_record_and_the_figures(book, tmp_path):
    """On a machine where no part of Jupyter that runs anything can be imported."""
    (tmp_path / "block").mkdir()
    names = ["ipykernel", "IPython", "jupyter_client", "nbclient", "papermill", "matplotlib_inline"]
    (tmp_path / "block" / "sitecustomize.py").write_text(f"import sys\nfor n in {names}: sys.modules[n] = None\n")
    figure = 'import matplotlib.pyplot as plt\nbt.show(plt.figure(), alt="nothing")\nplt.plot([1, 2])'
    classes = "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n6 * 7"
    chapter = write(book.root, "good", "%matplotlib inline\n" + classes, figure, CLAIM)
    write(book.root, "raises", "def f():\n    return 1 / 0", "f()")
    before = chapter.path.read_bytes()
    path = os.pathsep.join([str(tmp_path / "block"), os.environ.get("PYTHONPATH", "")])
    words = ["run", "--profile", "laptop", "--no-kernel", "--json", "--jobs", "1"]
    process, _ = command(book, *words, PYTHONPATH=path, MPLBACKEND="")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    (failed,) = json.loads(output)["failed"]
    assert (failed["cell"], failed["error"]) == (5, "ZeroDivisionError: division by zero")
    assert "    return 1 / 0" in failed["traceback"]
    entry = Chapter(chapter.path).record("laptop")
    assert (entry["outcome"], entry["claims"][0]["n"], entry["parameters"]) == ("holds", 8, {"profile": "laptop"})
    assert chapter.path.read_bytes() == before
    kept = book.root / "_build" / "runs" / "laptop" / "good"
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
    job = worker.Job.of(write(book.root, "good", CLAIM), "smoke", threads=1, seconds=60, memory=4e9)
    result = worker.execute(worker.Job(**(vars(job) | {"key": "of another version"})))
    assert result.error.startswith("the benchtop of this worker is not the runner's: install one version on both")


def test_threads_are_the_share_of_the_cores(book, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    text = "import torch\nprint(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    for slug in ("one", "two"):
        write(book.root, slug, text, CLAIM)
    run(book, book.select(), "laptop", jobs=2)
    for chapter in book.select():
        assert chapter.notebook.cells[3].outputs[0].text == "3 3\n"


# ---- full disk, torn files, two runs at once ----


def test_a_full_disk_leaves_the_old_files_and_fails_the_chapter(book, monkeypatch):
    """The limit on the size of files makes the system refuse the write, as a full disk does."""
    chapter = write(book.root, "good", "print('some words\\n' * 40_000)", CLAIM)
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
    (row,) = run(book, book.select(), "laptop").failed
    assert "not kept, the old files stand: [Errno 27] File too large" in row["error"]
    assert (chapter.path.read_bytes(), chapter.record_path.read_bytes()) == (before, old)
    assert not list(book.root.glob("book/**/.*")), "no half-written file is left"


def test_two_runs_of_one_book_do_not_mix(book):
    write(book.root, "one", CLAIM)
    with runner.lock(book):
        process, _ = command(book, "run", "--profile", "smoke")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"benchtop: this book is being run by process {os.getpid()} on ")
    assert errors.endswith("wait for it or end it\n")
    with runner.lock(book):
        pass


# ---- the end of the runner ----


def die_while_keeping(root: str, result: worker.Result, step: int) -> None:
    """Keep a result in a process that is killed at its n-th step with a file; exit status 0 if there are fewer."""
    left = [step]

    def counted(function):
        def call(*arguments):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments)

        return call

    os.fsync, os.replace, os.fdopen = counted(os.fsync), counted(os.replace), counted(os.fdopen)
    (chapter,) = Book(Path(root)).select()
    runner.keep(Book(Path(root)), chapter, result, Summary("laptop"), Progress(lambda line: None))


def test_a_runner_killed_at_any_step_of_writing_tears_nothing(book):
    chapter = write(book.root, "good", "print(1)", CLAIM)
    executed = nbformat.from_dict(chapter.notebook)
    executed.cells[3].outputs = [new_output("stream", text="1\n")]
    entry = dict.fromkeys(("outcome", "device"), "x") | {"seconds": 1, "import_seconds": 1, "peak_bytes": 1}
    entry |= {"key": chapter.key("laptop", worker.parameters("laptop")), "parameters": worker.parameters("laptop")}
    files = {"executed.ipynb": nbformat.writes(executed).encode()}
    for step in range(20):
        process = worker.PROCESSES.Process(
            target=die_while_keeping, args=(str(book.root), worker.Result("good", "laptop", entry, files=files), step)
        )
        process.start()
        process.join(120)
        now = Chapter(chapter.path)
        assert now.source() == chapter.source()
        assert now.status("laptop") == ("missing" if process.exitcode else "fresh"), "a record only when all is done"
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    assert step == 9, "three files, three steps each"


def test_a_killed_runner_leaves_nothing_running_and_goes_on_where_it_was(book):
    for slug in ("a", "b", "c"):
        write(book.root, slug, "time.sleep(2)", CLAIM)
    process, mark = command(book, "run", "--profile", "laptop", "--jobs", "1")
    until(lambda: list(book.root.glob("book/records/[abc].json")))
    process.kill()
    process.wait()
    until(lambda: not living(mark), 15)
    finished = [chapter.slug for chapter in book.select() if chapter.status("laptop") == "fresh"]
    assert 1 <= len(finished) < 3
    summary = run(book, book.select(), "laptop", jobs=2)
    assert summary.fresh == finished
    assert {chapter.status("laptop") for chapter in book.select()} == {"fresh"}


def test_ctrl_c_stops_within_five_seconds_and_ends_the_kernels(book):
    flag = book.root / "flag"
    for slug in ("slow", "waits"):
        write(book.root, slug, f"open({str(flag)!r}, 'w').close()\ntime.sleep(100)")
    process, mark = command(book, "run", "--profile", "smoke", "--jobs", "1")
    until(flag.exists)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
    output, errors = process.communicate(timeout=20)
    until(lambda: not living(mark), 5)
    assert time.monotonic() - begin < 5
    assert process.returncode == 130
    assert "0 run, 0 fresh, 0 failed, 2 not run" in output
    assert "Traceback" not in errors


def test_a_request_to_end_counts_as_ctrl_c():
    with pytest.raises(KeyboardInterrupt), runner.interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- other machines ----


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Dask scheduler and two workers, one of them with a GPU, that share no folder with the book."""
    home = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"HOME": str(home)}
    environment.pop("BENCHTOP_BOOK", None)
    started = []

    def dask(*arguments):
        words = [sys.executable, "-m", "dask", *arguments]
        with open(home / f"{len(started)}.log", "w") as log:
            started.append(subprocess.Popen(words, cwd=home, env=environment, stdout=log, stderr=log))

    file = home / "scheduler.json"
    dask("scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    until(lambda: file.exists() and file.read_text().endswith("}"))
    address = json.loads(file.read_text())["address"]
    dask("worker", address, "--nthreads", "1", "--no-dashboard", "--name", "with-gpu", "--resources", "GPU=1")
    dask("worker", address, "--nthreads", "1", "--no-dashboard", "--name", "without")
    yield address
    for process in started[::-1]:
        for child in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()


def test_a_cluster_that_shares_no_disk_and_one_chapter_for_each_gpu(book, cluster):
    for slug in ("a", "b"):
        write(book.root, slug, "print(os.getcwd())\nprint(time.time())\ntime.sleep(1)\nprint(time.time())", CLAIM)
    summary = run(book, book.select(), "laptop", scheduler=cluster, resources={"GPU": 1})
    assert (len(summary.ran), summary.jobs) == (2, 1), summary.failed
    spans = []
    for chapter in book.select():
        here, begin, end = chapter.notebook.cells[3].outputs[0].text.split()
        assert not here.startswith(str(book.root))
        spans.append((float(begin), float(end)))
    (_, end), (begin, _) = sorted(spans)
    assert end < begin, "one chapter at a time on the one GPU"
    assert "holds" in (book.root / "_build/runs/laptop/a/log.txt").read_text(), "logs come back too"


def test_a_chapter_whose_worker_is_killed_runs_again_elsewhere(book, cluster):
    flag = book.root / "flag"
    kill = f"""if not os.path.exists({str(flag)!r}):
    import multiprocessing
    open({str(flag)!r}, "w").close()
    os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
    time.sleep(60)"""
    write(book.root, "fells-worker", kill, CLAIM)
    summary = run(book, book.select(), "smoke", scheduler=cluster)
    assert flag.exists()
    assert [row["slug"] for row in summary.ran] == ["fells-worker"], summary.failed


def test_chapters_on_a_cluster_end_when_their_runner_is_killed(book, cluster):
    pid = book.root / "pid"
    write(book.root, "slow", f'open({str(pid)!r}, "w").write(str(os.getpid()))\ntime.sleep(100)')
    process, _ = command(book, "run", "--profile", "smoke", "--scheduler", cluster)
    until(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    until(lambda: gone(int(pid.read_text())), 30)


# ---- pieces ----


def test_outcome_of_a_chapter_is_the_worst_of_its_claims():
    job = worker.Job("one", "laptop", {}, "key", seconds=1, memory=1, threads=1)
    end = {"kind": "end", "time": 12.0, "device": "d", "python": "p", "torch": "t", "benchtop": "b", "peak_bytes": 5}
    log = [{"kind": "begin", "time": 9.0}, {"kind": "profile", "name": "laptop", "started": 10.0}]
    for outcomes, overall in [(["holds", "open"], "open"), (["open", "fails", "holds"], "fails"), ([], "not measured")]:
        claims = [{"kind": "claim", "outcome": outcome} for outcome in outcomes]
        entry = worker.record_entry(job, [*log, end | {"cuda_bytes": None}, *claims], peak=7)
        assert entry["outcome"] == overall
        assert (entry["seconds"], entry["import_seconds"], entry["peak_bytes"]) == (2.0, 1.0, 7)
    assert worker.record_entry(job, [*log, end | {"cuda_bytes": 9}], peak=7)["peak_bytes"] == 9


def test_without_a_notebook_pictures_go_to_the_log_and_words_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(report.LOG, str(tmp_path / "log"))
    report.display({"image/png": base64.b64encode(b"picture").decode(), "text/plain": "[figure: x]"})
    assert capsys.readouterr().out == "[figure: x]\n"
    assert base64.b64decode(worker.read_log(tmp_path / "log")[0]["image/png"]) == b"picture"


def test_a_log_that_was_torn_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "log").write_text('{"kind": "cell"}\n{"kind": "ce')
    assert worker.read_log(tmp_path / "log") == [{"kind": "cell"}]


def test_progress_tells_how_long_the_rest_takes(monkeypatch):
    lines, clock = [], iter([0.0, 0.0, 10.0, 200.0, 300.0])
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    progress = Progress(lines.append)
    progress.begin(3)
    progress.ended("a: holds")
    progress.ended("b: FAILED", ["1 / 0"], failed=True)
    progress.ended("c: holds")
    words = ["a: holds [1/3, about 20 s to go]", "b: FAILED [2/3, about 2 min to go]", "    1 / 0", "c: holds [3/3]"]
    assert lines == words


# ---- the command ----


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "nowhere"], "unknown chapter or part 'nowhere'"),
    (["run", "--profile", "desktop"], "unknown profile 'desktop': expected one of smoke, laptop, gpu"),
    (["run", "--resource", "GPU"], "cannot read --resource GPU: expected NAME=NUMBER, such as GPU=1"),
    (["run", "--scheduler", "tcp://127.0.0.1:9"], "no Dask scheduler at tcp://127.0.0.1:9: start one with `dask schedu"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_1(book, arguments, words):
    write(book.root, "one", CLAIM)
    process, _ = command(book, *arguments)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert words in errors
    assert len(errors.splitlines()) == 1


def test_a_torn_notebook_and_a_place_without_a_book_are_named(book, tmp_path_factory):
    (book.root / "book" / "part" / "torn.ipynb").write_text('{"cells": [')
    with pytest.raises(BookError, match=r"torn\.ipynb is not a notebook"):
        book.chapters()["torn"].meta  # noqa: B018
    with pytest.raises(BookError, match="no book at or above"):
        Book.find(tmp_path_factory.mktemp("elsewhere"))


def test_list_shows_verdict_state_and_cost(book, capsys):
    from benchtop.publish.cli import app

    good, stale = write(book.root, "good", CLAIM), write(book.root, "stale", CLAIM)
    entry = {"outcome": "holds", "seconds": 12.5, "peak_bytes": 1_500_000_000, "date": "2026-01-01T00:00:00+00:00"}
    good.save_record("laptop", entry | {"key": good.key("laptop")})
    good.save_record("smoke", entry | {"key": good.key("smoke"), "outcome": "not measured"})
    stale.save_record("laptop", entry | {"key": "of another code"})
    write(book.root, "unrun", CLAIM)
    (book.root / "book" / "part" / "torn.ipynb").write_text('{"cells": [')
    app(["list", "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    states = [(row["slug"], row["profile"], row["verdict"], row["state"].split(":")[0]) for row in rows]
    assert states == [
        ("good", "smoke", "not measured", "fresh"),
        ("good", "laptop", "holds", "fresh"),
        ("stale", "laptop", "holds", "stale"),
        ("torn", "laptop", None, "broken"),
        ("unrun", "laptop", None, "missing"),
    ]
    assert set(rows[0]) == {"slug", "part", "verdict", "profile", "state", "seconds", "peak_bytes", "date"}
    app(["list", "good"], standalone_mode=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["chapter", "part", "verdict", "profile", "state", "seconds", "memory", "date"]
    assert lines[2] == ["good", "part", "holds", "laptop", "fresh", "12.5", "1.50", "GB", entry["date"]]


def test_budgets_and_limits_are_said_for_every_profile():
    from benchtop.profile import NAMES

    assert tuple(SECONDS) == tuple(runner.MEMORY) == tuple(runner.KILL_AFTER) == NAMES
    assert all(runner.KILL_AFTER[name] > SECONDS[name] for name in NAMES)
