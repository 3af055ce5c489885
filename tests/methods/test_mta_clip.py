"""`mta-clip`: prompts, adapter and losses of several datasets, what each stage trains, and what it reduces to."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli.commandline import cli
from conftest import corpus_of, write_dataset
from safetensors.torch import load_file
from torch.nn import functional

from reidctl import tables
from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.batch import Batch, Roster
from reidctl.config import load_recipe
from reidctl.data import TrainingSet, roster_of
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery_tasks
from reidctl.errors import DataError, UsageError
from reidctl.layers.sga import SgaConfig
from reidctl.methods.base import build_method, load_method, save_method
from reidctl.methods.clip_reid import ClipReidConfig
from reidctl.methods.mta_clip import MtaClipConfig
from reidctl.runs import Run
from reidctl.stages import building, finetune, prompt_stage
from reidctl.training import PromptConfig, TrainConfig, Trainer, build_optimizer

CPU = resolve_device("cpu")
READOUTS = ("cls_plus_gap", "concat", "gap", "pre_last")
LOCAL = (0, 1, 2, 3), (3, 4, 5, 6, 7)
"""The people of datasets a and b; 3 is in both."""
COSINE = {"con": {"normalize": True, "temperature": 0.07}, "i2t": {"normalize": True, "temperature": 0.07}}
SMALL = {"sga": {"groups": 4, "reduction": 4, "gamma_init": 0.3}, "unfreeze_blocks": 1, **COSINE}
NEITHER = {
    "hcp": {"enabled": False},
    "sga": {"enabled": False},
    "unfreeze_blocks": "all",
    "heads": "joint",
    **COSINE,
}
"""The settings with which it is `clip-reid`."""


def two_datasets(folder, people=16, *, one=False, shared=3):
    """People 0-7 train, 8-11 validate, 12-15 test; the first half of each is in dataset a, the others in b.

    Of person 3 two images are in each. `one` puts all into a.
    """
    splits = {**dict.fromkeys(range(8, 12), "val"), **dict.fromkeys(range(12, 16), "test")}
    write_dataset(folder, people=people, per_person=4, splits=splits)
    if one:
        return with_dataset(folder, lambda person, number: "a")
    first = {0, 1, 2, 8, 9, 12, 13}
    return with_dataset(
        folder, lambda person, number: "a" if person in first or (person == shared and number < 2) else "b"
    )


def with_dataset(folder, rule):
    images = tables.read_table(folder / "images.parquet", "images")
    names = [name[1:].split("-") for name in images["image_id"]]
    images["dataset"] = [rule(int(person), int(number)) for person, number in names]
    tables.write_table(folder / "images.parquet", "images", images)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_datasets(tmp_path_factory.mktemp("mta") / "both")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return two_datasets(tmp_path_factory.mktemp("mta") / "single", one=True)


@pytest.fixture(scope="module")
def corpus(data):
    return corpus_of(data).of_split("train")


def samples_of(corpus):
    tower = build("clip:micro")
    return TrainingSet(
        corpus, size=tower.image_size, mean=tower.mean, std=tower.std, tokenize=tower.tokenize, texts=(),
        augment=AugmentConfig(flip=0, pad=0, erase=0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def samples(corpus):
    return samples_of(corpus)


@pytest.fixture(scope="module")
def mixed(samples):
    """All 32 training images: 14 of a, 18 of b, in an order that mixes them."""
    order = np.random.default_rng(0).permutation(len(samples))
    return samples.collate([samples[(0, int(row), place)] for place, row in enumerate(order)])


def rows_of(batch, rows):
    kept = {name: getattr(batch, name)[rows] for name in ("image", "person", "domain", "camera")}
    return replace(batch, image_id=(), text_id=(), clothing_group=None, has_fusion=None, **kept)


def of_domain(batch, domain):
    return rows_of(batch, (batch.domain == domain).nonzero().flatten())


def with_noise(batch, rows):
    image = batch.image.clone()
    image[rows] = torch.randn(image[rows].shape, generator=torch.Generator().manual_seed(5))
    return replace(batch, image=image)


ROSTER = Roster(("a", "b"), LOCAL, tuple(f"{d}/c{n}" for d in "ab" for n in range(4)))


def make(name="mta-clip", roster=ROSTER, **changes):
    torch.manual_seed(0)
    settings = changes if name == "clip-reid" else {**SMALL, **changes}
    return build_method(name, settings, build("clip:micro"), 8, roster).eval()


def stirred(method):
    """The same with prompts that are far apart and an adapter that is not where it started."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in method.named_parameters():
            if name.startswith(("context.", "id_tokens")):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
            elif name.startswith("sga."):
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return method


def grads(value, *of):
    """Largest absolute gradient of each; 0 where none arrives."""
    found = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
    return [0.0 if grad is None else float(grad.abs().max()) for grad in found]


def same(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def text_of(method, person, domain):
    """The text feature of one person of one dataset, from the towers and the tokens alone."""
    tower = method.backbone
    before, after = (tower.tokenize([words]).ids for words in ("a photo of a", "person."))
    middle = [method.context.shared, method.context.domain[domain], method.id_tokens[person]]
    whole = [tower.embed_tokens(before[:, :-1])[0], *middle, tower.embed_tokens(after[:, 1:])[0]]
    joined = torch.cat(whole)[None]
    return tower.encode_embedded(joined, torch.ones(joined.shape[:2], dtype=torch.bool)).pooled[0]


def test_the_tests_datasets_are_what_they_say(samples, corpus, mixed):
    roster = roster_of(corpus.images)
    assert roster == ROSTER
    assert torch.bincount(mixed.domain).tolist() == [14, 18]
    assert {(int(p), int(d)) for p, d in zip(mixed.person, mixed.domain, strict=True)} == {
        (person, domain) for domain in (0, 1) for person in LOCAL[domain]
    }


# HCP


@pytest.mark.covers(201, 202, 203)
def test_the_text_of_a_person_is_the_sentence_of_shared_dataset_and_person_tokens(mixed):
    method = stirred(make())
    for domain in (0, 1):
        with torch.no_grad():
            found = method.prompt_features(torch.tensor(LOCAL[domain]), domain)
            for person, feature in zip(LOCAL[domain], found, strict=True):
                assert same(feature, text_of(method, person, domain))
    assert method.context.templates[0].length == 20 and method.id_tokens.shape == (8, 4, 32)
    assert MtaClipConfig().n_id_tokens == MtaClipConfig().hcp.n_shared == MtaClipConfig().hcp.n_domain == 4


@pytest.mark.covers(203)
@pytest.mark.parametrize("layout", ["concat", "add", "words"])
def test_two_people_of_one_dataset_have_different_texts_which_domain_prompts_alone_cannot_give(layout):
    method = stirred(make(hcp={"layout": layout}))
    with torch.no_grad():
        for domain in (0, 1):
            texts = functional.normalize(method.prompt_features(torch.tensor(LOCAL[domain]), domain), dim=1)
            assert torch.pdist(texts).min() > 1e-3
        alike = stirred(make(hcp={"layout": "domain"})).prompt_features(torch.arange(4), 0)
        assert same(alike, alike[:1].expand_as(alike))


@pytest.mark.covers(202, 204)
@pytest.mark.parametrize("layout", ["concat", "add"])
def test_exchanging_the_tokens_of_two_datasets_exchanges_their_texts(layout):
    method = stirred(make(hcp={"layout": layout}))
    person = torch.tensor([3])  # in both
    with torch.no_grad():
        before = [method.prompt_features(person, domain) for domain in (0, 1)]
        method.context.domain.copy_(method.context.domain.flip(0))
        after = [method.prompt_features(person, domain) for domain in (0, 1)]
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[0])
    assert functional.cosine_similarity(before[0], before[1]).item() < 0.999


