"""What a chapter must be before anybody reads it: every rule that a machine can judge.

A rule is one small function of a `Page`; for each thing that is wrong it yields where, what, and what to do about it.
``RULES`` read the notebook and its record; ``TRIALS`` run code: exercises, planted mistakes, comparison with a peer.
"""

import ast
import functools
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchtop.claims import judge
from benchtop.publish.chapter import (
    MEMORY,
    SECONDS,
    Book,
    BookError,
    Chapter,
    bare_code,
    module_digest,
    parse,
    write_atomically,
)
from benchtop.publish.mutate import BUDGET, EXCUSED, WANTED, apart, blame, mutate
from benchtop.widgets import MOST_BYTES, MOST_FRAMES

SECTIONS = {  # heading -> the tags its code cells must have
    "Set up": ("setup", "parameters"),
    "The idea": (),
    "Build it": ("technique",),
    "Check it": ("check",),
    "Try it": ("experiment",),
    "Does the claim hold?": ("claim",),
    "What differs from the paper": (),
    "Play": ("widget",),
    "Exercises": ("exercise", "solution"),
    "Further": (),
}
HOME = {tag: section for section, tags in SECTIONS.items() for tag in tags}
MEASURING = ["Try it", "Does the claim hold?"]  # a claim is fixed first, then its verdict seeds run
SHOWING = {"check", "widget", "exercise", "solution"}  # these cells show something, and so do those that
SPEAKING = r"^(?:print|display|(?:bt\.)?(?:say|show|explore|best))\(|\.(?:test|matches|trend|at_most)\("  # say so
PARAMETERS = 'profile = "laptop"'
INSTALL = """import importlib.util
import subprocess
import sys

if importlib.util.find_spec("benchtop") is None:  # on Colab: install the bench, leave torch as it is
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "benchtop @ git+{address}"], check=True)"""
LINES, BYTES = 25, 250_000  # of a cell, of a notebook
OUTCOMES = {"smoke": ["not measured"], "laptop": ["holds", "open", "fails"], "gpu": ["holds", "open", "fails"]}
SEEDS = 8
MARK = "# NBVAL_CHECK_OUTPUT"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which chapter, where, what, and what to do about it."""

    chapter: str
    where: str
    problem: str
    cure: str

    def __str__(self) -> str:
        return " ".join(f"{self.chapter} {self.where}: {self.problem}; {self.cure}".split())


@dataclass(frozen=True)
class Cell:
    """A cell as the reader counts: the first on the page is cell 1, text and code alike."""

    number: int
    section: str
    kind: str
    source: str
    tags: tuple[str, ...]
    outputs: list[dict[str, Any]]

    def __str__(self) -> str:
        return f"cell {self.number} [{', '.join(self.tags) or self.kind}]"


@dataclass(frozen=True)
class Page:
    """A chapter with what its rules need to know: the book around it and the other chapters."""

    chapter: Chapter
    book: Book
    others: dict[str, Chapter]

    @functools.cached_property
    def cells(self) -> list[Cell]:
        cells, section = [], ""
        for number, cell in enumerate(self.chapter.notebook.cells, start=1):
            if cell.cell_type == "markdown":
                section = ([title for level, title in titles_of(cell.source) if level == 2] or [section])[-1]
            tags = tuple(cell.metadata.get("tags", []))
            cells.append(Cell(number, section, cell.cell_type, cell.source, tags, cell.get("outputs", [])))
        return cells

    def code(self, *tags: str) -> list[Cell]:
        return [c for c in self.cells if c.kind == "code" and (not tags or set(tags) & set(c.tags))]

    def text(self, *sections: str) -> list[Cell]:
        return [c for c in self.cells if c.kind == "markdown" and (not sections or c.section in sections)]

    @functools.cached_property
    def titles(self) -> list[tuple[Cell, int, str]]:
        return [(cell, level, title) for cell in self.text() for level, title in titles_of(cell.source)]

    @functools.cached_property
    def numbers(self) -> list[float]:
        """What the run printed, what the metadata says, and what stands in the code (``20_000``, ``rot90``)."""
        return self.known([bare_code(cell.source) for cell in self.code()])

    def known(self, texts: list[str], saying: Cell | None = None) -> list[float]:
        """Numbers in these texts, the metadata and the outputs, except for what the cell ``saying`` says itself."""
        said = [(cell is saying, output) for cell in self.code() for output in cell.outputs]
        texts = [words_of(o) for own, o in said if not (own and "text/markdown" in o.get("data", {}))] + texts
        texts.append(str(self.chapter.meta))
        words = re.findall(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d[\d_]*)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+", "\n".join(texts))
        return [float(re.sub("[,_]", "", word)) for word in words]

    @property
    def peer_test(self) -> str:
        return f"tests/peers/test_{self.chapter.slug.replace('-', '_')}.py"

    def listed(self, name: str) -> list:
        """A list in the metadata; empty where `metadata` has found something else."""
        return value if isinstance(value := self.chapter.meta.get(name), list) else []


Wrong = tuple[Any, str, str]  # where, what is wrong, what to do
Rule = Callable[[Page], Iterator[Wrong]]


# ---- structure ----


def metadata(page: Page) -> Iterator[Wrong]:
    """The notebook's ``benchtop`` metadata is complete, and each entry is of its type."""
    chapter, meta = page.chapter, page.chapter.meta

    def words(value: Any, least: int = 0) -> bool:
        return isinstance(value, list) and len(value) >= least and all(isinstance(v, str) and v for v in value)

    def mutants(value: Any) -> bool:
        return isinstance(value, list) and all(words([e.get("mutant"), e.get("reason")]) for e in value)

    expected = {
        "slug": (lambda v: v == chapter.slug, f"{chapter.slug!r}, the name of the file"),
        "part": (lambda v: v == chapter.part, f"{chapter.part!r}, the name of the folder"),
        "papers": (lambda v: isinstance(v, list) and v and all(isinstance(i, int) for i in v), "a list of ids"),
        "title": (lambda v: words([v]), "text"),
        "authors": (lambda v: words([v]) or words(v, 1), "text or a list of names"),
        "tags": (lambda v: words(v, 1), "a list of words"),
        "prerequisites": (words, "a list of slugs"),
        "minutes": (lambda v: all(is_number(v.get(k)) for k in ("read", "run")), "{read, run} in numbers"),
        "difficulty": (lambda v: isinstance(v, int) and 1 <= v <= 5, "a whole number from 1 to 5"),
        "stand_in": (lambda v: isinstance(v, bool), "true or false"),
        "equivalent_mutants": (mutants, "a list of {mutant, reason}, both text"),
    }
    for name, (right, wanted) in expected.items():
        if name in meta:
            try:
                fine = right(meta[name])
            except AttributeError:  # not even a dictionary
                fine = False
            if not fine:
                yield "[metadata]", f"{name} is {meta[name]!r}", f"it must be {wanted}"
        elif name != "equivalent_mutants":
            yield "[metadata]", f"{name} is missing", f"add it to the notebook's benchtop entry: {wanted}"


