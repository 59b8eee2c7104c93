"""The real chapters before the checker: structure, fairness, planted mistakes, and somebody to compare with."""

import ast
from pathlib import Path

import pytest

from benchtop.publish import check as checker
from benchtop.publish.chapter import Book
from benchtop.publish.mutate import BUDGET, mutate

BOOK = Book(Path(__file__).parents[1])
CHAPTERS = BOOK.chapters()


@pytest.mark.parametrize("rule", checker.RULES, ids=lambda rule: rule.__name__)
def test_rule_over_all_chapters(rule):
    assert [str(finding) for finding in checker.check(CHAPTERS.values(), BOOK, [rule])] == []


@pytest.mark.parametrize("slug", CHAPTERS)
def test_checks_notice_planted_mistakes(slug):
    report = mutate(CHAPTERS[slug])
    assert report.passed, "\n".join(report.lines())
    assert report.seconds <= 1.5 * BUDGET  # `benchtop check` asks for BUDGET; a busy neighbour lengthens processor time


def test_each_chapter_is_compared_with_somebody_who_is_named():
    rows = {row["chapter"]: row for row in checker.peers(BOOK)}
    assert rows.keys() == CHAPTERS.keys()
    for slug, row in rows.items():
        assert all(row.values()), f"tests/peers of {slug}: say PEER and WHAT"
        source = (BOOK.root / "tests" / "peers" / f"test_{slug.replace('-', '_')}.py").read_text(encoding="utf-8")
        named = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
        assert slug in named, f"the peer test of {slug} never loads its technique"
