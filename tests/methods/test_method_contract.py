"""What every method must do, on a tiny model: one test file, all names."""

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset

from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.batch import Batch
from reidctl.data import TrainingSet
from reidctl.device import resolve_device
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import UsageError
from reidctl.methods.base import build_method, load_method, method_names, save_method

SETTINGS = {
    "clip": ("clip:micro", {}),
    "irra": ("clip:micro", {"mlm_layers": 1}),
    "bdam": ("vit-bert:micro", {"depth": 1, "heads": 2, "fusion": {"width": 16, "out_dim": 16, "sequence": "tokens"}}),
    "hpl": ("clip:micro", {"inversion": {"layers": 1, "heads": 2}, "n_id_tokens": 2, "n_inst_tokens": 2}),
    "clip-reid": ("clip:micro", {"n_id_tokens": 2}),
    "interpart": ("clip:micro", {}),
    "rde": ("clip:micro", {"width": 32}),
    "mta-clip": ("clip:micro", {"n_id_tokens": 2, "sga": {"groups": 4, "gamma_init": 0.1}, "unfreeze_blocks": "all"}),
}
CPU = resolve_device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("contract") / "blocks", people=6)


def model(name, **changes):
    torch.manual_seed(0)
    spec, settings = SETTINGS[name]
    return build_method(name, {**settings, **changes}, build(spec), 6).eval()


def training_batch(method, folder, rows=range(12)):
    backbone, corpus = method.backbone, corpus_of(folder)
    samples = TrainingSet(
        corpus,
        size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        tokenize=backbone.tokenize,
        # Those that learn from images alone still embed texts.
        texts=("full",) if method.name in ("clip-reid", "mta-clip") else method.train_texts,
        target=method.target_text,
        augment=AugmentConfig(flip=0, pad=0, erase=0),
        phrases=method.phrase_table(list(corpus.captions["text"])) if method.reads_phrases else None,
    )
    return samples.collate([samples[(0, row, row)] for row in rows])


def test_every_method_is_tested_here():
    assert set(SETTINGS) == set(method_names())


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_finite_and_every_one_reaches_a_parameter(name, folder):
    method = model(name).train()
    batch = training_batch(method, folder)
    found = method.losses(batch, "finetune")
    assert set(found) == set(method.current_weights())
    for loss, value in found.items():
        assert torch.isfinite(value), loss
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads) or value.item() == 0, loss


