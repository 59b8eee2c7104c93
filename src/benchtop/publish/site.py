"""The book as pages: what metadata and records say about each chapter, put where the reader needs it.

`survey` reads every chapter once and knows nothing of Sphinx. `setup` is the Sphinx extension that places the pieces (the
macros of ``site.html``): a card under each title, the atlas, the gallery, reading paths, courses. `build` makes the pages,
`bundle` one zip of them. Nothing of this is typed by hand or committed.
"""

import base64
import functools
import graphlib
import hashlib
import io
import json
import math
import os
import posixpath
import re
import textwrap
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import nbformat

from benchtop import data
from benchtop.publish.chapter import Book, BookError, Chapter, write_atomically
from benchtop.publish.check import peers, silent

PIECES = ("atlas", "forest", "gallery", "paths", "courses", "examples", "datasets", "peers", "speed")
COSTS = {"under 15 s": 15, "under 45 s": 45, "under 90 s": 90, "longer": math.inf}  # seconds on a laptop
VERDICTS = ("holds", "open", "fails", "stale", "not measured", "no chapter yet")
SHOWN = "laptop"  # the profile whose outputs the notebooks hold and whose verdict counts
WEEK = 150  # minutes of reading, running and exercises in one week of a course
THUMBNAIL = 320, 20_000  # pixels, bytes
# Extensions that do not say so, but do nothing while pages are read: pages may be read by several processes.
IDLE_WHILE_READING = {"sphinx_multitoc_numbering", "sphinx-mathjax-offline"}


# ---- what is known of the book ----


@dataclass(frozen=True)
class Claim:
    """One claim of a record, in the words and numbers of a page."""

    statement: str
    outcome: str
    stand_in: bool
    quantity: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    threshold: str = ""
    p: float | None = None
    q: float | None = None  # p after Benjamini-Hochberg over all claims of the book
    gain: tuple[float, float, float] | None = None  # low, mean, high on the claim's side, in units of the seeds' spread


@dataclass(frozen=True)
class Run:
    """One profile's entry of a record."""

    profile: str
    outcome: str
    stale: bool
    seconds: float
    device: str
    date: str

    @property
    def time(self) -> str:
        return in_words(self.seconds)


@dataclass(frozen=True)
class Facts:
    """What the pages say about one chapter; ``before`` and ``after`` are slugs."""

    slug: str
    doc: str
    title: str
    part: str
    papers: tuple[dict[str, Any], ...]
    verdict: str  # holds | open | fails | stale | not measured
    outcome: str  # of the last run, stale or not
    claims: tuple[Claim, ...]
    runs: tuple[Run, ...]
    minutes_read: float
    minutes_run: float
    minutes_exercises: float
    difficulty: int
    stand_in: bool
    before: tuple[str, ...]
    data: tuple[str, ...]
    picture: str  # what the thumbnail shows; empty without one
    after: tuple[str, ...] = ()

    @property
    def minutes(self) -> float:
        """What a student needs."""
        return self.minutes_read + self.minutes_run + self.minutes_exercises

    @property
    def seconds(self) -> float:
        """Of a run on a laptop: measured, or else what the author expects."""
        return next((run.seconds for run in self.runs if run.profile == SHOWN), 60 * self.minutes_run)

    @property
    def time(self) -> str:
        return in_words(self.seconds)

    @property
    def tally(self) -> str:
        """Where the verdict sums up several claims (the worst counts): how many hold, are open and fail."""
        outcomes = [claim.outcome for claim in self.claims if claim.effect is not None]
        others = [
            f"{n} {word}" for word, n in (("open", outcomes.count("open")), ("fail", outcomes.count("fails"))) if n
        ]
        count = [f"{outcomes.count('holds')} of {len(outcomes)} claims hold", *others]
        return ", ".join(count) if len(outcomes) > 1 else ""

    @property
    def cost(self) -> str:
        return next(name for name, most in COSTS.items() if self.seconds < most)

    @property
    def thumbnail(self) -> str:
        return f"_images/thumbnails/{self.slug}.webp"


