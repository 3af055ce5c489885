"""`report`: one self-contained HTML file with what a run has measured."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from reidctl import __version__, naming, tables
from reidctl.errors import DataError
from reidctl.explain.maps import USER_QUERY, grid_map
from reidctl.explain.pictures import overlay
from reidctl.pixels import read_pixels
from reidctl.report import content, figures, html
from reidctl.report.figures import named_rows
from reidctl.runs import Run, digest
from reidctl.stages.sources import Source, find_source

STAGE = "report"
READ = ("data", "caption", "prompt", "finetune", "index", "evaluate", "interpret")
QUERIES, HITS, EXPLAINED, PICTURES = 8, 10, 6, 10
"""How many ranked lists (per direction), results in each, explained captions, and sample pictures are shown."""

LAYOUT = 1
"""Raised when the page changes, so that an older page is made again."""

_MAP_SIZE = (256, 128)
_HOW = {
    "data": ("There is no dataset.", "reidctl data synth --run {run}"),
    "caption": ("The images are not described.", "reidctl caption --run {run}"),
    "finetune": ("No model is trained.", "reidctl finetune --method bdam --run {run}"),
    "evaluate": ("Nothing is evaluated.", "reidctl evaluate --run {run}"),
    "interpret": ("No phrase is explained.", "reidctl interpret --run {run}"),
}


def run(run: Run, *, out: Path | None = None, seed: int = 0, force: bool = False) -> dict[str, Any]:
    """Write `report/report.html` and its figures.

    Args:
        run: whose finished stages are reported; what is missing is named on the page with the command that makes it.
        out: also copy the page here.
        seed: of the choice of queries and pictures that are shown.
        force: write again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`.

    Raises:
        DataError: no stage of the run has finished, or a table is damaged.
    """
    records = {stage: record for stage in READ if (record := run.record(stage)) is not None}
    if not records:
        raise DataError(
            f"{run.path} has no finished stage to report.", hint=f"Start with `reidctl data synth --run {run.path}`."
        )
    settings = {"seed": seed, "layout": LAYOUT}
    inputs = {stage: digest(run.stage_dir(stage) / "stage.json") for stage in records}
    page = run.stage_dir(STAGE) / "report.html"
    record = None if force else run.up_to_date(STAGE, settings, inputs)
    status = "done" if record is None else "up-to-date"
    if record is None:
        started = datetime.now(UTC)
        run.unfinish(STAGE)
        writer = _Writer(run, records, seed)
        tables.write_text(page, html.render(writer.page()))
        outputs = [page, *writer.files]
        sections = [anchor for anchor, _ in writer.nav]
        record = run.finish(
            STAGE, settings=settings, inputs=inputs, outputs=outputs, started=started, extra={"sections": sections}
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, out)
    return {**record, "status": status}


@dataclass
class _Writer:
    """Collects the page's values from a run; every part is empty when its stage has not run."""

    run: Run
    records: Mapping[str, dict[str, Any]]
    seed: int
    files: list[Path] = field(default_factory=list)
    nav: list[tuple[str, str]] = field(default_factory=list)

    def page(self) -> dict[str, Any]:
        self.source = self._source()
        images = self.source.images if self.source else None
        self.images = tables.read_table(images, "images") if images else tables.empty("images")
        self.captions = self._table(self.source.captions if self.source else None, "captions")
        self._row_of = {row.image_id: row for row in named_rows(self.images)}
        self._uris: dict[str, str | None] = {}
        metrics = self._table(self.run.table("evaluate", "metrics"), "metrics")
        # A record without its tables is an unfinished or damaged stage: its section says so by being absent.
        parts: dict[str, Any] = {
            "results": self._results(metrics),
            "rankings": self._rankings(),
            "maps": self._maps(),
            "gates": self._gates(),
            "training": self._training(),
            "captioning": self._captioning(),
            "dataset": self._dataset(),
            "missing": self._missing(),
        }
        titles = ("Results", "Ranked lists", "Phrase maps", "Gates", "Training", "Descriptions", "Data", "Missing")
        anchors = ("results", "rankings", "maps", "gates", "training", "captions", "data", "missing")
        sections = [*zip(anchors, titles, parts.values(), strict=True), ("provenance", "Provenance", True)]
        self.nav = html.navigation(sections)
        return {
            **parts,
            "title": self._title(),
            "about": self._about(),
            "banners": self._banners(),
            "nav": self.nav,
            "cards": content.headline_cards(metrics),
            "conditions": self._condition_texts(metrics),
            "notes": self.records.get("evaluate", {}).get("notes", []),
            "stages": self._stages(),
            "libraries": self._libraries(),
            "version": __version__,
            "run": str(self.run.path),
        }

    def _source(self) -> Source | None:
        try:
            return find_source(self.run)
        except DataError:
            return None

    @staticmethod
    def _table(path: Path | None, name: str) -> pd.DataFrame:
        return tables.read_table(path, name) if path is not None and path.is_file() else tables.empty(name)

    def _title(self) -> str:
        trained = self.records.get("finetune", {}).get("method")
        datasets = ", ".join(sorted(set(self.images["dataset"])))
        return " on ".join(part for part in (trained, datasets) if part) or self.run.path.name

    def _about(self) -> str:
        sentences = []
        if len(self.images):
            people = self.images["person_id"].nunique()
            sentences.append(f"{len(self.images):,} images of {people:,} people, {len(self.captions):,} texts.")
        trained = self.records.get("finetune", {})
        if "parameters" in trained:
            sentences.append(f"The model has {trained['parameters'] / 1e6:.1f} million parameters.")
        if "best_epoch" in trained:
            sentences.append(
                f"Of {trained['epochs']} epochs, epoch {trained['best_epoch']} was chosen on the "
                f"{trained['selected_on']} split."
            )
        return " ".join(sentences) or f"What the run {self.run.path} has so far."

    def _banners(self) -> list[dict[str, str]]:
        banners = []
        if any(str(name).startswith("synthped") for name in set(self.images["dataset"])):
            text = "The people are rendered. The numbers compare settings with each other, not with published results."
            banners.append({"head": "Synthetic data, not comparable with published numbers.", "text": text})
        if self.records.get("finetune", {}).get("selected_on") == "test":
            text = "The result is not a test of anything unseen."
            banners.append({"head": "The epoch was chosen on the test split.", "text": text})
        return banners

    def _condition_texts(self, metrics: pd.DataFrame) -> list[tuple[str, str]]:
        present = figures.conditions(list(metrics["condition"]))
        texts = content.CONDITION_TEXTS
        return [(naming.label(name), texts[name]) for name in present if name in texts]

    def _figure(self, paths: list[Path], title: str, alt: str) -> dict[str, Any]:
        self.files += [path for path in paths if path.is_relative_to(self.run.stage_dir(STAGE))]
        png, svg, _ = paths
        drawn = figures.inline_svg(svg.read_text(encoding="utf-8"), prefix=svg.stem)
        name = f"{png.relative_to(self.run.path).with_suffix('')}.{{png,svg,csv}}"
        return {"svg": Markup(drawn), "title": title, "alt": alt, "file": name}

    def _stem(self, name: str) -> Path:
        return self.run.stage_dir(STAGE) / "figures" / name

    def _results(self, metrics: pd.DataFrame) -> list[dict[str, Any]]:
        groups = content.metric_groups(metrics)
        for number, group in enumerate(groups):
            paths = figures.metric_bars(group.pop("frame"), self._stem(f"metrics-{number + 1}"))
            alt = f"Bar chart of the table above: {group['title']}"
            group["figure"] = self._figure(paths, group["title"], alt)
        return groups

    def _rankings(self) -> list[dict[str, Any]]:
        rankings = self._table(self.run.table("evaluate", "rankings"), "rankings")
        queries = self._table(self.run.table("evaluate", "queries"), "queries")
        if dict(self.records.get("evaluate", {}).get("settings", {})).get("joint"):
            # The same queries once more, against the images of all datasets: the lists show those of each dataset.
            rankings, queries = (part[part["dataset"] != "joint"] for part in (rankings, queries))
        rankings = rankings[rankings["condition"] == "standard"]
        facts = {row.query_id: row for row in named_rows(queries[queries["condition"] == "standard"])}
        unmatched = {name for name, row in facts.items() if row.matches == 0}
        rankings = rankings[~rankings["query_id"].isin(unmatched)]
        texts = self._sentences()
        groups = []
        for title, direction in (("Text queries", "t2i"), ("Image queries", "i2i")):
            part = rankings[rankings["direction"] == direction]
            if not len(part):
                continue
            chosen, rule = content.pick_queries(part, shown=QUERIES, seed=self.seed)
            lists = dict(list(part.groupby("query_id")))
            shown = [self._query(name, lists[name], facts.get(name), texts.get(name)) for name in chosen]
            found = sum(query["found"] for query in shown)
            groups.append({"title": title, "rule": rule, "queries": shown, "found": found})
        return groups

    def _sentences(self) -> dict[str, str]:
        full = self.captions[self.captions["kind"].isin(["full", "identity", "clothing"])]
        texts = full[full["text"].notna()]
        return dict(zip(texts["caption_id"], texts["text"], strict=True))

    def _query(self, name: str, hits: pd.DataFrame, facts: Any, text: str | None) -> dict[str, Any]:
        hits = hits.sort_values("rank").head(HITS)
        person = getattr(facts, "person_id", "")
        described = ""
        if facts is not None and not pd.isna(facts.first_match):
            described = f"first right image at {facts.first_match:.0f}, AP {100 * facts.average_precision:.0f} %"
        rows = [
            {
                "rank": int(hit.rank),
                "score": f"{hit.score:.3f}",
                "match": bool(hit.match),
                "uri": self._uri(hit.gallery_id),
            }
            for hit in named_rows(hits)
        ]
        uri = None if text is not None else self._uri(name)
        found = bool(rows and rows[0]["match"])
        return {
            "id": name,
            "text": text,
            "uri": uri,
            "person": person,
            "facts": described,
            "found": found,
            "hits": rows,
        }

    def _path(self, image_id: str) -> Path | None:
        row = self._row_of.get(image_id)
        return self.source.folder / row.path if row is not None and self.source is not None else None

    def _uri(self, image_id: str) -> str | None:
        if image_id not in self._uris:
            path = self._path(image_id)
            self._uris[image_id] = html.picture_uri(path) if path is not None else None
        return self._uris[image_id]

    def _maps(self) -> dict[str, Any] | None:
        rows = self._table(self.run.table("interpret", "explanations"), "explanations")
        if not len(rows):
            return None
        record = self.records.get("interpret", {})
        pairs = list(dict.fromkeys(zip(rows["query_id"], rows["image_id"], strict=True)))
        columns, scores = content.grounding_rows(record.get("metrics", {}))
        shown = pairs[:EXPLAINED]
        rule = (
            f"Explainer: {rows['explainer'].iloc[0]}. The first {len(shown)} of {len(pairs)} captions that were drawn "
            "at random, each on its own image. Every map is scaled to its own maximum: brightness "
            "compares places in one map, never two maps."
        )
        return {
            "rule": rule,
            "captions": [self._explained(rows, query, image) for query, image in shown],
            "columns": columns,
            "scores": scores,
            "scores_caption": f"Percent over {record.get('grounded', 0):,} phrases with a true mask, 95 % intervals "
            "over people. A map beats a control when the interval of the difference is above 0.",
        }

    def _explained(self, rows: pd.DataFrame, query: str, image: str) -> dict[str, Any]:
        found = rows[(rows["query_id"] == query) & (rows["image_id"] == image)].sort_values("char_start")
        numbered = list(enumerate(named_rows(found), start=1))
        sentence = str(found["phrase"].iloc[0]) if query == USER_QUERY else self._sentences().get(query)
        if sentence is None:
            sentence = " · ".join(found["phrase"])
        spans = [(int(row.char_start), int(row.char_end), number) for number, row in numbered]
        views = [
            {"number": n, "phrase": row.phrase, "similarity": f"{row.similarity:.3f}", "uri": self._overlay(row)}
            for n, row in numbered
        ]
        pieces = html.mark_phrases(sentence, spans)
        return {"sentence": pieces, "image_id": image, "uri": self._uri(image), "views": views}

    def _overlay(self, row: Any) -> str | None:
        path = self._path(row.image_id)
        if path is None:
            return None
        shape = self._row_of[row.image_id]
        size = (_MAP_SIZE[0], max(1, round(_MAP_SIZE[0] * shape.width / max(shape.height, 1))))
        try:
            return html.pixels_uri(overlay(read_pixels(path, size), grid_map(row)))
        except DataError:
            return None

    def _gates(self) -> dict[str, Any] | None:
        path = self.run.stage_dir("interpret") / "gates.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        stem = self.run.stage_dir("interpret") / "gates"
        paths = [stem.with_suffix(ending) for ending in (".png", ".svg", ".csv")]
        if not found["summary"] or not all(item.is_file() for item in paths):
            return None
        rows = [{"name": name, **entry} for name, entry in found["summary"].items()]
        alt = "Histogram; " + "; ".join(f"{row['name']}: mean {row['mean']:.2f}, std {row['std']:.2f}" for row in rows)
        figure = self._figure(paths, "Distribution of gate activations", alt)
        return {"rule": found["rule"], "figure": figure, "samples": len(found["samples"]), "rows": rows}

    def _training(self) -> dict[str, Any] | None:
        history = self._table(self.run.table("finetune", "history"), "history")
        if not len(history):
            return None
        record = self.records.get("finetune", {})
        best = record.get("best_epoch")
        drawn = []
        if history["name"].str.startswith("loss/").any():
            alt = "Line chart of every loss over the epochs; the numbers are in the CSV file beside the figure"
            drawn.append(self._figure(figures.training_curves(history, self._stem("losses")), "Every loss", alt))
        if (history["split"] != "train").any():
            paths = figures.validation_curve(history, self._stem("validation"), best_epoch=best)
            alt = f"Line chart of the validation metrics; epoch {best} was chosen"
            drawn.append(self._figure(paths, "Metrics on the split that chooses the epoch", alt))
        facts = [f"{history['epoch'].max() + 1} epochs"]
        if record.get("images_per_second"):
            facts.append(f"{record['images_per_second']:,.0f} images per second")
        facts.append(f"device {record.get('device', 'unknown')}")
        text = ", ".join(facts) + "."
        return {"text": text, "figures": drawn}

    def _captioning(self) -> dict[str, Any] | None:
        table = self._table(self.run.table("caption", "captions"), "captions")
        if not len(table):
            return None
        styles = self._table(self.run.table("caption", "styles"), "styles")
        status = ", ".join(f"{count:,} {name}" for name, count in table["status"].value_counts().items())
        models = ", ".join(sorted({str(name) for name in table["model"] if name})) or "unknown"
        accepted = table[
            (table["status"] == "ok") & table["text"].notna() & table["kind"].isin(["identity", "clothing"])
        ]
        known = self.images[self.images["image_id"].isin(set(accepted["image_id"]))]
        samples = []
        for name in content.pick_images(known, shown=3, seed=self.seed):
            texts = accepted[accepted["image_id"] == name].sort_values("kind", ascending=False)
            pairs = list(zip(texts["kind"], texts["text"], strict=True))
            samples.append({"image_id": name, "uri": self._uri(name), "texts": pairs})
        rows = [
            {
                "id": row.style_id,
                "size": f"{row.size:,}",
                "instruction": row.instruction,
                "example": row.exemplars[0] if row.exemplars is not None and len(row.exemplars) else "–",
            }
            for row in named_rows(styles)
        ]
        text = f"{len(table):,} texts written by {models}: {status}. Examples are drawn at random (seed {self.seed})."
        return {"text": text, "styles": rows, "samples": samples}

    def _dataset(self) -> dict[str, Any] | None:
        if not len(self.images) or self.source is None:
            return None
        chosen = content.pick_images(self.images, shown=PICTURES, seed=self.seed)
        return {
            "caption": f"{', '.join(sorted(set(self.images['dataset'])))} in {self.source.folder}",
            "rows": content.split_rows(self.images, self.captions),
            "samples": [{"image_id": name, "uri": self._uri(name)} for name in chosen],
            "rule": f"{len(chosen)} pictures of different people where possible, drawn at random (seed {self.seed}).",
        }

    def _missing(self) -> list[dict[str, str]]:
        lacking = [stage for stage in _HOW if stage not in self.records and not (stage == "data" and len(self.images))]
        return [{"text": _HOW[stage][0], "command": _HOW[stage][1].format(run=self.run.path)} for stage in lacking]

    def _stages(self) -> list[dict[str, Any]]:
        ordered = sorted(self.records.values(), key=lambda record: str(record.get("finished", "")))
        rows = []
        for record in ordered:
            shown = json.dumps(record.get("settings", {}), indent=2, default=str)
            rows.append({**content.provenance_row(record), "settings": shown})
        return rows

    def _libraries(self) -> str:
        last = max(self.records.values(), key=lambda record: str(record.get("finished", "")))
        facts = {"libraries": last.get("libraries", {}), "machine": last.get("machine", {})}
        return json.dumps(facts, indent=2, default=str)
