"""The real chapters before the checker: structure, fairness, planted mistakes, and somebody to compare with."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchtop.publish import check as checker
from benchtop.publish.chapter import Book
from benchtop.publish.mutate import BUDGET

BOOK = Book(Path(__file__).parents[1])
CHAPTERS = BOOK.chapters()


@pytest.mark.parametrize("rule", checker.RULES, ids=lambda rule: rule.__name__)
def test_rule_over_all_chapters(rule):
    assert [str(finding) for finding in checker.check(CHAPTERS.values(), BOOK, [rule])] == []


@pytest.mark.parametrize("slug", CHAPTERS)
def test_checks_notice_planted_mistakes(slug):
    # a process of its own: each mutant is a fork, and one of this process with all that the tests have loaded costs twice
    command = [sys.executable, "-m", "benchtop.publish.cli", "mutate", slug]
    done = subprocess.run(command, cwd=BOOK.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = float(re.search(r"([\d.]+) s of processor time", done.stdout)[1])
    assert seconds <= 1.5 * BUDGET  # `benchtop check` asks for BUDGET; a busy neighbour lengthens processor time


def test_each_chapter_is_compared_with_somebody_who_is_named():
    rows = {row["chapter"]: row for row in checker.peers(BOOK)}
    assert rows.keys() == CHAPTERS.keys()
    for slug, row in rows.items():
        assert all(row.values()), f"tests/peers of {slug}: say PEER and WHAT"
        source = (BOOK.root / "tests" / "peers" / f"test_{slug.replace('-', '_')}.py").read_text(encoding="utf-8")
        named = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
        assert slug in named, f"the peer test of {slug} never loads its technique"
