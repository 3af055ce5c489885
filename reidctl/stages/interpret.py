"""`interpret`: where phrases are seen, by any explainer of any method, and whether the maps survive being tested."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import torch

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.config import parse_section
from reidctl.console import log, progress
from reidctl.data import Corpus
from reidctl.device import resolve_device
from reidctl.errors import DataError, UsageError
from reidctl.explain.alignment import PlainEncoder
from reidctl.explain.controls import CONTROLS, Plan
from reidctl.explain.explainers import EXPLAINERS, Aggregate, applies, check_explainer
from reidctl.explain.fills import PLUGIN, check_fill, plugin_digest
from reidctl.explain.grounding import PartNames, find_mask, part_names, summarise_grounding
from reidctl.explain.maps import USER_QUERY, Phrase, explain_phrases, grid_map, named_rows, of_captions, pick_phrases
from reidctl.explain.parsing import read_parsing
from reidctl.explain.pictures import draw_explanation
from reidctl.methods.base import Method, load_method
from reidctl.phrases.base import PhraseConfig, PhraseSource
from reidctl.pixels import read_pixels
from reidctl.runs import Run, digest
from reidctl.stages import building
from reidctl.stages.gates import collect_gates, gate_summary, write_gates
from reidctl.stages.interpret_tests import (
    PARAMETERS,
    QUICK,
    TESTS,
    Independent,
    Material,
    Model,
    labelled,
    run_tests,
)
from reidctl.stages.measuring import check_unseen, find_subject
from reidctl.stages.sources import Source, find_source

STAGE = "interpret"
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)
_ENOUGH = 30
"""People from which on a bootstrap over people is not too narrow; `evaluate` warns below it too."""
_LOOSE = "loose"
"""The person of a picture that belongs to no dataset."""


def run(
    run: Run,
    *,
    data: Path | None = None,
    captions: Path | None = None,
    samples: int = 100,
    explainer: str | Sequence[str] = (),
    what: Sequence[str] = (),
    lenient: bool = False,
    phrase: str | None = None,
    query: str | None = None,
    image: str | None = None,
    split: str = "test",
    fractions: Sequence[float] = FRACTIONS,
    fills: Sequence[str] = ("mean",),
    controls: Sequence[str] = (),
    draws: int = 10,
    scope: str = "target",
    level: str = "caption",
    aggregate: str = "own",
    judges: Sequence[Run] = (),
    encoder: str | None = None,
    parts: Path | None = None,
    phrases: str = "given",
    pictures: int = 24,
    batch: int = 128,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Explain phrases of captions on their images, test the maps, and plot the gates.

    Writes `explanations.parquet`, `pictures/*.png`, `interpretability.parquet` (every score, control and difference
    with intervals) and, where they apply, `faithfulness.parquet`, `grounding.csv` and `gates.json` with pictures.
    Long measurements are kept in parts: a run that was killed goes on where it stopped.

    Args:
        run: holds the trained model; where the stage writes.
        data: the dataset folder; default: the run's.
        captions: the table of identity and clothing texts; default: the run's.
        samples: how many captions, drawn at random.
        explainer: names of `explainers.EXPLAINERS`, or `all`; default `ppim` where the method has it, else `gradcam`.
        what: tests, of `interpret_tests.TESTS`, or `all` that apply; default: those that encode nothing again.
        lenient: also a test that was asked for by name may not apply.
        phrase: explain this text on `samples` random images (or on `image`) instead of the captions' own phrases.
        query: explain this caption, by its id or as words, on `image`, on its own image, or on random ones.
        image: the id of an image of the split, or the file of any picture.
        split: whose captions and images.
        fractions: shares of patches to remove.
        fills: what is put there; see `explain.fills.make_fill`.
        controls: what removes as many patches; default: all that the data allow.
        draws: of the control `random`, at least 10.
        scope: mask the `target` image, or `all_positives` of a query, which are then all explained.
        level: mask by the map of a `caption`, or by that of each `phrase`.
        aggregate: how a caption's map is made: `own` (as the explainer does it), or `weighted`, `max` or `mean` of its
            phrases' maps.
        judges: runs whose models see the masked pictures too, and whose own maps are compared.
        encoder: an independent encoder for `alignment`: a run directory, or a backbone's spec.
        parts: part masks: a `parts` table or a folder of label maps; default: the dataset's own.
        phrases: the backend that finds phrases: `given` (the dataset's, else rules), `rules`, `spacy`, or `trained`:
            as the model's training did.
        pictures: how many maps are also drawn as PNG.
        batch: masked images per forward pass.
        seed: of every draw.
        device: where to compute.
        force: do it again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`; `metrics` holds `{value, low, high}` by score.

    Raises:
        UsageError: an unknown explainer, test, fill, control or device, an empty phrase, or flags that exclude others.
        DataError: no trained model, no dataset, no captions, or a test that was asked for and does not apply.
    """
    names = [explainer] if isinstance(explainer, str) else list(explainer)
    _check_words(phrase, query, image)
    asked_tests, by_name = _tests(what)
    strict = by_name and not lenient
    chosen_controls = _controls(controls, level)
    plan = _plan(fractions, fills, [name for name in chosen_controls if name != "pooled"], draws, scope, seed)
    _choice("level", level, ("caption", "phrase"))
    _choice("aggregate", aggregate, get_args(Aggregate))
    _choice("phrases", phrases, ("given", "rules", "spacy", "trained"))
    target = resolve_device(device)
    run.require("finetune")
    source = find_source(run, data, captions)
    mine = Model("", load_method(run.stage_dir("finetune"), target), _weights(run))
    chosen = _explainers(names, mine.method)
    others = _judges(judges, target)
    independent = _encoder(encoder, target, seed)
    _check_others(mine, others, independent, asked_tests if strict else (), masks=parts or source.parts)
    inputs = {**source.digests(), "model": mine.digest, **{f"judge {m.name}": m.digest for m in others}}
    if independent is not None and independent.digest:
        inputs["encoder"] = independent.digest
    masks = parts or (source.parts if source.parts.exists() else None)
    if masks is not None:
        inputs["parts"] = digest(masks)
    inputs |= {f"fill {name}": code for name in fills if name.startswith(PLUGIN) and (code := plugin_digest(name))}
    settings = {
        "seed": seed,
        "interpret": {
            "samples": samples, "explainer": chosen, "what": list(asked_tests), "strict": strict,
            "phrase": phrase, "query": query, "image": image, "split": split, "pictures": pictures,
            "fractions": list(fractions), "fills": list(fills), "controls": list(chosen_controls), "draws": draws,
            "placements": plan.placements, "scope": scope, "level": level, "aggregate": aggregate,
            "judges": [m.name for m in others], "encoder": encoder, "phrases": phrases,
            "parts": None if parts is None else "user-supplied", **PARAMETERS,
        },
    }  # fmt: skip
    current = None if force else run.up_to_date(STAGE, settings, inputs)
    if current is not None:
        return {**current, "status": "up-to-date"}
    started = datetime.now(UTC)
    if force:
        _forget(run.stage_dir(STAGE) / "parts")
    corpus, written = _corpus(source, split, image), _captions(source)
    known = _phrases_of(run, source, phrases)
    building.give_phrases(run, source, mine.method)
    # Asked for by name, a backend stands in for the dataset's own phrases too.
    given = written if phrases == "given" else written[written["kind"] != "phrase"]
    picked = _pick(corpus, given, known, samples=samples, seed=seed, phrase=phrase, query=query, image=image)
    if scope == "all_positives":
        picked = _on_all_positives(picked, corpus)
    heavy = [name for name in asked_tests if name not in QUICK]
    if heavy:
        find_subject(run, split=split, device=device, data=data, captions=captions)  # refuses what would be no test
        _check_judges(judges, encoder, source, corpus, split)
    folder = run.stage_dir(STAGE)
    maps = _explain(mine.method, corpus, picked, chosen, target, seed, cast(Aggregate, aggregate))
    true_parts, names_of = _parts(masks, corpus, supplied=parts is not None), part_names(written)
    if "pooled" in chosen_controls and len(true_parts):
        plan = replace(plan, controls=(*plan.controls, "pooled"))
    material = Material(
        mine, corpus, picked, maps, true_parts, names_of, plan, level, others, independent, target, batch, seed,
        folder / "parts",
    )  # fmt: skip
    rows, notes = run_tests(material, asked_tests, strict=strict)
    gates = collect_gates(mine.method, corpus, device=target, seed=seed)
    aside = folder / "new"
    with _emptied(aside):
        made = [aside / "explanations.parquet"]
        tables.write_table(made[0], "explanations", _joined(maps))
        made += _write(aside, rows, material.frames)
        made += _draw(aside / "pictures", maps[chosen[0]], corpus, true_parts, names_of, pictures)
        made += write_gates(aside, gates[0], gates[1])
        # Only now, when nothing can be refused any more, does an older result go.
        run.unfinish(STAGE)
        _clear(folder)
        outputs = [_moved(path, aside, folder) for path in made]
    _forget(folder / "parts")
    grounded = material.frames.get("grounding")
    record = run.finish(
        STAGE,
        settings=settings,
        inputs=inputs,
        outputs=outputs,
        started=started,
        device=str(target),
        metrics=_metrics(rows, grounded, chosen[0], seed),
        extra={
            "explained": len(picked),
            "explainers": chosen,
            "grounded": 0 if grounded is None else int((grounded["explainer"] == chosen[0]).sum()),
            "gates": gate_summary(gates[1]),
            "pictures": min(pictures, len(picked)),
            "parts": None if masks is None else "user-supplied" if parts is not None else "true",
            "file": _file_of(corpus),
            "cautions": _few(material, rows),
            "notes": notes,
            "data": str(source.folder.resolve()),
        },
    )
    return {**record, "status": "done"}


