"""The checker is itself checked: each way in which a chapter can be broken must be found, and a good one left alone."""

import shutil
from pathlib import Path

import nbformat
import pytest

from benchtop.publish import check as checker
from benchtop.publish.chapter import Book, Chapter
from benchtop.publish.cli import main
from benchtop.publish.mutate import mutants

ADDRESS = "https://github.com/somebody/somebook"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
STATEMENT = "Scaling first reaches a lower loss"
META = {
    "slug": "scale", "part": "basics", "papers": [7], "title": "Scale", "authors": "A. Uthor", "tags": ["linear"],
    "prerequisites": ["before"], "minutes": {"read": 15, "run": 1}, "difficulty": 2, "stand_in": False,
}  # fmt: skip
TECHNIQUE = '''class Scale:
    """y = a x + b."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def forward(self, x):
        return self.a * x + self.b'''
EXERCISE = '''def half(x):
    """Half of x."""
    ...


def check_half(answer) -> str:
    if answer(2.0) is None:
        return "not yet: return a number"
    return "passed" if answer(2.0) == 1 and answer(0.0) == 0 else "not yet: try it on 2.0"


print(check_half(half))'''
SOLUTION = """def half_solution(x):
    return Scale(0.5, 0.0).forward(x)


def half_wrong(x):
    return 2 * x


print(check_half(half_solution))"""


def printed(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def figure(alt="A line that rises"):
    meta = {"image/png": {"alt": alt}} if alt else {}
    return nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "[figure]"}, metadata=meta)


def slider(frames=3):
    images = "".join(f'<img src="data:," alt="frame {i}">' for i in range(frames))
    return nbformat.v4.new_output("display_data", {"text/html": f'<div><input type="range">{images}</div>'})


def cells():
    """A chapter in which nothing is wrong: (text) or (code, tags, outputs)."""
    return [
        ("# Scale\n\nYou will know how to scale.",),
        ("## Set up",),
        (checker.INSTALL.format(address=ADDRESS), "setup"),
        ('profile = "laptop"', "parameters"),
        ("import math", "setup"),
        ("## The idea\n\nMultiply {cite}`uthor2001`, see [before](before.ipynb) and [below](#play). $y = 17 x$",),
        ("## Build it",),
        (TECHNIQUE, "technique"),
        ("## Check it",),
        ("# NBVAL_CHECK_OUTPUT\nprint([Scale(a, b).forward(3.0) for a, b in ((2.0, 1.0), (1.0, 0.0))])", "check",
         printed("[7.0, 3.0]\n")),
        ("## Try it\n\nWe take 40 steps.",),
        ("steps = 40\nprint('loss', 0.1234)", "experiment", printed("loss 0.1234\n"), figure()),
        ("## Does the claim hold?\n\nIt does, by 0.12 or 12 %, as Section 3 of the paper has it.",),
        ("claim = 1", "claim", printed(f"holds: {STATEMENT}\n")),
        ("## What differs from the paper\n\n| what | why | effect |\n|---|---|---|\n| small | time | none |",),
        ("## Play",),
        ("play = 1", "widget", slider()),
        ("## Exercises\n\n### Exercise 1: half (5 min, easy)",),
        (EXERCISE, "exercise", printed("not yet: return a number\n")),
        (SOLUTION, "solution hide-cell", printed("passed\n")),
        ("### Exercise 2: half again (5 min, medium)",),
        (EXERCISE.replace("half", "again"), "exercise", printed("not yet: return a number\n")),
        (SOLUTION.replace("half", "again"), "solution hide-cell", printed("passed\n")),
        ("## Further\n\nNothing.",),
    ]  # fmt: skip


def tuning(**changes):
    choice = {"grid": {"lr": [0.1, 0.2, 0.4]}, "values": {"lr": 0.2}, "edge": [], "seeds": [0, 1, 2, 3], "steps": 100,
              "metric": "validation loss"}  # fmt: skip
    return choice | changes


