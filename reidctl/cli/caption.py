"""`reidctl caption`: an identity and a clothing text per image."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reidctl.cli import options as o
from reidctl.cli.output import emit, table
from reidctl.errors import GateError, UsageError

EPILOG = "Example:  reidctl caption --run runs/demo --mllm template"


def command(
    run: o.RunDir = o.DEFAULT_RUN,
    mllm: Annotated[
        str | None,
        typer.Option(
            help="Who writes: gpt-4 or another OpenAI model, hf:MODEL (a local vision-language model), template (from "
            "attribute tables), file:FILE, replay:FILE, command:PROGRAM. Images leave this machine only with an OpenAI "
            "model or a --base-url elsewhere."
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server: vLLM, Ollama, LM Studio, Azure.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print requests, tokens and an estimated price; send and write nothing.")
    ] = False,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop (exit 5) before all replies together could cost more.")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="A price table that takes precedence over the shipped one (YAML).")
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Use the provider's Batch API: cheaper, within a day, resumable.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="With --batch: wait for the replies, or submit, fetch and return.")
    ] = True,
    cancel: Annotated[bool, typer.Option("--cancel", help="With --batch: cancel the open batches and return.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="i/n: only this machine's share of the images; merge by copying caption/parts.")
    ] = None,
    styles: Annotated[
        str | None,
        typer.Option(help="Style clustering: dbscan, hdbscan, kmeans, gmm, agglomerative, ups, random or none."),
    ] = None,
    data: o.Data = None,
    recipe: o.Recipe = None,
    set_: o.Set = None,
    seed: o.Seed = None,
    force: o.Force = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Let a language model write two texts per image, in the writing styles of the train captions."""
    merged = o.prepare(recipe, set_, seed, quiet)
    section: dict[str, Any] = dict(merged.get("caption") or {})
    prices_path = str(prices.absolute()) if prices is not None else None
    given = {"mllm": mllm, "limit": limit, "shard": shard, "max_cost": max_cost, "prices": prices_path}
    section |= _said(given)
    _into(section, "remote", _said({"base_url": base_url, "concurrency": concurrency}))
    _into(section, "batch", {"enabled": True} if batch else {})
    _into(section, "batch", {} if wait else {"wait": False})
    _into(section, "style", _said({"algorithm": styles}))
    merged["caption"] = section
    if not batch and not section.get("batch", {}).get("enabled") and (cancel or not wait):
        raise UsageError("--cancel and --no-wait belong to --batch.")
    from reidctl.runs import Run
    from reidctl.stages import caption

    if cancel:
        record = caption.cancel(Run(run), merged)
    else:
        record = caption.run(Run(run), merged, data=data, force=force, dry_run=dry_run)
    emit(record, run=run, as_json=json_, lines=_lines(record))
    if record.get("over_budget"):
        left = int(record["metrics"].get("not_asked") or 0)
        raise GateError(
            f"Stopped at the budget of {section['max_cost']}: {left} texts were not asked for.",
            hint="Everything stored is kept: raise --max-cost and run it again, or take what is there with "
            f"--mllm replay:{run}.",
        )


def _said(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _into(section: dict[str, Any], name: str, flags: dict[str, Any]) -> None:
    if flags:
        section[name] = {**(section.get(name) or {}), **flags}


def _lines(record: dict[str, Any]) -> list[str]:
    if record["status"] == "cancelled":
        number = record["metrics"]["cancelled"]
        return [f"{number} batches are being cancelled; `--batch --no-wait` fetches what they had finished."]
    lines = _dry_lines(record) if record["status"] == "dry-run" else _done_lines(record)
    styles = record["styles"]
    eps = "" if styles.get("eps") is None else f", eps {styles['eps']:.4f}"
    noise = "" if not styles.get("captions") else f", noise {100 * styles['noise']:.1f} %"
    found = f"{styles['count']} style{'s' * (styles['count'] != 1)} by {styles['algorithm']}{eps}{noise}"
    return [*lines, f"{found}; written by {record['model']}"]


def _done_lines(record: dict[str, Any]) -> list[str]:
    shown = ["ok", "rejected", "failed", *(["open"] if record.get("pending") else [])]
    rows = [[kind, *(str(counts.get(status, 0)) for status in shown)] for kind, counts in record["texts"].items()]
    lines = table(["text", *shown], rows)
    if record.get("refused_by_check"):
        lines.append("not usable: " + ", ".join(f"{code} {n}" for code, n in record["refused_by_check"].items()))
    totals = record["metrics"]
    if totals["tokens_in"]:
        lines.append(f"tokens: {int(totals['tokens_in']):,} in, {int(totals['tokens_out']):,} out{_money(record)}")
    if record["status"] == "pending":
        lines.append(f"{record['pending']} requests are open in a batch: run the same command later to fetch them.")
    if record["status"] == "part":
        lines.append("this is one part: with all caption/parts together, run without --shard or --limit 0.")
    return lines


def _money(record: dict[str, Any]) -> str:
    cost = record["metrics"].get("cost")
    return "" if not cost else f"; {cost:.4f} {record['currency']} at the prices of the table"


def _dry_lines(record: dict[str, Any]) -> list[str]:
    found = record["metrics"]
    rows = [["texts wanted", f"{found['texts']:,}", ""], ["already stored", f"{found['stored']:,}", ""]]
    rows += [
        [name, f"{found[expected]:,.0f}", f"{found[upper]:,.0f}"]
        for name, expected, upper in (
            ("requests", "requests", "requests_max"),
            ("tokens in", "tokens_in", "tokens_in_max"),
            ("tokens out", "tokens_out", "tokens_out_max"),
        )
    ]
    notes = [] if found["images_counted"] else ["the tokens of the images are not counted: no rule is known for them"]
    if found["price"] is None:
        notes.append(f"no price is known for {record['model']}: add it to a table and give that with --prices")
    else:
        rows.append([f"price in {record['currency']}", f"{found['price']:,.4f}", f"{found['price_max']:,.4f}"])
        notes.append("`at most` counts every retry and the longest answers; text tokens are guessed from characters")
    return [*table(["dry run", "expected", "at most"], rows), *notes]
