"""Planted mistakes: every kind is planted, words are left alone, and the sandbox holds."""

import os
import time

import nbformat
import pytest

from benchtop.publish import mutate as planter
from benchtop.publish.chapter import BookError, Chapter

SETUP = "import torch\nfrom torch.nn import functional as F"


@pytest.fixture
def chapter(tmp_path):
    def make(*technique: str, check: str = "print(1)", **meta) -> Chapter:
        code = nbformat.v4.new_code_cell
        cells = [code(SETUP, metadata={"tags": ["setup"]})]
        cells += [code(source, metadata={"tags": ["technique"]}) for source in technique]
        cells += [code(check, metadata={"tags": ["check"]})]
        path = tmp_path / "book" / "part" / "made.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"benchtop": meta}), path)
        return Chapter(path)

    return make


def names(chapter: Chapter) -> set[str]:
    return {mutant.name for mutant in planter.mutants(chapter)}


@pytest.mark.parametrize(("line", "mutants"), [
    ("y = a + b", ["a + b -> a - b", "a + b -> a", "a + b -> b"]),
    ("y = a - b", ["a - b -> a + b", "a - b -> a", "a - b -> -b"]),
    ("y = a * b", ["a * b -> a / b", "a * b -> a", "a * b -> b"]),
    ("y = a / b", ["a / b -> a * b", "a / b -> a"]),
    ("y += a", ["y += a -> y -= a", "y += a -> pass"]),
    ("y = -a", ["-a -> a"]),
    ("y = a < b", ["a < b -> a > b"]),
    ("y = a <= b == c", ["a <= b == c -> a >= b == c", "a <= b == c -> a <= b != c"]),
    ("y = not a", ["not a -> a"]),
    ("y = a ** 3", ["a ** 3 -> a", "a ** 3 -> a ** 6"]),
    ("y = 0.5", ["y = 0.5 -> y = 1.0"]),
    ("y = f(0)", ["f(0) -> f(1)"]),
    ("y = f(a, eps=1e-12)", []),
    ("y = f(a, flag=True)", ["f(a, flag=True) -> f(a, flag=False)"]),
    ("y = f(a, b)", ["f(a, b) -> f(b, a)"]),
    ("y = isinstance(a, b)", []),
    ("y = a.T", ["a.T -> a"]),
    ("y = a.transpose(i, j)", ["a.transpose(i, j) -> a", "a.transpose(i, j) -> a.transpose(j, i)"]),
    ("y = a @ b", ["a @ b -> a @ b.mT"]),
    ("y = a @ b.T", ["b.T -> b"]),
    ("y = a.abs()", ["a.abs() -> a"]),
    ("y = torch.exp(a)", ["torch.exp(a) -> a"]),
    ("y = F.normalize(a, dim=d)", ["F.normalize(a, dim=d) -> a"]),
    ("y = torch.linalg.norm(a)", []),
    ("y = nn.LayerNorm(a, bias=b)", ["nn.LayerNorm(a, bias=b) -> nn.Identity(a, bias=b)"]),
    ("y = a.mean()", ["a.mean() -> a.sum()"]),
    ("y = a.detach()", ["a.detach() -> a"]),
    ("with torch.no_grad():\n    y = a", ["with torch.no_grad(): -> if True:"]),
])  # fmt: skip
def test_each_kind_of_mistake_is_planted(chapter, line, mutants):
    assert names(chapter(line)) == set(mutants)


def test_words_annotations_and_errors_are_left_alone(chapter):
    source = '''
class Layer:
    """At most 3 of 4 - or 5."""

    size: "1 + 2"

    def forward(self, x: "a - b", text=f"{1 + 1}") -> "c * d":
        """Returns x + 1."""
        assert x is not None, "x has " + "no value"
        if x is None:
            raise ValueError("size " + str(2 * 3))
        return x
'''
    assert names(chapter(source)) == set()


def test_a_decorator_may_lose_the_gradient_too(chapter):
    assert names(chapter("@torch.no_grad()\ndef f(x):\n    return x")) == {"f: @torch.no_grad() -> def f(x):"}