def con_gradients(method, batch):
    method.begin("prompt-stage")
    loss = method.losses(batch, "prompt-stage")["con"]
    found = torch.autograd.grad(loss, (method.context.shared, method.context.domain, method.id_tokens))
    return dict(zip(("shared", "domain", "person"), found, strict=True))


@pytest.mark.covers(201, 202)
@pytest.mark.parametrize("layout", ["concat", "add"])
def test_l_con_of_one_dataset_s_batch_reaches_shared_tokens_and_its_own_and_exactly_no_others(mixed, layout):
    for domain in (0, 1):
        found = con_gradients(stirred(make(hcp={"layout": layout})), of_domain(mixed, domain))
        assert found["shared"].abs().amax(dim=1).min() > 0
        assert found["domain"][domain].abs().amax(dim=1).min() > 0
        assert (found["domain"][1 - domain] == 0).all()
        members = torch.zeros(8, dtype=torch.bool)
        members[list(LOCAL[domain])] = True
        assert (found["person"][members].abs().amax(dim=(1, 2)) > 0).all()
        assert (found["person"][~members] == 0).all()


@pytest.mark.covers(201, 202)
@pytest.mark.parametrize("layout", ["concat", "add"])
def test_in_a_mixed_batch_too_a_dataset_s_tokens_learn_from_its_own_images_alone(mixed, layout):
    method = stirred(make(hcp={"layout": layout}))
    found = con_gradients(method, mixed)
    for domain in (0, 1):
        other = con_gradients(method, with_noise(mixed, mixed.domain != domain))
        assert torch.equal(other["domain"][domain], found["domain"][domain])
        assert not same(other["domain"][1 - domain], found["domain"][1 - domain])
        assert not same(other["shared"], found["shared"])
        assert same(con_gradients(method, of_domain(mixed, domain))["domain"][domain], found["domain"][domain])


@pytest.mark.covers(204)
def test_orth_is_off_unless_it_has_a_weight_and_then_it_counts_and_falls(mixed):
    assert "orth" not in make().losses(mixed, "prompt-stage")
    method = make(weights={"orth": 0.5})
    assert method.current_weights("prompt-stage") == {"con": 1.0, "orth": 0.5}
    assert "orth" not in method.current_weights("finetune")
    with torch.no_grad():
        method.context.domain += method.context.shared
    found = method.losses(mixed, "prompt-stage")
    cosine = functional.cosine_similarity(method.context.shared[None, :, None], method.context.domain[:, None], dim=-1)
    assert same(found["orth"], cosine.square().mean()) and found["orth"] > 0.1
    torch.testing.assert_close(method.objective(found), found["con"] + 0.5 * found["orth"])
    assert method.training_report()["hcp/cosine"] == pytest.approx(cosine.abs().mean().item(), abs=1e-6)
    left = {}
    for weight in (0.0, 20.0):
        trained = make(weights={"orth": weight})
        trained.load_state_dict(method.state_dict())
        optimizer = build_optimizer(trained, "prompt-stage", PromptConfig(lr_prompt=5e-3))
        trained.begin("prompt-stage")
        for _ in range(10):
            optimizer.zero_grad()
            trained.objective(trained.losses(mixed, "prompt-stage")).backward()
            optimizer.step()
        left[weight] = trained.context.orthogonality().item()
    assert left[20.0] < 0.5 * left[0.0] and left[20.0] < 0.4 * found["orth"].item()
    assert not make(weights={"orth": 0.5}, hcp={"layout": "words"}).active("orth")
    assert not make(weights={"orth": 0.5}, hcp={"enabled": False}).active("orth")


