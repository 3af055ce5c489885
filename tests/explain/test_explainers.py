"""Explainers on a tower whose attention is planted, so that every answer is known; then on every method."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from methods.test_method_contract import SETTINGS, model
from torch import Tensor, nn
from torch.nn import functional

from reidctl.backbones.base import ImageFeatures, ImageTower
from reidctl.batch import Batch, PhraseSets, Tokens
from reidctl.errors import UsageError
from reidctl.explain.explainers import (
    EXPLAINERS,
    Asked,
    applies,
    check_explainer,
    explainer,
    relevance,
    relevance_of,
)
from reidctl.explain.maps import Phrase, ask, explain_phrases
from reidctl.methods.base import Method, MethodConfig, method_names, unit
from reidctl.parts import Parts
from reidctl.pixels import PixelStore

GRID, N, D = (2, 2), 4, 5
COAT, TROUSERS, SHOES, WALL, NOTHING = torch.eye(D)
"""What a patch shows; nobody shows NOTHING."""
IMAGE = torch.stack([COAT, TROUSERS, COAT, WALL])


class Block(nn.Module):
    """Mixes tokens by attention that does not depend on them."""

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.attention = nn.Parameter(attention)
        self.ln_1 = nn.Identity()


class Planted(ImageTower):
    """One class token that shows nothing and four patches; each block replaces tokens by their mixtures."""

    def __init__(self, *attention: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(each) for each in attention)
        self.grid, self.image_size, self.patch_size, self.width = GRID, (2, 2), (1, 1), D

    @property
    def blocks(self):
        return list(self.layers)

    @property
    def class_token(self):
        return torch.zeros(D)

    @property
    def last_norm(self):
        return self.blocks[-1].ln_1

    @property
    def tail(self):
        return []

    @property
    def last_mlp_weight(self):
        return self.blocks[-1].attention

    def project(self, hidden):
        return hidden

    def run_block(self, block, tokens, mask, attention, alike=None, classes=0):
        looks = block.attention.expand(len(tokens), 1, -1, -1)
        return looks[:, 0] @ block.ln_1(tokens), looks if attention else None

    def encode(self, images, **options):
        """Images are (B, D, 2, 2) here: every pixel is a patch."""
        patches = images.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), 1, -1), patches], dim=1)
        out, previous, maps = self.run_blocks(tokens, None, options.get("attention", False), classes=1)
        # The patches stay what they show, so that `patch` and `slots` have a known answer too.
        return ImageFeatures(out[:, :1], patches, GRID, out[:, :1], out[:, 1:], previous[:, :1], maps)


class Backbone(nn.Module):
    def __init__(self, tower: Planted) -> None:
        super().__init__()
        self.image, self.grid, self.dim = tower, GRID, D

    def encode_image(self, images, **options):
        return self.image.encode(images, **options)


class Toy(Method):
    """A text is the number of what it names."""

    name, summary = "toy", "a toy"
    shares = (1.0, 0.0)

    @property
    def reads_out(self):
        return self.shares

    def encode(self, batch, stage):
        return Parts({})

    def losses_of(self, parts, stage):
        return {}

    def embed_images(self, batch):
        seen = self.backbone.encode_image(batch.image)
        first, average = self.shares
        return unit(first * seen.cls[:, 0] + average * seen.hidden_patches.mean(dim=1))

    def embed_texts(self, batch):
        return torch.eye(D)[batch.texts["full"].ids[:, 0]]


class Mapped(Toy):
    """With a phrase-patch module whose answer is given."""

    given: Tensor

    def phrase_maps(self, batch):
        return self.given


def row(*values: float) -> Tensor:
    """Attention of which only the class token's row is of interest; patches look at themselves."""
    attention = torch.eye(1 + N)
    attention[0] = torch.tensor(values)
    return attention


LOOKS = row(0.1, 0.1, 0.2, 0.3, 0.3)


