"""`mta-clip` in parts: datasets and people of a whole batch from parts of any mixture, and what no device is asked."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import corpus_of
from methods.parted import assert_near, doubled, halves, in_order, step, without_asking
from methods.twodatasets import (
    LOCAL,
    READOUTS,
    ROSTER,
    SMALL,
    make,
    of_domain,
    samples_of,
    stirred,
    two_datasets,
    with_noise,
)

from reidctl.batch import Roster
from reidctl.parts import join
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer

STAGES = ["prompt-stage", "finetune"]
THREE = Roster(("a", "b", "c"), (LOCAL[0], LOCAL[1], (0, 7)), ROSTER.cameras)
"""Nobody in the batches is of c."""
SETTINGS = {
    "concat": {"weights": {"orth": 0.5}},
    "add": {"hcp": {"layout": "add"}},
    "domain": {"hcp": {"layout": "domain"}, "weights": {"orth": 0.5}},
    "words": {"hcp": {"layout": "words"}},
    "raw": {"con": {}, "i2t": {}, "sie": {"camera": True}},
    "three": {"roster": THREE},
    "no hcp": {"hcp": {"enabled": False}},
    "joint": {"hcp": {"enabled": False}, "heads": "joint"},
    **{readout: {"sga": {**SMALL["sga"], "readout": readout}} for readout in READOUTS[1:]},
}
KINDS = {kind: {"sga": {**SMALL["sga"], "kind": kind}} for kind in ("linear", "ema", "none")}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """All 32 training images of both datasets in an order that mixes them, noise in two thirds of them."""
    samples = samples_of(corpus_of(two_datasets(tmp_path_factory.mktemp("mta") / "both")).of_split("train"))
    order = np.random.default_rng(0).permutation(len(samples))
    mixed = samples.collate([samples[(0, int(row), place)] for place, row in enumerate(order)])
    camera, number = torch.tensor([0, 1, -1, 2, 3, 4, 5, 6] * 4), torch.arange(32)
    return replace(with_noise(mixed, number % 3 > 0), camera=camera, sample=number)


def ready(stage, training=True, **changes):
    """A method at the start of a stage, with prompts that are far apart and classifiers that say something."""
    method, draw = stirred(make(**changes)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for neck in method.necks:
            for head in neck.values():
                head.classifier.weight.copy_(0.3 * torch.randn(head.classifier.weight.shape, generator=draw))
    build_optimizer(method, stage, PromptConfig() if stage == "prompt-stage" else TrainConfig())
    method.train(training).begin(stage)
    return method


def compare(method, whole, parts, stage):
    """Check the joined parts against the whole batch; return its losses."""
    other = copy.deepcopy(method)
    found, joined = step(method, [whole], stage), step(other, parts, stage)
    for what, one, two in zip(("losses", "gradients", "statistics"), found, joined, strict=True):
        assert_near(one, two, what)
    assert found[1], "no gradient was compared"
    return found[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SETTINGS)
def test_two_parts_joined_give_the_losses_gradients_and_norms_of_the_whole(batch, name, stage):
    method, given = doubled(ready(stage, **SETTINGS[name]), batch)
    method.begin(stage)  # the kept sentences in double precision too
    whole = method.prepare(given)
    parts = halves(whole)
    people = [{(int(p), int(d)) for p, d in zip(part.person, part.domain, strict=True)} for part in parts]
    assert (3, 0) in people[0] & people[1] or (3, 1) in people[0] & people[1], "somebody is in both parts"
    found = compare(method, in_order(whole, parts), parts, stage)
    assert set(found) == set(method.current_weights(stage)) and all(torch.isfinite(v) for v in found.values())


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_one_dataset_each_give_the_whole_of_both_and_hold_the_same_names(batch, stage):
    method, given = doubled(ready(stage), batch)
    method.begin(stage)
    whole = method.prepare(given)
    parts = [whole.take((given.domain == number).nonzero().flatten().tolist()) for number in (1, 0)]
    names = [set(method.encode(part, stage)) for part in parts]
    assert names[0] == names[1] and {"group0", "group1"} <= names[0]
    both = compare(method, in_order(whole, parts), parts, stage)
    alone = [method.losses(part, stage) for part in parts]
    assert_near(both, {name: sum(each[name] for each in alone) for name in both}, "a sum over datasets")


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_one_dataset_s_batch_give_the_whole_and_no_gradient_to_the_other_s_heads(batch, stage):
    method, given = doubled(ready(stage), of_domain(replace(batch, has_text=None, texts={}), 1))
    method.begin(stage)
    given = replace(given, sample=torch.arange(len(given)))
    parts = halves(method.prepare(given))
    compare(method, in_order(method.prepare(given), parts), parts, stage)
    reached = {name for name, value in method.named_parameters() if value.grad is not None}
    assert not any(name.startswith("necks.0.") for name in reached)
    assert any(name.startswith("necks.1.") for name in reached) == (stage == "finetune")


def test_a_part_encodes_a_person_of_two_datasets_once_in_each(batch, monkeypatch):
    method = ready("prompt-stage")
    asked, prompt_features = [], method.prompt_features
    monkeypatch.setattr(
        method,
        "prompt_features",
        lambda who, group: asked.append((group, who.tolist())) or prompt_features(who, group),
    )
    rows = [row for row, person in enumerate(batch.person.tolist()) if person in (2, 3, 6)]
    parts = [method.prepare(batch).take(rows), method.prepare(batch).take([rows[0]])]
    joined = join([method.encode(part, "prompt-stage") for part in parts])
    first = int(batch.person[rows[0]]), int(batch.domain[rows[0]])
    assert asked == [(0, [2, 3]), (1, [3, 6]), (first[1], [first[0]])]
    # Numbers of owners tell person 3 of a from person 3 of b.
    assert joined["owner"].tolist() == [2, 3, 8 + 3, 8 + 6, 8 * first[1] + first[0]]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*SETTINGS, *KINDS])
def test_a_device_is_asked_for_no_numbers(batch, stage, name, monkeypatch):
    """Tensors on `meta` have a shape and no numbers: whatever asks for one fails there."""
    method = ready(stage, **{**SETTINGS, **KINDS}[name])
    prepared = method.prepare(batch)
    method, moved = method.to("meta"), prepared.to("meta")
    parts = method.encode(moved, stage)
    assert {value.device.type for value in parts.rows.values()} == {"meta"}
    without_asking(monkeypatch)
    found = method.losses_of(parts, stage)
    assert set(found) == set(method.current_weights(stage))
    method.objective(found).backward()


def test_a_sample_of_an_unknown_dataset_is_refused(batch):
    with pytest.raises(ValueError, match="of group 2, and there are 2"):
        make().prepare(replace(batch, domain=batch.domain + 1))
    with pytest.raises(ValueError, match="no `domain`"):
        make().losses(replace(batch, domain=None), "finetune")
