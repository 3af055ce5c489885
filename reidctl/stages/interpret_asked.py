"""What `interpret` is asked for: flags checked, judges and encoders loaded, before anything is done."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reidctl.backbones.weights import build
from reidctl.data import Corpus
from reidctl.errors import DataError, UsageError
from reidctl.explain.alignment import PlainEncoder
from reidctl.explain.controls import CONTROLS, Plan
from reidctl.explain.explainers import EXPLAINERS, applies, check_explainer
from reidctl.explain.fills import check_fill
from reidctl.methods.base import Method, load_method
from reidctl.runs import Run, digest
from reidctl.stages.interpret_tests import (
    QUICK,
    TESTS,
    Independent,
    Model,
)
from reidctl.stages.measuring import check_unseen
from reidctl.stages.sources import Source


def check_words(phrase: str | None, query: str | None, image: str | None) -> None:
    """Refuse empty words, and a phrase beside a query.

    Raises:
        UsageError: so it is.
    """
    for name, value, example in (
        ("phrase", phrase, "--phrase 'red shirt'"),
        ("query", query, "--query 'a man in a red shirt'"),
        ("image", image, "--image photo.jpg"),
    ):
        if value is not None and not value.strip():
            raise UsageError(f"The {name} is empty.", hint=f"Give words: {example}.")
    if phrase is not None and query is not None:
        raise UsageError("--phrase and --query exclude each other.", hint="Give one of them.")


def check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that a flag does not know.

    Raises:
        UsageError: it is not among `known`.
    """
    if value not in known:
        raise UsageError(f"`--{flag} {value}` is not known.", hint=f"One of: {', '.join(known)}.")


def tests_of(what: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The tests asked for, and whether by name: `all` and the default take those that apply."""
    names = [name.strip() for text in what for name in text.split(",")]
    for name in names:
        check_choice("what", name, ("all", *TESTS))
    if "all" in names:
        return tuple(TESTS), False
    return tuple(name for name in TESTS if name in (names or QUICK)), bool(names)


def controls_of(controls: Sequence[str], level: str) -> tuple[str, ...]:
    """Return the controls asked for, by default all that the level of masking allows.

    Raises:
        UsageError: one is not known.
    """
    names = [name.strip() for text in controls for name in text.split(",")]
    for name in names:
        check_choice("control", name, CONTROLS)
    # A whole caption has no other phrase beside it that could be another answer.
    usual = [name for name in CONTROLS if name != "phrase" or level == "phrase"]
    return tuple(dict.fromkeys(names or usual))


def plan_of(
    fractions: Sequence[float], fills: Sequence[str], controls: Sequence[str], draws: int, scope: str, seed: int
) -> Plan:
    """Return what is removed, what is put there and what it is compared with.

    Raises:
        UsageError: a fill, scope or share is not known.
    """
    check_choice("scope", scope, ("target", "all_positives"))
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


def explainers_of(names: Sequence[str], method: Method) -> list[str]:
    """The explainers asked for, the method's own first."""
    words = [name.strip() for text in names for name in text.split(",")]
    for name in words:
        check_choice("explainer", name, ("all", *EXPLAINERS))
    if "all" in words:
        return [name for name in EXPLAINERS if applies(name, method)]
    chosen = list(dict.fromkeys(words)) or ["ppim" if applies("ppim", method) else "gradcam"]
    for name in chosen:
        check_explainer(name, method)
    return chosen


def weights_of(run: Run) -> str:
    """Return the digest of a run's weights."""
    return digest(run.stage_dir("finetune") / "model.safetensors")


def _model(run: Run, device: torch.device) -> Model:
    run.require("finetune")
    method = load_method(run.stage_dir("finetune"), device)
    return Model(f"{method.name} {run.path.resolve().name}", method, weights_of(run))


def judges_of(runs: Sequence[Run], device: torch.device) -> list[Model]:
    """The models of other runs; those that would be called alike are numbered."""
    models = [_model(run, device) for run in runs]
    names = [model.name for model in models]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [
        replace(model, name=f"{model.name} ({count + 1})") if count else model
        for model, count in zip(models, before, strict=True)
    ]


def check_others(
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


def check_judges(judges: Sequence[Run], encoder: str | None, source: Source, corpus: Corpus, split: str) -> None:
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


def encoder_of(named: str | None, device: torch.device, seed: int) -> Independent | None:
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
