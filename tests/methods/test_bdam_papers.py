"""What the two papers print, echoed by the recipes, and the traps that a trained model must not fall into."""

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_bdam import bdam
from methods.test_method_contract import CPU, training_batch
from PIL import Image

from reidctl.augment import AugmentConfig
from reidctl.backbones.weights import build
from reidctl.config import load_recipe, parse_section
from reidctl.data import TrainingSet
from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import UsageError
from reidctl.evaluation.pairwise import score_pairs
from reidctl.methods.base import build_method
from reidctl.methods.bdam import BdamConfig
from reidctl.training.config import TrainConfig
from reidctl.training.optimizer import build_optimizer


def settings(recipe):
    read = load_recipe(recipe)
    method = {key: value for key, value in read["method"].items() if key != "name"}
    return parse_section(BdamConfig, method, "method"), parse_section(TrainConfig, read["train"], "train"), read


@pytest.mark.covers(146, 148)
@pytest.mark.parametrize("recipe", ["bdam", "bdam-icme", "bdam-long"])
def test_the_recipes_have_the_solver_that_both_papers_print(recipe):
    method, train, read = settings(recipe)
    assert (train.optimizer, train.lr, train.lr_new, train.weight_decay) == ("adam", 1e-4, 1e-4, 1e-3)
    assert (train.schedule, train.warmup_epochs, train.bias_lr_factor) == ("cosine", 0, 1.0)
    assert (train.epochs, train.batch, train.instances, train.sampler) == (60, 64, 4, "identity")
    assert train.lr_text == (2e-5 if recipe == "bdam" else None), "literal: one rate for all"
    assert train.select == "val" and read.get("seed", 0) == 0
    assert method.dropout == method.fusion.dropout == 0.1
    assert (method.depth, method.heads, method.mlp_ratio) == (6, 12, 4) and method.gate
    assert method.cross_attention == "after"
    assert (method.fusion.width, method.fusion.kind, method.fusion.layers) == (256, "mamba", None)
    assert not method.fusion.prenorm
    assert read["backbone"]["image_size"] == [224, 224] and read["backbone"]["spec"].endswith("+bert-base-uncased")
    balance = method.gradnorm
    assert (balance.coef, balance.exponent, balance.lr, balance.clip) == (1.5, 1.0, 0.025, (1e-4, 10.0))
    assert (balance.weight_reg, balance.warm_steps, balance.layer, method.freeze) == (1e-3, 10, "last_mlp", ())


@pytest.mark.covers(121, 139, 143, 146)
def test_the_paper_recipes_differ_where_the_papers_do_and_ours_where_it_says_so():
    icme, long, ours = (settings(name)[0] for name in ("bdam-icme", "bdam-long", "bdam"))
    assert (icme.clothing_loss, long.clothing_loss, ours.clothing_loss) == (("aln",), ("adv",), ("aln", "grl"))
    assert (icme.protocol, long.protocol, ours.protocol) == ("image_only", "visual", "image_only")
    assert long.p_pos == "softmax" and ours.target == icme.target == long.target == "mix"
    for paper in (icme, long):
        assert (paper.fusion.sequence, paper.hsic.normalize, paper.info_nce.direction) == ("vector", "none", "v2t")
        assert (paper.gradnorm.ref, paper.gradnorm.targets) == ("first", "literal")
        assert paper.triplet.squared and not paper.triplet.normalize and paper.triplet.mining == "batch_hard"
    assert (ours.fusion.sequence, ours.hsic.normalize, ours.info_nce.direction) == ("tokens", "l2", "both")
    for one in (icme, long, ours):
        assert (one.triplet.margin, one.info_nce.temperature, one.info_nce.positives) == (0.3, 0.05, "id")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("papers") / "blocks", people=6)