def measured(**changes):
    claim = {"statement": STATEMENT, "form": "difference", "metric": "test loss", "better": "Scale", "than": "Shift",
             "lower_is_better": True, "threshold": 0.0, "seeds": list(range(100, 108)), "outcome": "holds",
             "values": {"Scale": [0.1, 0.2, 0.1, 0.2, 0.1, 0.3, 0.1, 0.2], "Shift": [0.5, 0.7, 0.6, 0.5, 0.4, 0.6, 0.5, 0.8]},
             "tuning": {"Scale": tuning(), "Shift": tuning()}}  # fmt: skip
    return claim | changes


class Made:
    """A book of one good chapter in a temporary folder, to be broken and written."""

    def __init__(self, root: Path):
        self.root, self.cells, self.meta = root, cells(), dict(META)
        self.entry = {"seconds": 50.0, "peak_bytes": 10**9, "claims": [measured()], "parameters": {}}
        self.profile, self.stale = "laptop", False
        (root / "book" / "basics").mkdir(parents=True)
        (root / "tests" / "peers").mkdir(parents=True)
        (root / "_config.yml").write_text(f"repository:\n  url: {ADDRESS}\n")
        (root / "book" / "papers.yml").write_text("- {id: 7, title: T, year: 2001, part: basics, chapter: scale}\n")
        (root / "book" / "references.bib").write_text("@article{uthor2001,\n title = {T}\n}\n")
        (root / "tests" / "peers" / "test_scale.py").write_text("def test_agrees():\n    assert 1 + 1 == 2\n")
        self.write_other([])

    def write_other(self, prerequisites):
        notebook = nbformat.v4.new_notebook(
            metadata={"benchtop": META | {"slug": "before", "prerequisites": prerequisites}}
        )
        nbformat.write(notebook, self.root / "book" / "basics" / "before.ipynb")

    def find(self, words):
        tagged = [i for i, cell in enumerate(self.cells) if words in cell[1:2]]
        return (tagged or [i for i, cell in enumerate(self.cells) if words in cell[0]])[0]

    def replace(self, old, new, tag=None):
        i = self.find(tag or old)
        assert old in self.cells[i][0], "the test breaks nothing"
        self.cells[i] = (self.cells[i][0].replace(old, new), *self.cells[i][1:])

    def set_outputs(self, tag, *outputs):
        i = self.find(tag)
        self.cells[i] = (*self.cells[i][:2], *outputs)

    def chapter(self) -> Chapter:
        made = []
        for source, *rest in self.cells:
            if rest:
                made.append(nbformat.v4.new_code_cell(source, metadata={"tags": rest[0].split()}, outputs=rest[1:]))
            else:
                made.append(nbformat.v4.new_markdown_cell(source))
        path = self.root / "book" / "basics" / "scale.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"benchtop": self.meta}), path)
        chapter = Chapter(path)
        if self.entry:
            key = "old" if self.stale else chapter.key(self.profile, {})
            chapter.save_record(self.profile, self.entry | {"key": key})
        return Chapter(path)

    def findings(self, *rules) -> list[str]:
        return [
            str(f) for f in checker.check([self.chapter()], Book(self.root), rules or checker.RULES + checker.TRIALS)
        ]


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


def test_nothing_is_wrong_with_a_good_chapter(made):
    assert made.findings() == []


def edit(old, new, tag=None):
    return lambda made: made.replace(old, new, tag)


def drop(words):
    return lambda made: made.cells.pop(made.find(words))


def show(tag, *outputs):
    return lambda made: made.set_outputs(tag, *outputs)


def meta(**changes):
    return lambda made: made.meta.update(changes)


def claim(**changes):
    return lambda made: made.entry.update(claims=[measured(**changes)])


def arm(**changes):
    return claim(tuning={"Scale": tuning(), "Shift": tuning(**changes)})


