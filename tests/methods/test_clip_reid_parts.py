"""`clip-reid` in parts: what is encoded of each sample apart, what compares them, and what no device is asked."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset
from methods.parted import assert_near, doubled, halves, in_order, step, without_asking
from methods.test_clip_reid import reid, with_cameras
from methods.test_method_contract import training_batch

from reidctl.layers.groups import GroupedBatch
from reidctl.parts import join
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer

COSINE = {"normalize": True, "temperature": 0.07}
STAGES = ["prompt-stage", "finetune"]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """18 images of people 0 to 5, noise in a third of them, with cameras of which some are unknown."""
    made = training_batch(reid(), write_dataset(tmp_path_factory.mktemp("parts") / "blocks", people=6), range(18))
    image = made.image.clone()
    image[::3] = torch.randn(image[::3].shape, generator=torch.Generator().manual_seed(5))
    return replace(made, image=image, camera=torch.tensor([0, 1, -1] * 6), sample=torch.arange(18))


def ready(method, stage, *, training=True):
    """A method at the start of a stage, with classifiers that say something."""
    with torch.no_grad():
        for head in method.necks[0].values():
            head.classifier.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    build_optimizer(method, stage, PromptConfig() if stage == "prompt-stage" else TrainConfig())
    method.train(training).begin(stage)
    return method


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("changes", [{}, {"con": COSINE, "i2t": COSINE}, {"triplet": {"mining": "all", "margin": 9.0}}])
def test_two_parts_joined_give_the_losses_gradients_and_norms_of_the_whole(batch, stage, training, changes):
    method, given = doubled(reid(**changes), batch)
    method = ready(method, stage, training=training)
    parts = halves(method.prepare(given))
    other = copy.deepcopy(method)
    whole = step(method, [in_order(method.prepare(given), parts)], stage)
    joined = step(other, parts, stage)
    for what, one, two in zip(("losses", "gradients", "statistics"), whole, joined, strict=True):
        assert_near(one, two, what)
    assert set(whole[0]) == set(method.current_weights(stage)) and min(map(float, whole[0].values())) > 0.1
    if stage == "finetune":
        alone = [step(copy.deepcopy(method), [part], stage)[0] for part in parts]
        mean = {name: (alone[0][name] * len(parts[0]) + alone[1][name] * len(parts[1])) / 18 for name in whole[0]}
        assert abs(mean["triplet"] - whole[0]["triplet"]) > 1e-3, "parts by themselves are another loss"


def test_cameras_reach_their_vectors_from_every_part(batch):
    method, given = doubled(with_cameras(), batch)
    method = ready(method, "finetune")
    parts = halves(method.prepare(given))
    whole = step(method, [in_order(method.prepare(given), parts)], "finetune")
    joined = step(method, parts, "finetune")
    assert "camera_vectors" in whole[1]
    assert_near(whole[1], joined[1], "gradients")


def test_a_part_encodes_the_sentences_of_its_own_people_once_each(batch, monkeypatch):
    method = ready(reid(), "prompt-stage")
    asked, prompt_features = [], method.prompt_features
    monkeypatch.setattr(
        method, "prompt_features", lambda who, *rest: asked.append(who.tolist()) or prompt_features(who, *rest)
    )
    whole = method.prepare(batch)
    parts = [whole.take([0, 1, 2, 3, 4]), whole.take([5, 6, 7, 8, 1])]
    joined = join([method.encode(part, "prompt-stage") for part in parts])
    assert asked == [[0, 1], [0, 1, 2]]
    assert joined["owner"].tolist() == [0, 1, 0, 1, 2] and len(joined["prompt"]) == 5 and len(joined["image"]) == 10
    # Of a person whom both parts hold the first sentence counts: the second, however wrong, is not read.
    found = method.losses_of(joined, "prompt-stage")["con"]
    prompt = joined["prompt"].clone()
    prompt[2:4] = 7.0
    again = method.losses_of(joined.with_rows({**joined.rows, "prompt": prompt}), "prompt-stage")["con"]
    assert torch.equal(again, found)
    prompt[0] = 7.0
    other = method.losses_of(joined.with_rows({**joined.rows, "prompt": prompt}), "prompt-stage")["con"]
    assert abs(other - found) > 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_nobody_prepared_has_the_same_losses(batch, stage):
    method = ready(reid(), stage)
    prepared = method.prepare(batch)
    assert isinstance(prepared, GroupedBatch) and not isinstance(batch, GroupedBatch)
    with torch.no_grad():
        found = [method.losses_of(method.encode(each, stage), stage) for each in (batch, prepared)]
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_device_is_asked_for_no_numbers(batch, stage, monkeypatch):
    """Tensors on `meta` have a shape and no numbers: whatever asks for one fails there."""
    method = ready(with_cameras(), stage)
    prepared = method.prepare(batch)
    method, moved = method.to("meta"), prepared.to("meta")
    parts = method.encode(moved, stage)
    assert {value.device.type for value in parts.rows.values()} == {"meta"}
    without_asking(monkeypatch)
    found = method.losses_of(parts, stage)
    assert set(found) == set(method.current_weights(stage))
    method.objective(found).backward()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        method.encode(batch.to("meta"), stage)