@dataclass(frozen=True)
class Site:
    """Chapters by slug, prerequisites before what needs them; papers; parts by name with their titles."""

    book: Book
    chapters: dict[str, Facts]
    papers: list[dict[str, Any]]
    parts: dict[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """Changes when pages that list chapters have to be made anew."""
        return digest([list(self.chapters.values()), self.papers, self.parts, peers(self.book), measured(self.book)])

    def digest_of(self, chapter: Facts) -> str:
        """Changes when the page of one chapter has to be made anew although its notebook is the same."""
        neighbours = [(self.chapters[s].slug, self.chapters[s].title) for s in chapter.before + chapter.after]
        return digest([chapter, neighbours])

    @functools.cached_property
    def needed(self) -> dict[str, list[str]]:
        """For each chapter all that it rests on, first things first, and itself."""
        found: dict[str, list[str]] = {}
        for slug, chapter in self.chapters.items():
            found[slug] = list(dict.fromkeys([s for before in chapter.before for s in found[before]] + [slug]))
        return found

    @functools.cached_property
    def by_part(self) -> dict[str, list[Facts]]:
        """Parts that have chapters, in the order of ``parts``."""
        groups = defaultdict(list)
        for chapter in self.chapters.values():
            groups[chapter.part].append(chapter)
        return {part: groups[part] for part in self.parts if part in groups}

    def launch(self, chapter: Facts, where: str) -> str:
        """The address that opens the chapter's notebook in ``colab`` or ``binder``."""
        config = self.book.config
        repository, branch = "/".join(self.book.address.split("/")[-2:]), config["repository"]["branch"]
        if where == "colab":
            return f"{config['launch_buttons']['colab_url']}/github/{repository}/blob/{branch}/{chapter.doc}.ipynb"
        return f"{config['launch_buttons']['binderhub_url']}/v2/gh/{repository}/{branch}?urlpath=lab/tree/{chapter.doc}.ipynb"


def survey(book: Book) -> Site:
    """Read every chapter and its records once. Raises BookError, one line, for prerequisites that cannot be followed."""
    chapters = book.chapters()
    before = {slug: tuple(chapter.meta.get("prerequisites", ())) for slug, chapter in chapters.items()}
    after = defaultdict(list)
    for slug, names in before.items():
        for name in names:
            if name not in chapters:
                raise BookError(f"{slug}: unknown prerequisite {name!r}: name the slug of a chapter of this book")
            after[name].append(slug)
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError as error:
        raise BookError(f"prerequisites form a cycle: {' before '.join(error.args[1])}; cut one of them") from None
    papers = described(book)
    facts = [replace(facts_of(chapters[slug], papers), after=tuple(after[slug])) for slug in order]
    parts = {
        part: part_title(book, part) for part in sorted({row["part"] for row in book.papers} | {f.part for f in facts})
    }
    return Site(book, {f.slug: f for f in correct(facts)}, list(papers.values()), parts)


def facts_of(chapter: Chapter, papers: dict[int, dict[str, Any]]) -> Facts:
    """One chapter's metadata and records as its card shows them."""
    meta, records = chapter.meta, chapter.records()
    runs = tuple(
        Run(name, entry["outcome"], chapter.status(name) == "stale", entry["seconds"], entry["device"], entry["date"])
        for name, entry in records.items()
    )
    shown = next((run for run in runs if run.profile == SHOWN), None)
    outcome = shown.outcome if shown else "not measured"
    claims = tuple(claim_of(entry) for entry in records.get(SHOWN, {}).get("claims", ()))
    text = "\n".join(cell.source for cell in chapter.notebook.cells if cell.cell_type == "markdown")
    try:
        return Facts(
            slug=chapter.slug, doc=f"book/{chapter.part}/{chapter.slug}", title=meta["title"], part=chapter.part,
            papers=tuple(papers[number] for number in meta["papers"]),
            verdict="stale" if shown and shown.stale else outcome, outcome=outcome, claims=claims, runs=runs,
            minutes_read=meta["minutes"]["read"],
            minutes_run=max(1, round(shown.seconds / 60)) if shown else meta["minutes"]["run"],
            minutes_exercises=sum(map(int, re.findall(r"^### Exercise .*\((\d+) min", text, re.M))),
            difficulty=meta["difficulty"], stand_in=meta["stand_in"] or any(claim.stand_in for claim in claims),
            before=tuple(meta["prerequisites"]),
            data=tuple(records.get(SHOWN, {}).get("data", ())), picture=picture(chapter)[1],
        )  # fmt: skip
    except KeyError as error:
        raise BookError(
            f"{chapter.slug}: its metadata lacks {error}, or papers.yml does; `benchtop check` says more"
        ) from None


def claim_of(entry: dict[str, Any]) -> Claim:
    """A claim as `benchtop.claims` wrote it into the record."""
    claim = Claim(entry["statement"], entry["outcome"], entry["stand_in"])
    if "effect" not in entry:
        return claim
    threshold, form = entry["threshold"], entry["form"]
    side = "lower" if entry["lower_is_better"] else "higher"
    quantity, limit = {
        "difference": (f"{entry['metric']}: {entry['better']} {side} than {entry['than']} by", "margin"),
        "agreement": ("largest relative deviation", "tolerance"),
        "trend": ("change per unit, in the claimed direction,", "margin"),
        "bound": ("value, mean over seeds,", "bound"),
    }[form]
    low, high = entry["low"] - threshold, entry["high"] - threshold
    if form in ("agreement", "bound"):  # there the claim's side is below the threshold
        low, high = -high, -low
    mean = sum(entry["gain"]) / len(entry["gain"])
    spread = math.sqrt(sum((g - mean) ** 2 for g in entry["gain"]) / (len(entry["gain"]) - 1)) or 1e-300
    return replace(
        claim, quantity=quantity, effect=entry["effect"], low=entry["low"], high=entry["high"], n=entry["n"], p=entry["p"],
        threshold=f"{limit} {threshold:.3g}" if threshold or limit != "margin" else "",
        gain=(low / spread, mean / spread, high / spread),
    )  # fmt: skip


def correct(facts: list[Facts]) -> list[Facts]:
    """The same facts, each measured claim with its p-value after Benjamini-Hochberg over all of them."""
    from scipy.stats import false_discovery_control

    measured = [claim.p for f in facts for claim in f.claims if claim.p is not None]
    adjusted = iter(false_discovery_control(measured) if measured else ())
    return [
        replace(f, claims=tuple(c if c.p is None else replace(c, q=float(next(adjusted))) for c in f.claims))
        for f in facts
    ]


def described(book: Book) -> dict[int, dict[str, Any]]:
    """The papers by id; those that ``references.bib`` knows, by their title, with authors and address."""
    from pybtex.database import parse_file

    def plain(title: str) -> str:
        return re.sub(r"[^a-z0-9]", "", title.lower())

    path = book.root / "book" / "references.bib"
    entries = parse_file(path).entries.values() if path.exists() else ()
    known = {plain(entry.fields.get("title", "")): entry for entry in entries}
    papers = {}
    for row in book.papers:
        papers[row["id"]] = row | {"authors": "", "url": ""}
        if entry := known.get(plain(row["title"])):
            names = [" ".join(p.prelast_names + p.last_names).strip("{}") for p in entry.persons.get("author", ())]
            papers[row["id"]] |= {"authors": listed(names), "url": address_of(entry.fields)}
    return papers


def listed(names: list[str]) -> str:
    """One to three names in full, more as the first and the others."""
    return f"{names[0]} et al." if len(names) > 3 else " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def address_of(fields: dict[str, str]) -> str:
    if "doi" in fields:
        return f"https://doi.org/{fields['doi']}"
    number = re.search(r"\d{4}\.\d{4,5}", fields.get("eprint", "") or fields.get("journal", ""))
    return f"https://arxiv.org/abs/{number[0]}" if number else fields.get("url", "")


def part_title(book: Book, part: str) -> str:
    """The title of the part's own page, or its name in words."""
    index = book.root / "book" / part / "index.md"
    found = re.search(r"^# (.+)$", index.read_text(encoding="utf-8"), re.M) if index.exists() else None
    return found[1].strip() if found else part.replace("-", " ").capitalize()


def picture(chapter: Chapter) -> tuple[str, str]:
    """The chapter's main figure, as base64, and its alt text: the last of the experiment, or else its first.

    Forest plots are passed over: small, they all look alike.
    """
    found = [
        ("experiment" in cell.metadata.get("tags", ()), output["data"]["image/png"], alt)
        for cell in chapter.cells()
        for output in cell.outputs
        if "image/png" in output.get("data", {})
        and not (alt := output["metadata"].get("image/png", {}).get("alt", "").strip()).startswith("Forest plot")
    ]
    _, image, alt = next(iter([row for row in reversed(found) if row[0]] + found), ("", "", ""))
    return image, alt


def digest(value: Any) -> str:
    """A short hash of plain data and of the code that turns it into pages."""
    return hashlib.sha256(f"{value!r}{_own_code()}".encode()).hexdigest()[:16]


@functools.cache
def _own_code() -> str:
    return "".join(Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".py", ".html"))