def toy(*attention: Tensor, kind=Toy) -> Toy:
    return kind(MethodConfig(), Backbone(Planted(*attention or (LOOKS,))), 1).eval()


def texts(*numbers: int) -> dict[str, Tokens]:
    ids = torch.tensor(numbers)[:, None]
    return {"full": Tokens(ids, torch.ones_like(ids, dtype=torch.bool))}


def pixels(*patches: Tensor) -> Tensor:
    return torch.stack(patches).transpose(1, 2).reshape(len(patches), D, *GRID)


def asked(*named: int, place=None, image=IMAGE) -> Asked:
    """One caption that names these things, one pair for each."""
    count = len(named)
    sets = PhraseSets(
        texts(*range(D))["full"], torch.tensor([named]), torch.arange(count)[None], torch.zeros(1, count, 2).long()
    )
    return Asked(
        Batch(image=pixels(*[image] * count), texts=texts(*named)),
        Batch(image=pixels(image), texts=texts(named[0]), phrases=sets),
        torch.zeros(count, dtype=torch.long),
        torch.arange(count) if place is None else torch.tensor(place),
        [f"pair {number}" for number in named],
    )


def found(method: Method, given: Asked, name: str) -> list[list[float]]:
    return relevance(method, given, name).flatten(1).tolist()


def near(*rows: list[float]) -> list:
    return [pytest.approx(values, abs=1e-5) for values in rows]


# Known answers


@pytest.mark.covers(181)
def test_patch_shows_where_the_phrase_is_seen():
    method = toy()
    expected = near([1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0])
    assert found(method, asked(0, 1, 2), "patch") == expected
    against = torch.stack([-COAT, TROUSERS + COAT, COAT, WALL])
    assert found(method, asked(0, image=against), "patch") == near([0, 0.5**0.5, 1, 0]), "negative cosines are cut"


@pytest.mark.covers(181)
def test_cls_is_the_class_token_s_row_of_the_last_block_whatever_the_phrase():
    method = toy(torch.full((5, 5), 0.2), LOOKS)
    assert found(method, asked(0, 1), "cls") == near([1 / 3, 2 / 3, 1, 1], [1 / 3, 2 / 3, 1, 1])


@pytest.mark.covers(181)
def test_cls_is_the_mean_of_the_heads():
    method = toy()
    tower = method.backbone.image
    two = torch.stack([row(0, 1, 0, 0, 0), row(0, 0, 0.5, 0, 0.5)])
    tower.run_block = lambda block, tokens, mask, attention, *more: (
        two.mean(dim=0) @ tokens,
        two.expand(len(tokens), -1, -1, -1),
    )
    assert found(method, asked(0), "cls") == near([1, 0.5, 0, 0.5])


@pytest.mark.covers(181)
def test_rollout_of_uniform_attention_is_flat_and_of_one_block_its_row():
    uniform = torch.full((5, 5), 0.2)
    assert found(toy(uniform, uniform, uniform), asked(0), "rollout") == near([1, 1, 1, 1])
    assert found(toy(LOOKS), asked(0), "rollout") == near([1 / 3, 2 / 3, 1, 1])


@pytest.mark.covers(181)
def test_rollout_follows_attention_through_the_blocks():
    """In the first block patch 3 reads patch 0; in the second the class token reads patch 3.

    (1/2 + A2/2)(1/2 + A1/2): from the class token a quarter stays at patch 3, a quarter comes from patch 0.
    """
    first, second = torch.eye(5), torch.eye(5)
    first[4] = torch.eye(5)[1]
    second[0] = torch.eye(5)[4]
    assert found(toy(first, second), asked(0), "rollout") == near([1, 0, 0, 1])
    assert found(toy(second, first), asked(0), "rollout") == near([0, 0, 0, 1]), "what comes later is not read"
    assert found(toy(first, second), asked(0), "cls") == near([0, 0, 0, 1])


