"""`epochs`: every kept epoch on a split, the one chosen on val beside the one that is best on test."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from reidctl import tables
from reidctl.console import log
from reidctl.errors import DataError
from reidctl.evaluation import protocols
from reidctl.methods.base import unique_state
from reidctl.metrics import CUTOFFS, Interval, QueryMetrics, bootstrap_interval, summarise
from reidctl.runs import Run, fingerprint
from reidctl.stages.index import model_digest
from reidctl.stages.measuring import Subject, check_people, check_query, embed, find_subject, protocols_of
from reidctl.stages.sources import find_source
from reidctl.training.state import kept_epochs

STAGE = "epochs"
Group = tuple[str, str]  # direction, dataset


def run(
    run: Run,
    *,
    split: str = "test",
    query: str = "caption",
    device: str = "auto",
    data: Path | None = None,
    captions: Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Measure every kept epoch, and report the epoch chosen in training beside the best one on this split.

    Most published code reports the best epoch on the test split; that number is optimistic, because the test people
    chose it. Nothing here changes which weights the run uses. The best epoch is the first with the highest value of
    the training's `select_metric`, for each direction and dataset on its own, as a paper on that task alone would
    have it. The gap is best minus chosen, over the same queries; its interval, over people, takes the best epoch as
    given, so it says nothing about how much of the gap another test set would repeat.

    Writes the tables `epochs` and `queries` (condition `epoch-003`, ...). A killed run repeats one epoch at most.

    Args:
        run: with a model that was trained with `train.keep_epochs=true`.
        split: which people.
        query: what a text query is; see `evaluate`.
        device: where to compute.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts.
        seed: of the bootstrap.
        force: measure again even if nothing changed.

    Raises:
        DataError: no epoch was kept, or see `find_subject`.
    """
    check_query(query)
    trained = run.require("finetune")
    kept = kept_epochs(run.stage_dir("finetune"), trained["fingerprint"])
    if not kept:
        raise DataError(
            f"The training in {run.path} kept no epochs.",
            hint="Train with `reidctl finetune --set train.keep_epochs=true`; it costs one model on disk per epoch.",
        )
    source = find_source(run, data, captions)
    check_people(source)
    inputs = source.digests()
    settings: Mapping[str, Any] = {
        "split": split, "query": query, "seed": seed, "model": model_digest(run), "training": trained["fingerprint"],
        "epochs": sorted(kept),
    }  # fmt: skip
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    subject = find_subject(run, split=split, query=query, device=device, data=data, captions=captions)
    run.unfinish(STAGE)
    # What a part holds depends on neither the seed of the intervals nor the other epochs.
    same = {name: value for name, value in settings.items() if name not in ("seed", "epochs")}
    queries = _measure(subject, kept, run.stage_dir(STAGE) / "parts", fingerprint(same, inputs), force=force)
    found = _Found(queries, trained, split, seed)
    outputs = [run.table(STAGE, "epochs"), run.table(STAGE, "queries")]
    tables.write_table(outputs[0], "epochs", found.rows())
    tables.write_table(outputs[1], "queries", queries)
    shown = found.beside()
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(subject.device),
        metrics=_summary(shown),
        extra={
            "split": split,
            "rows": shown,
            "notes": [*subject.notes, *_missing(run, trained, kept), found.note()],
            "data": str(source.folder.resolve()),
        },
    )
    _clear(run.stage_dir(STAGE) / "parts")
    return {**record, "status": "done"}


def _measure(subject: Subject, kept: Mapping[int, Path], folder: Path, digest: str, *, force: bool) -> pd.DataFrame:
    """The `queries` rows of every epoch, from a part file each where a killed run left one."""
    frames = []
    for epoch, path in kept.items():
        part = folder / f"epoch-{epoch:03d}-{digest[:16]}.parquet"
        held = None if force else _part(part)
        if held is None:
            log.info(f"epoch {epoch} of {max(kept)}")
            tables.write_table(part, "queries", _queries(_at(subject, epoch, path), epoch))
            held = tables.read_table(part, "queries")
        frames.append(held)
    return pd.concat(frames, ignore_index=True)


def _part(path: Path) -> pd.DataFrame | None:
    """What a killed run measured; None if it is not there or damaged."""
    try:
        return tables.read_table(path, "queries") if path.is_file() else None
    except DataError:
        return None


def _at(subject: Subject, epoch: int, path: Path) -> Subject:
    """The subject with an epoch's weights; its digest is no index's, so no stored gallery is taken for it.

    Raises:
        DataError: the file lacks weights, which would stay those of the epoch before, or holds others.
    """
    known = set(unique_state(subject.method))
    state = load_file(path, device=str(subject.device))
    missing, unexpected = subject.method.load_state_dict(state, strict=False)
    lacking = [name for name in missing if name in known]
    if lacking or unexpected:
        raise DataError(f"{path} does not fit: missing {lacking[:3]}, unexpected {list(unexpected)[:3]}.")
    return replace(subject, method=subject.method.eval(), weights=f"epoch {epoch}")


def _queries(subject: Subject, epoch: int) -> pd.DataFrame:
    stored = embed(subject)
    frames = []
    for dataset in sorted(set(subject.corpus.images["dataset"])):
        for protocol in protocols_of(subject, stored, dataset)[0]:
            named = replace(protocol, condition=_condition(epoch))
            frames.append(protocols.evaluate(named, top=0, resamples=1, device=str(subject.device)).queries)
    scored = [frame for frame in frames if (frame["matches"] > 0).any()]
    if not scored:
        raise DataError(f"No query of the {subject.split} split has a match, so there is nothing to measure.")
    return pd.concat(scored, ignore_index=True)