@pytest.mark.covers(41, 225)
@pytest.mark.parametrize("protocol", ["image_only", "own_text", "visual", "pairwise"])
def test_clip_towers_train_with_their_end_token_and_refuse_their_first(folder, protocol):
    torch.manual_seed(0)
    given = {"depth": 1, "heads": 2, "fusion": {"width": 16, "out_dim": 16}, "protocol": protocol}
    with pytest.raises(UsageError, match=r"method\.text_pool=end"):
        build_method("bdam", given, build("clip:micro"), 6)
    method = build_method("bdam", {**given, "text_pool": "end"}, build("clip:micro"), 6)
    batch = training_batch(method, folder)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    steps(method, batch, 2)
    moved = [name for name, value in method.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("backbone.image", "backbone.text", "decoupling", "fusion", "critic"):
        assert any(name.startswith(part) for name in moved), part
    image, text = method.eval().embed_images(batch), method.embed_texts(batch)
    assert image.shape == text.shape and torch.isfinite(image).all()


def steps(method, batch, count, rate=3e-3):
    method.train()
    optimizer = build_optimizer(method, "finetune", TrainConfig(lr=rate, lr_new=rate))
    torch.manual_seed(0)
    for _ in range(count):
        found = method.losses(batch, "finetune")
        optimizer.zero_grad(set_to_none=True)
        method.objective(found).backward()
        optimizer.step()
    return found


def noise(corpus, folder, seed):
    """The same people and texts, every picture replaced by noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for path in corpus.paths():
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(folder / path.name)
    images = corpus.images.assign(path=[path.name for path in corpus.paths()])
    return type(corpus)(images, corpus.captions, corpus.identity, corpus.clothing, folder)


def batch_of(method, corpus):
    backbone = method.backbone
    samples = TrainingSet(
        corpus, size=backbone.image_size, mean=backbone.mean, std=backbone.std, tokenize=backbone.tokenize,
        texts=method.train_texts, target=method.target_text, augment=AugmentConfig(flip=0, pad=0, erase=0),
    )  # fmt: skip
    return samples.collate([samples[(0, row, row)] for row in range(len(samples))])


def first_hits(scores, corpus):
    """Places (0-based) of the first right image, all queries."""
    people = corpus.images["person_id"].to_numpy()
    order = np.argsort(-scores, axis=1, kind="stable")
    return (people[order] == people[corpus.captions["row"]][:, None]).argmax(axis=1)


@pytest.mark.covers(142, 143)
@pytest.mark.parametrize("protocol", ["image_only", "visual", "pairwise"])
def test_training_on_noise_images_fits_them_and_leaves_others_at_chance(folder, tmp_path, protocol):
    """A model that copies text into the gallery would find people behind any picture, and noise makes it learn to."""
    corpus = corpus_of(folder)
    seen, *unseen = (noise(corpus, tmp_path / str(seed), seed) for seed in range(5))
    method = bdam(protocol=protocol, decouple=False, gradnorm=None, target="caption", weights={"triplet": 0.0},
                  fusion={"sequence": "vector", "width": 64, "out_dim": 64, "dropout": 0.0})  # fmt: skip
    steps(method, batch_of(method, seen), 90 if protocol == "pairwise" else 40)
    method.eval()
    query = embed_queries(method, list(corpus.captions["text"]), device=CPU)
    sentences, everything = [str(text) for text in corpus.captions["text"]], np.tile(np.arange(18), (18, 1))
    scorers = [lambda part: query @ embed_gallery(method, part, device=CPU).T]
    if protocol == "pairwise":
        scorers.append(lambda part: score_pairs(method, part.paths(), sentences, everything, device=CPU))
    people = corpus.images["person_id"].to_numpy()
    same = people[corpus.captions["row"]][:, None] == people
    for scores in scorers:
        fitted = scores(seen)
        assert fitted[same].mean() > fitted[~same].mean() + 0.3, "it did learn"
        # 18 images, 3 per person: the first hit of a random order is expected near place 3.75 (0-based).
        assert 2 < np.mean([first_hits(scores(part), corpus) for part in unseen]) < 6