@pytest.mark.covers(181)
def test_chefer_of_one_block_is_the_positive_part_of_gradient_times_attention():
    """v = sum_n a_n x_n = (.4, .2, 0, .3); d cos(v, e_k) / d a_n = (e_k - cos v/|v|).x_n / |v|."""
    method, v = toy(), torch.tensor([0.1 + 0.3, 0.2, 0, 0.3, 0])
    for number in (0, 1, 3):
        cosine = v[number] / v.norm()
        gradient = (IMAGE @ (torch.eye(D)[number] - cosine * v / v.norm())) / v.norm()
        expected = (gradient * LOOKS[0, 1:]).clamp_min(0)
        assert expected.max() > 0
        raw = explainer("chefer")(method, asked(number), 0)
        assert raw.tolist() == near(expected.tolist())
    assert found(method, asked(0, 1), "chefer") == near([1 / 3, 0, 1, 0], [0, 1, 0, 0])


@pytest.mark.covers(181)
def test_chefer_with_a_gradient_of_zero_names_nothing():
    """Nobody in the image shows shoes, so no attention could change how near it is to them."""
    assert found(toy(), asked(2), "chefer") == near([0, 0, 0, 0])
    flat = [torch.rand(2, 3, 5, 5)] * 2
    assert relevance_of(flat, [torch.zeros_like(each) for each in flat]).abs().max() == 0
    assert relevance_of(flat, [None, None]).abs().max() == 0


@pytest.mark.covers(181)
def test_chefer_s_rule_of_two_blocks_equals_the_product_by_hand():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(1, 2, 3, 3, generator=generator) for _ in range(2)]
    grads = [torch.randn(1, 2, 3, 3, generator=generator) for _ in range(2)]
    steps = []
    for attention, grad in zip(maps, grads, strict=True):
        step = np.zeros((3, 3))
        for head in range(2):
            step += np.maximum(0, grad[0, head].numpy() * attention[0, head].numpy()) / 2
        steps.append(step)
    by_hand = (np.eye(3) + steps[1]) @ (np.eye(3) + steps[0]) - np.eye(3)
    assert relevance_of(maps, grads)[0].numpy() == pytest.approx(by_hand, abs=1e-6)
    alone = relevance_of(maps[:1], grads[:1])[0].numpy()
    assert alone == pytest.approx(steps[0], abs=1e-6)
    assert relevance_of(maps, [grads[0], None])[0].numpy() == pytest.approx(steps[0], abs=1e-6)


@pytest.mark.covers(181)
def test_gradcam_is_gradient_times_activation_and_agrees_with_the_method():
    method, given = toy(), asked(0, 1, 2)
    v = torch.tensor([0.4, 0.2, 0, 0.3, 0])
    for number, values in enumerate(relevance(method, given, "gradcam")):
        towards = (torch.eye(D)[number] - v[number] / v.norm() * v / v.norm()) / v.norm()
        expected = (LOOKS[0, 1:, None] * towards * IMAGE).sum(dim=1).clamp_min(0)
        expected = expected / expected.max().clamp_min(1e-12)
        assert values.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert torch.equal(relevance(method, given, "gradcam"), method.explain(given.pairs, "gradcam"))
    assert torch.equal(relevance(method, given, "patch"), method.explain(given.pairs, "patch"))


@pytest.mark.covers(181, 182)
def test_slots_compete_and_one_phrase_takes_its_patches_from_the_other():
    method = toy()
    assert found(method, asked(0, 1), "slots") == near([1, 0, 1, 0], [0, 1, 0, 0])
    # Two phrases that are nearly alike: alone the second sees both patches, beside the first it keeps its own.
    bright = functional.normalize(COAT + 0.3 * TROUSERS, dim=0)
    image = torch.stack([COAT, bright, WALL, WALL])
    method.embed_texts = lambda batch: torch.stack([COAT, bright])[batch.texts["full"].ids[:, 0].clamp_max(1)]
    alone = relevance(method, asked(1, image=image), "slots").flatten(1)[0]
    together = relevance(method, asked(0, 1, image=image), "slots").flatten(1)
    assert alone[0] > 0.8 and alone[1] == 1
    assert together[1, 0] < 0.7 and together[1, 1] == 1 and together[0, 1] < 0.7 and together[0, 0] == 1
    assert together[:, 2:].max() < 0.1, "the walls fall to the average patch"