def papers(page: Page) -> Iterator[Wrong]:
    """Its papers stand in ``papers.yml``, and there the chapter stands with them."""
    rows = {row["id"]: row.get("chapter") for row in page.book.papers}
    for paper in page.listed("papers"):
        if paper not in rows:
            yield "[metadata]", f"paper {paper} is not in book/papers.yml", "correct the id"
        elif rows[paper] != (mine := page.chapter.slug):
            yield "[metadata]", f"book/papers.yml gives paper {paper} to {rows[paper]}", f"write chapter: {mine} there"


def prerequisites(page: Page) -> Iterator[Wrong]:
    """Prerequisites exist, and none leads back to the chapter itself."""
    for slug in page.listed("prerequisites"):
        if slug not in page.others:
            yield "[metadata]", f"unknown prerequisite {slug!r}", "name the slug of a chapter of this book"
        todo, seen = [slug], set()
        while todo:
            if (step := todo.pop()) in page.others and step not in seen:
                seen.add(step)
                todo += page.others[step].meta.get("prerequisites", [])
        if page.chapter.slug in seen:
            yield "[metadata]", f"the prerequisite {slug!r} leads back to this chapter", "cut the cycle"


def headings(page: Page) -> Iterator[Wrong]:
    """One title, then the ten sections in their order."""
    levels = [level for _, level, _ in page.titles]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "[headings]", f"{levels.count(1)} titles", "begin with one `# Title` and have no other"
    there = [title for _, level, title in page.titles if level == 2]
    for section in SECTIONS.keys() - set(there):
        yield "[headings]", f"the section `## {section}` is missing", "add it in its place"
    for cell, level, title in page.titles:
        if level == 2 and title not in SECTIONS:
            yield cell, f"unknown section `## {title}`", "use the ten sections, and `###` within them"
    known = [section for section in there if section in SECTIONS]
    if known != [section for section in SECTIONS if section in known]:
        yield "[headings]", f"the sections stand as {', '.join(known)}", f"the order is {', '.join(SECTIONS)}"
    for (_, before, _), (cell, level, title) in itertools.pairwise(page.titles):
        if level > before + 1:
            yield cell, f"`{title}` jumps from level {before} to {level}", "go down one level at a time"


