"""The pages: what they say is what metadata and records say, and a reader without network or kernel can use them all.

A small book of five chapters is made in a temporary folder (`small`); the browser visits that one and the real book.
"""

import contextlib
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import time
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

import benchtop as bt
from benchtop import plots, report, widgets
from benchtop.claims import judge
from benchtop.publish import site as pages
from benchtop.publish.chapter import Book, BookError, Chapter

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "ci-artefacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = ROOT / "_build" / "npm"  # where axe-core is put, outside of git

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}

# slug: paper, part, prerequisites, mean gain over the baseline, is the record fresh?
CHAPTERS = {
    "first": (266, "adaptation", [], 1.5, True),
    "second": (154, "learning-dynamics", ["first"], 0.1, True),
    "third": (87, "attention", ["first"], -1.5, True),
    "fourth": (1, "recommendation-and-graphs", ["second", "third"], 1.2, False),
    "fifth": (2, "activations-and-norms", [], None, True),  # never run
}


# ---- a small book ----


def outputs_of(show) -> list[nbformat.NotebookNode]:
    """What a cell that calls ``show()`` would store."""
    rich: list[nbformat.NotebookNode] = []

    def keep(bundle, metadata=None):
        rich.append(nbformat.v4.new_output("display_data", bundle, metadata=metadata or {}))

    with contextlib.ExitStack() as stack:
        for module in (report, plots, widgets):
            stack.enter_context(mock.patch.object(module, "display", keep))
        stack.enter_context(contextlib.redirect_stdout(printed := io.StringIO()))
        show()
    text = [nbformat.v4.new_output("stream", name="stdout", text=printed.getvalue())] if printed.getvalue() else []
    return text + rich


def figure():
    fig, ax = bt.subplots()
    ax.plot([1, 0.4, 0.2], label="ours")
    ax.set(xlabel="step", ylabel="loss (nats)")
    ax.legend()
    bt.show(fig, alt="Loss falls from 1 to 0.2 in three steps.")


def wave(rank, depth):
    fig, ax = bt.subplots(figsize=(4, 2.5))
    ax.plot(np.sin(np.linspace(0, 6, 50) * rank) / depth)
    ax.set(xlabel="x (s)", ylabel="y", ylim=(-1.1, 1.1))
    return fig


def judged(title: str, gain: float, log: Path, monkeypatch) -> tuple[list[nbformat.NotebookNode], dict]:
    """The outputs of a claim cell and the claim's entry in the record."""
    monkeypatch.setenv(report.LOG, str(log))
    noise = np.random.default_rng(len(title)).normal(gain, 0.5, 8)
    results = pd.DataFrame({"Ours": 2 - noise, "Base": np.full(8, 2.0)}, index=range(100, 108))
    claim = bt.Claim(f"{title} lowers the loss", metric="test loss", better="Ours", than="Base", paper="Table 2")
    outputs = outputs_of(lambda: claim.test(results))
    entry = json.loads(log.read_text().splitlines()[-1])
    return outputs, {key: value for key, value in entry.items() if key != "kind"}