@pytest.mark.covers(202)
def test_the_layout_domain_tells_datasets_apart_and_classifies_among_them(mixed):
    """Every dataset's prompt is there once, also in a batch of one dataset, which still pushes the other's away."""
    method = stirred(make(hcp={"layout": "domain"}))
    method.begin("prompt-stage")
    seen = functional.normalize(method.frozen_features(mixed)["image"], dim=1)
    texts = functional.normalize(method.domain_features().detach(), dim=1)
    labels = mixed.domain.tolist()
    scores = seen @ texts.T / 0.07
    expected = functional.cross_entropy(scores, mixed.domain)
    for k in (0, 1):
        own = [row for row, label in enumerate(labels) if label == k]
        expected -= scores[:, k].log_softmax(dim=0)[own].mean() / 2
    found = method.losses(mixed, "prompt-stage")["con"]
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    assert min(grads(found, method.context.shared, method.context.domain)) > 0 and grads(found, method.id_tokens) == [0]
    alone = method.losses(of_domain(mixed, 0), "prompt-stage")["con"]
    assert torch.autograd.grad(alone, method.context.domain)[0][1].abs().sum() > 0
    names = [name for name, _ in method.parameters_by_role("prompt-stage")["prompt"]]
    assert names == ["context.shared", "context.domain"]
    assert [row[:2] for row in method.prompt_rows([f"p{n}" for n in range(8)])] == [
        ("shared", ""), ("domain", "a"), ("domain", "b")
    ]  # fmt: skip
    method.begin("finetune")
    assert torch.equal(method.group_texts(0), method.group_texts(1)) and len(method.group_texts(0)) == 2
    proj = functional.normalize(method.look(mixed.image).proj, dim=1)
    scores = proj @ texts.T / 0.07
    expected = sum(
        functional.cross_entropy(scores[mixed.domain == k], mixed.domain[mixed.domain == k], label_smoothing=0.1)
        for k in (0, 1)
    )
    assert same(method.losses(mixed, "finetune")["i2t"], expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hcp": {"template": "A photo of a {shared} {id} person."}}, r"hcp\.template has no slot \{domain\}"),
        ({"hcp": {"layout": "add", "n_domain": 3}}, "layout add puts 3 tokens of a dataset onto 4"),
        ({"hcp": {"n_shared": 30}}, "tokens"),
        ({"heads": "joint"}, r"method\.heads: joint.*method\.hcp\.enabled=false"),
        ({"i2i_feature": "bn"}, r"i2i_feature: bn.*method\.heads=joint"),
        ({"unfreeze_blocks": 3}, r"unfreeze_blocks` is 3; the image encoder has 2 blocks"),
        ({"unfreeze_blocks": -1}, r"unfreeze_blocks` is -1"),
        ({"unfreeze_blocks": "some"}, "unfreeze_blocks"),
        ({"sga": {"kind": "ssm"}}, "kind"),
        ({"sga": {"groups": 0}}, "groups"),
        ({"weights": {"i2tt": 1.0}}, "no loss `i2tt`"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, said):
    with pytest.raises(UsageError, match=said):
        make(**changes)


def test_prompts_of_datasets_alone_need_several_datasets_and_joint_heads_one_or_plain_prompts():
    with pytest.raises(UsageError, match=r"layout: domain.*one dataset.*data combine"):
        make(roster=Roster.single(8), hcp={"layout": "domain"})
    make(roster=Roster.single(8), heads="joint")
    make(heads="joint", hcp={"enabled": False})
    make(heads="joint", hcp={"enabled": False}, i2i_feature="bn")
    make(roster=Roster.single(8), i2i_feature="bn")


# SGA in the model


@pytest.mark.covers(212)
@pytest.mark.parametrize("kind", ["gate", "linear", "ema"])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_adapter_reaches_the_retrieved_vectors_for_every_readout(mixed, readout, kind):
    method = make(sga={**SMALL["sga"], "readout": readout, "kind": kind})
    made = method.embed_tasks(mixed)
    for task in ("i2i", "t2i"):
        value = (made[task] * made[task].detach().roll(1, 0)).sum()
        reached = dict(zip(dict(method.sga.named_parameters()), grads(value, *method.sga.parameters()), strict=True))
        assert min(reached.values()) > 0, (task, reached)
    with torch.no_grad():
        for name, parameter in method.sga.named_parameters():
            before = parameter.clone()
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
            changed = method.embed_tasks(mixed)
            assert all((changed[task] - made[task]).abs().max() > 1e-6 for task in made), name
            parameter.copy_(before)
        again = method.embed_tasks(mixed)
    assert all(torch.equal(again[task], made[task]) for task in made)


@pytest.mark.covers(212)
@pytest.mark.parametrize("readout", READOUTS)
def test_every_image_loss_reaches_the_adapter(mixed, readout):
    method = make(sga={**SMALL["sga"], "readout": readout}, triplet={"margin": 100.0, "squared": False}).train()
    with torch.no_grad():
        for neck in method.necks:  # started near zero, they hardly pass anything
            for head in neck.values():
                head.classifier.weight.normal_()
    for name, value in method.losses(mixed, "finetune").items():
        assert min(grads(value, method.sga.gamma, method.sga.fusion, *method.sga.local.parameters())) > 0, name


@pytest.mark.covers(212)
def test_the_class_token_alone_would_not_see_the_adapter(mixed):
    """The trap: CLIP's own feature is the class token of the last layer, which is made before the adapter."""
    with torch.no_grad():
        plain, adapted = make(sga={"enabled": False}), make()
        cls = plain.look(mixed.image)
        hidden = adapted.backbone.encode_image(mixed.image).hidden_patches
        for readout in READOUTS[:3]:
            method = make(sga={**SMALL["sga"], "readout": readout})
            out = method.sga(hidden, method.backbone.grid).mean(dim=1)
            first = cls.hidden
            hiddens = {"cls_plus_gap": first + out, "gap": out, "concat": torch.cat([first, out], dim=1)}
            joint = out if readout == "gap" else first + out
            seen = method.look(mixed.image)
            assert same(seen.hidden, hiddens[readout]) and same(seen.previous, cls.previous)
            assert same(seen.proj, joint @ method.backbone.image.visual.proj)
            assert method.embed_tasks(mixed)["i2i"].shape[1] == (96 if readout == "concat" else 64)
        last = make(sga={**SMALL["sga"], "readout": "pre_last"}).look(mixed.image)
        assert same(last.previous, cls.previous) and not same(last.hidden, cls.hidden)


@pytest.mark.covers(205, 211, 212)
@pytest.mark.parametrize("readout", READOUTS)
def test_stage_one_sees_no_adapter_and_stage_two_begins_with_what_it_saw(mixed, readout):
    method = make(sga={**SMALL["sga"], "readout": readout, "gamma_init": 0.0})
    method.begin("prompt-stage")
    with torch.no_grad():
        first = method.look(mixed.image)
        kept = method.frozen_features(mixed)["image"]
    method.begin("finetune")
    with torch.no_grad():
        second = method.look(mixed.image)
        for name in ("previous", "hidden", "proj"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert torch.equal(kept, second.proj)
        method.sga.gamma.fill_(0.3)
        assert not same(method.look(mixed.image).proj, second.proj)
        method.begin("prompt-stage")
        assert torch.equal(method.frozen_features(mixed)["image"], kept), "stage 1: the adapter is off"


@pytest.mark.parametrize("readout", READOUTS)
def test_without_an_adapter_the_read_out_alone_is_what_gamma_zero_gives(mixed, readout):
    """`sga.kind: none`: the control that tells the adapter from the other feature."""
    none = make(sga={"kind": "none", "readout": readout})
    still = make(sga={**SMALL["sga"], "readout": readout, "gamma_init": 0.0})
    assert not hasattr(none, "sga") and none.gates(mixed) == none.extra_parts(mixed) == {}
    assert "sga/gamma" not in none.training_report()
    names = [name for name, _ in still.named_parameters() if not name.startswith("sga.")]
    assert [name for name, _ in none.named_parameters()] == names
    none.load_state_dict(still.state_dict(), strict=False)
    with torch.no_grad():
        one, two = none.embed_tasks(mixed), still.embed_tasks(mixed)
    assert all(torch.equal(one[task], two[task]) for task in ("t2i", "i2i"))


def test_a_batch_that_does_not_say_its_datasets_is_an_error(mixed):
    for stage in ("prompt-stage", "finetune"):
        with pytest.raises(ValueError, match="no `domain`"):
            make().losses(replace(mixed, domain=None), stage)
        make(hcp={"enabled": False}, heads="joint").losses(replace(mixed, domain=None), stage)


@pytest.mark.parametrize("kind", ["gate", "none"])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_activation_map_is_the_cosine_of_the_patches_that_are_read_with_the_image_s_feature(mixed, readout, kind):
    """With `pre_last` the adapter stands before the last block: the patches behind it have seen it."""
    method = make(sga={**SMALL["sga"], "readout": readout, "kind": kind})

    def adapt(patches):
        return method.sga(patches, method.backbone.grid) if kind == "gate" else patches

    with torch.no_grad():
        if kind == "gate":
            method.sga.gamma.fill_(2.0)
        early = readout == "pre_last"
        hidden = method.backbone.encode_image(mixed.image, adapt=adapt if early else None).hidden_patches
        patches = (hidden if early else adapt(hidden)) @ method.backbone.image.visual.proj
        feature = method.embed_images(mixed)[:, None]
        expected = functional.cosine_similarity(patches, feature, dim=2).clamp_min(0)
        found = method.activation(mixed)
    assert found.shape == (32, 4, 2) and expected.max() > 0.01
    assert same(found.flatten(1), expected)


@pytest.mark.covers(208, 209)
@pytest.mark.parametrize("readout", READOUTS)
def test_the_gates_of_both_streams_can_be_looked_at(mixed, readout):
    method = make(sga={**SMALL["sga"], "readout": readout})
    with torch.no_grad():
        found = method.gates(mixed)
    assert {name: value.shape for name, value in found.items()} == {"sga_local": (32, 32), "sga_global": (32, 32)}
    assert all(value.min() > 0 and value.max() < 1 for value in found.values())
    assert make(sga={"enabled": False}).gates(mixed) == {}


def test_the_cost_of_the_adapter_stands_beside_that_of_the_encoder_without_it(mixed):
    method = make()
    parts = method.extra_parts(Batch(image=mixed.image))
    assert set(parts) == {"sga", "image_without_sga"}
    with torch.no_grad():
        assert parts["sga"]().shape == (32, 8, 32)
        plain = make(sga={"enabled": False})
        assert torch.equal(parts["image_without_sga"](), plain.look(mixed.image).proj)
        assert plain.extra_parts(mixed) == {}
    assert (
        sum(value.numel() for value in method.sga.parameters()) == 32 * 10 + 32 * 9 + (32 * 8 + 8) + (8 * 32 + 32) + 3
    )


# PTSO stage 1


def slow_contrast(images, texts, labels, temperature=0.07):
    """One text per image; every column of the label is a positive; image to text plus text to image."""
    both = 0.0
    for rows, columns in ((images, texts), (texts, images)):
        total = 0.0
        for i in range(len(labels)):
            scores = [float(rows[i] @ columns[j]) / temperature for j in range(len(labels))]
            whole = math.log(sum(math.exp(score) for score in scores))
            right = [scores[j] for j in range(len(labels)) if labels[j] == labels[i]]
            total += whole - sum(right) / len(right)
        both += total / len(labels)
    return both


@pytest.mark.covers(206)
@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)])
def test_l_stage1_is_the_sum_over_the_datasets_of_a_batch_of_both_directions_within_each(mixed, present):
    method = stirred(make())
    method.begin("prompt-stage")
    rows = [row for row, domain in enumerate(mixed.domain.tolist()) if domain in present]
    batch = rows_of(mixed, torch.tensor(rows))
    expected, halves = 0.0, []
    with torch.no_grad():
        seen = functional.normalize(method.look(batch.image).proj, dim=1)
        for domain in present:
            own = [row for row in range(len(rows)) if batch.domain[row] == domain]
            labels = [int(batch.person[row]) for row in own]
            texts = [functional.normalize(text_of(method, person, domain), dim=0) for person in labels]
            expected += slow_contrast(seen[own], texts, labels)
            halves.append(slow_contrast(seen[own], texts, labels) / len(present))
        found = method.losses(batch, "prompt-stage")
        frozen = replace(batch, image=None, frozen=method.frozen_features(batch))
        assert torch.equal(method.losses(frozen, "prompt-stage")["con"], found["con"])
    assert set(found) == {"con"} and found["con"].item() == pytest.approx(expected, rel=1e-5)
    if len(present) == 2:
        assert abs(found["con"].item() - sum(halves)) > 0.1, "a sum, not a mean"


