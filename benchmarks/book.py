"""What one more chapter adds to a full build of the pages: the book as it is, and the book with copies of its chapters.

    python benchmarks/book.py [--copies 10] [--repeats 3]

Each build is a process of its own that starts with no pages. The two books are built in turn; the median of the
differences within a round, divided by the number of copies, counts.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
MOST = 0.2  # seconds a chapter
BUILD = "from pathlib import Path; from benchtop.publish.chapter import Book; from benchtop.publish.site import build; build(Book(Path.cwd()))"


def book_with(copies: int, folder: Path) -> Path:
    """The book's files in ``folder``, with so many copies of its chapters beside them: same cells, another slug and title."""
    shutil.copytree(ROOT / "book", folder / "book")
    for name in ("_config.yml", "benchmarks/fit.json"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = [c for group in toc["parts"] for c in group["chapters"] if "sections" in c]
    chapters = cycle([(part, section["file"]) for part in parts for section in part["sections"]])
    for number in range(copies):
        part, file = next(chapters)
        notebook = nbformat.read(folder / f"{file}.ipynb", 4)
        slug = notebook.metadata["benchtop"]["slug"]
        notebook.metadata["benchtop"] |= {"slug": f"{slug}-{number}", "title": f"Copy {number} of {slug}"}
        nbformat.write(notebook, folder / f"{file}-{number}.ipynb")
        records = folder / "book" / "records"
        shutil.copy(records / f"{slug}.json", records / f"{slug}-{number}.json")
        part["sections"].append({"file": f"{file}-{number}"})
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    return folder


def seconds_to_build(folder: Path) -> float:
    shutil.rmtree(folder / "_build", ignore_errors=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        books = [book_with(copies, Path(folder, str(copies))) for copies in (0, options.copies)]
        each = []
        for _ in range(options.repeats):
            small, large = map(seconds_to_build, books)
            each.append((large - small) / options.copies)
            print(f"{small:.2f} s, with {options.copies} more {large:.2f} s: {each[-1]:.3f} s a chapter", flush=True)
    if (found := statistics.median(each)) > MOST:
        raise SystemExit(f"a chapter adds {found:.3f} s, the bar is {MOST} s")
    print(f"a chapter adds {found:.3f} s")


if __name__ == "__main__":
    main()