class _Found:
    """All epochs measured, and which of them is chosen and which is best."""

    def __init__(self, queries: pd.DataFrame, trained: Mapping[str, Any], split: str, seed: int) -> None:
        self.split, self.seed = split, seed
        self.selected, self.selected_on = int(trained["best_epoch"]), str(trained["selected_on"])
        self.metric = str(trained["settings"]["train"]["select_metric"])
        self.parts: dict[Group, dict[int, tuple[QueryMetrics, pd.Series]]] = {}
        self.summary: dict[Group, dict[int, dict[str, Interval]]] = {}
        for (direction, dataset, condition), part in queries.groupby(["direction", "dataset", "condition"], sort=False):
            group, epoch = (str(direction), str(dataset)), int(str(condition).removeprefix("epoch-"))
            rows = part.sort_values("query_id")  # the same queries in the same places in every epoch
            metrics, person = _metrics_of(rows), rows["person_id"]
            self.parts.setdefault(group, {})[epoch] = (metrics, person)
            found = summarise(metrics, person.to_numpy(dtype=object), seed=seed)
            measured = {name: value for name, value in found.items() if value.value == value.value}
            self.summary.setdefault(group, {})[epoch] = measured

    def best(self, group: Group) -> int:
        """The first epoch with the highest value on this split."""
        values = self.summary[group]
        return max(sorted(values), key=lambda epoch: values[epoch][self.metric].value)

    @property
    def labels(self) -> tuple[str, str]:
        """What the chosen epoch and the best one are called."""
        optimistic = f"best epoch on {self.split}: optimistic, for comparison with papers that report it only"
        return f"selected on {self.selected_on}", optimistic

    def rows(self) -> pd.DataFrame:
        """Rows of the table `epochs`."""
        return pd.DataFrame(
            [
                {
                    "epoch": epoch, "direction": group[0], "dataset": group[1], "split": self.split, "metric": metric,
                    **vars(interval), "queries": self.parts[group][epoch][0].scored,
                    "chosen": self._chosen(group, epoch),
                }
                for group, epochs in self.summary.items()
                for epoch, summary in sorted(epochs.items())
                for metric, interval in summary.items()
            ]
        )  # fmt: skip

    def _chosen(self, group: Group, epoch: int) -> str | None:
        here, there = (epoch == self.selected, epoch == self.best(group))
        return "; ".join(label for label, yes in zip(self.labels, (here, there), strict=True) if yes) or None

    def beside(self) -> list[dict[str, Any]]:
        """One printable row per direction, dataset and metric: the chosen epoch, the best one and the gap."""
        return [self._row(group, metric) for group in self.summary for metric in self.summary[group][self.best(group)]]

    def _row(self, group: Group, metric: str) -> dict[str, Any]:
        best = self.best(group)
        row: dict[str, Any] = {"direction": group[0], "dataset": group[1], "split": self.split, "metric": metric}
        for label, name, epoch in zip(self.labels, ("selected", "best"), (self.selected, best), strict=True):
            known = self.summary[group].get(epoch)
            row[name] = {"label": label, "epoch": epoch, **vars(known[metric])} if known else None
        row["gap"] = vars(self._gap(group, metric, best)) if row["selected"] else None
        return row

    def _gap(self, group: Group, metric: str, best: int) -> Interval:
        (above, person), (below, _) = self.parts[group][best], self.parts[group][self.selected]
        difference = above.values(metric) - below.values(metric)
        return bootstrap_interval(difference, person.to_numpy(dtype=object), seed=self.seed)

    def note(self) -> str:
        """What a reader of the numbers must know."""
        if self.selected_on == self.split:
            return f"The epoch of this model was chosen on the {self.split} split itself: both numbers are optimistic."
        return (
            f"The number of this model is the one {self.labels[0]}. The best epoch on {self.split} was chosen with the "
            f"{self.split} people and is optimistic."
        )


def _metrics_of(rows: pd.DataFrame) -> QueryMetrics:
    """The rows of a `queries` table as metrics; a cutoff beyond the gallery is NaN."""
    return QueryMetrics(
        matches=rows["matches"].to_numpy(np.int64),
        first_match=rows["first_match"].to_numpy(float),
        average_precision=rows["average_precision"].to_numpy(float),
        inp=rows["inp"].to_numpy(float),
        hits={k: rows[f"rank{k}"].to_numpy(float) for k in CUTOFFS},
    )


def _condition(epoch: int) -> str:
    return f"epoch-{epoch:03d}"


def _summary(shown: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Chosen, best and gap by direction; of several datasets the lowest chosen value with its best and gap."""
    summary: dict[str, dict[str, float]] = {}
    for row in shown:
        if row["selected"] is None:
            continue
        held, metric = summary.setdefault(row["direction"], {}), row["metric"]
        if metric not in held or row["selected"]["value"] < held[metric]:
            held[metric] = row["selected"]["value"]
            held[f"{metric}.best"] = row["best"]["value"]
            held[f"{metric}.gap"] = row["gap"]["value"]
    return summary


def _missing(run: Run, trained: Mapping[str, Any], kept: Mapping[int, Path]) -> list[str]:
    history = tables.read_table(run.table("finetune", "history"), "history")
    validated = set(history.loc[history["split"] == trained["selected_on"], "epoch"] + 1)
    gone = sorted(int(epoch) for epoch in validated - set(kept))
    listed = ", ".join(map(str, gone[:10])) + (", ..." if len(gone) > 10 else "")
    return [f"The weights of {len(gone)} validated epochs are gone or unreadable: {listed}."] if gone else []


def _clear(folder: Path) -> None:
    """Remove the part files, once the tables hold them."""
    for part in folder.glob("epoch-*.parquet"):
        part.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
