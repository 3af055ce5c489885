"""`clip-reid`: its losses by slow loops, what each stage trains, cameras, and the published settings.

Against the published code itself: tests/benchmarks/parity_clip_reid.py.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import model, training_batch
from torch.nn import functional

from reidctl.backbones.weights import build
from reidctl.batch import Batch, Roster
from reidctl.config import load_recipe, parse_section
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery_tasks
from reidctl.errors import UsageError
from reidctl.methods.base import build_method, load_method, save_method
from reidctl.methods.clip_reid import ClipReid, ClipReidConfig, Seen
from reidctl.stages import building
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor

CPU = resolve_device("cpu")
FAR = {"margin": 100.0, "squared": False, "normalize": False}
"""A margin that leaves every triplet active."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clip_reid") / "blocks", people=6)


@pytest.fixture(scope="module")
def batch(folder):
    """12 images of people 0 to 3, three of each; the model has 6 people."""
    return training_batch(reid(), folder)


def reid(**changes):
    return model("clip-reid", **changes)


def with_cameras(cameras=("blocks/c0", "blocks/c1", "blocks/c2"), **sie):
    torch.manual_seed(0)
    roster = replace(Roster.single(6), cameras=tuple(cameras))
    settings = {"n_id_tokens": 2, "sie": {"camera": True, **sie}}
    return build_method("clip-reid", settings, build("clip:micro"), 6, roster).eval()


def seeing(method, monkeypatch, seen):
    """Let the method see these features."""
    monkeypatch.setattr(method, "look", lambda images, shift=None: seen)


def some_features(count, dim=32, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return Seen(*(scale * torch.randn(count, dim, generator=generator) for _ in range(3)))


def batch_of(people):
    return Batch(image=torch.zeros(len(people), 3, 64, 32), person=torch.tensor(people))


def smoothed(scores, own, smoothing=0.1):
    """Cross-entropy of one row of scores with 0.9 on the right class and 0.1 on all of them."""
    total = math.log(sum(math.exp(score) for score in scores))
    target = [smoothing / len(scores) + (1 - smoothing) * (place == own) for place in range(len(scores))]
    return -sum(share * (score - total) for share, score in zip(target, scores, strict=True))


def hardest(features, people, margin=0.3):
    """Batch-hard triplet loss, anchor by anchor, of whatever people there are."""
    found = []
    for anchor, person in enumerate(people):
        near = [
            math.dist(features[anchor].tolist(), features[other].tolist())
            for other in range(len(people))
            if people[other] == person and other != anchor
        ]
        far = [
            math.dist(features[anchor].tolist(), features[other].tolist())
            for other in range(len(people))
            if people[other] != person
        ]
        if near and far:
            found.append(max(0.0, max(near) - min(far) + margin))
    return sum(found) / len(found) if found else 0.0


def supervised(rows, columns, people):
    """-mean over rows of the mean over the columns of the same person of log softmax of the plain dot product."""
    whole = 0.0
    for row, person in enumerate(people):
        scores = [sum(a * b for a, b in zip(rows[row].tolist(), column.tolist(), strict=True)) for column in columns]
        total = math.log(sum(math.exp(score) for score in scores))
        mine = [place for place, other in enumerate(people) if other == person]
        whole -= sum(scores[place] - total for place in mine) / len(mine) / len(people)
    return whole


# Prompts


@pytest.mark.covers(222)
def test_the_sentence_is_a_photo_of_a_x_x_x_x_person_with_the_four_x_learnt():
    assert (ClipReidConfig().template, ClipReidConfig().n_id_tokens) == ("A photo of a {id} person.", 4)
    torch.manual_seed(0)
    backbone = build("clip:micro").eval()
    method = build_method("clip-reid", {}, backbone, 6).eval()
    assert method.id_tokens.shape == (6, 4, backbone.width_text)
    assert float(method.id_tokens.detach().std()) == pytest.approx(0.02, rel=0.15)
    tokens = backbone.tokenize(["A photo of a X X X X person."])
    x = int(backbone.tokenize(["x"]).ids[0, 1])
    places = [place for place, token in enumerate(tokens.ids[0].tolist()) if token == x]
    assert places == list(method.sentence.places("id")) == [5, 6, 7, 8] and method.sentence.length == 12
    words = backbone.embed_tokens(tokens.ids)
    person = torch.tensor([4, 0])
    with torch.no_grad():
        prompt = method.prompt(method.id_tokens[person], 0)
        expected = words.expand(2, -1, -1).clone()
        expected[:, places] = method.id_tokens[person]
        assert torch.equal(prompt.embeddings, expected)
        pooled = backbone.encode_embedded(expected, tokens.mask.expand(2, -1)).pooled
        torch.testing.assert_close(method.prompt_features(person), pooled)
        # With the letters' own embeddings in the slots it is the plain sentence.
        method.id_tokens[0] = words[0, places]
        torch.testing.assert_close(method.prompt_features(torch.tensor([0])), backbone.encode_text(tokens).pooled)


def test_prompts_of_many_people_are_the_same_in_blocks():
    method, people = reid(), torch.tensor([5, 1, 1, 0, 3])
    with torch.no_grad():
        torch.testing.assert_close(method.prompt_features(people, block=2), method.prompt_features(people))


@pytest.mark.covers(222)
def test_stage_one_moves_the_tokens_of_the_batch_s_people_and_nothing_else(batch):
    method = reid()
    method.begin("prompt-stage")
    optimizer = build_optimizer(method, "prompt-stage", PromptConfig())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(method.id_tokens)]
    method.objective(method.losses(batch, "prompt-stage")).backward()
    reached = method.id_tokens.grad.abs().amax(dim=2)
    assert (reached[:4] > 0).all() and not reached[4:].any()
    assert [name for name, value in method.named_parameters() if value.grad is not None] == ["id_tokens"]