def trained(**changes):
    """A verdict run of each arm at its tuned values; the second one with changes."""
    run = {"arm": "Scale", "grid": {"lr": [0.2]}, "seeds": list(range(100, 108)), "steps": 100}
    return entry(fits=[run, run | {"arm": "Shift"} | changes])


def entry(**changes):
    return lambda made: made.entry.update(changes)


def set_(**changes):
    return lambda made: made.__dict__.update(changes)


def move(words, place):
    return lambda made: made.cells.insert(place, made.cells.pop(made.find(words)))


def cycle(made):
    made.write_other(["scale"])


def twice(words):
    return lambda made: made.cells.insert(made.find(words), made.cells[made.find(words)])


def said(words):
    """A cell that says typed words, and its output."""
    output = nbformat.v4.new_output("display_data", {"text/markdown": words})
    return lambda made: made.cells.insert(14, (f"import benchtop as bt\nbt.say({words!r})", "claim", output))


ERROR = nbformat.v4.new_output("error", ename="ValueError", evalue="seeds", traceback=[])
BROKEN = [
    # ---- structure ----
    (meta(slug="scales"), "[metadata]: slug is 'scales'; it must be 'scale', the name of the file"),
    (meta(minutes=15), "[metadata]: minutes is 15"),
    (meta(difficulty=9), "difficulty is 9; it must be a whole number from 1 to 5"),
    (meta(papers=["7"]), "papers is ['7']"),
    (meta(stand_in="no"), "stand_in is 'no'"),
    (meta(equivalent_mutants=[{"mutant": "a -> b"}]), "equivalent_mutants is"),
    (lambda made: made.meta.pop("authors"), "[metadata]: authors is missing"),
    (meta(papers=[8]), "paper 8 is not in book/papers.yml"),
    (lambda made: (made.root / "book" / "papers.yml").write_text("- {id: 7, chapter: null}\n"), "gives paper 7 to None"),
    (meta(prerequisites=["after"]), "unknown prerequisite 'after'"),
    (cycle, "the prerequisite 'before' leads back to this chapter"),
    (drop("## Play"), "the section `## Play` is missing"),
    (drop("# Scale"), "[headings]: 0 titles"),
    (edit("## Further", "## More"), "cell 24 [markdown]: unknown section `## More`"),
    (move("## Further", 5), "[headings]: the sections stand as Set up, Further, The idea"),
    (edit("### Exercise 1", "#### Exercise 1"), "jumps from level 2 to 4"),
    (edit('"-q"', '"-qq"', tag="setup"), "cell 3 [setup]: not the setup cell that all chapters share"),
    (edit('"laptop"', '"gpu"', tag="parameters"), 'cell 4 [parameters]: not the parameters cell'),
    (lambda made: made.cells.insert(5, ("x = 1", "parameters")), "cell 6 [parameters]: a second parameters cell"),
    (drop("parameters"), "here stands the parameters cell"),
    (move("experiment", 5), "cell 6 [experiment]: stands in Set up; experiment belongs in Try it or Does the claim hold?"),
    (drop("widget"), "[Play]: no cell tagged widget"),
    (move("technique", 5), "cell 6 [technique]: stands in Set up; technique belongs in Build it"),
    (edit("# NBVAL_CHECK_OUTPUT\n", "", tag="check"), "cell 10 [check]: only check cells, and all of them"),
    (edit("claim = 1", "# NBVAL_CHECK_OUTPUT\nclaim = 1"), "cell 14 [claim]: only check cells, and all of them"),
    (edit("claim = 1", "claim = 1\n" * 26), "cell 14 [claim]: 26 lines of code, at most 25"),
    (show("experiment", printed("x" * 300_000)), "[size]: 3"),
    (lambda made: made.replace("claim = 1", "claim = = 1") or made.__dict__.update(entry=None), "cell 14 [claim]: not Python: invalid syntax; correct line 1"),
    (drop("solution hide-cell"), "cell 19 [exercise]: no folded solution follows"),
    (edit("(5 min, easy)", ""), "cell 18 [markdown]: the heading 'Exercise 1: half'"),
    (edit("### Exercise 2", "Exercise 2"), "[Exercises]: 2 exercises under 1 headings"),
    # ---- outputs ----
    (show("check"), "cell 10 [check]: no stored output"),
    (lambda made: made.cells.insert(12, ("print(1)", "experiment")), "cell 13 [experiment]: no stored output"),
    (lambda made: made.cells.insert(14, ("claim.test(\n  1)", "claim")), "cell 15 [claim]: no stored output"),
    (show("experiment", ERROR), "cell 12 [experiment]: its output is the error ValueError: seeds"),
    (lambda made: made.cells.__setitem__(11, ("x = 1", "experiment remove-output", ERROR)), "its output is the error"),
    (lambda made: made.cells.__setitem__(11, ("1 / 0", "experiment raises-exception", printed("x"))), "an error unseen"),
    (show("experiment", printed("Traceback (most recent call last):\n x")), "its output holds a traceback"),
    (show("experiment", nbformat.v4.new_output("stream", name="stderr", text="UserWarning: slow")), "a warning is stored"),
    (show("experiment", figure(alt="")), "cell 12 [experiment]: 1 picture(s) without alt text"),
    (edit("We take", "![](a.png)\nWe take"), "cell 11 [markdown]: 1 picture(s) without alt text"),
    (edit("We take", '<img src="a.png" alt=" ">\nWe take'), "cell 11 [markdown]: 1 picture(s) without alt text"),
    (show("widget", printed("no slider")), "cell 17 [widget]: no slider in its output"),
    (show("widget", slider(13)), "cell 17 [widget]: a slider of 13 frames, at most 12"),
    # ---- prose ----
    (edit("by 0.12", "by 0.31"), "cell 13 [markdown]: 0.31 is in no output, metadata or code"),
    (edit("12 %", "37 %"), "37 is in no output"),
    (edit("40 steps", "4,000 steps"), "cell 11 [markdown]: 4,000 is in no output"),
    (said("It reaches 0.97."), "cell 15 [claim]: 0.97 is in no output"),
    (edit("| small | time | none |", ""), "cell 15 [markdown]: no row in its table"),
    (edit("| none |", "| |"), "cell 15 [markdown]: the row 'small | time | ' is incomplete"),
    (edit("uthor2001", "uthor1999"), "cell 6 [markdown]: cites 'uthor1999'"),
    (edit("before.ipynb", "after.ipynb"), "cell 6 [markdown]: the link after.ipynb leads nowhere"),
    (edit("#play", "#work"), "the link #work leads nowhere"),
    (edit("[below]", "{doc}`after` [below]"), "the link after leads nowhere"),
    # ---- what was measured ----
    (set_(entry=None), "[record laptop]: the record is missing"),
    (set_(stale=True), "[record laptop]: the record is stale; run `benchtop run scale`"),
    (entry(seconds=91.0), "[record laptop]: 91.0 s, at most 90"),
    (entry(peak_bytes=5 * 10**9), "5.0 GB of memory, at most 4"),
    (entry(claims=[]), "no claim was measured"),
    (claim(outcome="not measured"), "here it is one of holds, open, fails"),
    (claim(outcome="fails"), "the page does not say 'fails: Scaling first"),
    (claim(outcome="fails"), "'fails: Scaling first reaches a lower loss', but its values per seed say holds"),
    (claim(threshold=0.9), "but its values per seed say fails"),
    (claim(values={}), "but its values per seed say nothing: none is kept"),
    (set_(profile="smoke"), "here it is one of not measured"),
    # ---- fairness ----
    (arm(values={"lr": 0.4}), "lr = 0.4 of Shift lies at the edge of its grid [0.1, 0.2, 0.4]"),
    (arm(grid={"lr": [0.1, 0.2]}, values={"lr": 0.1}), "lr = 0.1 of Shift lies at the edge"),
    (arm(grid={"lr": [0.1]}, values={"lr": 0.1}), "the grid of Shift is one point"),
    (arm(grid={"lr": [0.1, 0.2, 0.3, 0.4]}), "unequal tuning budgets: Scale 3 points x 4 seeds x 100 steps, Shift 4"),
    (arm(steps=200), "unequal tuning budgets"),
    (arm(seeds=[0, 1]), "unequal tuning budgets"),
    (arm(seeds=[0, 1, 2, 100]), "the seeds [100] of Shift serve tuning and verdict"),
    (arm(metric="test accuracy"), "Shift was tuned on 'test accuracy', the verdict's data"),
    (claim(metric="validation loss"), "Scale was tuned on 'validation loss', the verdict's data"),
    (claim(seeds=list(range(100, 107))), "7 verdict seeds, at least 8"),
    (claim(seeds=[100] * 8), "1 verdict seeds, at least 8"),
    (claim(seeds=[100, 101, 102, 104, 105, 106, 107, 109]), "the verdict leaves out the seeds [103, 108]"),
    (arm(grid={"lr": [0.1, 0.2, 0.2]}), "unequal tuning budgets: Scale 3 points x 4 seeds x 100 steps, Shift 2"),
    (trained(grid={"lr": [0.4]}), "no verdict run of Shift has its tuned values {'lr': 0.2}"),
    (trained(steps=50), "verdict runs of unequal length: Scale 100, Shift 50 steps"),
    (claim(tuning=None), "the arm Scale was not tuned"),
    (claim(tuning={"Scale": tuning()}), "the arm Shift was not tuned"),
]  # fmt: skip
HINT = '    if answer(2.0) is None:\n        return "not yet: return a number"\n'
EXERCISES = [
    (edit("return 2 * x", "return 0.5 * x", tag="solution hide-cell"), "check_half says 'passed' to half_wrong"),
    (edit("return 2 * x", "return 2 * y", tag="solution hide-cell"), "(raises) cell 20 line 6: NameError"),
    (edit("0.5, 0.0", "0.7, 0.0", tag="solution hide-cell"), "check_half says 'not yet: try it on 2.0' to the solution"),
    (edit("    ...", "    return x / 2", tag="exercise"), "cell 19 [exercise]: check_half says 'passed' to half"),
    (edit(HINT, "", tag="exercise"), "says the same to half_wrong as to the stub"),
    (edit("if answer(2.0) is None", "if answer(2.0) > 9", tag="exercise"), "cannot run: cell 19 line 7: TypeError"),
    (edit("not yet: try it on 2.0", "no", tag="exercise"), "check_half says 'no' to half_wrong; it must say 'not yet: '"),
    (edit("half_wrong", "half_bad", tag="solution hide-cell"), "check_half has no half, half_solution or half_wrong"),
    (edit("check_half", "judge_half", tag="exercise"), "cannot run: cell 20 line 9: NameError: name 'check_half'"),
    (edit("Scale(0.5", "claim(0.5", tag="solution hide-cell"), "cell 19 [exercise]: it cannot run: cell 20 line 2"),
]  # fmt: skip


