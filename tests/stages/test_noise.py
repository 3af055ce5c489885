from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reidctl.data import Corpus
from reidctl.errors import DataError
from reidctl.stages.noise import exchange_descriptions


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