@pytest.mark.covers(181)
def test_the_centre_is_in_the_middle_and_random_maps_know_their_pair_and_nothing_else():
    method = toy()
    assert found(method, asked(0), "centre") == near([1, 1, 1, 1]), "in a grid of four all are as near"
    wide = SimpleNamespace(backbone=SimpleNamespace(grid=(3, 5)))
    centre = explainer("centre")(wide, asked(0), 0).view(3, 5)
    assert centre.argmax() == 7 and centre[1, 2] == 1
    assert torch.equal(centre, centre.flip(0)) and torch.equal(centre, centre.flip(1))
    corner = 1 - math.hypot(2 / 3, 4 / 5) / math.sqrt(2)
    assert centre[0, 0].item() == pytest.approx(corner, abs=1e-6) == centre.min().item()
    both, second = relevance(method, asked(0, 1), "random"), relevance(method, asked(1), "random")
    assert torch.equal(both[1], second[0]) and not torch.equal(both[0], both[1])
    assert not torch.equal(second, relevance(method, asked(1), "random", seed=1))


@pytest.mark.covers(180, 181)
def test_ppim_gives_each_phrase_its_map_and_a_caption_their_sum_weighted_by_how_well_they_fit():
    """The coat's map hits (cosine 1), the trousers' map misses (cosine 0): their shares are softmax(20, 0)."""
    method = toy(kind=Mapped)
    method.given = torch.tensor([[[0.5, 0, 0.5, 0], [0, 0, 0, 1.0], [0.2, 0.2, 0.2, 0.4]]])
    given = replace(asked(0, 1, place=[-1, 1]))
    given.captions.phrases.index.data = torch.tensor([[0, 1, -1]])
    maps = explainer("ppim")(method, given, 0)
    share = math.exp(20) / (math.exp(20) + 1)
    assert maps.tolist() == near([share / 2, 0, share / 2, 1 - share], [0, 0, 0, 1])
    method.given = torch.tensor([[[0.5, 0, 0.5, 0], [0, 1.0, 0, 0], [0.2, 0.2, 0.2, 0.4]]])
    assert explainer("ppim")(method, given, 0)[0].tolist() == pytest.approx([0.25, 0.5, 0.25, 0], abs=1e-6)


@pytest.mark.covers(181)
def test_where_the_image_vector_reads_patches_their_rows_count_by_its_shares():
    """A vector of which a quarter is the class token: a quarter of its row, three quarters of the average patch's."""
    attention = row(0.1, 0.1, 0.2, 0.3, 0.3)
    attention[1:] = 0
    attention[1:, 1] = 1  # all patches look at the first
    method = toy(attention)
    method.shares = (0.25, 0.75)
    expected = torch.tensor([0.025 + 0.75, 0.05, 0.075, 0.075])
    assert explainer("cls")(method, asked(0), 0)[0].tolist() == pytest.approx(expected.tolist())
    method.shares = (0.0, 1.0)
    assert explainer("cls")(method, asked(0), 0)[0].tolist() == pytest.approx([1, 0, 0, 0])


def test_relevance_is_divided_by_its_maximum_and_what_is_nothing_stays_nothing(monkeypatch):
    raw = torch.tensor([[0.0, 2.0, 4.0, -3.0], [0.0, 0, 0, 0]])
    monkeypatch.setitem(EXPLAINERS, "patch", lambda method, given, seed: raw)
    assert found(toy(), asked(0, 1), "patch") == near([0, 0.5, 1, 0], [0, 0, 0, 0])
    with pytest.raises(AssertionError, match="evaluation mode"):
        relevance(toy().train(), asked(0), "cls")