def excuse_all(made):
    made.replace("Scale(a, b).forward(3.0)", "a", tag="check")
    names = [mutant.name for mutant in mutants(made.chapter())]
    made.meta["equivalent_mutants"] = [{"mutant": name, "reason": "so I say"} for name in names]


PLANTED = [
    (edit("Scale(a, b).forward(3.0)", "Scale(a, b).a", tag="check"), "the checks catch 0 of 6 planted mistakes, at least 80%"),
    (edit("3.0", "claim", tag="check"), "its checks cannot run on the technique alone: scale.ipynb cell 10 line 2: NameError"),
    (edit("3.0", "__import__('torch').rand(()).item()", tag="check"), "give each random call a generator="),
    (meta(equivalent_mutants=[{"mutant": "Scale: x -> y", "reason": "r"}]), "'Scale: x -> y' is caught or no longer there"),
    (drop("check"), "has no technique or no check cell"),
    (lambda made: excuse_all(made), "6 of 6 planted mistakes are listed as equivalent, at most 33%"),
]  # fmt: skip


def peer(text):
    return lambda made: (made.root / "tests" / "peers" / "test_scale.py").write_text(text)


PEER = [
    (lambda made: shutil.rmtree(made.root / "tests" / "peers"), "[peer]: compared with nobody; write tests/peers/test_scale.py"),
    (peer("def test_agrees():\n    assert 1 == 2\n"), "[peer]: the comparison fails: FAILED tests/peers/test_scale.py::test_agrees"),
    (peer("import pytest\npytest.importorskip('nothing_such')\ndef test_agrees():\n    pass\n"), "[peer]: compared with nobody: SKIPPED"),
    (peer("import pytest\ndef test_agrees():\n    pytest.skip('tomorrow')\n"), "compared with nobody: SKIPPED [1] tests/peers/test_scale.py:3: tomorrow; install the extra peers"),
    (peer("x = 1\n"), "[peer]: compared with nobody: it holds no test"),
    (peer("import nothing_such\n"), "[peer]: the comparison fails: ERROR tests/peers/test_scale.py"),
]  # fmt: skip


