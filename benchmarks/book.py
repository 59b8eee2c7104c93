"""What one more chapter adds to a full build of the pages: the book as it is, and the book with copies of its chapters.

    python benchmarks/book.py [--copies 10] [--repeats 3]

Each build is a process of its own that starts with no pages. The two books are built in turn, by us and by Jupyter Book
without our extension of Sphinx; the median over rounds of the difference between the books, divided by the number of
copies, counts. Reading and writing a page with Jupyter Book alone takes longer than the 0.2 s that we want to spend, so
the bar is on what our extension adds to it.
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
OURS = "benchtop.publish.site"
BUILD = "from pathlib import Path; from benchtop.publish.chapter import Book; from benchtop.publish.site import build; build(Book(Path.cwd()))"

PLAIN = """
import os
from pathlib import Path
from jupyter_book.config import get_final_config
from sphinx.application import Sphinx

here = Path.cwd()
config, _ = get_final_config(user_yaml=here / "_config.yml", sourcedir=here, raise_on_invalid=True,
                             cli_config={"latex_individualpages": False, "external_toc_path": str(here / "_toc.yml")})
Sphinx(here, None, here / "_build/html", here / "_build/.doctrees", "html", config, status=None, warning=None,
       parallel=os.cpu_count()).build()
"""


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


def seconds_to_build(folder: Path, program: str = BUILD) -> float:
    shutil.rmtree(folder / "_build", ignore_errors=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    return time.perf_counter() - start


def without_ours(folder: Path, to: Path) -> Path:
    """The same book with our extension taken out of its configuration."""
    shutil.copytree(folder, to)
    config = yaml.safe_load((to / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["config"]["extensions"].remove(OURS)
    (to / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as place:
        books = [book_with(copies, Path(place, str(copies))) for copies in (0, options.copies)]
        ways = {"benchtop": (books, BUILD)}
        ways["jupyter book"] = [without_ours(book, Path(place, f"plain-{book.name}")) for book in books], PLAIN
        each = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, (folders, program) in ways.items():
                small, large = (seconds_to_build(folder, program) for folder in folders)
                each[way].append((large - small) / options.copies)
                line = f"{small:.2f} s, with {options.copies} more {large:.2f} s: {each[way][-1]:.3f} s a chapter"
                print(f"{way}: {line}", flush=True)
    found = {way: statistics.median(values) for way, values in each.items()}
    print("; ".join(f"{way}: {seconds:.3f} s a chapter" for way, seconds in found.items()))
    if (added := found["benchtop"] - found["jupyter book"]) > MOST:
        raise SystemExit(f"our extension adds {added:.3f} s a chapter, the bar is {MOST} s")
    print(f"our extension adds {added:.3f} s a chapter")


if __name__ == "__main__":
    main()
