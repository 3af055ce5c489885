"""`hpl` in parts: what is encoded of each sample apart, what compares them, and what no device is asked."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset
from methods.parted import assert_near, doubled, halves, in_order, step, without_asking
from methods.test_hpl import FAR, bare, hpl, on
from methods.test_method_contract import training_batch

from reidctl.batch import Batch
from reidctl.parts import join
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer

STAGES = ["prompt-stage", "finetune"]
MIXED = torch.tensor([True, False, False, True, True, False] * 3)
"""Which of the images have a caption: one or two of each person's three."""
LIVE = {"train_id_tokens": True, "train_prompt_encoder": True, "keep_ic": 0.3}
VARIANTS = {
    "default": {},
    "one token": {"trt": {"dual": False}},
    "own projection": {"trt": {"i2i_proj": "own", "isolation": "full"}},
    "words": {"prompts": "words"},
    "plain": {"prompts": "plain"},
    "none": {"prompts": "none"},
    "one stage": {"two_stage": False, "proto_positives": "literal"},
    "one stage, batch": {"two_stage": False, "cic_over": "batch"},
    "batch": {"cic_over": "batch", "i2i_losses_on": "i2i", "cic_reduction": "sum"},
    "all trained": {"stage2": LIVE, "trt": {"i2i_proj": "none"}},
    "all trained, batch": {"stage2": LIVE, "cic_over": "batch"},
    "hidden": {"inversion": {"layers": 1, "heads": 2, "input": "hidden", "readout": "linear"}, "cmpr": False},
    "images alone": {"train_tasks": ("i2i",), "i2i_losses_on": "i2i"},
    "texts alone": {"train_tasks": ("t2i",), "weights": {"tgps": 0.0}},
}
CASES = [
    (name, stage)
    for name, changes in VARIANTS.items()
    for stage in STAGES
    if stage == "finetune" or changes.get("prompts", "soft") in ("soft", "words")
]


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """18 captioned images of people 0 to 5, noise in a third of them."""
    made = training_batch(hpl(), write_dataset(tmp_path_factory.mktemp("parts") / "blocks", people=6), range(18))
    image = made.image.clone()
    image[::3] = torch.randn(image[::3].shape, generator=torch.Generator().manual_seed(5))
    return replace(made, image=image, sample=torch.arange(18))


@pytest.fixture(scope="module")
def mixed(paired):
    """The same, half of the images without a caption."""
    return bare(paired, MIXED).located()


def ready(method, stage, *, training=True):
    """A method at the start of a stage, with classifiers that say something."""
    with torch.no_grad():
        for head in (method.classifier, method.neck.classifier):
            head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    build_optimizer(method, stage, PromptConfig() if stage == "prompt-stage" else TrainConfig())
    method.train(training).begin(stage)
    return method


@pytest.mark.parametrize("captions", ["paired", "mixed"])
@pytest.mark.parametrize(("variant", "stage"), CASES)
def test_two_parts_joined_give_the_losses_gradients_and_norms_of_the_whole(request, variant, stage, captions):
    method, given = doubled(hpl(triplet=FAR, **VARIANTS[variant]), request.getfixturevalue(captions))
    if not method.train_texts:
        given = replace(given, texts={})
    method = ready(method, stage)
    parts = halves(method.prepare(given))
    other = copy.deepcopy(method)
    whole = step(method, [in_order(method.prepare(given), parts)], stage)
    joined = step(other, parts, stage)
    for what, one, two in zip(("losses", "gradients", "statistics"), whole, joined, strict=True):
        assert_near(one, two, what)
    assert set(whole[0]) == set(method.current_weights(stage))
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert set(whole[1]) <= trained and whole[1]
    alone = [step(copy.deepcopy(method), [part], stage)[0] for part in parts]
    compared = {"sdm", "triplet", "proto_t2i"} & set(whole[0])
    for name in compared:
        mean = sum(each[name] * len(part) for each, part in zip(alone, parts, strict=True)) / 18
        assert abs(mean - whole[0][name]) > 1e-3, "parts by themselves are another loss"
    assert compared


@pytest.mark.parametrize("training", [True, False])
def test_features_that_the_prompt_stage_keeps_go_with_their_samples(mixed, training):
    method, given = doubled(hpl(), mixed)
    method = ready(method, "prompt-stage", training=training)
    kept = method.frozen_features(Batch(image=given.image)) | method.frozen_features(Batch(texts=given.texts))
    longer = torch.cat([kept["text_tokens"], torch.full((9, 5, 32), 9.0)], dim=1)
    held = replace(given, image=None, frozen={**kept, "text_tokens": longer})
    parts = halves(method.prepare(held))
    whole = step(method, [in_order(method.prepare(given), parts)], "prompt-stage")
    joined = step(method, parts, "prompt-stage")
    assert_near(whole[0], joined[0], "losses")
    assert_near(whole[1], joined[1], "gradients")