@pytest.mark.covers(206, 222)
def test_the_stage_one_loss_is_the_contrast_of_raw_dot_products_in_both_directions(batch):
    method, people = reid(), [3, 0, 3, 5, 0, 3]
    image = 0.7 * torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    found = method.losses(Batch(person=torch.tensor(people), frozen={"image": image}), "prompt-stage")
    assert set(found) == {"con"}
    text = method.prompt_features(torch.tensor(people)).detach()
    one, other = supervised(image, text, people), supervised(text, image, people)
    assert abs(one - other) > 0.01  # a loss with one direction twice would show
    assert found["con"].item() == pytest.approx(one + other, rel=1e-5)
    assert method.objective(found).item() == found["con"].item()
    # Longer features are another loss: nothing is normalised, unless asked for.
    longer = method.losses(Batch(person=torch.tensor(people), frozen={"image": 2 * image}), "prompt-stage")
    assert longer["con"].item() == pytest.approx(
        supervised(2 * image, text, people) + supervised(text, 2 * image, people), rel=1e-5
    )
    cosine = reid(con={"normalize": True, "temperature": 0.07})
    scaled = functional.normalize(image, dim=1) / 0.07, functional.normalize(text, dim=1)
    assert cosine.losses(Batch(person=torch.tensor(people), frozen={"image": image}), "prompt-stage")[
        "con"
    ].item() == pytest.approx(supervised(*scaled, people) + supervised(scaled[1], scaled[0], people), rel=1e-4)


