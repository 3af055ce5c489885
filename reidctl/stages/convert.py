"""`convert`: a published checkpoint as the trained model of a run.

What is written is a finished `finetune` stage, so that `index`, `search`, `evaluate` and `interpret` work on it and
`finetune` can start from it. What no checkpoint holds is recorded as unknown: whom the model saw, how its epoch was
chosen.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save

from reidctl import tables
from reidctl.backbones.base import Backbone
from reidctl.console import log
from reidctl.convert.assembling import Converted, convert
from reidctl.convert.heads import Told
from reidctl.convert.towers import Asked
from reidctl.errors import UsageError
from reidctl.methods.base import save_method
from reidctl.runs import Run, digest

STAGE, SOURCE = "finetune", "convert"
PLAIN = "clip.safetensors"
"""The towers of a plain CLIP under open_clip's names, for `backbone.spec`."""
UNSEEN = (
    "A published checkpoint does not say whom it was trained on: nothing here can tell whether people or images of a "
    "test set were among them."
)
# Their code keeps the epoch that is best on `--val_dataset`, whose default is `test`.
_CHOOSES_ON_TEST = ("irra", "rde", "mllm4text")


@dataclass(frozen=True)
class Options:
    """What is said about the file.

    Attributes:
        form: whose code wrote it; `auto`: by its names.
        model: open_clip's name of the towers; None: by their shapes.
        image_size: (height, width); None: as the code trains.
        stride: step between patches; None: what the position table fits.
        persons: number of training people; None: as the file has.
        cameras: names of its cameras, `dataset/camera`, in the file's order.
        words: another CLIP file with the table of words; None: none.
    """

    form: str = "auto"
    model: str | None = None
    image_size: tuple[int, int] | None = None
    stride: int | None = None
    persons: int | None = None
    cameras: tuple[str, ...] = ()
    words: Path | None = None


def run(run: Run, file: Path, options: Options, *, force: bool = False) -> dict[str, Any]:
    """Write the model of a published checkpoint and its record as the run's finished training.

    Args:
        run: where the model is written; it must hold no training of its own.
        file: the checkpoint.
        options: what is said about it.
        force: convert again, also over a training.

    Returns:
        The record of `finetune` with `status` `done` or `up-to-date`; `source` is `convert`, and `taken`, `dropped`,
        `initial` and `notes` say what became of the tensors.

    Raises:
        UsageError: the run holds a trained model, or an option does not fit the file.
        DataError: a file that cannot be read safely, or whose tensors do not fit.
    """
    run.check_writable()
    inputs = {"checkpoint": digest(file)} | ({} if options.words is None else {"words": digest(options.words)})
    said = {name: value for name, value in asdict(options).items() if name != "words"}
    held = run.record(STAGE)
    if held is not None and not force:
        if held.get("source") != SOURCE:
            raise UsageError(
                f"{run.path} holds a model that was trained there.",
                hint="Convert into another --run, or give --force to replace the training.",
            )
        if held["settings"].get("convert") == _json(said) and run.up_to_date(STAGE, held["settings"], inputs):
            return {**held, "status": "up-to-date"}
    started = datetime.now(UTC)
    found = convert(
        file,
        form=options.form,
        asked=Asked(options.model, options.image_size, options.stride),
        told=Told(options.persons, options.cameras),
        words=options.words,
    )
    run.unfinish(STAGE)
    outputs = _write(run, found)
    notes = [*found.notes, *_unknown(found)]
    for note in notes:
        log.warning(note)
    record = run.finish(
        STAGE,
        settings=_settings(found, _json(said)),
        inputs=inputs,
        outputs=outputs,
        started=started,
        extra={**_facts(run, file, found), "notes": notes},
    )
    return {**record, "status": "done"}


def _json(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}


def _write(run: Run, found: Converted) -> list[Path]:
    """Write the model, what a training leaves beside it, and towers for `backbone.spec`; a training's state goes."""
    folder = run.stage_dir(STAGE)
    (folder / "last" / "state.pt").unlink(missing_ok=True)
    (folder / PLAIN).unlink(missing_ok=True)
    outputs = save_method(found.method, folder)
    for name in ("history", "seen"):
        outputs.append(run.table(STAGE, name))
        tables.write_table(outputs[-1], name, tables.empty(name))
    if found.method.name == "clip":
        outputs.append(folder / PLAIN)
        tables.write_bytes(outputs[-1], _plain(found.method.backbone))
    return outputs


def _plain(backbone: Backbone) -> bytes:
    """The towers in open_clip's names, with the grid of the position table, which `backbone.spec` reads."""
    weights = {
        name.removeprefix("image.").removeprefix("text."): value.contiguous()
        for name, value in backbone.state_dict().items()
    }
    return save(weights, {"grid": f"{backbone.grid[0]}x{backbone.grid[1]}"})


def _unknown(found: Converted) -> list[str]:
    chosen = "How its epoch was chosen is not in the file."
    if found.form.name in _CHOOSES_ON_TEST:
        chosen += (
            " Its code chooses on the test split unless told otherwise, and then the numbers of that split flatter it."
        )
    return [UNSEEN, *([chosen] if found.form.name != "open-clip" else [])]


def _settings(found: Converted, said: Mapping[str, Any]) -> dict[str, Any]:
    """What a training's record has, as far as it is known."""
    method, towers = found.method, found.method.backbone.config
    return {
        "seed": 0,
        "method": {"name": method.name, **method.config.model_dump()},
        "backbone": {
            "spec": towers.spec,
            "image_size": list(towers.image_size),
            "text_length": None,
            "pixel_statistics": "half" if found.form.statistics == 0.5 else "checkpoint",
            "grad_checkpointing": False,
            **({} if towers.stride is None else {"stride": towers.stride}),
        },
        "train": {},
        "convert": dict(said),
        "device": "cpu",
    }


def _start(found: Converted) -> dict[str, Any]:
    """The settings of `backbone` with which a training starts from it."""
    towers = found.method.backbone.config
    stride = {} if towers.stride is None else {"stride": towers.stride}
    return {"spec": towers.spec, "image_size": list(towers.image_size), **stride}


def _facts(run: Run, file: Path, found: Converted) -> dict[str, Any]:
    return {
        "source": SOURCE,
        # No dataset: a folder that holds none.
        "data": str(run.stage_dir(STAGE).resolve()),
        "described": None,
        "method": found.method.name,
        "form": found.form.name,
        "train_people": found.persons,
        "start": None if found.form.name == "open-clip" else str(file.resolve()),
        "prompts": None,
        "selected_on": "unknown",
        # For whoever measures this model, or one that was trained from it.
        "seen_note": " ".join(_unknown(found)),
        "parameters": sum(parameter.numel() for parameter in found.method.parameters()),
        "taken": found.taken,
        "dropped": found.dropped,
        "initial": found.initial,
        "to_train": {"method": found.method.name, **_start(found)},
        "towers": {
            "spec": found.method.backbone.config.spec,
            "image_size": list(found.method.backbone.image_size),
            "grid": list(found.method.backbone.grid),
            "stride": found.method.backbone.config.stride or found.method.backbone.image.patch_size[0],
            "activation": "QuickGELU" if found.method.backbone.config.quick_gelu else "GELU",
        },
    }