def test_unknown_explainers_and_a_module_that_is_not_there_are_refused_by_name():
    with pytest.raises(UsageError, match=r"Unknown explainer `tea-leaves`.*ppim, patch, cls, rollout, chefer"):
        check_explainer("tea-leaves", toy())
    with pytest.raises(UsageError, match=r"phrase-patch module of `interpart`; `toy` has none.*`patch`"):
        check_explainer("ppim", toy())
    with pytest.raises(UsageError, match="`toy` has none"):
        relevance(toy(), asked(0), "ppim")
    check_explainer("ppim", toy(kind=Mapped))
    assert [name for name in EXPLAINERS if not applies(name, toy())] == ["ppim"]


# Every method

SENTENCE = "A person wears a red shirt and red trousers."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(write_dataset(tmp_path_factory.mktemp("explainers") / "blocks", people=6))


def phrases(corpus) -> list[Phrase]:
    """Three captions: one as a whole with two phrases, one with one phrase, one that is its own phrase."""
    name = [str(image) for image in corpus.images["image_id"]]
    return [
        Phrase("one", name[0], SENTENCE, 0, len(SENTENCE), SENTENCE),
        Phrase("one", name[0], "red shirt", 17, 26, SENTENCE, "upper"),
        Phrase("one", name[0], "red trousers", 31, 43, SENTENCE, "lower"),
        Phrase("two", name[4], "green shirt", 17, 28, "A person wears a green shirt.", "upper"),
        Phrase("user", name[9], "green hat", 0, 9),
    ]


def asked_of(method, corpus, chosen) -> Asked:
    row_of = {str(name): number for number, name in enumerate(corpus.images["image_id"])}
    return ask(method, corpus, chosen, row_of, PixelStore(corpus.paths(), method.backbone.image_size), "cpu")


def test_every_method_is_explained_here():
    assert set(SETTINGS) == set(method_names())


@pytest.mark.covers(180, 181)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_explainer_explains_every_method_on_the_grid_alike_whoever_else_is_asked_about(name, corpus):
    method, chosen = model(name), phrases(corpus)
    grid = method.backbone.grid
    before = {key: value.clone() for key, value in method.state_dict().items()}
    whole, last = asked_of(method, corpus, chosen), asked_of(method, corpus, chosen[3:])
    for which in EXPLAINERS:
        if not applies(which, method):
            assert which == "ppim" and name != "interpart"
            continue
        first = relevance(method, whole, which)
        assert first.shape == (5, *grid) and first.dtype == torch.float32 and not first.requires_grad, which
        assert first.min() >= 0 and first.max() <= 1, which
        top = first.flatten(1).amax(dim=1)
        # Where every patch speaks against the phrase, these three say nothing.
        nothing = (top == 0) & torch.tensor(which in ("patch", "chefer", "gradcam"))
        assert ((top - 1).abs() < 1e-5).logical_or(nothing).all() and (top > 0).any(), which
        assert torch.equal(first, relevance(method, whole, which)), f"{which} is not deterministic"
        torch.testing.assert_close(relevance(method, last, which), first[3:], atol=1e-5, rtol=1e-4, msg=which)
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert method.backbone.image.recorded is None


@pytest.mark.covers(181)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_image_alone_decides_what_cls_and_rollout_say_and_the_phrase_what_the_others_say(name, corpus):
    method, chosen = model(name), phrases(corpus)
    given = asked_of(method, corpus, chosen[:3])
    for which in EXPLAINERS:
        if not applies(which, method):
            continue
        maps = relevance(method, given, which)
        if which in ("cls", "rollout", "centre"):
            assert torch.equal(maps[1], maps[2]), which
        else:
            assert not torch.allclose(maps[1], maps[2], atol=1e-4), which