@pytest.mark.covers(206)
def test_contrast_over_all_people_together_would_be_another_loss(mixed):
    """With plain prompts and joint heads the people of both datasets are contrasted with each other."""
    values = {}
    for heads in ("per_domain", "joint"):
        method = make(hcp={"enabled": False}, heads=heads)
        method.begin("prompt-stage")
        values[heads] = method.losses(mixed, "prompt-stage")["con"].item()
    assert abs(values["joint"] - values["per_domain"]) > 0.1


def encoders(method):
    return {name: value.clone() for name, value in method.state_dict().items() if name.startswith("backbone.")}


@pytest.mark.covers(201, 202, 205)
def test_the_optimiser_of_stage_one_holds_the_prompts_and_nothing_of_encoders_heads_or_adapter():
    method = make()
    optimizer = build_optimizer(method, "prompt-stage", PromptConfig())
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    names = {name for name, value in method.named_parameters() if id(value) in held}
    assert names == {"id_tokens", "context.shared", "context.domain"}
    assert {name for name, value in method.named_parameters() if value.requires_grad} == names
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    words = make(hcp={"layout": "words"}).parameters_by_role("prompt-stage")
    assert [name for members in words.values() for name, _ in members] == ["id_tokens"]


# PTSO stage 2


@pytest.mark.covers(213)
@pytest.mark.parametrize("count", [0, 1, 2, "all"])
def test_stage_two_trains_the_last_blocks_norm_and_projection_adapter_and_heads_and_no_text(mixed, count):
    method = make(unfreeze_blocks=count)
    build_optimizer(method, "finetune", TrainConfig())
    visual = "backbone.image.visual."
    names = {name for name, _ in method.named_parameters()}
    image = {name for name in names if name.startswith("backbone.image.")}
    tail = {f"{visual}ln_post.weight", f"{visual}ln_post.bias", f"{visual}proj"}
    first = 2 - count if count != "all" else 0
    blocks = {name for name in image for n in range(first, 2) if name.startswith(f"{visual}transformer.resblocks.{n}.")}
    assert tail <= image and len(blocks) == 12 * (2 - first)
    expected = {name for name in names if name.startswith("sga.")}
    expected |= {name for name in names if name.startswith("necks.") and not name.endswith("norm.bias")}
    expected |= image if count == "all" else blocks | tail
    assert {name for name, value in method.named_parameters() if value.requires_grad} == expected
    facts = method.training_facts()
    assert facts == {"domains": {"a": 4, "b": 5}, "trained_blocks": list(range(first + 1, 3))}
    assert MtaClipConfig().unfreeze_blocks == 4
    # A step moves exactly these.
    before = {name: value.clone() for name, value in method.named_parameters()}
    optimizer = build_optimizer(method.train(), "finetune", TrainConfig(lr=1e-2))
    method.begin("finetune")
    for _ in range(2):
        optimizer.zero_grad()
        method.objective(method.losses(mixed, "finetune")).backward()
        optimizer.step()
    moved = {name for name, value in method.named_parameters() if not torch.equal(value, before[name])}
    assert moved == expected


def slow_losses(method, batch, present):
    """L_id, L_tri and L_i2t of every dataset by loops over images and classes, summed over datasets."""
    seen = method.look(batch.image)
    found = {"id": 0.0, "triplet": 0.0, "i2t": 0.0}
    for domain in present:
        rows = [row for row in range(len(batch)) if batch.domain[row] == domain]
        people = [int(batch.person[row]) for row in rows]
        target = [LOCAL[domain].index(person) for person in people]
        heads = method.necks[domain]
        for name in ("hidden", "proj"):
            feature = getattr(seen, name)[rows]
            normed = (feature - feature.mean(0)) / (feature.var(0, unbiased=False) + 1e-5).sqrt()
            found["id"] += smoothed(normed * heads[name].norm.weight @ heads[name].classifier.weight.T, target)
        for name in ("previous", "hidden", "proj"):
            feature = getattr(seen, name)[rows]
            for i in range(len(rows)):
                gap = {True: [], False: []}
                for j in range(len(rows)):
                    if i != j:
                        distance = (feature[i] - feature[j]).square().sum().sqrt()
                        gap[people[i] == people[j]].append(distance)
                margin = method.config.triplet.margin
                found["triplet"] += (max(gap[True]) - min(gap[False]) + margin).clamp_min(0) / len(rows)
        texts = torch.stack([text_of(method, person, domain) for person in LOCAL[domain]])
        scores = functional.normalize(seen.proj[rows], dim=1) @ functional.normalize(texts, dim=1).T / 0.07
        found["i2t"] += smoothed(scores, target)
    return found