# ---- orders and layouts ----


def graph(site: Site) -> dict[str, Any]:
    """Where the chapters stand in the drawing of prerequisites: a column for each step away from the beginnings.

    Chapters that neither need nor lead to another are left out; the page lists them below.
    """
    column: dict[str, int] = {}
    rows, height = defaultdict(int), {}
    for slug, c in site.chapters.items():  # prerequisites come first
        if c.before or c.after:
            column[slug] = max((column[b] + 1 for b in c.before), default=0)
    middle = {slug: sum(height.get(b, 0) for b in site.chapters[slug].before) for slug in column}
    nodes = []
    for slug in sorted(column, key=lambda s: (column[s], middle[s], site.chapters[s].part, s)):
        height[slug] = rows[column[slug]]
        rows[column[slug]] += 1
        x, y = 8 + 250 * column[slug], 8 + 64 * height[slug]
        nodes.append({"chapter": site.chapters[slug], "x": x, "y": y,
                      "lines": textwrap.wrap(site.chapters[slug].title, 25, max_lines=2, placeholder=" …")})  # fmt: skip
    at = {node["chapter"].slug: node for node in nodes}
    edges = [
        (at[b]["x"] + 210, at[b]["y"] + 24, node["x"], node["y"] + 24) for node in nodes for b in node["chapter"].before
    ]
    size = (250 * (max(column.values(), default=0) + 1), 64 * max(rows.values(), default=0) + 8)
    return {"nodes": nodes, "edges": edges, "width": size[0], "height": size[1]}


