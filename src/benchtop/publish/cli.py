"""The command ``benchtop``: thin functions, one a command."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from benchtop.profile import NAMES
from benchtop.publish.chapter import Book, BookError, Chapter

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run, check and print Benchtop Deep Learning.")
Names = Annotated[Optional[list[str]], typer.Argument(help="slugs or parts; all chapters if none is given")]  # noqa: UP045
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def run(
    names: Names = None,
    profile: Annotated[str, typer.Option(metavar="|".join(NAMES), help="size of the run")] = "laptop",
    everything: Annotated[bool, typer.Option("--all/--stale", help="fresh chapters too, or only stale ones")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="chapters at once; default: one a core, one for gpu")] = None,
    scheduler: Annotated[Optional[str], typer.Option(metavar="ADDRESS", help="a Dask cluster, tcp://...")] = None,  # noqa: UP045
    resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="what a chapter takes of a worker")
    ] = None,
    kernel: Annotated[bool, typer.Option("--kernel/--no-kernel", help="with Jupyter, or in plain Python")] = True,
    as_json: AsJson = False,
) -> None:
    """Execute chapters and keep their records; under laptop their outputs too."""
    import psutil

    from benchtop.publish import run as runner

    if profile not in NAMES:
        raise BookError(f"unknown profile {profile!r}: expected one of {', '.join(NAMES)}")
    book = Book.find()
    with runner.interruptible():
        summary = runner.run(
            book, book.select(names), profile, everything=everything, jobs=jobs, scheduler=scheduler,
            resources=amounts(resource or []), kernel=kernel,
        )  # fmt: skip
    print(json.dumps(asdict(summary), indent=1) if as_json else summary, flush=True)
    if summary.left:  # interrupted: what had finished is kept, nothing else is waited for
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os._exit(130)
    raise typer.Exit(1 if summary.failed else 0)


def amounts(words: list[str]) -> dict[str, float]:
    """``["GPU=1"]`` as ``{"GPU": 1.0}``."""
    try:
        return {name: float(number) for name, number in (word.split("=") for word in words)}
    except ValueError:
        raise BookError(f"cannot read --resource {' '.join(words)}: expected NAME=NUMBER, such as GPU=1") from None


@app.command("list")
def list_(names: Names = None, as_json: AsJson = False) -> None:
    """Each chapter in each profile it has run in: verdict, fresh or stale, cost."""
    rows = [row for chapter in Book.find().select(names) for row in standing(chapter)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = [["chapter", "part", "verdict", "profile", "state", "seconds", "memory", "date"]]
    for row in rows:
        memory = row["peak_bytes"] and f"{row['peak_bytes'] / 1e9:.2f} GB"
        words = [row[name] for name in ("slug", "part", "verdict", "profile", "state", "seconds")] + [
            memory,
            row["date"],
        ]
        table.append(["-" if word is None else str(word) for word in words])
    print_table(table)


def standing(chapter: Chapter) -> Iterator[dict[str, Any]]:
    """A row for laptop and for each other profile with a record; a broken chapter says so in its state."""
    try:
        records, _ = chapter.records(), chapter.key("laptop")  # a corrupt notebook has none
        states = {name: chapter.status(name) for name in NAMES if name in records or name == "laptop"}
    except BookError as error:
        records, states = {}, {"laptop": f"broken: {error}"}
    for profile, state in states.items():
        entry = records.get(profile, {})
        row = {"slug": chapter.slug, "part": chapter.part, "verdict": entry.get("outcome"), "profile": profile}
        yield row | {"state": state} | {name: entry.get(name) for name in ("seconds", "peak_bytes", "date")}


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())


@app.command()
def doctor() -> None:
    """Is this machine ready? One line for each thing, and a cure for each problem."""
    from benchtop.publish.doctor import examine

    rows = list(examine(Book.find()))
    print_table([[row.name, "problem" if row.cure else "OK", row.found, row.cure] for row in rows])
    if any(row.cure for row in rows):
        raise typer.Exit(1)


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
def data_list(as_json: AsJson = False) -> None:
    """Each data set with its kind, size and licence; no size: embedded, no network."""
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


if __name__ == "__main__":
    main()