def smoothed(scores, target, epsilon=0.1):
    """Cross-entropy with label smoothing, image by image and class by class."""
    total = 0.0
    for i in range(len(target)):
        whole = scores[i].logsumexp(0)
        for k in range(scores.shape[1]):
            share = epsilon / scores.shape[1] + (1 - epsilon) * (k == target[i])
            total = total + share * (whole - scores[i, k]) / len(target)
    return total


@pytest.mark.covers(214)
@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)])
def test_l_total_is_the_sum_over_datasets_of_id_triplet_and_image_to_text_each_with_its_own_heads(mixed, present):
    # A margin near the distances, and pictures of noise: some triplets count and others do not.
    method = stirred(make(triplet={"squared": False, "normalize": False, "margin": 0.5})).train()
    method.begin("finetune")
    with torch.no_grad():
        for neck in method.necks:
            for head in neck.values():
                head.classifier.weight.normal_(std=0.2)
        noisy = with_noise(mixed, torch.arange(len(mixed)) % 3 > 0)
        batch = rows_of(noisy, torch.tensor([r for r, d in enumerate(mixed.domain.tolist()) if d in present]))
        expected = slow_losses(method, batch, present)
        found = method.losses(batch, "finetune")
    assert set(found) == set(expected) == {"id", "triplet", "i2t"} and min(found.values()) > 0.1
    for name, value in found.items():
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-4), name
    total = 0.25 * expected["id"] + 1.0 * expected["triplet"] + 1.0 * expected["i2t"]
    assert method.objective(found).item() == pytest.approx(float(total), rel=1e-4)


@pytest.mark.covers(214)
def test_every_dataset_has_classifiers_of_its_own_size_and_a_person_of_both_is_in_both(mixed):
    method = stirred(make())
    for domain, members in enumerate(LOCAL):
        heads = method.necks[domain]
        assert heads["hidden"].classifier.weight.shape == heads["proj"].classifier.weight.shape == (len(members), 32)
        texts = method.group_texts(domain)
        assert same(texts, torch.stack([text_of(method, person, domain) for person in members]))
    assert method.local.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1], [-1, -1, -1, 0, 1, 2, 3, 4]]
    joint = make(hcp={"enabled": False}, heads="joint")
    assert [len(head["proj"].classifier.weight) for head in joint.necks] == [8]
    # The images of person 3 in a are told from a's people, those in b from b's.
    method.train().begin("finetune")
    for domain in (0, 1):
        own = of_domain(mixed, domain)
        found = method.losses(own, "finetune")
        weights = [method.necks[k]["proj"].classifier.weight for k in (0, 1)]
        reached = grads(found["id"], *weights)
        assert reached[domain] > 0 and reached[1 - domain] == 0
        rows = torch.autograd.grad(found["id"], weights[domain], retain_graph=True)[0].abs().amax(dim=1)
        assert (rows > 0).all()
    alone = rows_of(mixed, (mixed.person == 3).nonzero().flatten())
    assert all(torch.isfinite(value) for value in method.losses(alone, "finetune").values())


@pytest.mark.covers(214)
def test_only_the_direction_from_image_to_text_counts_in_stage_two(mixed):
    """The mean of what every image gives alone: a softmax over images would couple them."""
    method = stirred(make())
    method.begin("finetune")
    batch = of_domain(mixed, 1)
    with torch.no_grad():
        whole = method.losses(batch, "finetune")["i2t"]
        each = [method.losses(rows_of(batch, torch.tensor([row])), "finetune")["i2t"] for row in range(len(batch))]
    assert same(whole, torch.stack(each).mean())


@pytest.mark.covers(213)
def test_texts_are_fixed_in_stage_two_and_get_no_gradient(mixed):
    method = stirred(make()).train()
    optimizer = build_optimizer(method, "finetune", TrainConfig(lr=1e-2))
    method.begin("finetune")
    texts = [method.group_texts(domain).clone() for domain in (0, 1)]
    assert not any(text.requires_grad for text in texts)
    method.objective(method.losses(mixed, "finetune")).backward()
    optimizer.step()
    for name, value in method.named_parameters():
        if name.startswith(("context.", "id_tokens", "backbone.text.")):
            assert value.grad is None and not value.requires_grad, name
    method._texts = []
    assert all(same(method.group_texts(domain), texts[domain]) for domain in (0, 1))


def test_a_training_step_in_half_precision_is_near_that_in_full(mixed):
    for readout in READOUTS:
        method = make(sga={**SMALL["sga"], "readout": readout}).train()
        for stage in ("prompt-stage", "finetune"):
            method.begin(stage)
            wide = method.losses(mixed, stage)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                narrow = method.losses(mixed, stage)
            for name, value in wide.items():
                assert narrow[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.05), (readout, name)


# Batches of one dataset


@pytest.mark.parametrize("sampler", ["alternating", "alternating-random"])
def test_every_batch_of_the_training_set_is_of_one_dataset_and_both_have_turns(samples, tmp_path, sampler):
    settings = TrainConfig(sampler=sampler, batch=6, instances=2, device="cpu", workers=0)
    trainer = Trainer(make(), samples, None, settings, tmp_path, seed=0, stage="finetune", fingerprint="x")
    for epoch in range(3):
        counts = [0, 0]
        for batch in trainer._load(epoch, trainer._batches(epoch)):
            (domain,) = set(batch.domain.tolist())
            counts[domain] += 1
            assert set(batch.person.tolist()) <= set(LOCAL[domain])
            if sampler == "alternating":
                assert torch.bincount(batch.person).unique().tolist() in ([0, 2], [2])
        # Shares of 14 ** 0.5 to 18 ** 0.5.
        assert min(counts) >= 2 and abs(counts[0] / sum(counts) - 0.469) < 0.5 / sum(counts) + 1e-6


def test_identity_batches_of_two_datasets_are_mixed(samples, tmp_path):
    settings = TrainConfig(sampler="identity", batch=8, instances=2, device="cpu", workers=0)
    trainer = Trainer(make(), samples, None, settings, tmp_path, seed=0, stage="finetune", fingerprint="x")
    assert any(len(set(batch.domain.tolist())) == 2 for batch in trainer._load(0, trainer._batches(0)))


# Through the stages


LOOP = {
    "batch": 8, "instances": 2, "device": "cpu", "workers": 0, "log_every": 1,
    "augment": {"flip": 0.5, "pad": 2, "erase": 0},
}  # fmt: skip
RECIPE = {
    "method": {"name": "mta-clip", **SMALL},
    "backbone": {"spec": "clip:micro"},
    "prompt": {**LOOP, "sampler": "alternating-random", "epochs": 2, "lr_prompt": 0.02, "cache": "fp32"},
    "train": {**LOOP, "sampler": "alternating", "epochs": 2, "lr": 1e-3, "warmup_epochs": 0, "schedule": "constant"},
}