@pytest.mark.covers(39, 145)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_objective_is_the_weighted_sum_of_the_losses(name, folder):
    method = model(name).train()
    found = method.losses(training_batch(method, folder), "finetune")
    expected = sum(method.current_weights()[loss] * value for loss, value in found.items())
    assert torch.allclose(method.objective(found), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_embeddings_are_unit_vectors_of_one_width(name, folder):
    method = model(name)
    batch = training_batch(method, folder)
    with torch.no_grad():
        image, text = method.embed_images(batch), method.embed_texts(batch)
    assert image.shape == text.shape and image.dtype == torch.float32
    for features in (image, text):
        assert torch.allclose(features.norm(dim=1), torch.ones(len(batch)), atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_embedding_of_an_item_does_not_depend_on_the_others(name, folder):
    method = model(name)
    batch = training_batch(method, folder)
    order = torch.tensor([3, 0, 2, 1])
    with torch.no_grad():
        whole = method.embed_images(Batch(image=batch.image[:4], texts=batch.texts))
        shuffled = method.embed_images(Batch(image=batch.image[order]))
        alone = method.embed_images(Batch(image=batch.image[2:3]))
        text = method.embed_texts(batch)
        text_alone = method.embed_texts(Batch(texts={"full": batch.texts["full"][slice(5, 6)]}))
    assert torch.allclose(whole[order], shuffled, atol=1e-6)
    assert torch.allclose(whole[2:3], alone, atol=1e-6)
    assert torch.allclose(text[5:6], text_alone, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_named_features_start_with_the_embedding_and_hold_one_finite_row_per_image(name, folder):
    method = model(name)
    batch = training_batch(method, folder, range(5))
    images_only = Batch(image=batch.image)
    with torch.no_grad():
        found = method.features(batch)
        alone = method.features(images_only)
        assert next(iter(found)) == "embedding" and torch.equal(found["embedding"], method.embed_images(batch))
    for feature, value in found.items():
        assert value.shape[0] == 5 and value.ndim == 2 and value.dtype == torch.float32, feature
        assert torch.isfinite(value).all(), feature
        assert torch.equal(value, alone[feature]), "the texts of the batch must not be read"


@pytest.mark.covers(142)
@pytest.mark.parametrize("name", SETTINGS)
def test_gallery_embeddings_are_bit_identical_when_the_queries_change(name, folder):
    method, corpus = model(name), corpus_of(folder)
    before = embed_gallery(method, corpus, device=CPU)
    corpus.captions["text"] = ["another text entirely"] * len(corpus.captions)
    embed_queries(method, list(corpus.captions["text"]), device=CPU)
    assert np.array_equal(before, embed_gallery(method, corpus, device=CPU))


@pytest.mark.covers(142)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_gallery_of_noise_images_scores_chance(name, folder, tmp_path):
    """If the query could be read from the gallery side, noise would still be found."""
    method, corpus = model(name), corpus_of(folder)
    rng = np.random.default_rng(0)
    from PIL import Image

    for path in corpus.paths():
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(tmp_path / path.name)
    noise = type(corpus)(
        corpus.images.assign(path=[path.name for path in corpus.paths()]),
        corpus.captions,
        corpus.identity,
        corpus.clothing,
        tmp_path,
    )
    gallery = embed_gallery(method, noise, device=CPU)
    query = embed_queries(method, list(corpus.captions["text"]), device=CPU)
    people = corpus.images["person_id"].to_numpy()
    ranks = np.argsort(-query @ gallery.T, axis=1)
    own = (people[ranks] == people[corpus.captions["row"]][:, None]).argmax(axis=1)
    # 18 images, 3 per person: the first hit of a random order is expected near place 3.75 (0-based).
    assert 2 < own.mean() < 7


@pytest.mark.covers(225)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_model_comes_back_bit_for_bit_without_its_first_weights(name, folder, tmp_path):
    method = model(name)
    batch = training_batch(method, folder)
    save_method(method, tmp_path)
    back = load_method(tmp_path)
    with torch.no_grad():
        assert torch.equal(method.embed_images(batch), back.embed_images(batch))
        assert torch.equal(method.embed_texts(batch), back.embed_texts(batch))
    assert back.config == method.config and not back.training


@pytest.mark.covers(180)
@pytest.mark.parametrize("explainer", ["gradcam", "patch"])
@pytest.mark.parametrize("name", SETTINGS)
def test_explanations_are_maps_on_the_patch_grid_in_0_to_1_and_deterministic(name, explainer, folder):
    method = model(name)
    batch = training_batch(method, folder, range(4))
    first = method.explain(batch, explainer)
    assert first.shape == (4, *method.backbone.grid)
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, method.explain(batch, explainer))
    assert all(parameter.grad is None for parameter in method.parameters())


def test_an_unknown_explainer_or_loss_weight_is_refused_by_name(folder):
    with pytest.raises(UsageError, match="gradcam"):
        model("clip").explain(training_batch(model("clip"), folder, range(2)), "tea-leaves")
    with pytest.raises(UsageError, match=r"no loss `sdn`.*sdm"):
        model("irra", weights={"sdn": 1.0})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_of_weight_zero_is_not_computed(name, folder):
    first = next(iter(model(name).loss_weights))
    method = model(name, weights={first: 0.0}).train()
    if name == "clip":
        return  # its only loss
    assert first not in method.losses(training_batch(method, folder), "finetune")


PAIRED = {"bdam": {"protocol": "pairwise"}, "interpart": {}}


@pytest.mark.covers(143)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_method_scores_pairs_one_by_one_or_says_which_training_makes_a_head(name, folder):
    method = model(name, **PAIRED.get(name, {}))
    batch = training_batch(method, folder, range(6))
    if name not in PAIRED:
        assert not method.scores_pairs
        for call in (lambda: method.encode_pair_images(batch), lambda: method.encode_pair_texts(batch)):
            with pytest.raises(UsageError, match=r"no match head.*method\.protocol=pairwise"):
                call()
        return
    assert method.scores_pairs
    with torch.no_grad():
        images = method.encode_pair_images(Batch(image=batch.image))
        texts = method.encode_pair_texts(Batch(texts={"full": batch.texts["full"]}, phrases=batch.phrases))
        image, text = torch.tensor([0, 5, 2, 2]), torch.tensor([1, 1, 0, 4])
        scores = method.pair_scores(images[image], texts[text])
        assert scores.shape == (4,) and scores.dtype == torch.float32 and len(set(scores.tolist())) == 4
        for place in range(4):
            one = slice(place, place + 1)
            alone = method.pair_scores(images[image[one]], texts[text[one]])
            assert torch.allclose(alone, scores[one], atol=1e-5)


def test_every_protocol_that_scores_pairs_is_tested_here():
    assert {name for name in SETTINGS if model(name, **PAIRED.get(name, {})).scores_pairs} == set(PAIRED)