def set_up(page: Page) -> Iterator[Wrong]:
    """The install cell that all chapters share, ``profile`` alone in its cell, then the imports."""
    install = INSTALL.format(address=page.book.address)
    wanted = [("setup", install), ("parameters", PARAMETERS), ("setup", None)]
    for cell, (tag, source) in itertools.zip_longest(page.code()[:3], wanted):
        if cell is None or tag not in cell.tags:
            yield cell or "[set up]", f"here stands the {tag} cell", "see `benchtop new` for how a chapter starts"
        elif source and cell.source.strip() != source:
            yield cell, f"not the {tag} cell that all chapters share", f"it is: {source.splitlines()[-1].strip()}"
    for cell in page.code("parameters")[1:]:
        yield cell, "a second parameters cell", f"one cell with {PARAMETERS} decides the size"


def tags(page: Page) -> Iterator[Wrong]:
    """Each section has the cells that make it, each tagged cell stands in its section."""
    there = {title for _, _, title in page.titles}
    for tag, section in HOME.items():
        if section in there and not any(cell.section == section for cell in page.code(tag)):
            yield f"[{section}]", f"no cell tagged {tag}", "tag the cells of this section with it"
    for cell in page.code():
        for tag in cell.tags:
            homes = MEASURING if tag in ("experiment", "claim") else [HOME.get(tag, cell.section)]
            if cell.section not in homes:
                yield cell, f"stands in {cell.section or 'no section'}", f"{tag} belongs in {' or '.join(homes)}"
        if cell.source.startswith(MARK) != ("check" in cell.tags):
            yield cell, f"only check cells, and all of them, begin with {MARK}", "correct the first line or the tag"


def tasks(page: Page) -> Iterator[Wrong]:
    """Two or three exercises, each under its heading with minutes and difficulty, the folded solution behind it."""
    cells = page.code("exercise")
    named = [(cell, title) for cell, level, title in page.titles if level == 3 and cell.section == "Exercises"]
    if cells and (len(named) != len(cells) or not 2 <= len(cells) <= 3):
        yield (
            "[Exercises]",
            f"{len(cells)} exercises under {len(named)} headings",
            "two or three, a heading before each",
        )
    for cell, title in named:
        if not re.fullmatch(r"Exercise \d+: .+ \(\d+ min, (easy|medium|hard)\)", title):
            yield cell, f"the heading {title!r}", "write `### Exercise 1: title (10 min, medium)`"
    for cell in cells:
        if not {"solution", "hide-cell"} <= set(page.cells[min(cell.number, len(page.cells) - 1)].tags):
            yield cell, "no folded solution follows", "add it as the next cell, tags solution and hide-cell"


def sizes(page: Page) -> Iterator[Wrong]:
    """At most 25 lines of code a cell (comments, docstrings and blank lines do not count), 250 KB a notebook."""
    for cell in page.code():
        if (lines := len(bare_code(cell.source).splitlines())) > LINES:
            yield cell, f"{lines} lines of code, at most {LINES}", "a cell does one thing: split it"
    if (size := page.chapter.path.stat().st_size) > BYTES:
        yield "[size]", f"{size // 1000} KB, at most {BYTES // 1000}", "fewer or smaller figures"


# ---- outputs ----