def test_stage_one_reads_the_projected_feature_kept_or_computed(batch):
    method = reid()
    method.begin("prompt-stage")
    kept = method.frozen_features(Batch(image=batch.image))
    assert set(kept) == {"image"} and not kept["image"].requires_grad
    assert torch.equal(kept["image"], method.backbone.encode_image(batch.image).cls[:, 0])
    found = [
        method.losses(each, "prompt-stage")["con"].item() for each in (batch, Batch(person=batch.person, frozen=kept))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    half = {"image": kept["image"].half()}
    assert method.losses(Batch(person=batch.person, frozen=half), "prompt-stage")["con"].dtype == torch.float32


# Losses of stage 2


@pytest.mark.covers(214, 222)
def test_the_identity_loss_is_two_smoothed_cross_entropies_behind_two_norms(monkeypatch):
    method, people = reid(weights={"triplet": 0, "i2t": 0}).train(), [0, 4, 4, 2]
    seen = some_features(4)
    seeing(method, monkeypatch, seen)
    for head in method.necks[0].values():
        torch.nn.init.normal_(head.classifier.weight)
        torch.nn.init.uniform_(head.norm.weight, 0.5, 2.0)
    expected = 0.0
    for name, feature in (("hidden", seen.hidden), ("proj", seen.proj)):
        head = method.necks[0][name]
        normed = (feature - feature.mean(dim=0)) / (feature.var(dim=0, unbiased=False) + 1e-5).sqrt()
        scores = (normed * head.norm.weight) @ head.classifier.weight.T
        assert scores.shape == (4, 6) and head.classifier.bias is None
        expected += sum(smoothed(row.tolist(), own) for row, own in zip(scores, people, strict=True)) / 4
    found = method.losses(batch_of(people), "finetune")
    assert set(found) == {"id"} and found["id"].item() == pytest.approx(expected, rel=1e-5)
    assert method.objective(found).item() == pytest.approx(0.25 * expected, rel=1e-5)


@pytest.mark.covers(214, 222)
def test_the_triplet_loss_is_worked_by_hand_on_three_raw_features(monkeypatch):
    method = reid(weights={"id": 0, "i2t": 0})

    def on_a_line(*places):
        feature = torch.zeros(len(places), 32)
        feature[:, 0] = torch.tensor(places)
        return feature

    # People 0 0 1 1. Of the first: anchors 0 and 1: |1-0| - 3 or 2 + .3 < 0; 2: 4 - 2 + .3; 3: 4 - 6 + .3 < 0.
    # Of the second: everybody in one place: 0.3 for each. Of the third: 10 - 1, 10 - 9, 10 - 1, 10 - 9, + .3.
    seen = Seen(on_a_line(0, 1, 3, 7), on_a_line(5, 5, 5, 5), on_a_line(0, 10, 1, 11))
    seeing(method, monkeypatch, seen)
    found = method.losses(batch_of([0, 0, 1, 1]), "finetune")
    assert set(found) == {"triplet"}
    parts = [2.3 / 4, 0.3, (9.3 + 9.3 + 9.3 + 9.3) / 4]
    assert found["triplet"].item() == pytest.approx(sum(parts), rel=1e-5)
    assert method.objective(found).item() == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.covers(222)
@pytest.mark.parametrize("people", [[0, 0, 0, 1], [0, 1, 1, 2, 2, 2, 2, 2], [0, 1, 2, 3], [4, 4, 4], [0, 0, 1, 1, 5]])
def test_a_batch_may_hold_any_number_of_images_of_each_person(monkeypatch, people):
    """The published code reshapes and needs exactly K of everybody."""
    method, seen = reid().train(), some_features(len(people))
    seeing(method, monkeypatch, seen)
    method.begin("finetune")
    found = method.losses(batch_of(people), "finetune")
    expected = sum(hardest(feature, people) for feature in (seen.previous, seen.hidden, seen.proj))
    assert found["triplet"].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert all(torch.isfinite(value) for value in found.values())


def test_a_batch_of_one_image_has_losses_and_a_gradient(batch):
    method = reid().train()
    alone = Batch(image=batch.image[:1], person=batch.person[:1])
    found = method.losses(alone, "finetune")
    assert all(torch.isfinite(value) for value in found.values()) and found["triplet"].item() == 0
    method.objective(found).backward()


@pytest.mark.covers(214, 222)
def test_the_image_to_text_loss_is_a_smoothed_choice_among_all_people_by_raw_dot_products(monkeypatch):
    method, people = reid(weights={"id": 0, "triplet": 0}), [5, 0, 5, 2]
    seen = some_features(4)
    seeing(method, monkeypatch, seen)
    method.begin("finetune")
    texts = method.prompt_features(torch.arange(6)).detach()
    found = method.losses(batch_of(people), "finetune")
    scores = [[float(image @ text) for text in texts] for image in seen.proj]
    expected = sum(smoothed(row, own) for row, own in zip(scores, people, strict=True)) / 4
    assert set(found) == {"i2t"} and found["i2t"].item() == pytest.approx(expected, rel=1e-5)
    # One direction only: a choice among images for each text would be another number.
    other = functional.cross_entropy(texts[people] @ seen.proj.T, torch.arange(4))
    assert abs(other.item() - expected) > 0.01
    plain = reid(weights={"id": 0, "triplet": 0}, smoothing=0.0, i2t={"normalize": True, "temperature": 0.07})
    seeing(plain, monkeypatch, seen)
    cosine = functional.normalize(seen.proj, dim=1) @ functional.normalize(texts, dim=1).T / 0.07
    by_cosine = functional.cross_entropy(cosine, torch.tensor(people))
    torch.testing.assert_close(plain.losses(batch_of(people), "finetune")["i2t"], by_cosine)


@pytest.mark.covers(214, 222)
def test_the_objective_is_a_quarter_of_the_identity_loss_and_the_others_whole(batch):
    method = reid().train()
    found = method.losses(batch, "finetune")
    assert method.current_weights("finetune") == {"id": 0.25, "triplet": 1.0, "i2t": 1.0}
    assert method.current_weights("prompt-stage") == {"con": 1.0}
    assert set(found) == {"id", "triplet", "i2t"}
    by_hand = 0.25 * found["id"] + found["triplet"] + found["i2t"]
    torch.testing.assert_close(method.objective(found), by_hand)


@pytest.mark.covers(222)
def test_the_three_features_are_the_class_token_before_and_after_the_last_block_and_projected(batch):
    method = reid()
    tower = method.backbone.image.visual
    kept = []
    tower.transformer.resblocks[-1].ln_1.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    with torch.no_grad():
        seen = method.see(batch)
        whole = tower.transformer.resblocks[-1](kept[0])
        assert torch.equal(seen.previous, kept[0][:, 0])
        torch.testing.assert_close(seen.hidden, tower.ln_post(whole[:, 0]))
        torch.testing.assert_close(seen.proj, tower.ln_post(whole[:, 0]) @ tower.proj)


def test_texts_are_computed_once_when_stage_two_begins_and_are_fixed(batch, monkeypatch):
    method = reid().train()
    method.begin("finetune")
    before = method.losses(batch, "finetune")["i2t"].item()
    monkeypatch.setattr(method, "prompt_features", lambda *given: pytest.fail("the sentences were encoded again"))
    found = method.losses(batch, "finetune")
    assert found["i2t"].item() == pytest.approx(before, rel=1e-6)
    method.objective(found).backward()
    assert method.id_tokens.grad is None
    assert all(value.grad is None for value in method.backbone.text.parameters())


@pytest.mark.covers(213, 222)
def test_stage_two_trains_image_encoder_heads_and_cameras_and_never_the_text_side():
    method = with_cameras()
    build_optimizer(method, "finetune", TrainConfig())
    trained = {name for name, value in method.named_parameters() if value.requires_grad}
    expected = {name for name, _ in method.named_parameters() if name.startswith(("backbone.image.", "necks.0."))}
    assert trained == (expected | {"camera_vectors"}) - {"necks.0.hidden.norm.bias", "necks.0.proj.norm.bias"}
    optimizer = build_optimizer(method, "prompt-stage", PromptConfig())
    assert [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]] == [(6, 2, 32)]
    assert [name for name, value in method.named_parameters() if value.requires_grad] == ["id_tokens"]


