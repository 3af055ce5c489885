"""Look-alikes: planted features of bodies and of clothes."""

import numpy as np
import pandas as pd
import pytest

from reidctl.evaluation import clones

CAMERAS = 3


def people(pairs=6, *, cameras=True, two_outfits=False):
    """Images of pairs: a copy wears the other's outfit on another body, or has its body in another outfit; + strangers.

    Returns the images with the true body and outfit of each as columns.
    """
    rows = []
    for number in range(pairs):
        kind = "outfit" if number % 2 == 0 else "body"
        for member in (0, 1):
            person, partner = f"p{number}{'ab'[member]}", f"p{number}{'ba'[member]}"
            body = f"body{number}" + ("" if kind == "body" else "ab"[member])
            for image in range(2 * CAMERAS):
                own = f"outfit{number}" + ("" if kind == "outfit" else "ab"[member])
                own += f"-{image % 2}" if two_outfits else ""
                rows.append((person, partner, kind, body, own, f"c{image // 2}"))
    for number in range(4):
        for image in range(2 * CAMERAS):
            rows.append((f"s{number}", "", "", f"sbody{number}", f"soutfit{number}", f"c{image // 2}"))
    frame = pd.DataFrame(rows, columns=["person_id", "clone_of", "clone_kind", "body", "outfit_id", "camera_id"])
    frame["image_id"] = [f"i{row}" for row in range(len(frame))]
    frame["attributes"] = frame[["clone_of", "clone_kind"]].to_dict("records")
    if not cameras:
        frame["camera_id"] = None
    return frame


def hot(values, rng, noise):
    codes = np.unique(np.asarray(values, str), return_inverse=True)[1]
    return np.eye(codes.max() + 1)[codes] + noise * rng.normal(size=(len(codes), codes.max() + 1))


@pytest.mark.covers(166)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_bodies_win_where_outfits_are_equal_and_clothes_where_bodies_are(noise):
    images = people(20)
    alike, rng = clones.look_alikes(images), np.random.default_rng(0)
    body = clones.image_shares(hot(images["body"], rng, noise), alike)
    clothes = clones.image_shares(hot(images["outfit_id"], rng, noise), alike)
    tolerance = {"abs": 0.06 if noise else 0}
    assert body["outfit"].share.value == 1 and body["body"].share.value == pytest.approx(0.5, **tolerance)
    assert clothes["outfit"].share.value == pytest.approx(0.5, **tolerance) and clothes["body"].share.value == 1
    assert body["strangers"].share.value == clothes["strangers"].share.value == 1
    assert "outfit-changed" not in body
    # Who needs both to recognise everybody has to hold both.
    both = clones.image_shares(np.hstack([hot(images["body"], rng, 0), hot(images["outfit_id"], rng, 0)]), alike)
    assert all(share.share.value == 1 for share in both.values())


@pytest.mark.covers(166)
def test_after_a_change_of_clothes_the_outfit_speaks_for_the_wrong_one():
    images = people(two_outfits=True)
    alike, rng = clones.look_alikes(images), np.random.default_rng(0)
    body = clones.image_shares(hot(images["body"], rng, 0), alike)
    clothes = clones.image_shares(hot(images["outfit_id"], rng, 0), alike)
    assert body["outfit-changed"].share.value == 1 and clothes["outfit-changed"].share.value == 0
    assert body["outfit"].share.value == 1 and clothes["outfit"].share.value == 0.5


def test_noise_is_at_chance_and_the_interval_says_so():
    alike = clones.look_alikes(people(30))
    features = np.random.default_rng(5).normal(size=(len(alike.person), 16))
    for kind in ("outfit", "body"):
        share = clones.image_shares(features, alike)[kind].share
        assert share.low <= 0.5 <= share.high and share.high - share.low < 0.2


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("cameras", [False, True])
def test_shares_equal_a_slow_version(text, cameras):
    images = people(4, cameras=cameras)
    features = np.random.default_rng(1).normal(size=(len(images), 5))
    alike = clones.look_alikes(images)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    expected, triples, rows = {}, {}, list(images.itertuples())
    for a, one in enumerate(rows):
        if not one.clone_of:
            continue
        values = []
        for p, own in enumerate(rows):
            for n, other in enumerate(rows):
                away = not cameras or text or (own.camera_id != one.camera_id != other.camera_id)
                if own.person_id == one.person_id and (text or p != a) and other.person_id == one.clone_of and away:
                    values.append(cosine[a, p] > cosine[a, n])
        expected.setdefault(one.clone_kind, []).append(np.mean(values))
        triples[one.clone_kind] = triples.get(one.clone_kind, 0) + len(values)
    if text:
        found = clones.text_shares(features, np.arange(len(images)), features, alike)
    else:
        found = clones.image_shares(features, alike)
    for kind in ("outfit", "body"):
        assert found[kind].share.value == pytest.approx(np.mean(expected[kind]))
        assert found[kind].triples == triples[kind]
        assert found[kind].questions == len(expected[kind]) and found[kind].pairs == 2


def test_texts_are_compared_with_the_images_they_describe_too():
    images = people(10)
    alike, rng = clones.look_alikes(images), np.random.default_rng(0)
    clothes = hot(images["outfit_id"], rng, 0)
    found = clones.text_shares(clothes, np.arange(len(images)), clothes, alike)
    assert found["outfit"].share.value == 0.5 and found["body"].share.value == 1


def test_few_pairs_have_no_interval_and_a_partner_that_is_elsewhere_is_none():
    images = people(4)
    found = clones.image_shares(np.random.default_rng(0).normal(size=(len(images), 4)), clones.look_alikes(images))
    assert found["outfit"].pairs == 2 and np.isnan(found["outfit"].share.low)
    alone = clones.look_alikes(images[images["person_id"] != "p0b"].reset_index(drop=True))
    assert alone.pairs == 3
    without = people(1)
    without["attributes"] = None
    assert (
        clones.look_alikes(without).pairs == 0
        and clones.image_shares(np.eye(len(without)), clones.look_alikes(without)) == {}
    )