def course(site: Site, weeks: int) -> list[list[Facts]]:
    """A plan of so many weeks: easy chapters of many parts, prerequisites always earlier, at most `WEEK` minutes a week.

    Weeks left empty at the end are for projects. A chapter longer than a week has a week of its own.
    """
    needed = site.needed
    used: dict[str, int] = defaultdict(int)
    waiting, chosen, minutes = sorted(site.chapters.values(), key=lambda c: (c.difficulty, c.minutes)), set(), 0.0
    while waiting:
        chapter = min(waiting, key=lambda c: used[c.part])  # of the parts used least, the easiest
        waiting.remove(chapter)
        new = [site.chapters[s] for s in needed[chapter.slug] if s not in chosen]
        if minutes + (cost := sum(c.minutes for c in new)) <= weeks * WEEK:
            minutes += cost
            chosen |= {c.slug for c in new}
            for c in new:
                used[c.part] += 1
    most = math.ceil(len(chosen) / weeks)
    plan: list[list[Facts]] = [[]]
    for chapter in sorted(
        (site.chapters[s] for s in chosen), key=lambda c: (len(needed[c.slug]), c.difficulty, c.slug)
    ):
        if len(plan[-1]) == most or (plan[-1] and sum(c.minutes for c in plan[-1]) + chapter.minutes > WEEK):
            plan.append([])
        plan[-1].append(chapter)
    return [*plan, *[[]] * weeks][:weeks]