@pytest.mark.parametrize("stage", ["prompt-stage", "finetune"])
def test_nothing_says_on_which_device_to_compute(stage):
    """What the published code puts on "cuda". A tensor made without the batch's device would lie on `meta` here."""
    method = with_cameras().train()
    camera = torch.tensor([0, 1, -1, 2, 0, 1])
    given = replace(batch_of([0, 0, 1, 1, 4, 4]), camera=camera)
    text = Batch(texts={"full": method.backbone.tokenize(["a tall man"])})
    with torch.device("meta"):
        method.begin(stage)
        method.objective(method.losses(given, stage)).backward()
        made = [*method.embed_tasks(replace(given, camera=None)).values(), method.embed_texts(text)]
    assert all(value.device.type == "cpu" for value in made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("stage", ["prompt-stage", "finetune"])
def test_a_gpu_gives_the_losses_of_the_cpu(batch, stage):
    found = []
    for device in ("cpu", "cuda"):
        method = with_cameras().to(device).train()
        method.begin(stage)
        found.append({n: v.item() for n, v in method.losses(batch.to(device), stage).items()})
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# Side information and overlapping patches


@pytest.mark.covers(222)
@pytest.mark.parametrize("coefficient", [1.0, 3.0])
def test_a_camera_s_vector_times_the_coefficient_is_added_to_the_class_token_alone(batch, coefficient):
    method = with_cameras(coefficient=coefficient)
    camera = torch.tensor([2, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    plain = reid()
    weights = {name: value for name, value in method.state_dict().items() if name != "camera_vectors"}
    plain.load_state_dict(weights)
    token = plain.backbone.image.class_token
    with torch.no_grad():
        torch.nn.init.normal_(method.camera_vectors)
        found = method.see(replace(batch, camera=camera))
        without = plain.see(batch)
        start = token.clone()
        for row in range(12):
            token.copy_(start + coefficient * method.camera_vectors[camera[row]])
            expected = plain.look(batch.image[row : row + 1])
            for name in ("previous", "hidden", "proj"):
                torch.testing.assert_close(getattr(found, name)[row], getattr(expected, name)[0], atol=1e-5, rtol=1e-4)
        assert (found.proj - without.proj).abs().max() > 0.01


def test_an_unknown_camera_has_the_mean_of_all_and_no_batch_of_cameras_is_all_unknown(batch):
    method = with_cameras()
    with torch.no_grad():
        torch.nn.init.normal_(method.camera_vectors)
        known = torch.tensor([0, -1] * 6)
        found = method.see(replace(batch, camera=known))
        mean = method.camera_vectors.mean(dim=0)
        expected = method.look(batch.image, torch.stack([method.camera_vectors[0], mean] * 6))
        torch.testing.assert_close(found.proj, expected.proj)
        nobody = method.see(replace(batch, camera=None))
        torch.testing.assert_close(nobody.proj, method.look(batch.image, mean.expand(12, -1)).proj)


def test_a_gradient_reaches_the_cameras_of_the_batch_alone(batch):
    method = with_cameras(("a/0", "a/1", "b/0", "b/1")).train()
    given = replace(batch, camera=torch.tensor([3, 1] * 6))
    method.objective(method.losses(given, "finetune")).backward()
    reached = method.camera_vectors.grad.abs().amax(dim=1)
    assert (reached[[1, 3]] > 0).all() and not reached[[0, 2]].any()
    assert method.camera_vectors.shape == (4, method.backbone.width_image)


def test_stage_one_knows_no_cameras(batch):
    method = with_cameras()
    with torch.no_grad():
        torch.nn.init.normal_(method.camera_vectors)
        kept = method.frozen_features(replace(batch, camera=torch.zeros(12, dtype=torch.long)))["image"]
    assert torch.equal(kept, method.backbone.encode_image(batch.image).cls[:, 0])
    assert "camera_vectors" not in method.prompt_state()


def test_the_gallery_is_embedded_with_its_cameras(folder):
    method, corpus = with_cameras(), corpus_of(folder)
    with torch.no_grad():
        torch.nn.init.normal_(method.camera_vectors)
    made = embed_gallery_tasks(method, corpus, device=CPU)
    by_hand = training_batch(method, folder, range(18))
    # c0 to c2 are cameras 0 to 2.
    by_hand = replace(by_hand, camera=torch.tensor([0, 1, 2] * 6))
    with torch.no_grad():
        for task, vectors in method.embed_tasks(by_hand).items():
            assert made[task] == pytest.approx(vectors.numpy(), abs=1e-5)
    corpus.images["camera_id"] = ["c1", None, "elsewhere"] * 6
    moved = embed_gallery_tasks(method, corpus, device=CPU)["i2i"]
    unknown = replace(by_hand, camera=torch.tensor([1, -1, -1] * 6))
    with torch.no_grad():
        assert moved == pytest.approx(method.embed_tasks(unknown)["i2i"].numpy(), abs=1e-5)
    assert np.abs(moved - made["i2i"]).max() > 1e-3


def test_cameras_are_saved_with_the_model_and_matter_after_loading(batch, tmp_path):
    method = with_cameras(("x/1", "x/7"), coefficient=2.0)
    given = replace(batch, camera=torch.tensor([0, 1, -1] * 4))
    save_method(method, tmp_path)
    back = load_method(tmp_path)
    assert back.cameras == method.cameras == ("x/1", "x/7") and back.roster == method.roster
    with torch.no_grad():
        assert torch.equal(method.embed_tasks(given)["i2i"], back.embed_tasks(given)["i2i"])
        other = replace(given, camera=torch.tensor([1, 0, -1] * 4))
        assert not torch.equal(back.embed_tasks(other)["i2i"], back.embed_tasks(given)["i2i"])


def test_side_information_needs_cameras_and_is_off_as_published():
    with pytest.raises(UsageError, match=r"method\.sie\.camera.*names its camera.*sie\.camera=false"):
        reid(sie={"camera": True})
    assert reid().cameras == () and not hasattr(reid(), "camera_vectors")
    assert (ClipReidConfig().sie.camera, ClipReidConfig().sie.coefficient) == (False, 1.0)


@pytest.mark.covers(222)
def test_a_step_of_12_pixels_makes_the_patches_overlap(tmp_path):
    backbone = build("clip:micro", image_size=(256, 128), stride=12)
    assert backbone.grid == (21, 10)
    method = build_method("clip-reid", {"n_id_tokens": 2}, backbone, 3).eval()
    image = torch.randn(2, 3, 256, 128)
    with torch.no_grad():
        features = backbone.encode_image(image)
        assert features.patches.shape == (2, 210, 32)
        # Patch (r, c) sees the 16 x 16 pixels at 12 r, 12 c.
        visual = backbone.image.visual
        patches = visual.conv1(image)
        at = (visual.conv1.weight * image[0, :, 36:52, 84:100]).sum(dim=(1, 2, 3))
        torch.testing.assert_close(patches[0, :, 3, 7], at, atol=1e-4, rtol=1e-4)
        save_method(method, tmp_path)
        assert torch.equal(
            load_method(tmp_path).embed_images(Batch(image=image)), method.embed_images(Batch(image=image))
        )


# Retrieval


@pytest.mark.covers(222)
def test_images_are_compared_by_hidden_and_projected_feature_joined_before_the_norm(batch):
    method = reid()
    with torch.no_grad():
        seen, found = method.see(batch), method.embed_tasks(batch)
        joined = torch.cat([seen.hidden, seen.proj], dim=1)
        torch.testing.assert_close(found["i2i"], joined / joined.norm(dim=1, keepdim=True))
        torch.testing.assert_close(found["t2i"], seen.proj / seen.proj.norm(dim=1, keepdim=True))
        assert torch.equal(method.embed_images(batch), found["t2i"])
        assert found["i2i"].shape == (12, 64) and method.tasks == ("t2i", "i2i")
        assert torch.equal(method.features(batch)["i2i"], found["i2i"])
        # Joining unit vectors would weigh the two alike, whatever their lengths.
        apart = torch.cat([functional.normalize(seen.hidden, dim=1), functional.normalize(seen.proj, dim=1)], dim=1)
        assert (functional.normalize(apart, dim=1) - found["i2i"]).abs().max() > 0.01


def test_the_feature_may_be_the_projected_one_or_the_one_behind_the_norms(batch):
    with torch.no_grad():
        seen = reid().see(batch)
        projected = reid(i2i_feature="proj").embed_tasks(batch)["i2i"]
        torch.testing.assert_close(projected, functional.normalize(seen.proj, dim=1))
        method = reid(i2i_feature="bn")
        method.necks[0]["hidden"].norm.running_mean += 1.0
        method.necks[0]["proj"].norm.running_var *= 4.0
        normed = torch.cat([(seen.hidden - 1.0) / (1 + 1e-5) ** 0.5, seen.proj / (4 + 1e-5) ** 0.5], dim=1)
        torch.testing.assert_close(method.embed_tasks(batch)["i2i"], functional.normalize(normed, dim=1))


# The published settings (peers.md 2.8)


@pytest.mark.covers(222)
def test_the_recipe_has_the_published_numbers():
    recipe = load_recipe("clip-reid")
    assert recipe["method"] == {"name": "clip-reid"}
    checked = building.check(building.resolve({}, "clip-reid"))
    assert checked.towers.spec == "clip:ViT-B-16/openai" and checked.towers.image_size == (256, 128)
    assert checked.towers.pixel_statistics == "half" and checked.towers.stride is None
    first, second, method = checked.prompts, checked.training, checked.method
    assert (first.optimizer, first.epochs, first.batch, first.sampler) == ("adam", 120, 64, "random")
    assert (first.lr_prompt, first.weight_decay, first.warmup_epochs) == (3.5e-4, 1e-4, 5)
    assert (second.optimizer, second.epochs, second.batch, second.instances) == ("adam", 60, 64, 4)
    assert (second.lr, second.lr_new, second.bias_lr_factor, second.weight_decay) == (5e-6, 5e-6, 2.0, 1e-4)
    assert (second.warmup_epochs, second.warmup_factor, second.milestones, second.gamma) == (10, 0.1, (30, 50), 0.1)
    assert second.sampler == "identity" and second.augment.recipe == "clip-reid"
    assert first.clip_grad_norm is None and second.clip_grad_norm is None
    assert (method.smoothing, method.triplet.margin, method.i2i_feature) == (0.1, 0.3, "concat")
    assert not (method.triplet.squared or method.triplet.normalize or method.con.normalize or method.i2t.normalize)
    assert method.triplet.mining == "batch_hard" and (method.con.temperature, method.i2t.temperature) == (1.0, 1.0)
    assert method.weights == {} and dict(ClipReid.loss_weights) == {"con": 1.0, "id": 0.25, "triplet": 1.0, "i2t": 1.0}


@pytest.mark.covers(222)
def test_the_learning_rates_of_every_epoch_are_those_of_the_published_schedules():
    recipe = load_recipe("clip-reid")
    first = parse_section(PromptConfig, recipe["prompt"], "prompt")
    second = parse_section(TrainConfig, recipe["train"], "train")
    # timm's cosine, called with epochs from 1: linear from 1e-5 over 5 epochs, then the cosine of all 120 to 1e-6.
    for epoch in range(1, 121):
        rate = 1e-5 + epoch * (3.5e-4 - 1e-5) / 5
        if epoch >= 5:
            rate = 1e-6 + 0.5 * (3.5e-4 - 1e-6) * (1 + math.cos(math.pi * epoch / 120))
        assert first.lr_prompt * learning_rate_factor(first, epoch - 1) == pytest.approx(rate, rel=1e-8), epoch
    # Stage 2: from a tenth over 10 epochs, a tenth of it from 30 on, a hundredth from 50 on.
    for epoch in range(1, 61):
        rate = 5e-6 * (0.1 + 0.9 * epoch / 10 if epoch < 10 else 1.0) * 0.1 ** ((epoch >= 30) + (epoch >= 50))
        assert second.lr * learning_rate_factor(second, epoch - 1) == pytest.approx(rate, rel=1e-9), epoch


@pytest.mark.covers(222)
def test_biases_learn_twice_as_fast_and_everything_decays():
    method = with_cameras()
    recipe = load_recipe("clip-reid")
    second = build_optimizer(method, "finetune", parse_section(TrainConfig, recipe["train"], "train"))
    name_of = {id(value): name for name, value in method.named_parameters()}
    for group in second.param_groups:
        for value in group["params"]:
            bias = name_of[id(value)].endswith("bias")
            assert group["lr"] == pytest.approx(1e-5 if bias else 5e-6), name_of[id(value)]
            assert group["weight_decay"] == 1e-4
    first = build_optimizer(method, "prompt-stage", parse_section(PromptConfig, recipe["prompt"], "prompt"))
    assert [(group["lr"], group["weight_decay"]) for group in first.param_groups] == [(3.5e-4, 1e-4)]
    assert type(first) is type(second) is torch.optim.Adam


def test_stage_one_is_asked_for_again_only_when_what_it_reads_has_changed():
    plain = ClipReidConfig()
    for change in ({"weights": {"id": 2.0}}, {"smoothing": 0.0}, {"i2i_feature": "bn"}, {"sie": {"camera": True}}):
        assert ClipReidConfig(**change).prompt_settings() == plain.prompt_settings(), change
    for change in ({"weights": {"con": 2.0}}, {"n_id_tokens": 3}, {"template": "{id}"}, {"con": {"temperature": 0.1}}):
        assert ClipReidConfig(**change).prompt_settings() != plain.prompt_settings(), change