def write_chapter(root: Path, slug: str, monkeypatch) -> Chapter:
    number, part, before, gain, fresh = CHAPTERS[slug]
    text, title = nbformat.v4.new_markdown_cell, f"Technique {slug}"

    def code(source, tag, outputs=()):
        return nbformat.v4.new_code_cell(source, metadata={"tags": [tag]}, outputs=list(outputs))

    shown, claim = judged(title, gain, root / "log", monkeypatch) if gain is not None else ([], None)
    cells = [
        text(f"# {title}\n\nWhat the {slug} technique does to the loss."), text("## The idea\n\nTake $A = U_r S_r$, then\n\n$$W = AB .$$"),
        code('profile = "laptop"', "parameters"),
        text("## Try it"), code("bt.show(fig, alt='Loss falls')", "experiment", outputs_of(figure)),
        text("## Does the claim hold?"), code("claim.test(runs)", "claim", shown),
        text("## Play"), code("bt.explore(wave, alt='...')", "widget", outputs_of(
            lambda: bt.explore(wave, alt=lambda rank, depth: f"{slug}: {rank} waves at depth {depth}", rank=[1, 2, 4], depth=[1.0, 2.0]))),
        text("## Exercises\n\n### Exercise 1: Rank (10 min, medium)\n\n### Exercise 2: Scale (15 min, hard)"),
    ]  # fmt: skip
    meta = {
        "slug": slug, "part": part, "papers": [number], "title": title, "authors": ["A"], "tags": ["x"],
        "prerequisites": before, "minutes": {"read": 20, "run": 1}, "difficulty": 2, "stand_in": slug == "third",
    }  # fmt: skip
    notebook = nbformat.v4.new_notebook(
        cells=cells, metadata={"benchtop": meta, "kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    path = root / "book" / part / f"{slug}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    chapter = Chapter(path)
    if claim:
        chapter.save_record("laptop", {
            "key": chapter.key("laptop") if fresh else "another", "outcome": claim["outcome"], "date": "2026-01-02T10:00:00+00:00",
            "seconds": 42.4, "device": "a laptop", "data": {}, "claims": [claim],
        })  # fmt: skip
    return chapter


def write_book(root: Path, monkeypatch) -> Book:
    """The pages of the real book around the chapters of `CHAPTERS`."""
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns("records"))
    for folder in root.glob("book/*/"):
        if folder.name != "_static":
            shutil.rmtree(folder)
    shutil.copy(ROOT / "_config.yml", root)
    papers = Book(ROOT).papers
    by_number = {number: slug for slug, (number, *_) in CHAPTERS.items()}
    rows = [row | {"chapter": by_number.get(row["id"])} for row in papers]
    titles = {row["id"]: row["title"] for row in papers}
    (root / "book" / "papers.yml").write_text(yaml.safe_dump(rows, allow_unicode=True))
    known = "".join(
        f"@article{{{slug}key, title={{{titles[number]}}}, author={{Lovelace, Ada and Hopper, Grace}}, year={{2020}}, eprint={{2001.0000{i}}}}}\n"
        for i, (slug, (number, *_)) in enumerate(CHAPTERS.items())
    )
    references = root / "book" / "references.bib"
    entries = re.findall(r"^@.*?^\}", references.read_text(), re.S | re.M)
    theirs = [e for e in entries if not any(titles[n].lower() in e.lower() for n, *_ in CHAPTERS.values())]
    references.write_text("\n\n".join(theirs) + f"\n{known}")  # a real chapter's entry would stand in for a missing one
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    toc["parts"] = [
        part for part in toc["parts"] if not any(c["file"].count("/") > 1 for c in part["chapters"])
    ]  # the real chapters
    sections = [{"file": f"book/{part}/{slug}"} for slug, (_, part, *_) in CHAPTERS.items()]
    toc["parts"].insert(2, {"caption": "Chapters", "chapters": sections})
    (root / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    for slug in CHAPTERS:
        write_chapter(root, slug, monkeypatch)
    return Book(root)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(book, folder of its pages): built once; tests that change a book make their own."""
    with pytest.MonkeyPatch.context() as patch:
        book = write_book(tmp_path_factory.mktemp("book"), patch)
    return book, pages.build(book).parent


@pytest.fixture
def book(small, tmp_path):
    """A small book that may be changed."""
    return Book(shutil.copytree(small[0].root, tmp_path / "b", ignore=shutil.ignore_patterns("_build")))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder of the pages of this repository's own book: `build` raises if anything is wrong with them."""
    return pages.build(Book(ROOT), tmp_path_factory.mktemp("real") / "html").parent


def page(folder: Path, slug: str) -> str:
    return (folder / "book" / CHAPTERS[slug][1] / f"{slug}.html").read_text()


def plain(html: str) -> str:
    return " ".join(re.sub(r"<script.*?</script>|<[^>]+>", " ", html, flags=re.S).split())


def piece(html: str, start: str, end: str) -> str:
    return plain(html[html.index(start) : html.index(end, html.index(start))])


# ---- what the pages say ----


def test_card_shows_metadata_and_record(small):
    book, folder = small
    card = piece(html := page(folder, "first"), '<aside class="bt-card"', "</aside>")
    claim = book.chapters()["first"].record("laptop")["claims"][0]
    assert claim["outcome"] == "holds"
    for words in (
        "Lovelace and Hopper, 2024", "holds Technique first lowers the loss", "42 s on a laptop, 2026-01-02; made the outputs",
        f"test loss: Ours lower than Base by {claim['effect']:.3g} [{claim['low']:.3g}, {claim['high']:.3g}], 8 seeds",
        "20 min, exercises 25 min", "2 of 5", "read before nothing",
    ):  # fmt: skip
        assert words in card, (words, card)
    assert "https://arxiv.org/abs/2001.00000" in html
    assert "stand-in" in piece(page(folder, "third"), '<aside class="bt-card"', "</aside>")
    assert "bt-banner" not in html


@pytest.mark.parametrize(
    ("slug", "badge", "banner"),
    [
        ("third", "fails", "the paper's claim fails"),
        ("fourth", "stale before the last change: holds", "has changed since its outputs were made"),
        ("fifth", "not measured", "has not been measured"),
        ("second", "open", None),
    ],
)
def test_verdict_by_shape_and_word_and_banner(small, slug, badge, banner):
    html = page(small[1], slug)
    assert badge in piece(html, 'class="bt-headline"', "</p>")
    assert re.search(r'class="bt-headline">\s*<span class="bt-badge"><svg', html)
    assert (banner in piece(html, 'class="bt-banner"', "</div>")) if banner else "bt-banner" not in html


def test_several_claims_are_counted_beside_the_verdict(small):
    site = pages.survey(small[0])
    (claim,) = site.chapters["third"].claims
    others = [replace(claim, outcome=outcome) for outcome in ("holds", "open", "holds")]
    several = replace(site.chapters["third"], claims=(claim, *others, replace(claim, effect=None)))
    assert several.tally == "2 of 4 claims hold, 1 open, 1 fail" and site.chapters["third"].tally == ""
    html = pages.render("card", site, "book/attention/third", several)
    assert "Not all claims pass this test: 2 of 4 claims hold, 1 open, 1 fail." in plain(html)


def test_buttons_lead_to_the_notebook(small):
    book, folder = small
    html = page(folder, "second")
    owner = "/".join(book.address.split("/")[-2:])
    assert f"https://colab.research.google.com/github/{owner}/blob/main/book/learning-dynamics/second.ipynb" in html
    assert f"https://mybinder.org/v2/gh/{owner}/main?urlpath=lab/tree/book/learning-dynamics/second.ipynb" in html
    source = folder / "_sources" / "book" / "learning-dynamics" / "second"
    assert nbformat.read(source.with_suffix(".ipynb"), 4).metadata["benchtop"]["slug"] == "second"
    script = source.with_suffix(".py").read_text()
    compile(script, "second.py", "exec")
    assert '# %% tags=["parameters"]\nprofile = "laptop"' in script
    assert "# ## The idea" in script


def test_neighbours_at_the_foot(small):
    foot = piece(page(small[1], "second"), '<nav class="bt-foot"', "</nav>")
    assert foot == "Read before Technique first Read next Technique fourth"


def test_atlas_lists_every_paper_once(small):
    book, folder = small
    html = (folder / "book" / "atlas.html").read_text()
    rows = re.findall(r'<tr data-part="[^"]*" data-verdict="([^"]*)"', html)
    assert len(rows) == len(book.papers) == 300
    assert rows.count("no chapter yet") == 295
    assert sorted(set(rows)) == sorted(pages.VERDICTS)
    forest = plain(html[html.index('<div class="bt-forest"') :])
    assert all(f"Technique {slug}" in forest for slug, (*_, gain, _) in CHAPTERS.items() if gain is not None)


def test_benjamini_hochberg_over_all_claims():
    """Worked by hand: q_(k) is the smallest p_(j) n / j over j >= k."""
    claims = [pages.Claim("a", "holds", False, p=p) for p in (0.01, 0.04, 0.03)] + [pages.Claim("b", "open", False)]
    base = dict.fromkeys(pages.Facts.__dataclass_fields__, None)
    facts = [pages.Facts(**base | {"claims": tuple(claims[:2])}), pages.Facts(**base | {"claims": tuple(claims[2:])})]
    adjusted = [claim.q for f in pages.correct(facts) for claim in f.claims]
    assert adjusted[:3] == pytest.approx([0.03, 0.04, 0.04])
    assert adjusted[3] is None


@pytest.mark.parametrize("form", ["test", "matches", "trend", "at_most"])
def test_effect_and_interval_stand_on_the_side_of_the_claim(form, tmp_path, monkeypatch):
    """What is drawn right of the middle is what the outcome calls true, for each form of a claim."""
    monkeypatch.setenv(report.LOG, str(tmp_path / "log"))
    claim, noise = bt.Claim("x", metric="m", better="a", than="b"), np.linspace(0.9, 1.1, 8)
    outputs_of(lambda: {
        "test": lambda: claim.test(pd.DataFrame({"a": 1 - noise, "b": np.ones(8)})),
        "matches": lambda: claim.matches(1.0, 1 + noise / 100, rtol=0.05),
        "trend": lambda: claim.trend([0, 1], np.stack([np.zeros(8), noise], 1)),
        "at_most": lambda: claim.at_most(noise, 2.0),
    }[form]())  # fmt: skip
    entry = json.loads((tmp_path / "log").read_text())
    assert entry["outcome"] == "holds"
    low, mean, high = pages.claim_of(entry).gain
    assert 0 < low < mean < high
    assert mean == pytest.approx(np.mean(entry["gain"]) / np.std(entry["gain"], ddof=1))


# ---- order among chapters ----


def test_cycle_of_prerequisites_is_one_line(book):
    edit(book, "first", lambda n: n.metadata["benchtop"].update(prerequisites=["fourth"]))
    with pytest.raises(BookError, match=r"^prerequisites form a cycle: \w+ before .*; cut one of them$"):
        pages.build(book)


def test_unknown_prerequisite_is_one_line(book):
    edit(book, "first", lambda n: n.metadata["benchtop"].update(prerequisites=["sixth"]))
    with pytest.raises(BookError, match=r"^first: unknown prerequisite 'sixth'"):
        pages.survey(book)


def test_graph_draws_each_arrow_from_left_to_right(small):
    drawing = pages.graph(site := pages.survey(small[0]))
    places = {node["chapter"].slug: (node["x"], node["y"]) for node in drawing["nodes"]}
    assert set(places) == {"first", "second", "third", "fourth"}
    assert len(set(places.values())) == 4
    assert len(drawing["edges"]) == 4
    assert all(x1 < x2 for x1, _, x2, _ in drawing["edges"])
    html = (small[1] / "book" / "paths.html").read_text()
    for facts in site.chapters.values():
        assert (
            html.count(f'href="{facts.doc.removeprefix("book/")}.html"') >= 2
        )  # the drawing or contents, and the list


@pytest.mark.parametrize("weeks", [6, 10, 14])
def test_courses_keep_prerequisites_and_minutes(weeks):
    """Eighty made-up chapters, each resting on up to two earlier ones."""
    rng, base = np.random.default_rng(0), dict.fromkeys(pages.Facts.__dataclass_fields__, None)
    facts = [
        pages.Facts(**base | {
            "slug": f"c{i}", "part": f"p{i % 7}", "difficulty": int(rng.integers(1, 6)), "minutes_read": int(rng.integers(10, 30)),
            "minutes_run": 1, "minutes_exercises": int(rng.integers(0, 40)), "before": tuple({f"c{j}" for j in rng.integers(0, i, 2)} if i else ()),
        })
        for i in range(80)
    ]  # fmt: skip
    site = pages.Site(Book(ROOT), {f.slug: f for f in facts}, [], {})
    plan = pages.course(site, weeks)
    assert len(plan) == weeks
    taught: set[str] = set()
    for week in plan:
        assert sum(c.minutes for c in week) <= pages.WEEK
        for chapter in week:
            assert set(chapter.before) <= taught
            taught.add(chapter.slug)
    assert len(taught) >= 2 * weeks


# ---- the gate, and only what has changed is made anew ----


def edit(book: Book, slug: str, change) -> Path:
    """Change a notebook, keep its record fresh."""
    chapter = book.chapters()[slug]
    notebook = nbformat.read(chapter.path, 4)
    change(notebook)
    nbformat.write(notebook, chapter.path)
    return chapter.path


def test_picture_without_alt_text_fails_the_build_until_it_is_mended(book):
    def silence(notebook):
        notebook.cells[4].outputs[0].metadata["image/png"]["alt"] = " "

    whole = book.chapters()["first"].path.read_bytes()
    path = edit(book, "first", silence)
    for _ in range(2):  # the second build must not forget it
        with pytest.raises(
            BookError, match=r"^book/adaptation/first\.ipynb.*cell 5: a picture without alt text"
        ) as error:
            pages.build(book)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    pages.build(book)


def test_an_edit_rebuilds_its_page_and_no_other_in_time(small, tmp_path):
    book, folder = Book(shutil.copytree(small[0].root, tmp_path / "b")), tmp_path / "b" / "_build" / "html"
    pages.build(book)  # paths have changed with the copy
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.html")}
    path = edit(book, "second", lambda n: n.cells[1].update(source="## The idea\n\nAnother word."))
    start = time.perf_counter()
    pages.build(book)
    assert time.perf_counter() - start < 10
    written = {p.stem for p, then in before.items() if p.stat().st_mtime_ns != then} - {"genindex", "search", "index"}
    assert written == {path.stem}
    assert "Another word." in page(folder, "second")


def test_every_warning_is_an_error(book):
    with (book.root / "book" / "paths.md").open("a") as file:
        file.write("\n[nowhere](no-such-page.md)\n")
    with pytest.raises(BookError, match=r"^book/paths\.md:\d+: .*no-such-page"):
        pages.build(book)


def test_chapter_needs_its_paper_among_the_references(book):
    references = book.root / "book" / "references.bib"
    references.write_text(re.sub(r"@article\{thirdkey.*\n", "", references.read_text()))
    with pytest.raises(
        BookError, match=r"^book/attention/third\.ipynb: references\.bib has no entry for 'Hopfield Networks"
    ):
        pages.build(book)


def test_bundle_is_one_zip_with_checksums_and_the_same_every_time(small, tmp_path):
    book, _ = small
    first, second = pages.bundle(book, tmp_path / "a.zip"), pages.bundle(book, tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        sums = dict(reversed(line.split("  ")) for line in archive.read("benchtop/SHA256SUMS").decode().splitlines())
        names = {name.removeprefix("benchtop/") for name in archive.namelist()} - {"SHA256SUMS"}
        assert names == set(sums)
        assert all(hashlib.sha256(archive.read(f"benchtop/{name}")).hexdigest() == said for name, said in sums.items())
    assert {f"notebooks/{part}/{slug}.ipynb" for slug, (_, part, *_) in CHAPTERS.items()} <= names


# ---- the files ----


class Links(HTMLParser):
    """Addresses, anchors, pictures and heading levels of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets, self.ids, self.loaded, self.pictures, self.levels = [], set(), [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if address := found.get("href") or found.get("src"):
            (self.targets if tag == "a" else self.loaded).append(address)
        if tag == "article":
            self.levels.clear()  # the heading before it is for print only
        if tag == "img":
            self.pictures.append(found)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))


@pytest.fixture(scope="module", params=["small", "real"])
def parsed(request):
    """(folder, pages by path) of both books."""
    built = request.getfixturevalue(request.param)
    folder = built[1] if request.param == "small" else built
    return folder, {path: Links(path) for path in folder.rglob("*.html") if "_static" not in path.parts}


def test_no_link_inside_is_broken(parsed):
    _, found = parsed
    broken = []
    for path, links in found.items():
        for address in links.targets + links.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (
                parts.fragment and target in found and parts.fragment not in found[target].ids | {"top"}
            ):
                broken.append(f"{path.name}: {address}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(parsed):
    outside = [
        address
        for links in parsed[1].values()
        for address in links.loaded
        if urlsplit(address).scheme in ("http", "https")
    ]
    assert not outside


def test_pictures_have_alt_text_headings_an_order_and_pages_a_language(parsed):
    for path, links in parsed[1].items():
        if path.parent != parsed[0] or path.stem == "search":
            html = path.read_text()
            assert '<html lang="en"' in html and 'id="pst-skip-link"' in html, path
        assert all(picture.get("alt", "").strip() or picture.get("alt") == "" for picture in links.pictures), path
        levels = links.levels
        if path.stem in ("genindex", "search") or path.parent == parsed[0]:
            continue  # made by Sphinx
        assert levels.count(1) == 1 and levels[0] == 1, (path, levels)
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), (path, levels)


def test_a_page_weighs_at_most_a_megabyte_beside_what_all_pages_share(parsed):
    folder, found = parsed
    for path, links in found.items():
        own = [(path.parent / unquote(urlsplit(a).path)).resolve() for a in links.loaded if not urlsplit(a).scheme]
        weight = path.stat().st_size + sum(p.stat().st_size for p in own if p.is_file() and "_images" in p.parts)
        assert weight <= 1_000_000, f"{path.relative_to(folder)} weighs {weight / 1e6:.2f} MB"


# ---- a reader's browser, its network cut off ----


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def unzipped(small, tmp_path_factory):
    """The bundle of the small book, unpacked as a reader would."""
    folder = tmp_path_factory.mktemp("unzipped")
    with zipfile.ZipFile(pages.bundle(small[0], folder / "book.zip")) as archive:
        archive.extractall(folder)
    return folder / "benchtop"


@pytest.fixture
def visit(chromium):
    """visit(path, width, dark) opens a page from disk. In the end there must be no console error and no failed request."""
    troubles: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1280, dark: bool = False):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
        tab.on("request", lambda r: r.url.startswith(("http:", "https:")) and troubles.append(f"asked for {r.url}"))
        tab.goto(path.as_uri())
        tab.wait_for_function("!window.MathJax?.startup || MathJax.startup.promise.then(() => true)")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def frame(tab) -> str:
    """The alt text of the picture that a slider shows."""
    shown = tab.locator(".benchtop-explore img:visible")
    assert shown.count() == 1
    assert shown.evaluate("image => image.naturalWidth") > 100
    return shown.get_attribute("alt")


@pytest.mark.browser
def test_slider_moves_by_mouse_and_by_keyboard(visit, unzipped):
    tab = visit(unzipped / "book" / "adaptation" / "first.html")
    rank, depth = tab.get_by_label("rank", exact=True), tab.get_by_label("depth", exact=True)
    assert frame(tab) == "first: 1 waves at depth 1.0"
    rank.scroll_into_view_if_needed()
    box = rank.bounding_box()
    middle = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + 8, middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 8, middle, steps=4)
    tab.mouse.up()
    assert frame(tab) == "first: 4 waves at depth 1.0"
    rank.press("ArrowLeft")
    depth.press("End")
    assert frame(tab) == "first: 2 waves at depth 2.0"
    assert rank.get_attribute("aria-valuetext") == "2"
    assert tab.locator(f'output[for="{rank.get_attribute("id")}"]').inner_text() == "2"


@pytest.mark.browser
def test_equations_are_typeset(visit, unzipped):
    tab = visit(unzipped / "book" / "adaptation" / "first.html")
    assert tab.locator("mjx-container").count() == 2
    assert tab.locator("mjx-container[display=true]").bounding_box()["width"] > 100
    assert tab.locator("mjx-merror").count() == 0
    font = "MJXTEX-I"
    assert tab.evaluate(f"document.fonts.ready.then(() => document.fonts.check('20px {font}'))")


@pytest.mark.browser
def test_search_finds_a_technique(visit, unzipped):
    tab = visit(unzipped / "index.html")
    tab.wait_for_url("**/book/index.html")
    tab.locator(".search-button__button:visible, .search-button-field:visible").first.click()
    tab.locator("dialog input[type=search]:visible, .search-button__search-container input:visible").first.fill(
        "third technique"
    )
    tab.keyboard.press("Enter")
    hit = tab.locator("#search-results li a", has_text="Technique third").first
    hit.wait_for()
    hit.click()
    assert tab.locator("h1:visible").inner_text().startswith("Technique third")


@pytest.mark.browser
def test_atlas_sorts_filters_and_searches(visit, unzipped):
    tab = visit(unzipped / "book" / "atlas.html")
    rows = tab.locator(".bt-atlas tbody tr:visible")
    count = tab.locator(".bt-count")
    assert rows.count() == 300

    tab.get_by_label("Verdict").select_option("holds")
    assert rows.count() == 1 and "Technique first" in rows.inner_text()
    tab.get_by_label("Verdict").select_option("")
    tab.get_by_label("Cost").select_option("under 45 s")
    assert rows.count() == 4
    tab.get_by_label("Cost").select_option("")
    tab.get_by_label("Kind").select_option("theory")
    assert 0 < rows.count() < 300
    assert set(rows.locator("[data-name=Kind]").all_inner_texts()) == {"theory"}
    tab.get_by_label("Kind").select_option("")
    tab.get_by_label("Part").select_option(index=1)
    assert len(set(rows.locator("[data-name=Part]").all_inner_texts())) == 1
    tab.get_by_label("Part").select_option("")
    tab.get_by_label("Search", exact=True).last.fill("pissa singular")
    assert count.inner_text() == "1 of 300 papers"
    tab.get_by_label("Search", exact=True).last.fill("")

    for down in (False, True):
        tab.get_by_role("button", name="Year").press("Enter")  # by keyboard
        years = [int(text) for text in rows.locator("[data-name=Year]").all_inner_texts()]
        assert years == sorted(years, reverse=down)
    tab.get_by_role("button", name="Cost").click()
    assert "Technique" in rows.first.inner_text()  # rows without a value come last
    assert tab.locator("th[aria-sort=ascending]").inner_text() == "Cost"


@pytest.mark.browser
def test_dark_mode_toggles_and_figures_stay_readable(visit, unzipped):
    tab = visit(unzipped / "book" / "adaptation" / "first.html")
    background = "getComputedStyle(document.body).backgroundColor"
    light, button = tab.evaluate(background), tab.locator(".theme-switch-button:visible").first
    for _ in range(3):
        button.click()
        if tab.evaluate("document.documentElement.dataset.theme") == "dark":
            break
    dark = tab.evaluate(background)
    assert dark != light and sum(map(int, re.findall(r"\d+", dark)[:3])) < 200
    picture = tab.locator(".cell_output img:visible").first
    paper = picture.evaluate("image => getComputedStyle(image).backgroundColor")
    assert min(map(int, re.findall(r"\d+", paper)[:3])) > 180  # black ink needs light paper


PAGES = ("book/index", "book/atlas", "book/gallery", "book/paths", "book/how-a-claim-is-judged", "book/how-to-teach")
CUT = """() => [...document.querySelectorAll("article p, article li, article dd, article h1, article h2")]
    .filter(e => e.offsetParent && !e.closest(".bt-graph, .cell_output") && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.textContent.trim().slice(0, 60))"""


def worth_a_look(request) -> list[Path]:
    """Landing page, atlas, gallery, ... and each chapter of the real book; the made-up chapters, which the real may lack."""
    if request.param == "small":
        folder = request.getfixturevalue("unzipped")
        return [folder / "book" / CHAPTERS[slug][1] / f"{slug}.html" for slug in ("third", "fourth")] + [
            folder / "book" / "gallery.html"
        ]
    folder = request.getfixturevalue("real")
    chapters = [path for path in folder.glob("book/*/*.html") if path.stem != "index"]
    return [folder / f"{name}.html" for name in PAGES] + sorted(chapters)


@pytest.fixture(scope="module", params=["small", "real"])
def looked_at(request):
    return worth_a_look(request)


@pytest.mark.browser
def test_usable_at_every_width_and_kept_for_a_look(visit, looked_at):
    SHOTS.mkdir(exist_ok=True)
    for path in looked_at:
        tab = visit(path)
        tab.add_style_tag(content="* { transition: none !important }")
        for width, scheme in ((360, "light"), (768, "light"), (1280, "light"), (1280, "dark")):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{path.stem} scrolls at {width}"
            assert not (cut := tab.evaluate(CUT)), f"{path.stem} at {width}: {cut}"
            short = tab.evaluate("document.documentElement.scrollHeight") < 9000
            tab.screenshot(path=SHOTS / f"{path.stem}-{width}-{scheme}.png", full_page=short, animations="disabled")


@pytest.fixture(scope="module")
def axe():
    """The source of axe-core, which npm brings once; it is no part of the project."""
    source = AXE / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        if not (npm := shutil.which("npm")):
            pytest.skip("no npm on this machine, so no axe-core")
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(AXE), "axe-core@4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm could not bring axe-core: {done.stderr.strip().splitlines()[-1:]}")
    return source.read_text()


@pytest.mark.browser
def test_no_serious_barrier(visit, axe, looked_at):
    """What axe-core finds, in light and in dark."""
    found = []
    for path in looked_at:
        tab = visit(path)
        tab.evaluate(axe)
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            for violation in tab.evaluate("axe.run(document, {preload: false}).then(result => result.violations)"):
                if violation["impact"] in ("serious", "critical"):
                    found.append((path.stem, scheme, violation["id"], violation["nodes"][0]["html"][:200]))
    assert not found


def test_power_on_the_page_about_the_rule_is_what_the_rule_does():
    """Fresh experiments with other noise: the stored share lies within three standard errors of both."""
    notebook = nbformat.read(ROOT / "book" / "how-a-claim-is-judged.ipynb", 4)
    said = "".join(output["data"]["text/plain"] for cell in notebook.cells for output in cell.get("outputs", ()))
    share = int(re.search(r"With 8 seeds an effect of one standard deviation is found in (\d+)%", said)[1]) / 100
    found = [judge(gain)[0] == "holds" for gain in np.random.default_rng(1).normal(1, 1, (500, 8))]
    assert np.mean(found) == pytest.approx(share, abs=3 * np.sqrt(share * (1 - share) * (1 / 250 + 1 / 500)))