def exemplary(site: Site, n: int = 3) -> list[Facts]:
    """Chapters for the landing page: of different parts, measured before unmeasured, the easy first."""
    ordered = sorted(site.chapters.values(), key=lambda c: (c.verdict == "not measured", c.difficulty, c.minutes))
    firsts = {c.part: c for c in reversed(ordered)}
    return sorted(firsts.values(), key=ordered.index)[:n]


def measured(book: Book) -> dict[str, Any]:
    """Device -> what ``benchmarks/fit.py`` wrote about it."""
    file = book.root / "benchmarks" / "fit.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---- Sphinx ----


def render(piece: str, site: Site, doc: str, *more: Any) -> str:
    """The HTML of one macro of ``site.html`` on the page ``doc``."""

    def to(target: str, suffix: str = ".html") -> str:
        return posixpath.relpath(target + suffix, posixpath.dirname(doc))

    return getattr(_templates(), piece)(site, to, *more)


@functools.cache
def _templates():
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("benchtop.publish", "."),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["place"] = lambda x: round(50 + 50 * x / (1 + abs(x)), 1)  # the whole axis in 100 %
    environment.globals |= {
        "graph": graph,
        "course": course,
        "exemplary": exemplary,
        "peers_of": peers,
        "measured": measured,
    }
    environment.globals |= {"VERDICTS": VERDICTS, "COSTS": COSTS, "data": data.table}
    return environment.get_template("site.html").module


def setup(app) -> dict[str, Any]:
    """Register with Sphinx; ``_config.yml`` names this module as an extension."""
    from docutils import nodes
    from pybtex.plugin import find_plugin, register_plugin
    from sphinx.util.docutils import SphinxDirective

    class Piece(SphinxDirective):
        """A directive named after its macro: ```{atlas}```."""

        optional_arguments = 1

        def run(self) -> list[nodes.Node]:
            self.env.metadata[self.env.docname]["benchtop"] = self.env.app.benchtop.digest
            html = render(self.name, self.env.app.benchtop, self.env.docname, *self.arguments)
            return [nodes.raw("", html, format="html")]

    for name in PIECES:
        app.add_directive(name, Piece)
    for name in ("docutils", "plaintext"):  # else each citation looks through the files of all installed packages
        register_plugin("pybtex.backends", name, find_plugin("pybtex.backends", name), force=True)
    for name in IDLE_WHILE_READING & set(app.extensions):
        app.extensions[name].parallel_read_safe = True
    app.connect("builder-inited", take_stock)
    app.connect("env-get-outdated", outdated)
    app.connect("doctree-read", furnish)
    app.connect("html-page-context", accompany)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def take_stock(app) -> None:
    """Survey the book."""
    from sphinx.errors import ConfigError

    try:
        app.benchtop = survey(Book(Path(app.srcdir)))
    except BookError as error:
        raise ConfigError(str(error)) from None


def accompany(app, doc: str, *_) -> None:
    """Beside the page of a chapter, as it is written, its script and its thumbnail."""
    facts = next((facts for facts in app.benchtop.chapters.values() if facts.doc == doc), None)
    if facts:
        chapter = app.benchtop.book.chapters()[facts.slug]
        write_atomically(Path(app.outdir, "_sources", facts.doc + ".py"), script(chapter))
        if facts.picture:
            write_atomically(Path(app.outdir, facts.thumbnail), thumbnail(picture(chapter)[0]))


