"""`benchtop new`: a notebook that runs at once, is entered in the lists, and says itself what is to be written."""

import shutil
from pathlib import Path

import pytest
import yaml

from benchtop.publish.chapter import Book, BookError
from benchtop.publish.check import RULES, check
from benchtop.publish.mutate import mutate
from benchtop.publish.new import new

ROOT = Path(__file__).parents[1]
PAPERS = """- {id: 7, title: "A title", year: 2001, part: basics, kind: technique, chapter: null}
- {id: 70, title: "Another", year: 2002, part: basics, kind: technique, chapter: null}
"""


@pytest.fixture
def book(tmp_path) -> Book:
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "_config.yml", tmp_path)
    shutil.copy(ROOT / "_toc.yml", tmp_path)
    (tmp_path / "book" / "papers.yml").write_text(PAPERS)
    return Book(tmp_path)


def test_is_entered_in_the_lists(book):
    assert new(book, "my-chapter", 7) == book.root / "book" / "basics" / "my-chapter.ipynb"
    new(Book(book.root), "other", 70)
    assert {row["id"]: row["chapter"] for row in Book(book.root).papers} == {7: "my-chapter", 70: "other"}
    before, after = (yaml.safe_load((r / "_toc.yml").read_text()) for r in (ROOT, book.root))
    groups = {group["caption"]: group["chapters"] for group in after["parts"]}
    (part,) = [entry for entry in groups["Chapters"] if entry["file"] == "book/basics/index"]
    assert [entry["file"] for entry in part["sections"]] == ["book/basics/my-chapter", "book/basics/other"]
    assert {g["caption"] for g in before["parts"]} <= groups.keys(), "what was listed before is still there"
    assert (book.root / "book" / "basics" / "index.md").exists()


def test_checks_of_the_skeleton_run_and_only_what_is_unwritten_is_wrong(book):
    new(book, "my-chapter", 7)
    chapters = Book(book.root).chapters()
    report = mutate(chapters["my-chapter"])
    assert report.passed, "\n".join(report.lines())
    names = {rule.__name__ for rule in RULES if list(check(chapters.values(), Book(book.root), [rule]))}
    assert names == {"metadata", "outputs", "unwritten", "citations", "record"}


def test_skeleton_runs_in_smoke_from_its_first_minute(book):
    from benchtop.publish.run import run

    new(book, "my-chapter", 7)
    summary = run(book, book.select(["my-chapter"]), "smoke")
    assert [row["outcome"] for row in summary.ran] == ["not measured"], summary.failed


@pytest.mark.parametrize(
    ("slug", "paper", "words"),
    [
        ("My Chapter", 7, "is no slug: expected small letters"),
        ("taken", 70, "there is a chapter 'taken' already"),
        ("free", 8, "no paper 8 in book/papers.yml"),
        ("free", 7, "paper 7 has its chapter, taken"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(book, slug, paper, words):
    new(book, "taken", 7)
    before = {p: p.read_bytes() for p in book.root.rglob("*") if p.is_file()}
    with pytest.raises(BookError, match=words) as error:
        new(Book(book.root), slug, paper)
    assert "\n" not in str(error.value)
    assert before == {p: p.read_bytes() for p in book.root.rglob("*") if p.is_file()}
