from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reidctl.data import Corpus
from reidctl.errors import DataError
from reidctl.stages.noise import degrade_captions, exchange_descriptions


def corpus(people: int = 10, each: int = 4, *, described: bool = True) -> Corpus:
    count = people * each
    images = pd.DataFrame(
        {
            "image_id": [f"i{row}" for row in range(count)],
            "person_id": [f"p{row // each}" for row in range(count)],
            "split": ["test" if row // each >= people - 2 else "train" for row in range(count)],
        }
    )
    texts: list[str | None] = [f"identity {row}" if described else None for row in range(count)]
    return Corpus(
        images, pd.DataFrame(), texts, [text and text.replace("identity", "clothing") for text in texts], Path()
    )


def changed(before: Corpus, after: Corpus) -> set[int]:
    return {row for row, (a, b) in enumerate(zip(before.identity, after.identity, strict=True)) if a != b}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_noise_gives_exactly_its_share_of_train_images_the_texts_of_other_people(share: float) -> None:
    before = corpus()
    after = exchange_descriptions(before, share)
    rows = changed(before, after)
    assert len(rows) == round(share * 32) and max(rows) < 32  # test people keep their texts
    for row in rows:
        giver = int(str(after.identity[row]).split()[1])
        assert giver // 4 != row // 4 and giver < 32
        assert after.clothing[row] == f"clothing {giver}"  # both texts come from one image


def test_more_noise_damages_the_same_images_in_the_same_way_and_more() -> None:
    before = corpus()
    some, more = exchange_descriptions(before, 0.25), exchange_descriptions(before, 0.75)
    few = changed(before, some)
    assert few < changed(before, more)
    assert all(some.identity[row] == more.identity[row] for row in few)
    assert changed(before, exchange_descriptions(before, 0.25, seed=1)) != few


def test_no_noise_changes_nothing_and_one_person_is_an_error() -> None:
    before = corpus()
    assert exchange_descriptions(before, 0.0) is before
    with pytest.raises(DataError, match="two people"):
        exchange_descriptions(corpus(described=False), 0.5)
    assert np.array_equal(before.images["person_id"], corpus().images["person_id"])


def captioned() -> Corpus:
    plain = corpus()
    rows = list(range(len(plain.images)))
    captions = pd.DataFrame(
        {"caption_id": [f"c{row}" for row in rows], "text": [f"text {row}" for row in rows], "row": rows}
    )
    return replace(plain, captions=captions)


def test_exchanged_captions_are_a_permutation_of_exactly_that_share_of_the_training_captions() -> None:
    before = captioned()
    texts = {}
    for share in (0.25, 0.5, 1.0):
        after = degrade_captions(before, "exchange", share)
        moved = [row for row, text in enumerate(after.captions["text"]) if text != f"text {row}"]
        assert len(moved) == round(share * 32) and max(moved) < 32
        assert sorted(after.captions["text"]) == sorted(before.captions["text"])
        texts[share] = set(moved)
    assert texts[0.25] < texts[0.5] < texts[1.0]
    again = degrade_captions(before, "exchange", 0.5)
    assert list(again.captions["text"]) == list(degrade_captions(before, "exchange", 0.5).captions["text"])
    assert list(again.captions["text"]) != list(degrade_captions(before, "exchange", 0.5, seed=1).captions["text"])