def outputs(page: Page) -> Iterator[Wrong]:
    """The outputs of a run are stored, and none of them is an error, in plain sight or hidden."""
    for cell in page.code():
        speaks = SHOWING & set(cell.tags) or re.search(SPEAKING, cell.source, re.M)
        if speaks and not cell.outputs:
            yield cell, "no stored output", f"run `benchtop run {page.chapter.slug}`"
        if "raises-exception" in cell.tags:
            yield cell, "may raise an error unseen", "take the tag raises-exception away"
        for output in cell.outputs:
            words = words_of(output)
            if output["output_type"] == "error":
                yield cell, f"its output is the error {output['ename']}: {output['evalue']:.99}", "repair and run it"
            elif "Traceback (most recent call last)" in words:
                yield cell, "its output holds a traceback", "repair the cell and run it"
            elif output.get("name") == "stderr" and re.search(r"Warning\b|Error\b", words):
                yield cell, f"a warning is stored: {words:.99}", "remove its cause and run the chapter"


def images(page: Page) -> Iterator[Wrong]:
    """Every picture says in words what is to be seen."""
    for cell in page.cells:
        bare = silent(cell.source) if cell.kind == "markdown" else []
        for output in cell.outputs:
            about = output.get("metadata", {})
            pictures = [mime for mime in output.get("data", {}) if mime.startswith("image/")]
            bare += [m for m in pictures if not (about.get(m, {}).get("alt") or about.get("alt") or "").strip()]
            bare += silent(html_of(output))
        if bare:
            yield cell, f"{len(bare)} picture(s) without alt text", 'say what is to be seen: bt.show(fig, alt="...")'


def sliders(page: Page) -> Iterator[Wrong]:
    """The reader can play: a slider of few frames and little weight."""
    for cell in page.code("widget"):
        shown = [html_of(output) for output in cell.outputs]
        if cell.outputs and not any('type="range"' in html for html in shown):
            yield cell, "no slider in its output", "bt.explore(draw, alt=..., name=[values]) makes one"
        for html in shown:
            if (frames := html.count("<img")) > MOST_FRAMES:
                yield cell, f"a slider of {frames} frames, at most {MOST_FRAMES}", "give fewer values"
            if (size := len(html)) > MOST_BYTES:
                yield cell, f"a slider of {size // 1000} KB, at most {MOST_BYTES // 1000}", "a smaller figsize"


# ---- prose ----

TO_WRITE = "WRITE:"  # how `benchtop new` marks a place


def unwritten(page: Page) -> Iterator[Wrong]:
    """No place of the skeleton waits to be written."""
    for cell in page.cells:
        if TO_WRITE in cell.source:
            yield cell, f"the skeleton's words stand here: {cell.source[cell.source.index(TO_WRITE) :]:.60}", "write it"


NUMBER = r"(?<![\w.#])(?:\d{1,3}(?:[,\u2009\u202f]\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\d⁻⁰¹²³⁴-⁹])"
PLACE = r"\(?[A-Z]?\.?\d[\d.]*\)?"
UNMEASURED = (  # what stands in prose as digits and is no result
    r"\$\$.*?\$\$|\$[^$]*\$|\{math\}`[^`]*`|```.*?```",  # equations
    r"(?:\A|(?<=[.!?]\s))(?:[^.!?]|[.!?](?=\S))*\{cite(?:[^.!?]|[.!?](?=\S))*",  # sentences on other people's numbers
    r"`[^`]*`|\]\([^)]*\)|https?://\S+|<[^>]+>|^\s*\d+\.\s",  # code, targets of links, tags, numbers of a list
    r"\b(?:sections?|sec\.|figures?|figs?\.|tables?|equations?|eqs?\.|theorems?|lemmas?|propositions?|appendix|"
    rf"algorithms?|chapters?|exercises?|pages?|python|torch|version)\s*{PLACE}(?:\s*(?:,|and|to|[-–])\s*{PLACE})*",
    r"(?:[(,]|\bin|\bsince|\bal\.,?)\s*(?:19|20)\d\d\b|\d+(?:st|nd|rd|th|D)\b",  # years, ordinals
    r"\b[A-Za-z]\w*-\d[\w.]*\b|\b95\s*%\s*(?=\w*\s*(?:interval|band))|\bp\s*[<>]\s*0\.05\b",  # CIFAR-10; our own rule
)