@pytest.mark.parametrize("name", SETTINGS)
def test_the_shares_of_class_token_and_patches_in_the_image_vector_sum_to_one(name, corpus):
    variants = {"mta-clip": [{"sga": {**SETTINGS["mta-clip"][1]["sga"], "readout": r}} for r in ("gap", "pre_last")]}
    for changes in ({}, *variants.get(name, [])):
        first, average = model(name, **changes).reads_out
        assert first >= 0 and average >= 0 and first + average == 1


@pytest.mark.covers(181)
@pytest.mark.parametrize("name", SETTINGS)
def test_cls_is_the_attention_of_the_last_block_where_the_image_vector_is_read(name, corpus):
    """Against the attention that the hook-free contract returns."""
    method = model(name)
    given = asked_of(method, corpus, phrases(corpus)[3:])
    kept: list[Tensor] = []
    plain = method.backbone.image.encode

    def watched(images, **options):
        seen = plain(images, **{**options, "attention": True})
        kept.append(seen.attention[-1])
        return seen

    method.backbone.image.encode = watched
    with torch.no_grad():
        method.embed_images(given.captions)
    del method.backbone.image.encode
    rows = kept[-1].mean(dim=1)
    first, average = method.reads_out
    classes = rows.shape[-1] - 8
    expected = first * rows[:, 0, classes:] + average * rows[:, classes:, classes:].mean(dim=1)
    expected = expected / expected.amax(dim=1, keepdim=True)
    torch.testing.assert_close(relevance(method, given, "cls").flatten(1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.covers(173)
def test_a_phrase_that_nobody_has_ever_said_gets_a_map(corpus):
    method, image = model("interpart"), str(corpus.images["image_id"].iloc[3])
    unseen = [Phrase("user", image, text, 0, len(text)) for text in ("turquoise serape", "green hat")]
    frame = explain_phrases(method, corpus, unseen[:1], explainer="ppim")
    other = explain_phrases(method, corpus, unseen[1:], explainer="ppim")
    maps = [np.asarray(table["relevance"].iloc[0]) for table in (frame, other)]
    assert frame["phrase"].tolist() == ["turquoise serape"] and frame["explainer"].tolist() == ["ppim"]
    assert all(found.shape == (8,) and found.max() == pytest.approx(1) and found.min() >= 0 for found in maps)
    assert not np.allclose(maps[0], maps[1], atol=1e-3)
    # The map is that of the phrase in its template, alone.
    words = method.backbone.tokenize(["a person with green hat"])
    image_batch = asked_of(method, corpus, unseen[1:]).pairs
    with torch.no_grad():
        phrase = method.backbone.encode_text(words).pooled[None]
        seen = method.ppim(phrase, torch.ones(1, 1, dtype=torch.bool), method.see(image_batch.image).patches).maps[0, 0]
    assert maps[1] == pytest.approx((seen / seen.max()).numpy(), abs=1e-4)


@pytest.mark.covers(180)
def test_a_caption_s_map_is_the_weighted_sum_of_its_phrases_maps_in_a_trained_method_too(corpus):
    method, chosen = model("interpart"), phrases(corpus)[:3]
    given = asked_of(method, corpus, chosen)
    raw = explainer("ppim")(method, given, 0)
    with torch.no_grad():
        patches = method.patch_features(given.captions)[0]
        words = method.embed_texts(Batch(texts={"full": given.captions.phrases.tokens}))
        fit = []
        for place in (0, 1):
            phrase = words[given.captions.phrases.index[0, place]]
            fit.append(float(functional.cosine_similarity(raw[1 + place] @ patches, phrase, dim=0)))
    share = torch.tensor(fit).div(0.05).softmax(dim=0)
    torch.testing.assert_close(raw[0], share[0] * raw[1] + share[1] * raw[2], atol=1e-5, rtol=1e-4)
    assert raw.sum(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