# What is asked for


def _check_words(phrase: str | None, query: str | None, image: str | None) -> None:
    for name, value, example in (
        ("phrase", phrase, "--phrase 'red shirt'"),
        ("query", query, "--query 'a man in a red shirt'"),
        ("image", image, "--image photo.jpg"),
    ):
        if value is not None and not value.strip():
            raise UsageError(f"The {name} is empty.", hint=f"Give words: {example}.")
    if phrase is not None and query is not None:
        raise UsageError("--phrase and --query exclude each other.", hint="Give one of them.")


def _choice(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"`--{flag} {value}` is not known.", hint=f"One of: {', '.join(known)}.")


def _tests(what: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The tests asked for, and whether by name: `all` and the default take those that apply."""
    names = [name.strip() for text in what for name in text.split(",")]
    for name in names:
        _choice("what", name, ("all", *TESTS))
    if "all" in names:
        return tuple(TESTS), False
    return tuple(name for name in TESTS if name in (names or QUICK)), bool(names)


def _controls(controls: Sequence[str], level: str) -> tuple[str, ...]:
    names = [name.strip() for text in controls for name in text.split(",")]
    for name in names:
        _choice("control", name, CONTROLS)
    # A whole caption has no other phrase beside it that could be another answer.
    usual = [name for name in CONTROLS if name != "phrase" or level == "phrase"]
    return tuple(dict.fromkeys(names or usual))


def _plan(
    fractions: Sequence[float], fills: Sequence[str], controls: Sequence[str], draws: int, scope: str, seed: int
) -> Plan:
    _choice("scope", scope, ("target", "all_positives"))
    for fill in fills:
        check_fill(fill)
    return Plan(
        fractions=tuple(dict.fromkeys(fractions)),
        fills=tuple(dict.fromkeys(fills)),
        controls=tuple(controls),
        draws=draws,
        scope="target" if scope == "target" else "all_positives",
        seed=seed,
    )


def _explainers(names: Sequence[str], method: Method) -> list[str]:
    """The explainers asked for, the method's own first."""
    words = [name.strip() for text in names for name in text.split(",")]
    for name in words:
        _choice("explainer", name, ("all", *EXPLAINERS))
    if "all" in words:
        return [name for name in EXPLAINERS if applies(name, method)]
    chosen = list(dict.fromkeys(words)) or ["ppim" if applies("ppim", method) else "gradcam"]
    for name in chosen:
        check_explainer(name, method)
    return chosen


def _weights(run: Run) -> str:
    return digest(run.stage_dir("finetune") / "model.safetensors")


def _model(run: Run, device: torch.device) -> Model:
    run.require("finetune")
    method = load_method(run.stage_dir("finetune"), device)
    return Model(f"{method.name} {run.path.resolve().name}", method, _weights(run))


def _judges(runs: Sequence[Run], device: torch.device) -> list[Model]:
    """The models of other runs; those that would be called alike are numbered."""
    found: list[Model] = []
    for run in runs:
        model = _model(run, device)
        alike = sum(other.method.name == model.method.name and other.name.startswith(model.name) for other in found)
        found.append(replace(model, name=f"{model.name} ({alike + 1})") if alike else model)
    return found


def _check_others(
    mine: Model, others: Sequence[Model], encoder: Independent | None, asked: Sequence[str], *, masks: Path
) -> None:
    """Refuse judges that are the explained model, and tests that lack whom or what they need, before anything is done.

    Raises:
        UsageError: a model would judge itself, or one judge is named twice.
        DataError: a test was asked for by name that cannot apply.
    """
    digests = [model.digest for model in others]
    if mine.digest in digests or (encoder is not None and encoder.digest == mine.digest):
        raise UsageError("The explained model would judge itself.", hint="Name another run.")
    if len(set(digests)) < len(digests):
        raise UsageError("Two of the judges are the same model.", hint="Name each run once.")
    lacking = {
        "alignment": encoder is None and "no independent encoder was named (--encoder RUN or --encoder SPEC)",
        "stability": not others and "no other model was named (--judge RUN)",
        "grounding": not masks.exists() and "there are no part masks; give parsing masks with --parts",
    }
    for name, why in lacking.items():
        if why and name in asked:
            raise DataError(f"`--what {name}` does not apply: {why}.")


def _check_judges(judges: Sequence[Run], encoder: str | None, source: Source, corpus: Corpus, split: str) -> None:
    """Refuse judges that were trained on the people they judge.

    Raises:
        DataError: one was.
    """
    named = [("--judge", judge) for judge in judges]
    if encoder is not None and is_there(Path(encoder)):
        named.append(("--encoder", Run(Path(encoder))))
    for flag, other in named:
        try:
            check_unseen(other, source, corpus, split)
        except DataError as error:
            raise DataError(f"{flag} {other.path}: {error.message}", hint=error.hint) from None


def _encoder(named: str | None, device: torch.device, seed: int) -> Independent | None:
    """A run's model, or the backbone that a spec names.

    Raises:
        UsageError: the run's model reads a text beside the picture, or there is no such spec.
        DataError: the run has no model, or the backbone's weights cannot be found.
    """
    if named is None:
        return None
    if ":" in named and not is_there(Path(named)):
        torch.manual_seed(seed)  # of specs without weights
        return Independent(named, PlainEncoder(build(named).to(device)))
    model = _model(Run(Path(named)), device)
    if model.method.gallery_texts:
        raise UsageError(
            f"`--encoder {named}`: its model reads a text beside the picture, not the crop alone.",
            hint="Take another model.",
        )
    return Independent(model.name, model.method, model.digest)


def is_there(path: Path) -> bool:
    """Return whether a path exists; a text that can be no path does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


# What is explained


def _captions(source: Source) -> pd.DataFrame:
    return tables.read_table(source.captions, "captions") if source.captions.is_file() else tables.empty("captions")


def _corpus(source: Source, split: str, image: str | None) -> Corpus:
    """The split, or one picture that belongs to no dataset.

    Raises:
        DataError: the image is neither.
    """
    corpus = source.corpus().of_split(split)
    if image is None or (corpus.images["image_id"] == image).any():
        return corpus
    path = Path(image)
    if not is_there(path) or not path.is_file():
        raise DataError(
            f"`{image}` is no image of the {split} split and no file.", hint="Give an image id, or a path to a picture."
        )
    return _of_file(corpus, path)


def _few(material: Material, rows: pd.DataFrame) -> list[str]:
    """A warning where intervals over people say little."""
    people = len({material.person_of[phrase.image_id] for phrase in material.phrases})
    if people >= _ENOUGH or not len(rows):
        return []
    return [f"Fewer than {_ENOUGH} people: {people}. Intervals, stars and verdicts over so few are too sure."]


def _file_of(corpus: Corpus) -> str | None:
    """The file of a picture that belongs to no dataset."""
    loose = len(corpus.images) == 1 and corpus.images["dataset"].iloc[0] == _LOOSE
    return str(corpus.images["path"].iloc[0]) if loose else None


def _of_file(corpus: Corpus, path: Path) -> Corpus:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({type(error).__name__}).") from None
    row = {
        "image_id": path.name, "path": str(path.resolve()), "dataset": _LOOSE, "split": "test", "person_id": _LOOSE,
        "width": width, "height": height, "sha256": digest(path),
    }  # fmt: skip
    images = pd.DataFrame([row]).reindex(columns=corpus.images.columns)
    return Corpus(images, corpus.captions.iloc[:0], [None], [None], path.resolve().parent)


def _phrases_of(run: Run, source: Source, backend: str) -> PhraseSource | None:
    """What finds the phrases of captions that the dataset has none of; None: only the dataset's own are taken."""
    if backend == "trained":
        saved = dict(run.require("finetune")["settings"].get("phrases") or {})
        return building.find_phrases(run, source, parse_section(PhraseConfig, saved, "phrases"))
    return building.find_phrases(run, source, PhraseConfig(backend="spacy" if backend == "spacy" else "rules"))


def _pick(
    corpus: Corpus,
    written: pd.DataFrame,
    known: PhraseSource | None,
    *,
    samples: int,
    seed: int,
    phrase: str | None,
    query: str | None,
    image: str | None,
) -> list[Phrase]:
    """The phrases that are explained; whole captions in front of their own."""
    images = corpus.images["image_id"].astype(str).tolist()
    where = image if image in images else images[0] if len(images) == 1 and image is not None else None
    if phrase is not None:
        if where is None:
            return pick_phrases(corpus, written, samples=samples, seed=seed, phrase=phrase)
        return [Phrase(USER_QUERY, where, phrase, 0, len(phrase))]
    if query is None:
        if where is None:
            return pick_phrases(corpus, written, samples=samples, seed=seed, source=known, whole=True)
        own = corpus.captions[corpus.captions["image_id"] == where]
        if not len(own):
            raise DataError(f"Image `{where}` has no caption.", hint="Give words: --query or --phrase.")
        return of_captions(own, written, source=known, whole=True)
    return _of_query(corpus, written, known, query, where, samples, seed)


def _of_query(
    corpus: Corpus,
    written: pd.DataFrame,
    known: PhraseSource | None,
    query: str,
    where: str | None,
    samples: int,
    seed: int,
) -> list[Phrase]:
    """A caption by its id, on its own image unless another is named; or words, on random images unless one is."""
    full = written[(written["caption_id"] == query) & (written["kind"] == "full")]
    if len(full):
        chosen = full.assign(image_id=where) if where else full
        if str(chosen["image_id"].iloc[0]) not in set(corpus.images["image_id"]):
            raise DataError(f"The image of caption `{query}` is not in this split.", hint="Name one: --image ID.")
        return of_captions(chosen, written, source=known, whole=True)
    rows = np.sort(np.random.default_rng((seed, 11)).permutation(len(corpus.images))[:samples])
    images = [where] if where else corpus.images["image_id"].iloc[rows].astype(str).tolist()
    frame = pd.DataFrame({"caption_id": USER_QUERY, "image_id": images, "text": query})
    return of_captions(frame, tables.empty("captions"), source=known, whole=True)


def _on_all_positives(picked: Sequence[Phrase], corpus: Corpus) -> list[Phrase]:
    """The phrases on their image and, after that, on every other image of the person on it."""
    names, people = corpus.images["image_id"].astype(str), corpus.images["person_id"].astype(str)
    person = dict(zip(names, people, strict=True))
    shown = {one: list(some) for one, some in names.groupby(people, sort=False)}
    asked = {(phrase.query_id, phrase.image_id) for phrase in picked}
    found: list[Phrase] = []
    for (query, image), group in groupby(picked, key=lambda phrase: (phrase.query_id, phrase.image_id)):
        members = list(group)
        more = shown[person[image]] if query != USER_QUERY else []
        others = [name for name in more if (query, name) not in asked]
        found += [replace(member, image_id=name) for name in (image, *others) for member in members]
    return found


def _explain(
    method: Method,
    corpus: Corpus,
    picked: Sequence[Phrase],
    chosen: Sequence[str],
    device: torch.device,
    seed: int,
    aggregate: Aggregate,
) -> dict[str, pd.DataFrame]:
    maps = {}
    for name in chosen:
        with progress(f"explain ({name})", len(picked), unit="phrases") as advance:
            maps[name] = explain_phrases(
                method, corpus, picked, explainer=name, device=device, seed=seed, aggregate=aggregate, advance=advance
            )
    return maps


def _joined(maps: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All maps, phrase by phrase, so that the explainers of a phrase stand together."""
    whole = pd.concat(list(maps.values()), keys=range(len(maps)), names=["explainer_", "row_"])
    return whole.sort_index(level=["row_", "explainer_"], kind="stable").reset_index(drop=True)


# What is written


def _clear(folder: Path) -> None:
    """Remove what an earlier run of this stage may have left and this one may not write; unfinished parts stay."""
    named = ("grounding.csv", "faithfulness.parquet", "interpretability.parquet")
    stale = [*(folder / name for name in named), *folder.glob("gates.*"), *(folder / "pictures").glob("*.png")]
    for path in stale:
        path.unlink(missing_ok=True)


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Remove a folder of files that are not in their place yet, before and after they are made."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _moved(path: Path, aside: Path, folder: Path) -> Path:
    """Move a finished file from `aside` to its place in `folder`; return the place."""
    place = folder / path.relative_to(aside)
    place.parent.mkdir(parents=True, exist_ok=True)
    path.replace(place)
    return place


def _forget(folder: Path) -> None:
    """Remove the parts of long measurements; they are in the tables now."""
    for path in folder.glob("part-*"):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _parts(masks: Path | None, corpus: Corpus, *, supplied: bool) -> pd.DataFrame:
    if masks is None:
        log.info("The dataset has no part masks: the maps are drawn but not scored.")
        return tables.empty("parts")
    if supplied:
        found = read_parsing(masks, corpus.images)
        log.info(
            f"{masks}: part masks of {len(corpus.images) - found.missing:,} of {len(corpus.images):,} images; "
            f"{found.unused:,} belong to none of them."
        )
        return found.parts
    parts = tables.read_table(masks, "parts")
    return parts[parts["image_id"].isin(set(corpus.images["image_id"]))]


def _write(folder: Path, rows: pd.DataFrame, frames: dict[str, pd.DataFrame]) -> list[Path]:
    outputs = [folder / "interpretability.parquet"]
    tables.write_table(outputs[0], "interpretability", rows)
    if "faithfulness" in frames:
        outputs.append(folder / "faithfulness.parquet")
        tables.write_table(outputs[-1], "faithfulness", frames["faithfulness"])
    if "grounding" in frames:
        outputs.append(_write_csv(folder / "grounding.csv", frames["grounding"]))
    return outputs


def _write_csv(path: Path, frame: pd.DataFrame) -> Path:
    text = StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    tables.write_text(path, text.getvalue())
    return path


def _metrics(rows: pd.DataFrame, grounded: pd.DataFrame | None, first: str, seed: int) -> dict[str, Any]:
    """`{value, low, high}` of everything by name; the grounding of the first explainer also by its short names."""
    own = grounded[grounded["explainer"] == first] if grounded is not None else pd.DataFrame()
    short: dict[str, Any] = {name: asdict(entry) for name, entry in summarise_grounding(own, seed=seed).items()}
    return short | {
        name: {key: float(getattr(row, key)) for key in ("value", "low", "high")} for name, row in labelled(rows)
    }


def _draw(
    folder: Path, table: pd.DataFrame, corpus: Corpus, parts: pd.DataFrame, names: PartNames, count: int
) -> list[Path]:
    """The first maps of the table as PNG; a thousand pictures would help nobody."""
    facts = {row.image_id: row for row in named_rows(corpus.images)}
    written = []
    for number, row in enumerate(named_rows(table.head(count))):
        image: Any = facts[row.image_id]
        size = (int(image.height), int(image.width))
        of_image = named_rows(parts[parts["image_id"] == row.image_id])
        name = names.get((row.query_id, int(row.char_start), int(row.char_end)))
        truth = find_mask(str(row.phrase), of_image, size, name=name)
        path = folder / f"{number + 1:03d}.png"
        note = f"{row.image_id}   cos {row.similarity:.3f}   {row.explainer}"
        picture = read_pixels(corpus.root / str(image.path), size)
        draw_explanation(picture, grid_map(row), str(row.phrase), path, note=note, truth=truth)
        written.append(path)
    return written