def numbers(page: Page) -> Iterator[Wrong]:
    """A number in the prose of the results appears, rounded, in an output, the metadata or the code.

    A number typed into `bt.say` needs one too, other than itself: its own output and the strings of the code do not count.
    """
    typed = [str(n.value) for c in page.code() for n in ast.walk(parse(c.source)) if is_number(getattr(n, "value", ""))]
    for cell in page.cells:
        if cell.section not in (*MEASURING, "Play"):
            continue
        written = cell.kind == "markdown"
        text = cell.source if written else sayings(cell.source)
        known = page.numbers if written or not text else page.known(typed, saying=cell)
        for pattern in UNMEASURED:
            text = re.sub(pattern, " ", text, flags=re.S | re.I | re.M)
        for match in re.finditer(NUMBER, text):
            about = re.search(r"(?:about|roughly|nearly|some|~|≈)\s*$", text[: match.start()])
            share = re.match(r"\s*(?:%|percent|points)", text[match.end() :])
            if not backed(match.group(), known, bool(about), 100 if share else 1):
                yield cell, f"{match.group()} is in no output, metadata or code", "take it from the run: bt.say(f'...')"


def backed(word: str, known: Iterable[float], about: bool = False, scale: int = 1) -> bool:
    """Is there a known value that, as it stands or times ``scale``, rounds to this number?"""
    number = Decimal(re.sub("[,\u2009\u202f]", "", word))
    zeros = len(str(number)) - len(str(number).rstrip("0")) if about else 0  # "about 3400" is rounded to hundreds
    half = 10.0 ** (zeros or number.as_tuple().exponent) / 2 * (1 + 1e-9)
    return any(abs(factor * value - float(number)) <= half for value in known for factor in (1, scale))


def sayings(source: str) -> str:
    """The words that `bt.say` is given as they stand, without what an f-string fills in."""
    calls = [n for n in ast.walk(parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("say")]
    parts = [part for call in calls for a in call.args for part in getattr(a, "values", [a])]
    return " ".join(str(part.value) for part in parts if isinstance(part, ast.Constant))


def deviations(page: Page) -> Iterator[Wrong]:
    """What differs from the paper is a table: deviation, why, which way it should move the result."""
    cells = page.text("What differs from the paper")
    lines = [(cell, line.strip()) for cell in cells for line in cell.source.splitlines()]
    rows = [(cell, [part.strip() for part in line.strip("|").split("|")]) for cell, line in lines if line[:1] == "|"]
    if cells and len(rows) < 3:
        yield cells[-1], "no row in its table", "name each deviation, its reason and the direction it acts in"
    for cell, row in rows[2:]:
        if len(row) < 3 or not all(row[:3]):
            yield (
                cell,
                f"the row {' | '.join(row)!r:.60} is incomplete",
                "deviation | why | which way it moves the result",
            )


def citations(page: Page) -> Iterator[Wrong]:
    """Each key that is cited stands in ``references.bib``."""
    keys = set(re.findall(r"@\w+\{\s*([^,\s]+)", read(page.book.root / "book" / "references.bib")))
    for cell in page.text():
        for key in re.split(r"\s*,\s*", ",".join(re.findall(r"\{cite[^}]*\}`([^`]+)`", cell.source))):
            if key and key not in keys:
                yield cell, f"cites {key!r}, which is not in book/references.bib", "add the entry or correct the key"


def links(page: Page) -> Iterator[Wrong]:
    """Links into the book lead somewhere."""
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, _, title in page.titles}
    for cell in page.text():
        text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|(\{[\w:]+\}`[^`]*`)|`[^`]*`", r"\1", cell.source, flags=re.S)
        targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text)
        for target in targets:
            path, _, anchor = target.partition("#")
            base = page.book.root / path.lstrip("/") if path.startswith("/") else page.chapter.path.parent / path
            there = (
                any(base.with_name(base.name + end).exists() for end in ("", ".ipynb", ".md"))
                if path
                else anchor in anchors
            )
            if not re.match(r"[a-z]+:|//", target) and not there:
                yield cell, f"the link {target} leads nowhere", "correct it"


# ---- what was measured ----


