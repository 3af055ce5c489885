"""The columns of every Parquet table, and the version of each; see `tables` for how they are read and written."""

import pyarrow as pa

VERSION = 1
# Tables whose columns changed since; all others are of version 1.
_VERSIONS = {"queries": 2, "rankings": 2, "faithfulness": 2}

TEXT = pa.string()
ENUM = pa.dictionary(pa.int32(), pa.string())
INTS = pa.list_(pa.int32())
FLOATS = pa.list_(pa.float32())


def _schema(required: dict[str, pa.DataType], optional: dict[str, pa.DataType] | None = None) -> pa.Schema:
    columns = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    columns += [pa.field(name, kind, nullable=True) for name, kind in (optional or {}).items()]
    return pa.schema(columns)


SCHEMAS: dict[str, pa.Schema] = {
    "images": _schema(
        {
            "image_id": TEXT,
            "path": TEXT,
            "dataset": ENUM,
            "split": ENUM,
            "person_id": TEXT,
            "width": pa.int32(),
            "height": pa.int32(),
            "sha256": TEXT,
        },
        {"role": ENUM, "camera_id": ENUM, "outfit_id": TEXT, "attributes": pa.map_(TEXT, TEXT)},
    ),
    "captions": _schema(
        {
            "caption_id": TEXT,
            "image_id": TEXT,
            "kind": ENUM,
            "source": ENUM,
            "conditioned_on": ENUM,
            "status": ENUM,
        },
        {
            "text": TEXT,
            "parent_id": TEXT,
            "char_start": pa.int32(),
            "char_end": pa.int32(),
            "style_id": ENUM,
            "model": ENUM,
            "prompt_sha256": TEXT,
            "reason": TEXT,
        },
    ),
    # Who is who after datasets were combined, and the images that were taken out of training for it.
    "identities": _schema({"original_id": TEXT, "dataset": ENUM, "person_id": TEXT, "rule": ENUM}),
    "purged": _schema(
        {
            "image_id": TEXT,
            "dataset": ENUM,
            "split": ENUM,
            "person_id": TEXT,
            "reason": ENUM,
            "evidence": TEXT,
        }
    ),
    # Digests of the people and image files that a model was trained on: what `evaluate` compares its test set with.
    "seen": _schema({"kind": ENUM, "digest": TEXT}),
    "styles": _schema(
        {
            "style_id": TEXT,
            "size": pa.int32(),
            "instruction": TEXT,
            "exemplars": pa.list_(TEXT),
            "centroid": FLOATS,
        }
    ),
    "parts": _schema({"image_id": TEXT, "part": ENUM, "box": INTS, "mask": INTS}, {"phrase": TEXT}),
    "prompts": _schema({"scope": ENUM, "key": TEXT, "position": pa.int32(), "vector": FLOATS}),
    "history": _schema(
        {
            "stage": ENUM,
            "step": pa.int64(),
            "epoch": pa.int32(),
            "split": ENUM,
            "name": ENUM,
            "value": pa.float64(),
            "seconds": pa.float64(),
        }
    ),
    "embeddings": _schema(
        {
            "item_id": TEXT,
            "role": ENUM,
            "modality": ENUM,
            "condition": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "person_id": TEXT,
            "embedding": FLOATS,
        },
        {"camera_id": ENUM},
    ),
    "rankings": _schema(
        {
            "direction": ENUM,
            "dataset": ENUM,
            "query_id": TEXT,
            "condition": ENUM,
            "rank": pa.int32(),
            "gallery_id": TEXT,
            "score": pa.float32(),
            "match": pa.bool_(),
        }
    ),
    "queries": _schema(
        {
            "direction": ENUM,
            "dataset": ENUM,
            "query_id": TEXT,
            "condition": ENUM,
            "person_id": TEXT,
            "matches": pa.int32(),
            "gallery": pa.int64(),
        },
        {
            "first_match": pa.float64(),
            "average_precision": pa.float64(),
            "inp": pa.float64(),
            "rank1": pa.float64(),
            "rank5": pa.float64(),
            "rank10": pa.float64(),
            "rank20": pa.float64(),
        },
    ),
    "metrics": _schema(
        {
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "condition": ENUM,
            "metric": ENUM,
            "value": pa.float64(),
            "queries": pa.int64(),
            "skipped": pa.int64(),
            "gallery": pa.int64(),
        },
        {"low": pa.float64(), "high": pa.float64()},
    ),
    # One metric on one part of the queries: those of one camera, view, caption length, ...
    "slices": _schema(
        {
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "condition": ENUM,
            "slice": ENUM,
            "part": ENUM,
            "metric": ENUM,
            "value": pa.float64(),
            "queries": pa.int64(),
            "skipped": pa.int64(),
            "people": pa.int64(),
        },
        {"low": pa.float64(), "high": pa.float64()},
    ),
    # This run minus another on the same queries, with an interval and a p-value over people.
    "differences": _schema(
        {
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "condition": ENUM,
            "metric": ENUM,
            "value": pa.float64(),
            "other": pa.float64(),
            "difference": pa.float64(),
            "queries": pa.int64(),
            "people": pa.int64(),
            "better": pa.int64(),
            "worse": pa.int64(),
            "equal": pa.int64(),
        },
        {"low": pa.float64(), "high": pa.float64(), "p_value": pa.float64()},
    ),
    # The same queries in both runs, one row each: what `differences` is computed from.
    "paired": _schema(
        {"direction": ENUM, "dataset": ENUM, "condition": ENUM, "query_id": TEXT, "person_id": TEXT},
        {
            f"{name}_difference": pa.float64()
            for name in ("average_precision", "inp", "rank1", "rank5", "rank10", "rank20")
        },
    ),
    # Several runs that differ in the seed alone.
    "seeds": _schema(
        {
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "condition": ENUM,
            "metric": ENUM,
            "runs": pa.int64(),
            "mean": pa.float64(),
            "minimum": pa.float64(),
            "maximum": pa.float64(),
        },
        {"std": pa.float64()},
    ),
    # Every model on every dataset.
    "matrix": _schema(
        {
            "model": TEXT,
            "method": ENUM,
            "trained_on": TEXT,
            "data": TEXT,
            "relation": ENUM,
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "metric": ENUM,
            "value": pa.float64(),
            "queries": pa.int64(),
            "skipped": pa.int64(),
            "gallery": pa.int64(),
        },
        {"low": pa.float64(), "high": pa.float64()},
    ),
    # One setting of spoilt queries or images, and what it costs against its reference setting.
    "robustness": _schema(
        {
            "model": TEXT,
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "setting": ENUM,
            "reference": ENUM,
            "seed": pa.int32(),
            "metric": ENUM,
            "value": pa.float64(),
            "queries": pa.int64(),
            "skipped": pa.int64(),
            "gallery": pa.int64(),
        },
        {
            "level": pa.float64(),
            "low": pa.float64(),
            "high": pa.float64(),
            "drop": pa.float64(),
            "drop_low": pa.float64(),
            "drop_high": pa.float64(),
            "p_value": pa.float64(),
            "ceiling": pa.float64(),
            "note": TEXT,
        },
    ),
    # Every kept epoch of one training; `chosen` says which of them was selected, and on what.
    "epochs": _schema(
        {
            "epoch": pa.int32(),
            "direction": ENUM,
            "dataset": ENUM,
            "split": ENUM,
            "metric": ENUM,
            "value": pa.float64(),
            "queries": pa.int64(),
        },
        {"low": pa.float64(), "high": pa.float64(), "chosen": ENUM},
    ),
    # What the features of a trained model hold: one number of one analysis, beside its control.
    "analysis": _schema(
        {
            "analysis": ENUM,
            "feature": ENUM,
            "target": ENUM,
            "metric": ENUM,
            "value": pa.float64(),
            "items": pa.int64(),
            "people": pa.int64(),
        },
        {
            "low": pa.float64(),
            "high": pa.float64(),
            "control": pa.float64(),
            "control_high": pa.float64(),
            "chance": pa.float64(),
            "p_value": pa.float64(),
        },
    ),
    # A study: every measured value of every training, and what the seeds say of each claim.
    "study": _schema({"condition": ENUM, "seed": pa.int32(), "measure": ENUM, "value": pa.float64()}),
    "claims": _schema(
        {
            "claim": TEXT,
            "measure": ENUM,
            "condition": ENUM,
            "other": ENUM,
            "other_measure": ENUM,
            "direction": ENUM,
            "matters": pa.float64(),
            "seeds": pa.int32(),
            "verdict": ENUM,
            "reason": TEXT,
        },
        {
            "bound": pa.float64(),
            "effect": pa.float64(),
            "low": pa.float64(),
            "high": pa.float64(),
            "p_value": pa.float64(),
            "p_holm": pa.float64(),
        },
    ),
    "explanations": _schema(
        {
            "query_id": TEXT,
            "image_id": TEXT,
            "phrase": TEXT,
            "char_start": pa.int32(),
            "char_end": pa.int32(),
            "explainer": ENUM,
            "similarity": pa.float32(),
            "grid_h": pa.int32(),
            "grid_w": pa.int32(),
            "relevance": FLOATS,
        }
    ),
    "faithfulness": _schema(
        {
            "query_id": TEXT,
            "image_id": TEXT,
            "person_id": TEXT,
            "judge": TEXT,
            "explainer": ENUM,
            "control": ENUM,
            "fill": TEXT,
            "removed": pa.float32(),
            "score": pa.float32(),
            "drop": pa.float32(),
            "rank": pa.float64(),
            "first": pa.float64(),
            "ap": pa.float64(),
        }
    ),
    "interpretability": _schema(
        {
            "explainer": ENUM,
            "judge": TEXT,
            "metric": TEXT,
            "kind": ENUM,
            "control": ENUM,
            "fill": TEXT,
            "value": pa.float64(),
            "items": pa.int64(),
        },
        {"removed": pa.float32(), "low": pa.float64(), "high": pa.float64()},
    ),
}


def version(name: str) -> int:
    """Return the version of table `name` that this reidctl reads and writes."""
    return _VERSIONS.get(name, VERSION)