def one_line_each(found):
    return all("\n" not in line and line.startswith("scale.ipynb ") and "; " in line for line in found)


@pytest.mark.parametrize(("broken", "words"), BROKEN, ids=[words[:50] for _, words in BROKEN])
def test_each_broken_chapter_is_found(made, broken, words):
    broken(made)
    found = made.findings(*checker.RULES)
    assert any(words in line for line in found), found
    assert one_line_each(found)


TRIED = [
    *((checker.exercises, *case) for case in EXERCISES),
    *((checker.planted, *case) for case in PLANTED),
    *((checker.peer, *case) for case in PEER),
]


@pytest.mark.parametrize(("rule", "broken", "words"), TRIED, ids=[words[:50] for _, _, words in TRIED])
def test_each_failed_trial_is_found(made, rule, broken, words):
    broken(made)
    found = made.findings(rule)
    assert any(words in line for line in found), found
    assert one_line_each(found)


def test_a_comparison_counts_in_a_project_that_is_quiet(made):
    (made.root / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    assert made.findings(checker.peer) == []


# ---- the finer points ----


@pytest.mark.parametrize(("prose", "wrong"), [
    ("It took 40 steps, lr 0.1234, about 40 of them.", []),
    ("Rounded: 0.123, 0.12 and 0.1; as a share 12.3 %.", []),
    ("Not rounded: 0.124.", ["0.124"]),
    ("A share without its sign: 12.3.", ["12.3"]),
    ("Equations $a = 9.9$ and $$b = 8.8$$ and `code = 7.7` do not count.", []),
    ("Section 5.5, Tables 11 and 12, eq. (13), Theorem A.14 do not count.", []),
    ("A year (2019), in 2018, and the 99th do not count.", []),
    ("They report 53.07 {cite}`uthor2001`. We find 53.07.", ["53.07"]),
    ("float32, conv2d, L2 and #77 do not count.", []),
    ("About 1300 values, some 1,200 values.", ["1300"]),
    ("From 1e-3 to 2e-1.", ["1e-3"]),
    ("CIFAR-10, ResNet-18 and top-5 do not count, but 83-fold does.", ["83"]),
    ("The 95 % interval, the 95 % BCa interval, p < 0.05; not so 95 % of them and p < 0.01.", ["95", "0.01"]),
    ("1. first\n2. second", []),
])  # fmt: skip
def test_numbers_in_prose_that_no_output_backs(made, prose, wrong):
    made.cells[made.find("## Try it")] = (f"## Try it\n\n{prose}",)
    made.set_outputs("experiment", printed("0.1234 and 0.2 and 40 of 1234\n"))
    assert [line.split(": ")[1].split(" is in")[0] for line in made.findings(checker.numbers)] == wrong


def test_a_cell_that_only_defines_needs_no_output_and_verdict_runs_follow_the_claim(made):
    made.cells.insert(made.find("claim"), ("limit = 40", "claim"))
    made.cells.insert(made.find("claim") + 1, ("runs = []", "experiment"))
    assert made.findings(*checker.RULES) == []


def test_what_is_said_may_name_sizes_of_the_code_and_numbers_of_other_cells(made):
    output = nbformat.v4.new_output("display_data", {"text/markdown": "any"})
    words = 'claim = 0.9713\nbt.say(f"{claim:.2f} [0.97] after 40 steps, loss 0.123, as {3:.7f}")'
    made.cells.insert(14, ("import benchtop as bt\n" + words, "claim", output))
    assert made.findings(*checker.RULES) == []


@pytest.mark.parametrize("form", ["agreement", "bound", "trend"])
def test_every_form_of_claim_is_judged_again_from_its_values(made, form):
    values = {"value": [0.1, 0.2, 0.1, 0.2, 0.15, 0.1, 0.3, 0.2]}
    about = {"form": form, "better": "", "than": "", "tuning": None, "values": values}
    low, high = (0.0, 1.0) if form == "trend" else (1.0, 0.0)
    made.entry["claims"] = [measured(threshold=low, **about)]
    assert made.findings(checker.record) == []
    made.entry["claims"] = [measured(threshold=high, **about)]
    assert any("values per seed say fails" in line for line in made.findings(checker.record))
    made.entry["claims"] = [measured(threshold=0.25, **about)]
    said = {"agreement": [], "bound": ["open"], "trend": ["fails"]}[form]  # a bound that one seed breaks cannot hold
    assert [line.split("values per seed say ")[1].split(";")[0] for line in made.findings(checker.record)] == said


def test_verdict_runs_at_the_tuned_values_are_fair_and_others_may_stand_beside_them(made):
    trained()(made)
    assert made.findings(checker.fairness) == []
    made.entry["fits"].append(made.entry["fits"][1] | {"grid": {"lr": [0.4]}, "steps": 7})  # a sweep for a figure
    made.entry["fits"].append(made.entry["fits"][0] | {"arm": "Neither", "steps": 7})
    assert made.findings(checker.fairness) == []


def test_links_that_lead_somewhere_are_left_alone(made):
    made.replace(
        "[below]", "$f[x](t)$, {doc}`before`, {doc}`x </book/basics/before>`, `[a](b)`, [c](https://x.y/z), [below]"
    )
    assert made.findings(checker.links) == []


def test_a_tuned_value_of_zero_has_nothing_beyond_it(made):
    both = tuning(grid={"weight_decay": [0.0, 0.1, 0.2]}, values={"weight_decay": 0.0})
    made.entry["claims"] = [measured(tuning={"Scale": both, "Shift": both})]
    assert made.findings(checker.fairness) == []


def test_claims_on_a_formula_need_no_tuning_and_smoke_no_seeds(made):
    made.entry["claims"] = [measured(form="agreement", better="", than="", tuning=None)]
    assert made.findings(checker.fairness) == []
    made.profile, made.entry["claims"] = "smoke", [measured(outcome="not measured", seeds=[100, 101])]
    assert made.findings(checker.fairness) == []


def test_a_broken_notebook_does_not_hide_the_others(made):
    path = made.root / "book" / "basics" / "torn.ipynb"
    path.write_text('{"cells": [')
    found = [
        str(f) for f in checker.check([Chapter(path), made.chapter()], Book(made.root), [checker.sizes, checker.links])
    ]
    assert len(found) == 1
    assert found[0].startswith("torn.ipynb [notebook]: torn.ipynb is not a notebook")


def test_table_of_peers_comes_from_the_tests(made):
    folder = made.root / "tests" / "peers"
    (folder / "test_scale.py").write_text('PEER = "scipy 1"\nWHAT = "forward"\n')
    (folder / "test_deep_net.py").write_text('"""Compared with a loop\nover time.\n\nDetails."""\n')
    assert checker.peers(Book(made.root)) == [
        {"chapter": "deep-net", "peer": "Compared with a loop over time.", "what": ""},
        {"chapter": "scale", "peer": "scipy 1", "what": "forward"},
    ]


def test_trials_are_repeated_only_when_something_changed(made, tmp_path, monkeypatch):
    tried = []

    def trial(page):
        tried.append(page.chapter.slug)
        yield from [("cell 1", "wrong", "repair")] if "bad" in page.chapter.source() else []

    monkeypatch.setattr(checker, "TRIALS", (trial,))

    def run():
        tried.clear()
        found = list(checker.check([made.chapter()], Book(made.root), [trial], memory=tmp_path / "passed"))
        return len(tried), len(found)

    assert [run(), run()] == [(1, 0), (0, 0)]
    made.replace("y = a x + b", "y = a x plus b", tag="technique")  # a docstring changes nothing
    assert run() == (0, 0)
    (made.root / "tests" / "peers" / "test_scale.py").write_text("def test_agrees():\n    assert 2 == 2\n")
    assert [run(), run()] == [(1, 0), (0, 0)]
    made.replace("import math", "import math\nbad = 1", tag="import math")
    assert [run(), run()] == [(1, 1), (1, 1)]


# ---- the command ----


def command(made, capsys, monkeypatch, *arguments) -> tuple[int, list[str], list[str]]:
    """(exit status, lines on standard output, lines on standard error)"""
    monkeypatch.chdir(made.root)
    monkeypatch.setattr("sys.argv", ["benchtop", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *(text.splitlines() for text in capsys.readouterr())


def test_the_commands_check_and_mutate_say_a_line_for_each_thing_and_fail_when_there_is_one(made, capsys, monkeypatch):
    made.chapter()
    assert command(made, capsys, monkeypatch, "check", "scale") == (0, ["1 chapters, 0 findings"], [])
    code, (words,), _ = command(made, capsys, monkeypatch, "mutate", "scale")
    assert code == 0
    assert words.startswith("6 of 6 planted mistakes caught (100%")
    made.replace("Scale(a, b).forward(3.0)", "a", tag="check")
    made.meta["stand_in"] = "no"
    made.chapter()
    code, lines, _ = command(made, capsys, monkeypatch, "check", "scale")
    assert code == 1
    assert [line.split(":")[0] for line in lines] == [
        "scale.ipynb [metadata]",
        "scale.ipynb [mutation]",
        "1 chapters, 2 findings",
    ]
    code, lines, _ = command(made, capsys, monkeypatch, "mutate", "scale")
    assert code == 1
    assert lines[0] == "survived  cell 8 line 8  Scale.forward: self.a * x + self.b -> self.a * x - self.b"
    assert command(made, capsys, monkeypatch, "check", "scale", "--fast")[1][-1] == "1 chapters, 1 findings"


@pytest.mark.parametrize("words", ["chekc", "check --slow", "check nothing", "run --jobs x", "run --profile huge", "mutate",
                                   "mutate nothing", "radar nothing", "data lst", "data get", "data get digit"])  # fmt: skip
def test_words_that_the_command_does_not_know_are_one_line(made, capsys, monkeypatch, words):
    code, out, err = command(made, capsys, monkeypatch, *words.split())
    assert code in (1, 2)
    assert (len(out), len(err)) == (0, 1)
    assert err[0].startswith("benchtop: ")
    assert "`" in err[0] or "expected" in err[0] or "did you mean" in err[0], "and says what to do"
