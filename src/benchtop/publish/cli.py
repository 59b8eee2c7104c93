"""The command ``benchtop``: thin functions, each loads what it needs when it is called."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from benchtop.publish.chapter import SECONDS, Book, BookError, Chapter

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Names = Annotated[list[str] | None, typer.Argument(metavar="[SLUG|PART ...]", help="chapters or parts; all for none")]
ProfileName = Annotated[str, typer.Option(metavar="|".join(SECONDS), help="size of the run")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """Entry point: what is wrong with the input is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (BookError, ValueError, LookupError) as error:
        if os.environ.get("BENCHTOP_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, LookupError) and error.args else error
        print(f"benchtop: {text}", file=sys.stderr)
        sys.exit(1)


@app.command()
def run(
    names: Names = None,
    profile: ProfileName = "laptop",
    everything: Annotated[bool, typer.Option("--all/--stale", help="all, or only what is stale or missing")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="chapters at once; default: one a core, one for gpu")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="ADDRESS", help="a running Dask cluster, tcp://...")] = None,
    resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="what a chapter takes of a worker")
    ] = None,
    kernel: Annotated[bool, typer.Option("--kernel/--no-kernel", help="with Jupyter, or in plain Python")] = True,
    as_json: Json = False,
) -> None:
    """Execute chapters and keep their records; under `laptop` their outputs too."""
    from benchtop.publish import run as runner

    if profile not in SECONDS:
        raise BookError(f"unknown profile {profile!r}: expected one of {', '.join(SECONDS)}")
    book = Book.find()
    with runner.interruptible():
        summary = runner.run(
            book, book.select(names), profile, everything=everything, jobs=jobs, scheduler=scheduler,
            resources=amounts(resource or []), kernel=kernel,
        )  # fmt: skip
    print(json.dumps(asdict(summary), indent=1) if as_json else summary)
    sys.stdout.flush()
    raise typer.Exit(130 if summary.left else 1 if summary.failed else 0)


@app.command("list")
def list_(names: Names = None, as_json: Json = False) -> None:
    """What there is and what is known of it: verdict, freshness, cost."""
    rows = [row for chapter in Book.find().select(names) for row in standing(chapter)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = [["chapter", "part", "profile", "verdict", "status", "seconds", "memory", "date"]]
    for r in rows:
        seconds = "" if r["seconds"] is None else f"{r['seconds']:.1f}"
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f} GB"
        table.append(
            [r["slug"], r["part"], r["profile"], r["verdict"] or "", r["status"], seconds, memory, r["date"] or ""]
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip())


def standing(chapter: Chapter) -> Iterator[dict[str, Any]]:
    """A row for the laptop profile and for every other that has a record; a broken chapter says so in its status."""
    try:
        records = chapter.records()
        for profile in (name for name in SECONDS if name in records or name == "laptop"):
            entry, status = records.get(profile, {}), chapter.status(profile)
            row = {"slug": chapter.slug, "part": chapter.part, "profile": profile, "verdict": entry.get("outcome")}
            yield row | {"status": status, **{name: entry.get(name) for name in ("seconds", "peak_bytes", "date")}}
    except BookError as error:
        row = {"slug": chapter.slug, "part": chapter.part, "profile": "laptop", "verdict": None}
        yield row | {"status": f"broken: {error}", "seconds": None, "peak_bytes": None, "date": None}


@app.command()
def build() -> None:
    """Make the HTML pages in _build/html, with warnings as errors."""
    from benchtop.publish.site import build as make

    print(f"open {make(Book.find())}")


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


def amounts(words: list[str]) -> dict[str, float]:
    """``["GPU=1"]`` as ``{"GPU": 1.0}``."""
    try:
        return {name: float(number) for name, number in (word.split("=") for word in words)}
    except ValueError:
        raise BookError(f"cannot read --resource {' '.join(words)}: expected NAME=NUMBER, such as GPU=1") from None


if __name__ == "__main__":
    main()