def outdated(app, env, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Pages whose notebook is the same but whose facts are not, and pages that failed in the last build."""
    site = app.benchtop
    wanted = {facts.doc: site.digest_of(facts) for facts in site.chapters.values()}
    made = {doc: meta["benchtop"] for doc, meta in env.metadata.items() if "benchtop" in meta}
    failed = json.loads(_failures(app.doctreedir).read_text()) if _failures(app.doctreedir).exists() else []
    return [
        doc for doc in env.found_docs if made.get(doc, "") not in ("", wanted.get(doc, site.digest)) or doc in failed
    ]


def furnish(app, doctree) -> None:
    """Put card and foot on the page of a chapter; see that each picture of any page says what it shows."""
    from docutils import nodes
    from sphinx.util import logging

    site, doc, log = app.benchtop, app.env.docname, logging.getLogger(__name__)
    facts = {f.doc: f for f in site.chapters.values()}.get(doc)
    if app.env.doc2path(doc).endswith(".ipynb"):
        give_alt_text(doctree, Chapter(Path(app.env.doc2path(doc))).notebook)
    for node in doctree.findall(lambda n: isinstance(n, nodes.image | nodes.raw)):
        if (isinstance(node, nodes.image) and not node.get("alt", "").strip()) or (
            isinstance(node, nodes.raw) and silent(node.astext())
        ):
            cell = next((n["cell_index"] + 1 for n in ancestors(node) if "cell_index" in n), None)
            where = f"cell {cell}: " if cell else ""
            log.warning(
                f"{where}a picture without alt text: bt.show(fig, alt=...) or ![what is to be seen](...)", location=node
            )
    if facts:
        for paper in facts.papers:
            if not (paper["authors"] and paper["url"]):
                lacks = "authors" if paper["url"] else "address (doi, eprint or url)" if paper["authors"] else "entry"
                log.warning(f"references.bib has no {lacks} for {paper['title']!r}", location=(doc, None))
        app.env.metadata[doc]["benchtop"] = site.digest_of(facts)
        section = next(doctree.findall(nodes.section))
        section.insert(1, nodes.raw("", render("card", site, doc, facts), format="html"))
        section.append(nodes.raw("", render("foot", site, doc, facts), format="html"))


def give_alt_text(doctree, notebook) -> None:
    """The alt text that `benchtop.show` stored beside each picture; MyST-NB reads it from no output."""
    from docutils import nodes

    for cell in doctree.findall(lambda n: isinstance(n, nodes.container) and "cell_index" in n):
        bundles = cell.findall(lambda n: isinstance(n, nodes.container) and n.get("nb_element") == "mime_bundle")
        outputs = [o for o in notebook.cells[cell["cell_index"]].get("outputs", ()) if "data" in o]
        for bundle, output in zip(bundles, outputs):
            for box in bundle.findall(
                lambda n: isinstance(n, nodes.container) and n.get("mime_type", "").startswith("image/")
            ):
                alt = output.metadata.get(box["mime_type"], {}).get("alt", "")
                for image in box.findall(nodes.image):
                    image["alt"] = alt


def ancestors(node) -> Iterable[Any]:
    while node := node.parent:
        yield node


def script(chapter: Chapter) -> str:
    """The notebook as a script in the percent format, which editors and jupytext know."""
    import jupytext

    notebook = nbformat.from_dict(chapter.notebook)
    notebook.metadata = {"jupytext": {"notebook_metadata_filter": "-all", "cell_metadata_filter": "tags,-all"}}
    return jupytext.writes(notebook, "py:percent")


def thumbnail(image: str) -> bytes:
    """A small WebP of a picture given as base64."""
    from PIL import Image

    width, most = THUMBNAIL
    full = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
    small = full.resize((width, round(full.height * width / full.width)), Image.Resampling.LANCZOS)
    for quality in (80, 60, 40, 20, 5):
        small.save(file := io.BytesIO(), format="webp", quality=quality)
        if file.tell() <= most:
            break
    return file.getvalue()


# ---- the commands ----


def build(book: Book, out: Path | None = None) -> Path:
    """Write the HTML pages (``_build/html``) and return the one to open; only what has changed is made anew.

    Every warning is an error, unresolved references among them. Raises BookError with one line a problem.
    """
    from jupyter_book.config import get_final_config
    from sphinx.application import Sphinx
    from sphinx.errors import ConfigError, SphinxError
    from sphinx.util.console import nocolor
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    out = out or book.root / "_build" / "html"
    doctrees, problems = out.parent / ".doctrees", io.StringIO()
    config, _ = get_final_config(
        user_yaml=book.root / "_config.yml", sourcedir=book.root, raise_on_invalid=True,
        cli_config={"latex_individualpages": False, "external_toc_path": str(book.root / "_toc.yml"), "nitpicky": True},
    )  # fmt: skip
    config["templates_path"] = []  # the theme adds to Sphinx' own default, so that a second build would differ
    nocolor()
    with patch_docutils(), docutils_namespace(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # sphinx_external_toc looks at every object there is, torch's too
        try:
            app = Sphinx(
                book.root,
                None,
                out,
                doctrees,
                "html",
                config,
                status=None,
                warning=problems,
                parallel=os.cpu_count() or 1,
            )
            app.build()
        except ConfigError as error:
            raise BookError(str(error)) from None
        except SphinxError as error:
            raise BookError(f"the book cannot be built: {' '.join(str(error).split())}") from None
    lines = one_line_each(problems.getvalue(), book.root)
    docs = [re.split(r"\.(?:md|ipynb)\b", line)[0] for line in lines]  # their pages are read again by the next build
    write_atomically(_failures(doctrees), json.dumps(docs))
    if lines:
        raise BookError("\n".join(lines))
    return out / "index.html"


def _failures(doctrees: str | Path) -> Path:
    return Path(doctrees) / "failures.json"


def one_line_each(text: str, root: Path) -> list[str]:
    """Sphinx' warnings, each as one line that begins with the page, as seen from the book's folder."""
    entries = re.split(r"^(?=.*\b(?:WARNING|ERROR|CRITICAL|SEVERE): )", text, flags=re.M)
    lines = [" ".join(entry.split()).replace(f"{root}/", "") for entry in entries if entry.strip()]
    lines = [re.sub(r"\b(?:WARNING|ERROR|CRITICAL|SEVERE): ", "", line, count=1) for line in lines]
    # MyST-NB counts 10,000 lines for each cell of a notebook
    return [
        re.sub(r"\.ipynb:(?:(\d+)\d{4})?: ", lambda m: f".ipynb: cell {m[1]}: " if m[1] else ".ipynb: ", line)
        for line in lines
    ]


def bundle(book: Book, target: Path | None = None) -> Path:
    """One zip that works from a USB stick: pages, notebooks, checksums. The same book gives the same bytes."""
    pages = build(book).parent
    target = target or pages.parent / "benchtop-book.zip"
    files = {
        path.relative_to(pages).as_posix(): path
        for path in pages.rglob("*")
        if path.is_file() and path.suffix != ".map"
    }
    files |= {f"notebooks/{c.part}/{c.slug}.ipynb": c.path for c in book.chapters().values()}
    content = {f"benchtop/{name}": path.read_bytes() for name, path in sorted(files.items()) if name != ".buildinfo"}
    sums = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name.removeprefix('benchtop/')}\n" for name, data in content.items()
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (content | {"benchtop/SHA256SUMS": sums.encode()}).items():
            archive.writestr(
                zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED
            )  # ZipInfo: the date of 1980, not of today
    write_atomically(target, file.getvalue())
    return target