def record(page: Page) -> Iterator[Wrong]:
    """The laptop entry is there, fresh and in budget; every entry has claims with a verdict its profile may give."""
    again = f"run `benchtop run {page.chapter.slug}`"
    if (status := page.chapter.status("laptop")) != "fresh":
        yield "[record laptop]", f"the record is {status}", again
    stored = " ".join(" ".join(words_of(output) for cell in page.code() for output in cell.outputs).split())
    for profile, entry in page.chapter.records().items():
        where = f"[record {profile}]"
        if (seconds := entry.get("seconds") or 0) > SECONDS[profile]:
            yield where, f"{seconds:.1f} s, at most {SECONDS[profile]}", "fewer steps or smaller sizes"
        if (memory := (entry.get("peak_bytes") or 0) / 1e9) > MEMORY[profile]:
            yield where, f"{memory:.1f} GB of memory, at most {MEMORY[profile]}", "fewer replicas at once"
        if not entry.get("claims"):
            yield where, "no claim was measured", "call Claim(...).test(...) in the claim cell"
        for claim in entry.get("claims", []):
            sentence = " ".join(f"{claim['outcome']}: {claim['statement']}".split())
            if claim["outcome"] not in OUTCOMES[profile]:
                yield where, f"the outcome of {sentence!r}", f"here it is one of {', '.join(OUTCOMES[profile])}"
                continue
            if profile != "smoke" and (outcome := judged(claim)) != claim["outcome"]:
                yield where, f"{sentence!r}, but its values per seed say {outcome}", again
            if profile == "laptop" and stored and sentence not in stored:
                yield where, f"the page does not say {sentence!r}", again


def judged(claim: dict[str, Any]) -> str:
    """The outcome that follows from the values per seed which the record keeps: a record is not edited by hand."""
    values, threshold = {arm: np.array(v, float) for arm, v in claim.get("values", {}).items()}, claim["threshold"]
    if not values:
        return "nothing: none is kept"
    if claim["form"] == "difference":
        effect = values[claim["better"]] - values[claim["than"]]
        return judge((-effect if claim["lower_is_better"] else effect) - threshold)[0]
    (value,) = values.values()
    gain = value - threshold if claim["form"] == "trend" else threshold - value
    outcome = judge(gain)[0]
    return "open" if claim["form"] == "bound" and outcome == "holds" and min(gain) < 0 else outcome


def fairness(page: Page) -> Iterator[Wrong]:
    """Both arms had the same chance, and the verdict saw neither the tuning seeds nor tuned test data."""
    for profile, entry in page.chapter.records().items():
        for claim in entry.get("claims", []) if profile != "smoke" else []:
            for problem, cure in unfair(claim, entry.get("fits", [])):
                yield f"[record {profile}]", f"{problem} (claim {claim['statement']!r})", cure


