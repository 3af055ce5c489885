"""What a dry run says of batches: who and what is in them, what several devices get, and the first one as a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reidctl.backbones.base import Backbone
from reidctl.batch import Batch
from reidctl.data import TrainingSet
from reidctl.report.batch_sheet import Shown, batch_sheet, to_pixels
from reidctl.sampling import share_of_rank
from reidctl.training.config import TrainConfig
from reidctl.training.memory import grouped

Numbers = npt.NDArray[np.int64]


def batch_facts(samples: TrainingSet, batch: Numbers) -> dict[str, Any]:
    """Return who and what is in a batch.

    `negatives` is the mean, over its samples, of the captioned samples of other people: what an image is told apart
    from; of images, where no text is read.

    Args:
        samples: the training set.
        batch: numbers of samples.
    """
    people, pictures = samples.person_of_sample[batch], samples.picture_of_sample[batch]
    told = _captioned(samples)[batch]
    each = np.unique(people, return_counts=True)[1]
    against = people[told] if told.any() else people
    same = np.asarray([(against == person).sum() for person in people])
    domains = [str(samples.domains[domain]) for domain in samples.domain_of_row[samples.row_of_sample[batch]]]
    return {
        "samples": len(batch),
        "people": len(each),
        "per_person": [int(each.min()), round(float(each.mean()), 2), int(each.max())],
        "datasets": dict(sorted(Counter(domains).items())),
        "captioned": int(told.sum()),
        "uncaptioned": int((~told).sum()),
        "repeated_images": len(batch) - len(np.unique(pictures)),
        "negatives": round(float((len(against) - same).mean()), 2),
    }


def _captioned(samples: TrainingSet) -> npt.NDArray[np.bool_]:
    """Which samples have a caption that the method reads."""
    reads = "full" in samples.texts
    return (np.arange(len(samples)) < samples.paired) & reads


def epoch_facts(samples: TrainingSet, batches: Sequence[Numbers]) -> dict[str, Any]:
    """Return what an epoch holds: steps, samples, different images and people, and its smallest and largest batch."""
    every = np.concatenate(batches)
    pictures, people = samples.picture_of_sample, samples.person_of_sample
    return {
        "steps": len(batches),
        "samples": len(every),
        "images": len(np.unique(pictures[every])),
        "of_images": len(np.unique(pictures)),
        "people": len(np.unique(people[every])),
        "of_people": len(samples.persons),
        "batches": [min(map(len, batches)), max(map(len, batches))],
        "repeated_images": sum(len(batch) - len(np.unique(pictures[batch])) for batch in batches),
    }


def text_facts(samples: TrainingSet, backbone: Backbone) -> dict[str, Any]:
    """Return how many training captions there are and which share of them is cut; no captions where none are read."""
    texts = [str(text) for text in samples.corpus.captions["text"]] if "full" in samples.texts else []
    return {
        "captions": len(texts),
        "context_length": backbone.context_length,
        "truncated": round(backbone.truncation_rate(texts), 4),
    }


def shares(samples: TrainingSet, batches: Sequence[Numbers], config: TrainConfig, devices: int) -> list[dict[str, Any]]:
    """Return for each of several devices its `steps`, and the samples of its first, smallest and largest batch.

    `left_out` is what no device gets of an epoch, because it cannot be dealt evenly.
    """
    captioned = _captioned(samples) if config.sampler == "mixed" else None
    dealt = [
        share_of_rank(batches, rank, devices, instances=config.instances if grouped(config) else 1, captioned=captioned)
        for rank in range(devices)
    ]
    given = sum(len(batch) for own in dealt for batch in own)
    left_out = sum(map(len, batches)) - given
    rows = []
    for rank, own in enumerate(dealt):
        sizes = [len(batch) for batch in own] or [0]
        rows.append(
            {
                "device": rank,
                "steps": len(own),
                "samples": sizes[0],
                "people": len(np.unique(samples.person_of_sample[own[0]])) if own else 0,
                "batches": [min(sizes), max(sizes)],
                "left_out": left_out,
            }
        )
    return rows


def draw_batch(samples: TrainingSet, batch: Batch, config: TrainConfig, backbone: Backbone, out: Path) -> None:
    """Write a batch as a picture.

    Raises:
        DataError: the file cannot be written.
    """
    texts = _texts(samples, batch, config, backbone)
    images, people = batch.finished().require("image").numpy(), batch.require("person").tolist()
    shown = [
        Shown(to_pixels(image, *samples.statistics), person, str(samples.persons[person]), text)
        for image, person, text in zip(images, people, texts, strict=True)
    ]
    title = f"First batch: {len(batch)} images of {len(set(people))} people, as the model gets them"
    batch_sheet(title, shown, out)


def _texts(samples: TrainingSet, batch: Batch, config: TrainConfig, backbone: Backbone) -> list[str | None]:
    """The text of every sample; None where it has none or none is read."""
    found: list[str | None] = [None] * len(batch)
    if "full" not in batch.texts:
        return found
    tokens, rows = batch.texts["full"], batch.image_of_text().tolist()
    corpus = samples.corpus
    known = dict(zip(corpus.captions["caption_id"].astype(str), corpus.captions["text"].astype(str), strict=True))
    for number, row in enumerate(rows):
        # Described texts and exchanged ones have no id of their own: they are read from what the model gets.
        text = None if config.shuffle_labels else known.get(batch.text_id[row])
        found[row] = _read(tokens.ids[number], tokens.mask[number], backbone) if text is None else text
    return found


def _read(ids: Any, mask: Any, backbone: Backbone) -> str:
    """Token ids as words, without the special ones at both ends."""
    return " ".join(backbone.tokenizer.word(int(token)) for token in ids[mask][1:-1])