def test_names_do_not_move_when_lines_do_and_tell_twins_apart(chapter):
    source = "def f(x):\n    y = x + x\n    return y * (x + x)"
    before, after = names(chapter(source)), names(chapter("# a comment\n\n" + source.replace("    y", "\n    y")))
    assert before == after
    assert {"f: x + x -> x - x", "f: x + x -> x - x #2"} <= before


def test_where_is_the_cell_and_line_of_the_page(chapter):
    made = planter.mutants(chapter("a = 1\n", "\n\nb = a + a"))
    assert [(m.name, m.where, m.cell) for m in made][:2] == [
        ("a = 1 -> a = 2", "cell 2 line 1", 0),
        ("a + a -> a - a", "cell 3 line 3", 1),
    ]


def test_mistakes_that_change_what_is_printed_are_caught_and_the_others_named(chapter):
    made = chapter(
        "def f(x):\n    return x + 1", "def g(x):\n    return f(x) * 3",
        check="print(round(g(1.0)))", equivalent_mutants=[],
    )  # fmt: skip
    report = planter.mutate(made)
    assert report.score == 1
    assert report.passed
    report = planter.mutate(chapter("def f(x):\n    return abs(x) + 1", check="print(f(2) > 1)"))
    assert {name for name, _ in report.survived} == {
        "f: abs(x) + 1 -> abs(x)",
        "f: abs(x) -> x",
        "f: abs(x) + 1 -> abs(x) + 2",
    }
    assert report.survived[0][1] == "cell 2 line 2"
    assert not report.passed


def test_equivalent_mutants_need_to_be_there_and_to_survive(chapter):
    def listed(*mutants):
        entries = [{"mutant": m, "reason": "sign of a square"} for m in mutants]
        return planter.mutate(
            chapter("def f(x):\n    return (-x) ** 2", check="print(f(3))", equivalent_mutants=entries)
        )

    assert listed("f: -x -> x").equivalent == ["f: -x -> x"]
    assert listed("f: -x -> x").passed
    report = listed("f: -x -> x", "f: (-x) ** 2 -> -x", "f: gone -> away")
    assert report.unfounded == ["f: (-x) ** 2 -> -x", "f: gone -> away"]
    assert not report.passed


def test_endless_loops_crashes_exits_and_greed_are_caught(chapter):
    loop = "def f(n):\n    while n > 0:\n        n -= 1\n    return n"
    greed = "def g(n):\n    return bytearray(int(n) * 1_000)"
    leave = "import os\n\ndef h(n):\n    return os._exit(3) if n != 0 else n"
    check = "print(f(3), len(g(1)), h(0))"
    began = time.perf_counter()
    report = planter.mutate(chapter(loop, greed.replace("1_000", "1000 + 10 ** 12 * (n - 1)"), leave, check=check))
    assert not [name for name, _ in report.survived if name.startswith(("f: n -=", "h: n != 0"))]
    assert time.perf_counter() - began < 20
    assert report.seconds < 20


def test_the_sandbox_says_how_it_ended():
    assert planter.apart(lambda: 1 + 1, 5) == ("done", 2)
    assert planter.apart(lambda: 1 / 0, 5) == ("error", "ZeroDivisionError: division by zero")
    assert planter.apart(lambda: os._exit(1), 5) == ("error", "the process died")
    assert planter.apart(lambda: time.sleep(60), 0.2)[0] == "timeout"
    assert planter.apart(lambda: len(bytearray(10**11)), 5, memory=10**9) == ("error", "MemoryError: ")
    assert planter.apart(lambda: print("not heard") or __import__("torch").get_num_threads(), 5) == ("done", 1)


def test_checks_that_cannot_be_judged_are_refused_in_one_line(chapter):
    with pytest.raises(BookError, match=r"made.ipynb: .*generator="):
        planter.mutate(chapter("a = 1", check="print(torch.rand(()).item())"))
    with pytest.raises(BookError, match=r"cell 3 line 2: NameError: name 'profile'"):
        planter.mutate(chapter("a = 1", check="b = a\nprint(profile)"))
    with pytest.raises(BookError, match="no technique or no check cell"):
        planter.mutate(chapter())