def changed(**sections):
    return RECIPE | {
        name: {**RECIPE.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }


def both_stages(folder, source, **sections):
    """A run with both stages and their records."""
    run, recipe = Run(folder), changed(**sections)
    first = prompt_stage.run(run, recipe, data=source, device="cpu")
    return run, first, finetune.run(run, recipe, data=source, device="cpu")


def untrained(data, **sections):
    checked = building.check(building.resolve(changed(**sections), None))
    return building.build_model(corpus_of(data).of_split("train"), checked, checked.prompts, 0)


def weights_of(run):
    return load_file(run.stage_dir("finetune") / "model.safetensors")


def equal(one, other):
    """The names that two sets of tensors do not hold alike, bit for bit."""
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run with both stages over two datasets, and the two records. Nobody may change it."""
    return both_stages(tmp_path_factory.mktemp("trained") / "run", data)


def history(run, stage):
    return tables.read_table(run.table(stage, "history"), "history")


@pytest.mark.covers(205)
def test_stage_one_leaves_encoders_adapter_and_heads_as_they_came_bit_for_bit(data, samples, tmp_path):
    method = untrained(data)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    settings = PromptConfig(**RECIPE["prompt"])
    Trainer(method, samples, None, settings, tmp_path, seed=0, stage="prompt-stage", fingerprint="x").run()
    after = method.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "id_tokens", "context.shared", "context.domain"
    }  # fmt: skip
    assert (method.context.domain - before["context.domain"]).abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.covers(201, 202, 203, 205)
def test_stage_one_hands_over_prompts_of_three_levels_and_writes_them_as_a_table(trained):
    run, first, _ = trained
    handed = load_file(prompt_stage.prompts_file(run))
    assert set(handed) == {"id_tokens", "context.shared", "context.domain"}
    assert first["parameters"] == 4 * 32 * (1 + 2 + 8)
    table = tables.read_table(run.table("prompt-stage", "prompts"), "prompts")
    for scope, keys in (("shared", [""]), ("domain", ["a", "b"]), ("person", [f"blocks:{n}" for n in range(8)])):
        rows = table[table["scope"] == scope]
        assert list(dict.fromkeys(rows["key"])) == keys and list(rows["position"]) == list(range(4)) * len(keys)
        name = {"shared": "context.shared", "domain": "context.domain", "person": "id_tokens"}[scope]
        assert np.array_equal(np.stack(rows["vector"]), handed[name].reshape(-1, 32).numpy())


@pytest.mark.covers(204)
def test_the_history_of_stage_one_has_the_cosine_of_shared_and_dataset_tokens(trained):
    run = trained[0]
    rows = history(run, "prompt-stage")
    cosines = rows[rows["name"] == "hcp/cosine"]["value"]
    assert len(cosines) == (rows["name"] == "loss/con").sum() > 2 and cosines.between(0, 1).all()
    handed = load_file(prompt_stage.prompts_file(run))
    expected = functional.cosine_similarity(
        handed["context.shared"][None, :, None], handed["context.domain"][:, None], dim=-1
    )
    assert cosines.iloc[-1] == pytest.approx(expected.abs().mean().item(), abs=1e-5)
    assert not {"sga/gamma", "sga/local"} & set(rows["name"])
    second = history(run, "finetune")
    assert second[second["name"] == "sga/local"]["value"].between(0, 1).all()
    assert second[second["name"] == "sga/gamma"]["value"].nunique() > 1


@pytest.mark.covers(213)
def test_stage_two_starts_from_stage_one_moves_the_last_block_and_tells_which(trained, data):
    run, _, record = trained
    assert record["trained_blocks"] == [2] and record["domains"] == {"a": 4, "b": 5}
    state, began = load_method(run.stage_dir("finetune")).state_dict(), untrained(data).state_dict()
    handed = load_file(prompt_stage.prompts_file(run))
    assert not any(torch.equal(handed[name], began[name]) for name in handed)
    began |= handed
    moved = {name for name in began if not torch.equal(began[name], state[name])}
    visual = "backbone.image.visual."
    parts = {name.removeprefix(visual) for name in moved if name.startswith("backbone.")}
    assert {name.split(".")[0] for name in parts} == {"transformer", "ln_post", "proj"}
    assert {name.split(".")[2] for name in parts if name.startswith("transformer")} == {"1"}
    others = {name.split(".")[0] for name in moved if not name.startswith("backbone.")}
    assert others == {"sga", "necks"}


@pytest.mark.covers(213)
def test_the_texts_of_stage_two_are_stage_one_s_prompts_of_the_right_dataset(trained, data):
    run = trained[0]
    method = untrained(data)
    prompt_stage.hand_over(run, method, [f"blocks:{n}" for n in range(8)])
    method.begin("finetune")
    handed = load_file(prompt_stage.prompts_file(run))
    assert torch.equal(method.context.domain, handed["context.domain"])
    for domain in (0, 1):
        with torch.no_grad():
            expected = torch.stack([text_of(method, person, domain) for person in LOCAL[domain]])
            wrong = torch.stack([text_of(method, person, 1 - domain) for person in LOCAL[domain]])
        assert same(method.group_texts(domain), expected) and not same(method.group_texts(domain), wrong)


@pytest.mark.covers(213)
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"hcp": {"n_shared": 3}}, "hcp"),
        ({"hcp": {"enabled": False}}, "hcp"),
        ({"sga": {**SMALL["sga"], "readout": "gap"}}, "readout"),
        ({"sga": {"enabled": False}}, "readout"),
        ({"weights": {"orth": 0.1}}, "weights"),
        ({"n_id_tokens": 3}, "n_id_tokens"),
        ({"heads": "joint", "hcp": {"enabled": False}}, "(hcp|heads)"),
    ],
)
def test_stage_two_refuses_prompts_of_other_settings_and_takes_what_stage_one_does_not_read(
    trained, data, tmp_path, method, said
):
    shutil.copytree(trained[0].path / "prompt-stage", tmp_path / "run" / "prompt-stage")
    run = Run(tmp_path / "run")
    with pytest.raises(DataError, match=rf"other settings: `method\.{said}`"):
        finetune.run(run, changed(method=method), data=data, device="cpu")


@pytest.mark.covers(213)
def test_adapter_weights_and_blocks_may_change_after_stage_one(trained, data, tmp_path):
    shutil.copytree(trained[0].path / "prompt-stage", tmp_path / "run" / "prompt-stage")
    more = {
        "sga": {"groups": 8, "kind": "ema", "gamma_init": 0.0}, "unfreeze_blocks": "all", "weights": {"i2t": 0.5},
    }  # fmt: skip
    record = finetune.run(Run(tmp_path / "run"), changed(method=more, train={"epochs": 1}), data=data, device="cpu")
    assert record["status"] == "done" and record["trained_blocks"] == [1, 2]


# What it reduces to


@pytest.mark.covers(215)
@pytest.mark.parametrize("several", [True, False])
def test_without_prompts_adapter_and_frozen_blocks_losses_and_gradients_are_clip_reid_s(mixed, single, several):
    batch, roster = mixed, ROSTER
    if not several:
        alone = samples_of(corpus_of(single).of_split("train"))
        batch = alone.collate([alone[(0, row, row)] for row in range(len(alone))])
        roster = roster_of(alone.corpus.images)
        assert len(roster.domains) == 1
    one, other = make("clip-reid", roster, **COSINE), make(roster=roster, **NEITHER)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1.0)
    other.load_state_dict(one.state_dict())
    for stage in ("prompt-stage", "finetune"):
        found = []
        for method in (one, other):
            settings = PromptConfig() if stage == "prompt-stage" else TrainConfig()
            build_optimizer(method.train(), stage, settings)
            method.begin(stage)
            losses = method.losses(batch, stage)
            method.zero_grad()
            method.objective(losses).backward()
            found.append((losses, {name: value.grad for name, value in method.named_parameters()}))
        assert list(found[0][0]) == list(found[1][0]) and list(found[0][1]) == list(found[1][1])
        for name, value in found[0][0].items():
            assert torch.equal(value, found[1][0][name]), name
        for name, grad in found[0][1].items():
            assert (grad is None) == (found[1][1][name] is None), name
            assert grad is None or torch.equal(grad, found[1][1][name]), name
        assert sum(grad is not None and bool(grad.any()) for grad in found[0][1].values()) >= 1
    with torch.no_grad():
        vectors = [method.eval().embed_tasks(batch) for method in (one, other)]
    assert all(torch.equal(vectors[0][task], vectors[1][task]) for task in ("t2i", "i2i"))


@pytest.mark.covers(215)
def test_so_reduced_both_stages_leave_clip_reid_s_weights_bit_for_bit_on_two_datasets(data, tmp_path):
    loops = {"prompt": {"sampler": "random"}, "train": {"sampler": "identity"}}
    runs = []
    for name, settings in (("clip-reid", COSINE), ("mta-clip", NEITHER)):
        recipe = {**RECIPE, "method": {"name": name, **settings}}
        recipe |= {section: {**RECIPE[section], **value} for section, value in loops.items()}
        run = Run(tmp_path / name)
        prompt_stage.run(run, recipe, data=data, device="cpu")
        finetune.run(run, recipe, data=data, device="cpu")
        runs.append(run)
    assert not equal(*(load_file(prompt_stage.prompts_file(run)) for run in runs))
    assert not equal(*map(weights_of, runs))


@pytest.fixture(scope="module")
def alternating(single, tmp_path_factory):
    """The recipe for several datasets on one. Nobody may change it."""
    return both_stages(tmp_path_factory.mktemp("one") / "alternating", single)[0]


@pytest.mark.covers(202, 215)
def test_on_one_dataset_the_recipe_for_several_leaves_the_weights_of_a_single_dataset_s(
    alternating, single, trained, tmp_path
):
    loops = {"prompt": {"sampler": "random"}, "train": {"sampler": "identity"}}
    run = both_stages(tmp_path / "run", single, **loops)[0]
    assert not equal(*(load_file(prompt_stage.prompts_file(each)) for each in (alternating, run)))
    assert not equal(weights_of(alternating), weights_of(run))
    # The comparison can fail: another sampler leaves other weights.
    shutil.copytree(run.path / "prompt-stage", tmp_path / "other" / "prompt-stage")
    other = Run(tmp_path / "other")
    finetune.run(other, changed(prompt=loops["prompt"], train={"sampler": "random"}), data=single, device="cpu")
    assert "sga.gamma" in equal(weights_of(other), weights_of(run))


@pytest.mark.covers(214, 215)
def test_on_one_dataset_heads_per_dataset_are_joint_heads(alternating, single, tmp_path):
    run = both_stages(tmp_path / "run", single, method={"heads": "joint"})[0]
    assert not equal(weights_of(alternating), weights_of(run))


# Presets

PRESETS = ("clip-reid", "clip-reid-tiny", "mta-clip", "mta-clip-single", "mta-clip-tiny")


def preset(name, **method):
    """A shipped preset on the smallest towers."""
    asked = {"backbone": {"spec": "clip:micro", "image_size": [64, 32]}}
    return building.check(building.resolve({**asked, **({"method": method} if method else {})}, name))


@pytest.mark.covers(215, 225)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_takes_a_step_of_both_stages(name, corpus, tmp_path):
    # The smallest towers have two blocks, so that four cannot be trained.
    checked = preset(name, **({"unfreeze_blocks": 1} if name in ("mta-clip", "mta-clip-single") else {}))
    assert checked.name == ("clip-reid" if name.startswith("clip-reid") else "mta-clip")
    small = {"epochs": 1, "batch": 8, "instances": 2, "device": "cpu", "workers": 0}
    for stage, section in (("prompt-stage", checked.prompts), ("finetune", checked.training)):
        training = section.replace(**small)
        method = building.build_model(corpus, checked, training, 0)
        samples = building.training_set(corpus, method, training, 0)
        before = {n: value.clone() for n, value in method.named_parameters()}
        trainer = Trainer(method, samples, None, training, tmp_path / stage, seed=0, stage=stage, fingerprint="x")
        found = trainer.run().history
        assert np.isfinite(found["value"]).all()
        assert {n for n, value in method.named_parameters() if not torch.equal(value, before[n])}
        losses = {n.removeprefix("loss/") for n in found["name"] if n.startswith("loss/")}
        assert losses == ({"con"} if stage == "prompt-stage" else {"id", "triplet", "i2t"})


@pytest.mark.covers(215)
def test_where_the_readme_is_silent_the_values_are_clip_reid_s():
    base, several, single = (preset(name) for name in ("clip-reid", "mta-clip", "mta-clip-single"))
    for section in ("training", "prompts"):
        first = getattr(base, section).model_dump()
        assert getattr(single, section).model_dump() == first
        differs = {key for key, value in getattr(several, section).model_dump().items() if value != first[key]}
        assert differs == {"sampler"}
    assert (several.training.sampler, several.prompts.sampler) == ("alternating", "alternating-random")
    assert (base.training.sampler, base.prompts.sampler) == ("identity", "random")
    for made in (several, single):
        assert made.towers == base.towers
        whole, own = base.method.model_dump(), made.method.model_dump()
        assert {name: own[name] for name in whole} == whole
    assert (several.method.hcp.enabled, several.method.sga.enabled, several.method.heads) == (True, True, "per_domain")
    assert (single.method.hcp.enabled, single.method.sga.enabled, single.method.heads) == (False, True, "joint")
    assert several.method.sga == SgaConfig() and several.method.unfreeze_blocks == 4
    raw = load_recipe("mta-clip")
    assert raw["backbone"] == load_recipe("clip-reid")["backbone"]
    assert raw["backbone"]["spec"] == "clip:ViT-B-16/openai" and raw["backbone"]["image_size"] == [256, 128]
    tiny, tiny_base = load_recipe("mta-clip-tiny"), load_recipe("clip-reid-tiny")
    assert {**tiny["train"], "sampler": "identity"} == tiny_base["train"]
    assert {**tiny["prompt"], "sampler": "random"} == tiny_base["prompt"]


@pytest.mark.covers(214, 215)
def test_the_published_numbers_of_clip_reid_are_the_defaults():
    method, checked = make(), preset("mta-clip")
    assert method.current_weights("finetune") == {"id": 0.25, "triplet": 1.0, "i2t": 1.0}
    assert method.current_weights("prompt-stage") == {"con": 1.0}
    plain = MtaClipConfig()
    assert (plain.smoothing, plain.triplet.margin, plain.con.temperature, plain.i2t.normalize) == (0.1, 0.3, 1.0, False)
    assert plain.triplet == ClipReidConfig().triplet and not plain.triplet.squared and not plain.triplet.normalize
    train, prompt = checked.training, checked.prompts
    assert (train.epochs, train.lr, train.batch, train.instances, train.milestones) == (60, 5e-6, 64, 4, (30, 50))
    assert (train.warmup_epochs, train.bias_lr_factor, train.optimizer) == (10, 2.0, "adam")
    assert (prompt.epochs, prompt.lr_prompt, prompt.batch, prompt.weight_decay) == (120, 3.5e-4, 64, 1e-4)
    assert prompt.lr_prompt * prompt.warmup_factor == pytest.approx(1e-5)
    assert prompt.lr_prompt * prompt.final_factor == pytest.approx(1e-6)


# Saved models and the gallery


def test_a_saved_model_keeps_its_datasets_and_every_vector(tmp_path, mixed):
    for readout in READOUTS:
        method = stirred(make(sga={**SMALL["sga"], "readout": readout}))
        save_method(method, tmp_path / readout)
        back = load_method(tmp_path / readout)
        assert back.roster == ROSTER and back.config == method.config
        with torch.no_grad():
            one, two = method.embed_tasks(mixed), back.embed_tasks(mixed)
            assert all(torch.equal(one[task], two[task]) for task in one)
            assert torch.equal(back.group_texts(1), method.group_texts(1))


@pytest.mark.covers(142)
def test_images_of_a_dataset_that_the_model_never_saw_need_no_prompt_and_no_caption(data, trained, tmp_path):
    """Trained on a alone, its roster knows no b."""
    run, _, record = both_stages(tmp_path / "run", data, data={"datasets": ["a"]}, prompt={"epochs": 1})
    method = load_method(run.stage_dir("finetune"))
    assert method.roster.domains == ("a",) and list(record["domains"]) == ["a"]
    for source, model in ((data, method), (data, load_method(trained[0].stage_dir("finetune")))):
        corpus = corpus_of(source).of_split("test")
        unseen = corpus.of_rows(np.flatnonzero(corpus.images["dataset"] == "b"))
        before = embed_gallery_tasks(model, unseen, device=CPU)
        unseen.captions["text"] = ["another text entirely"] * len(unseen.captions)
        unseen.images["dataset"] = "nobody knows"
        unseen.images["camera_id"] = None
        after = embed_gallery_tasks(model, unseen, device=CPU)
        for task in ("t2i", "i2i"):
            assert np.isfinite(before[task]).all() and len(before[task]) == 8
            assert np.array_equal(before[task], after[task]), task
        with torch.no_grad():  # nor do the prompts matter
            for name, value in model.named_parameters():
                if name.startswith(("context.", "id_tokens", "backbone.text.")):
                    value.zero_()
        assert np.array_equal(embed_gallery_tasks(model, unseen, device=CPU)["i2i"], before["i2i"])


# The command line


def sets(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


TINY = (
    "--method", "mta-clip-tiny", "--device", "cpu", "--json",
    *sets(
        "backbone.spec=clip:micro", "prompt.epochs=1", "prompt.batch=16", "train.epochs=1", "train.batch=16",
        "train.select_metric=mAP",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The run of two rendered worlds, and what each command printed."""
    folder = tmp_path_factory.mktemp("worlds")
    run, found = folder / "both", {}
    asked = {
        "synth": ("data", "synth", "--run", folder / "worlds", "--domain", "both", "--people", "24", "--crossing", "4",
                  "--images-per-person", "4", "--size", "64x32", "--workers", "1", "--json"),
        "combine": ("data", "combine", folder / "worlds", "--run", run, "--json"),
        "prompt-stage": ("prompt-stage", "--run", run, *TINY),
        "finetune": ("finetune", "--run", run, *TINY),
        "evaluate": ("evaluate", "--run", run, "--joint", "--device", "cpu", "--json"),
    }  # fmt: skip
    for name, args in asked.items():
        result = cli(*args)
        assert result.code == 0, (name, result.err)
        found[name] = result.json
    return Run(run), found


@pytest.mark.covers(213, 215, 220)
def test_the_commands_train_over_two_worlds_and_give_the_results_of_each(commands):
    run, found = commands
    worlds = ["synthped-a", "synthped-b"]
    assert list(found["finetune"]["domains"]) == worlds and found["finetune"]["trained_blocks"] == [1, 2]
    people = {name: facts["train"]["people"] for name, facts in found["combine"]["by_dataset"].items()}
    assert found["finetune"]["domains"] == people
    assert sum(people.values()) > found["finetune"]["train_people"], "some people are in both"
    assert {f"i2i:{name}" for name in (*worlds, "joint")} <= set(found["evaluate"]["tables"])
    frame = tables.read_table(run.table("evaluate", "metrics"), "metrics")
    rows = frame[(frame["direction"] == "i2i") & (frame["condition"] == "standard") & (frame["metric"] == "mAP")]
    assert sorted(rows["dataset"]) == ["joint", *worlds] and rows["value"].between(0, 1).all()


@pytest.mark.covers(201, 202, 203)
def test_the_table_of_prompts_of_two_worlds_has_the_three_scopes(commands):
    run, found = commands
    table = tables.read_table(run.table("prompt-stage", "prompts"), "prompts")
    keys = {scope: list(dict.fromkeys(part["key"])) for scope, part in table.groupby("scope", observed=True)}
    assert keys["shared"] == [""] and keys["domain"] == ["synthped-a", "synthped-b"]
    assert len(keys["person"]) == found["prompt-stage"]["people"] and set(keys) == {"shared", "domain", "person"}
    vectors = np.stack(table["vector"])
    assert vectors.shape == (4 * (1 + 2 + len(keys["person"])), 32) and np.isfinite(vectors).all()


def test_the_model_of_two_worlds_comes_back_with_its_roster_and_trains_batches_of_one(commands):
    run, found = commands
    method = load_method(run.stage_dir("finetune"))
    images = tables.read_table(run.stage_dir("data") / "images.parquet", "images")
    assert method.roster == roster_of(images[images["split"] == "train"])
    assert {name: len(people) for name, people in zip(method.roster.domains, method.roster.people, strict=True)} == (
        found["finetune"]["domains"]
    )
    assert set(method.roster.people[0]) & set(method.roster.people[1])
    again = cli("prompt-stage", "--run", run.path, *TINY)
    assert again.json["status"] == "up-to-date"
