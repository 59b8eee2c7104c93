"""A new chapter: a notebook in which everything runs and every place to be written says so."""

import re
from importlib.resources import files
from pathlib import Path

import jupytext
import yaml

from benchtop.publish.chapter import Book, BookError, write_atomically
from benchtop.publish.check import INSTALL

CAPTION = "Chapters"  # of the part of ``_toc.yml`` that lists them


def new(book: Book, slug: str, paper: int) -> Path:
    """Write ``book/<part>/<slug>.ipynb`` from the skeleton and enter it in ``papers.yml`` and ``_toc.yml``.

    Raises BookError for a slug that is taken or is no slug, and for a paper that is unknown or has its chapter.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise BookError(
            f"{slug!r} is no slug: expected small letters, digits and single hyphens, as in modern-hopfield"
        )
    if slug in book.chapters():
        raise BookError(f"there is a chapter {slug!r} already: choose another slug")
    row = next((row for row in book.papers if row["id"] == paper), None)
    if row is None:
        raise BookError(
            f"no paper {paper} in book/papers.yml: `benchtop new {slug} --paper ID` takes an id of that list"
        )
    if row["chapter"]:
        raise BookError(f"paper {paper} has its chapter, {row['chapter']}: choose a paper without one")
    part = row["part"]
    path = book.root / "book" / part / f"{slug}.ipynb"
    write_atomically(path, skeleton(book, slug, row))
    if not (index := path.with_name("index.md")).exists():
        write_atomically(index, f"# {part.replace('-', ' ').capitalize()}\n\nWRITE: what this part is about.\n")
    enter_paper(book.root / "book" / "papers.yml", paper, slug)
    enter_contents(book.root / "_toc.yml", f"book/{part}/index", f"book/{part}/{slug}")
    return path


def skeleton(book: Book, slug: str, row: dict) -> str:
    """The notebook as JSON text; ``row`` is the paper's row of ``papers.yml``."""
    text = files("benchtop.publish").joinpath("skeleton.txt").read_text(encoding="utf-8")
    fields = {"TITLE": row["title"], "KEY": f"{slug}{row['year']}", "INSTALL": INSTALL.format(address=book.address)}
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    notebook = jupytext.reads(text, "py:percent")
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "benchtop": {"slug": slug, "part": row["part"], "papers": [row["id"]], "title": row["title"], "authors": [],
                     "tags": [], "prerequisites": [], "minutes": {"read": 20, "run": 1}, "difficulty": 2, "stand_in": False},
    }  # fmt: skip
    return jupytext.writes(notebook, "ipynb")


def enter_paper(path: Path, paper: int, slug: str) -> None:
    """Name the chapter in the paper's line of ``papers.yml``, a line a paper."""
    text = path.read_text(encoding="utf-8")
    entered, n = re.subn(rf"^(- \{{id: {paper}, .*chapter: )null\}}$", rf"\g<1>{slug}}}", text, flags=re.M)
    if n != 1:
        raise BookError(
            f"{path.name} has no line of paper {paper} that ends in `chapter: null}}`: write it in one line"
        )
    write_atomically(path, entered)


def enter_contents(path: Path, index: str, doc: str) -> None:
    """List the page ``doc`` below the page of its part, both under the caption of the chapters."""
    toc = yaml.safe_load(path.read_text(encoding="utf-8"))
    group = next((group for group in toc["parts"] if group["caption"] == CAPTION), None)
    if group is None:
        group = {"caption": CAPTION, "chapters": []}
        toc["parts"].insert(2, group)  # behind "Start here" and "Find your way"
    part = next((entry for entry in group["chapters"] if entry["file"] == index), None)
    if part is None:
        part = {"file": index, "sections": []}
        group["chapters"] = sorted([*group["chapters"], part], key=lambda entry: entry["file"])
    part["sections"].append({"file": doc})
    write_atomically(path, yaml.safe_dump(toc, sort_keys=False, allow_unicode=True))