def signs(parts):
    return {name: (value.dtype, value.shape[1:]) for name, value in parts.rows.items()}, dict(parts.points)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("spec", ["clip:micro", "vit-bert:micro"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("variant", ["default", "one stage", "plain"])
def test_a_part_without_captions_has_the_same_tensors_with_no_rows_for_texts(mixed, variant, kept, spec, narrow):
    method = on(spec, triplet=FAR, **VARIANTS[variant])
    texts = method.backbone.tokenize(["a man in red", "a woman in a long blue coat", "a child"] * 3)
    batch = replace(mixed, texts={"full": texts})
    if kept:
        frozen = method.frozen_features(Batch(image=mixed.image)) | method.frozen_features(Batch(texts={"full": texts}))
        batch = replace(batch, frozen=frozen)
    alone, others = MIXED.logical_not().nonzero().flatten().tolist(), MIXED.nonzero().flatten().tolist()
    for stage in STAGES[: 1 if kept else 2]:
        ready(method, stage)
        parts = [method.prepare(batch).take(rows) for rows in (alone, others)]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            without, having = (method.encode(part, stage) for part in parts)
            found = method.losses_of(join([without, having]), stage)
        assert signs(without) == signs(having)
        assert len(without["text"]) == len(without["row"]) == 0 and len(having["row"]) == len(having["text"]) == 9
        assert join([without, having])["row"].tolist() == list(range(9, 18))
        assert all(torch.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("stage", "loss", "changes"),
    [
        ("prompt-stage", "proto_t2i", {}),
        ("prompt-stage", "proto_i2t", {}),
        ("prompt-stage", "proto_i2t", {"proto_positives": "literal"}),
        ("finetune", "cic", {"cic_over": "batch", "stage2": {"train_id_tokens": True}}),
    ],
)
def test_a_part_encodes_the_prompts_of_its_own_people_and_the_first_of_each_counts(
    paired, monkeypatch, stage, loss, changes
):
    method = ready(hpl(tau_prompt=0.5, **changes), stage)
    asked, identity_prompts = [], method.identity_prompts
    monkeypatch.setattr(method, "identity_prompts", lambda who: asked.append(who.tolist()) or identity_prompts(who))
    whole = method.prepare(paired)
    joined = join([method.encode(whole.take(rows), stage) for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 1])])
    assert asked == [[0, 1], [0, 1, 2]]
    assert joined["owner"].tolist() == [0, 1, 0, 1, 2] and len(joined["prompt"]) == 5 and len(joined["t2i"]) == 10

    def with_prompt(rows):
        prompt = joined["prompt"].detach().clone()
        prompt[rows] = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(8))
        return method.losses_of(joined.with_rows({**joined.rows, "prompt": prompt}), stage)[loss]

    found = with_prompt([])
    assert torch.equal(with_prompt([2, 3]), found)
    assert min(abs(with_prompt([row]) - found) for row in (0, 1, 4)) > 1e-3


def test_the_prompts_of_all_people_are_no_rows(paired):
    """A part would hold them all, whoever is in it."""
    method = ready(hpl(stage2={"train_id_tokens": True}), "finetune")
    parts = method.encode(method.prepare(paired), "finetune")
    assert not {"prompt", "owner"} & set(parts) and method.prototypes is None
    cached = ready(hpl(cic_over="batch"), "finetune")
    rows = cached.encode(cached.prepare(paired), "finetune")
    assert "prompt" not in rows and rows["owner"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_batch_that_nobody_prepared_has_the_same_losses(mixed):
    for stage in STAGES:
        method = ready(hpl(two_stage=False, cic_over="batch"), stage)
        with torch.no_grad():
            found = [method.losses_of(method.encode(each, stage), stage) for each in (mixed, method.prepare(mixed))]
        assert found[0] == found[1] and found[0]


def test_the_report_is_about_the_pairs_of_all_parts(mixed):
    method = ready(hpl(), "finetune")
    batch = method.prepare(mixed)
    parts = halves(batch)
    reports = []
    for given in ([in_order(batch, parts)], parts, parts[1:]):
        method.losses_of(join([method.encode(part, "finetune") for part in given]), "finetune")
        reports.append(method.training_report())
    assert set(reports[0]) == {"pseudo/diversity", "pseudo/mismatch"}
    assert reports[0] == pytest.approx(reports[1], rel=1e-4)
    assert abs(reports[0]["pseudo/diversity"] / reports[2]["pseudo/diversity"] - 1) > 1e-3


@pytest.mark.covers(64)
def test_task_cosine_is_that_of_the_gradients_which_the_training_brings(paired):
    method = ready(hpl(triplet=FAR), "finetune")
    found = method.losses(paired, "finetune")
    shape, asked = method.shared_weight().shape, []

    def planted(t2i, i2i):
        def gradients(losses, weights):
            asked.append(dict(losses))
            assert len(weights) == 1 and weights[0] is method.shared_weight()
            made = {"t2i": t2i, "i2i": i2i}
            return {name: [made.get(name)] for name in losses}

        return gradients

    one, both = torch.zeros(shape), torch.zeros(shape)
    one[0, 0] = both[0, 0] = both[0, 1] = 2.0
    for t2i, i2i, expected in ((one, both, 0.5**0.5), (one, -one, -1.0), (one, None, None), (one, 0 * one, None)):
        method.gradients = planted(t2i, i2i)
        method.gradient_norms(found)
        assert method.training_report().get("task_cosine") == (expected and pytest.approx(expected))
    weights = method.current_weights()
    for side, names in (("t2i", ("sdm", "id_t2i", "tgps", "vgps", "cmpr")), ("i2i", ("triplet", "id_i2i", "cic"))):
        torch.testing.assert_close(asked[0][side], sum(weights[name] * found[name] for name in names))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["default", "words", "one stage, batch", "batch", "all trained", "hidden"])
def test_a_device_is_asked_for_no_numbers(mixed, variant, stage, monkeypatch):
    """Tensors on `meta` have a shape and no numbers: whatever asks for one fails there."""
    method = ready(hpl(triplet=FAR, **VARIANTS[variant]), stage)
    moved = method.prepare(mixed).to("meta")
    method = method.to("meta")
    if method.prototypes is not None:
        method.prototypes = method.prototypes.to("meta")
    parts = method.encode(moved, stage)
    assert {value.device.type for value in parts.rows.values()} == {"meta"}
    without_asking(monkeypatch)
    found = method.losses_of(parts, stage)
    assert set(found) == set(method.current_weights(stage))
    method.objective(found).backward()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        method.encode(mixed.to("meta"), stage)