def unfair(claim: dict[str, Any], fits: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """What is unfair in one claim of a record whose training runs were ``fits``: (problem, cure)."""
    verdict, tuning, spent, trained = set(claim["seeds"]), claim.get("tuning") or {}, {}, {}
    if len(verdict) < SEEDS:
        yield f"{len(verdict)} verdict seeds, at least {SEEDS}", "use profile.seeds"
    if left := sorted(set(range(min(verdict), max(verdict))) - verdict):
        yield f"the verdict leaves out the seeds {left}", "use all of profile.seeds"
    if claim["form"] == "difference":
        for arm in {claim["better"], claim["than"]} - tuning.keys():
            yield f"the arm {arm} was not tuned", "pass claim.test(..., tuning=bt.best(runs, 'validation loss'))"
    for arm, choice in tuning.items():
        points = math.prod(len(set(values)) for values in choice["grid"].values())
        if points == 1:
            yield f"the grid of {arm} is one point", "tune it: lr=[...] with three values or more"
        spent[arm] = f"{points} points x {len(choice['seeds'])} seeds x {choice['steps']} steps"
        for name, value in choice["values"].items():
            grid = sorted(choice["grid"].get(name, []))
            if len(grid) > 1 and value in (grid[0], grid[-1]) and value != 0:  # nothing lies beyond zero
                yield f"{name} = {value:g} of {arm} lies at the edge of its grid {grid}", "widen the grid, tune again"
        if both := sorted(set(choice["seeds"]) & verdict):
            yield f"the seeds {both} of {arm} serve tuning and verdict", "tune with profile.tuning_seeds"
        if "test" in choice["metric"].lower() or choice["metric"] == claim["metric"]:
            yield f"{arm} was tuned on {choice['metric']!r}, the verdict's data", "tune on validation data"
        runs = [fit for fit in fits if fit["arm"] == arm and verdict & set(fit["seeds"])]
        tuned = [fit for fit in runs if all(v in fit["grid"].get(n, [v]) for n, v in choice["values"].items())]
        if runs and not tuned:
            yield f"no verdict run of {arm} has its tuned values {choice['values']}", "fit(..., **choice[arm])"
        trained[arm] = {fit["steps"] for fit in tuned}
    if len(trained) > 1 and all(trained.values()) and not set.intersection(*trained.values()):
        words = ", ".join(f"{arm} {min(steps)}" for arm, steps in trained.items())
        yield f"verdict runs of unequal length: {words} steps", "train every arm for as many steps"
    if len({math.prod(map(int, re.findall(r"\d+", budget))) for budget in spent.values()}) > 1:
        words = ", ".join(f"{arm} {budget}" for arm, budget in spent.items())
        yield f"unequal tuning budgets: {words}", "give every arm as many points, seeds and steps"


# ---- trials ----


def exercises(page: Page) -> Iterator[Wrong]:
    """Each exercise's check passes its solution, and says something useful to the stub and to each wrong answer."""
    for cell, after in zip(page.cells, page.cells[1:]):
        if "exercise" in cell.tags and "solution" in after.tags:
            outcome, found = apart(lambda cell=cell, after=after: list(answers(page, cell, after)), seconds=60)
            yield from (
                found if outcome == "done" else [(cell, f"it cannot run: {found}", "it has set-up and technique")]
            )


def answers(page: Page, exercise: Cell, solution: Cell) -> Iterator[Wrong]:
    """Run one exercise on the set-up, the technique and the exercises before it."""
    space: dict[str, Any] = {"__name__": "exercise"}
    earlier = [cell for cell in page.code("exercise") if cell.number <= exercise.number]
    for cell in (*page.code("parameters"), *page.code("setup")[1:], *page.code("technique"), *earlier, solution):
        exec(compile(parse(cell.source), f"cell {cell.number}", "exec"), space)

    def said(check: str, word: str) -> str:
        try:
            return str(space[check](space[word]))
        except Exception as error:
            return f"(raises) {blame(error)}"

    checks = [node.name for node in parse(exercise.source).body if getattr(node, "name", "").startswith("check_")]
    if not checks:
        yield exercise, "no function check_<name>", "add one that returns 'passed' or 'not yet: <hint>'"
    for check in checks:
        name = check.removeprefix("check_")
        wrong = [word for word in space if word.startswith(f"{name}_wrong")]
        if name not in space or f"{name}_solution" not in space or not wrong:
            yield solution, f"{check} has no {name}, {name}_solution or {name}_wrong to judge", "add what is missing"
            continue
        if (words := said(check, f"{name}_solution")) != "passed":
            yield solution, f"{check} says {words!r} to the solution", "it must say 'passed'"
        stub = said(check, name)
        for where, word in [(exercise, name), *((solution, word) for word in wrong)]:
            if not re.match(r"not yet: \S", words := said(check, word)):
                yield where, f"{check} says {words!r} to {word}", "it must say 'not yet: ' and give a hint"
            elif word != name and words == stub:
                yield where, f"{check} says the same to {word} as to the stub", "hint at the mistake in this answer"


def planted(page: Page) -> Iterator[Wrong]:
    """The checks notice at least 80 % of the planted mistakes."""
    report, again = mutate(page.chapter), f"`benchtop mutate {page.chapter.slug}` lists what they miss"
    if report.score < WANTED:
        caught, total = len(report.caught), len(report.caught) + len(report.survived)
        yield (
            "[mutation]",
            f"the checks catch {caught} of {total} planted mistakes, at least {WANTED:.0%} wanted",
            again,
        )
    if len(report.equivalent) > EXCUSED * report.planted:
        words = f"{len(report.equivalent)} of {report.planted} planted mistakes are listed as equivalent"
        yield "[metadata]", f"{words}, at most {EXCUSED:.0%}", "let the checks see a difference"
    for name in report.unfounded:
        yield "[metadata]", f"the equivalent mutant {name!r} is caught or no longer there", "take it off the list"
    if (seconds := report.seconds) > BUDGET:
        yield "[mutation]", f"{seconds:.0f} s of processor time, at most {BUDGET:.0f}", "make the checks smaller"


def peer(page: Page) -> Iterator[Wrong]:
    """Somebody else's implementation agrees: ``tests/peers/test_<slug>.py`` exists and passes."""
    if not (page.book.root / page.peer_test).exists():
        yield "[peer]", "compared with nobody", f"write {page.peer_test}, see tests/peers/conftest.py"
        return
    command = [sys.executable, "-m", "pytest", "-x", "-rfEs", "-p", "no:cacheprovider", page.peer_test]
    done = subprocess.run(command, cwd=page.book.root, capture_output=True, text=True)
    if done.returncode in (0, 5) and not re.search(r"\d passed", done.stdout):  # all skipped
        reasons = re.findall(r"^SKIPPED.*", done.stdout, re.M) or ["it holds no test"]
        yield "[peer]", f"compared with nobody: {reasons[-1]}", "install the extra peers"
    elif done.returncode:
        lines = [line for line in done.stdout.splitlines() if re.match(r"FAILED|ERROR|E  ", line)]
        yield (
            "[peer]",
            f"the comparison fails: {(lines or [done.stdout[-99:] + done.stderr[-99:]])[-1]}",
            f"pytest {page.peer_test}",
        )


RULES: tuple[Rule, ...] = (
    *(metadata, papers, prerequisites, headings, set_up, tags, tasks, sizes, outputs, images, sliders),
    *(unwritten, numbers, deviations, citations, links, record, fairness),
)
TRIALS: tuple[Rule, ...] = (exercises, planted, peer)


def check(
    chapters: Iterable[Chapter], book: Book, rules: Iterable[Rule] = RULES + TRIALS, memory: Path | None = None
) -> Iterator[Finding]:
    """Every finding in these chapters; what cannot be read is a finding too.

    ``memory``: a folder that keeps which chapters have passed their trials, so that only what changed is tried again.
    """
    others = book.chapters()
    for chapter in chapters:
        page, name = Page(chapter, book, others), chapter.path.name
        try:
            for cell in page.code():
                parse(cell.source)
            for rule in rules:
                passed = memory and memory / f"{chapter.slug}-{rule.__name__}"
                if rule not in TRIALS or not passed or read(passed) != (key := trial_key(page)):
                    wrong = list(rule(page))
                    yield from (Finding(name, str(where), problem, cure) for where, problem, cure in wrong)
                    if rule in TRIALS and passed and not wrong:
                        write_atomically(passed, key)
        except SyntaxError as error:
            yield Finding(name, str(cell), f"not Python: {error.msg}", f"correct line {error.lineno}")
        except BookError as error:
            yield Finding(name, "[notebook]", str(error), "the rules that follow wait for it")


def trial_key(page: Page) -> str:
    """Hash of what the trials depend on: the chapter's code, its helpers, its peer test, and the trials themselves."""
    judges = [module_digest(f"benchtop.publish.{name}") for name in ("check", "mutate")]
    about = [version("torch"), read(page.book.root / page.peer_test), page.listed("equivalent_mutants"), *judges]
    return page.chapter.key("trials", {"about": about})


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def peers(book: Book) -> list[dict[str, str]]:
    """Which chapter is compared with what: rows chapter, peer, what - the constants PEER and WHAT of the tests."""
    rows = []
    for path in sorted((book.root / "tests" / "peers").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
        words = {name: ast.literal_eval(said[name]) for name in ("PEER", "WHAT") if name in said}
        first = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
        slug = path.stem.removeprefix("test_").replace("_", "-")
        rows.append({"chapter": slug, "peer": words.get("PEER", first), "what": words.get("WHAT", "")})
    return rows


# ---- reading cells ----


def titles_of(source: str) -> list[tuple[int, str]]:
    """(level, title) of each heading in a text cell."""
    text = re.sub(r"^```.*?^```", "", source, flags=re.S | re.M)
    return [(len(marks), title) for marks, title in re.findall(r"^(#{1,6})\s+(.+?)[\s#]*$", text, re.M)]


def html_of(output: dict[str, Any]) -> str:
    return output.get("data", {}).get("text/html", "")


def words_of(output: dict[str, Any]) -> str:
    """What an output says in words: printed text, Markdown, tables; no pictures."""
    data, html = output.get("data", {}), re.sub(r"<script.*?</script>|<[^>]*>", " ", html_of(output), flags=re.S)
    return " ".join([output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", ""), html])


def silent(text: str) -> list[str]:
    """The pictures of HTML or Markdown that have no alt text."""
    tags = [tag for tag in re.findall(r"<img\b[^>]*>", text) if not re.search(r"""\balt=["']\s*[^"'\s]""", tag)]
    figures = [f for f in re.findall(r"```\{(?:figure|image)\}.*?```", text, re.S) if ":alt:" not in f]
    return tags + figures + re.findall(r"!\[\s*\]\(", text)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
