"""The command ``benchtop``: thin functions, one a command."""

import os
import sys
import time
from typing import Annotated, Optional

import typer

from benchtop.profile import NAMES
from benchtop.publish.chapter import Book, BookError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run, check and print Benchtop Deep Learning.")
Names = Annotated[Optional[list[str]], typer.Argument(help="slugs or parts; all chapters if none is given")]  # noqa: UP045


@app.command()
def run(
    names: Names = None,
    profile: Annotated[str, typer.Option(help="smoke, laptop or gpu")] = "laptop",
    everything: Annotated[bool, typer.Option("--all/--stale", help="fresh chapters too, or only stale ones")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="chapters at a time")] = 1,
) -> None:
    """Execute chapters and keep their records."""
    from benchtop.publish.run import run as execute

    if profile not in NAMES:
        raise BookError(f"unknown profile {profile!r}: expected one of {', '.join(NAMES)}")
    chapters, start, failed, done = Book.find().select(names), time.time(), 0, 0
    for result in execute(chapters, profile, everything=everything, jobs=jobs):
        done, failed = done + 1, failed + bool(result.error)
        print(f"{result.slug}: {result.error or result.outcome} ({result.seconds:.1f} s)", flush=True)
    print(f"{done} run, {len(chapters) - done} fresh, {failed} failed, {time.time() - start:.0f} s")
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_() -> None:
    """Each chapter with its verdict and the state of its records."""
    for chapter in Book.find().select():
        states = "  ".join(f"{name} {chapter.status(name)}" for name in NAMES)
        outcome = (chapter.record("laptop") or {}).get("outcome", "not measured")
        print(f"{chapter.part}/{chapter.slug}: {outcome}  ({states})")


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="name of the chapter, as in modern-hopfield")],
    paper: Annotated[int, typer.Option(help="id of its paper in book/papers.yml")],
) -> None:
    """Write the skeleton of a chapter, which runs, and enter it in the lists."""
    from benchtop.publish.new import new as write

    path = write(Book.find(), slug, paper)
    print(f"{path}: `benchtop run {slug} --profile smoke` runs it, `benchtop check {slug}` says what is to be written")


@app.command()
def build() -> None:
    """Make the HTML pages in _build/html, with warnings as errors."""
    from benchtop.publish.site import build as make

    print(f"open {make(Book.find())}")


@app.command()
def bundle() -> None:
    """Pack pages, notebooks and checksums into one zip that needs no network and no server."""
    from benchtop.publish.site import bundle as pack

    path = pack(Book.find())
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): unpack it and open benchtop/index.html")


@app.command()
def check(
    names: Names = None,
    fast: Annotated[bool, typer.Option("--fast", help="only what is read, nothing that has to run")] = False,
) -> None:
    """Structure, fairness, exercises, planted mistakes, peers: one line for each thing that is wrong."""
    from benchtop.publish.check import RULES, TRIALS
    from benchtop.publish.check import check as findings

    chapters, found = (book := Book.find()).select(names), 0
    for finding in findings(chapters, book, RULES if fast else RULES + TRIALS):
        found += 1
        print(finding, flush=True)
    print(f"{len(chapters)} chapters, {found} findings")
    if found:
        raise typer.Exit(1)


@app.command()
def mutate(slug: str) -> None:
    """Plant mistakes in a chapter's technique and say which ones its checks miss."""
    from benchtop.publish.mutate import mutate as plant

    reports = [plant(chapter) for chapter in Book.find().select([slug])]
    print("\n".join(line for report in reports for line in report.lines()))
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


@app.command()
def radar(names: Names = None) -> None:
    """Run chapters in smoke against the newest releases that the ranges allow, in a throw-away environment."""
    from benchtop.publish.radar import radar as sweep

    broken = 0
    for fine, line in sweep(Book.find(), names):
        broken += not fine
        print(line, flush=True)
    if broken:
        raise typer.Exit(1)


data_app = typer.Typer(no_args_is_help=True, help="List, fetch and check the data sets.")
app.add_typer(data_app, name="data")
Sets = Annotated[Optional[list[str]], typer.Argument(help="data sets; all if none is given")]  # noqa: UP045


@data_app.command("list")
def data_list(as_json: Annotated[bool, typer.Option("--json", help="all columns, as JSON")] = False) -> None:
    """Each data set with its kind, size and licence; no size: embedded, no network."""
    import json

    from benchtop.data import table

    if as_json:
        print(json.dumps(table(), indent=1))
        return
    for row in table():
        size = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else "embedded"
        print(f"{row['name']:<36} {row['kind']:<12} {size:>9}  {row['licence']}")


@data_app.command("get")
def data_get(names: Annotated[list[str], typer.Argument(help="data sets")]) -> None:
    """Fetch data sets into the cache (or find them in the mirror) and say where they are."""
    from benchtop.data import get

    for name in names:
        print(f"{name}: {', '.join(map(str, get(name))) or 'embedded, nothing to fetch'}", flush=True)


@data_app.command("check")
def data_check(names: Sets = None) -> None:
    """Read data sets from what is on this machine and compare their content with the registry."""
    from benchtop.data import DataError
    from benchtop.data import check as verify
    from benchtop.data import names as known

    failed = 0
    for name in names or known():
        try:
            print(verify(name), flush=True)
        except DataError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Errors of ours, and words that the command does not know, are one line on standard error; others keep their traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except (BookError, ValueError, LookupError) as error:
        if os.environ.get("BENCHTOP_TRACEBACK"):
            raise
        print(f"benchtop: {error}", file=sys.stderr)
        sys.exit(1)
    except typer.BadParameter.__mro__[2] as error:  # ClickException, of click or of the copy that newer typer brings
        if words := error.format_message():  # none: the help was shown
            print(f"benchtop: {words.rstrip('.')} (see `benchtop --help`)", file=sys.stderr)
        sys.exit(error.exit_code)
