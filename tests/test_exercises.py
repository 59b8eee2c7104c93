"""Every exercise of every chapter: the check passes the solution and helps with the stub and each wrong answer."""

from pathlib import Path

import pytest

from benchtop.publish import check as checker
from benchtop.publish.chapter import Book

BOOK = Book(Path(__file__).parents[1])
CHAPTERS = BOOK.chapters()
PAGES = {slug: checker.Page(chapter, BOOK, CHAPTERS) for slug, chapter in CHAPTERS.items()}


@pytest.mark.parametrize("slug", PAGES)
def test_exercises_of(slug):
    assert PAGES[slug].code("exercise"), "a chapter has two or three exercises"
    assert [f"{where}: {problem}; {cure}" for where, problem, cure in checker.exercises(PAGES[slug])] == []


@pytest.mark.parametrize("slug", PAGES)
def test_stored_outputs_show_what_the_reader_meets_first(slug):
    """The page shows the untouched stub answered with a hint and the solution accepted."""
    page = PAGES[slug]
    for tag, begins in (("exercise", "not yet: "), ("solution", "passed")):
        for cell in page.code(tag):
            assert checker.words_of(cell.outputs[-1]).strip().startswith(begins), cell
