"""`hpl`: what each loss reads, what each stage trains, and what the published tables switch on and off."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import model, training_batch
from torch.nn import functional

from reidctl import losses
from reidctl.backbones.weights import build
from reidctl.batch import Batch
from reidctl.config import load_recipe
from reidctl.errors import UsageError
from reidctl.methods.base import build_method
from reidctl.methods.hpl import HplConfig
from reidctl.training.config import PromptConfig, TrainConfig
from reidctl.training.optimizer import build_optimizer, learning_rate_factor

BASE = {"sdm", "id_t2i", "triplet", "id_i2i"}
PROMPTED = {"cic", "tgps", "vgps", "cmpr"}
CONSTRUCTION = {"ic", "proto_t2i", "proto_i2t"}
FAR = {"margin": 100.0, "squared": False}
"""A margin that leaves every triplet active."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("hpl") / "blocks", people=6)


def hpl(**changes):
    return model("hpl", **changes)


@pytest.fixture(scope="module")
def paired(folder):
    """12 captioned images of 4 people; the model has 6."""
    return training_batch(hpl(), folder)


def bare(batch, has_text):
    """The batch without the captions of some samples."""
    return replace(batch, texts={"full": batch.texts["full"][has_text]}, has_text=has_text)


@pytest.fixture(scope="module")
def mixed(paired):
    """Of each person two captioned images and one without a caption."""
    return bare(paired, torch.arange(len(paired)) % 3 != 1)


def with_noise(batch, rows):
    """The batch with other pixels in some rows."""
    image = batch.image.clone()
    image[rows] = torch.randn(image[rows].shape, generator=torch.Generator().manual_seed(5))
    return replace(batch, image=image)


def grads(value, *of):
    """Largest absolute gradient of each; 0 where none arrives."""
    found = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
    return [0.0 if grad is None else float(grad.abs().max()) for grad in found]


def reach(value, module):
    """Largest absolute gradient at any parameter of a module."""
    return max(grads(value, *module.parameters()))


def same(a, b):
    return torch.allclose(a, b, atol=1e-6, rtol=1e-5)


# The two class tokens


@pytest.mark.covers(61)
def test_the_second_class_token_makes_n_plus_two_tokens_and_leaves_the_patches_their_shape(paired):
    two, one = hpl(), hpl(trt={"dual": False})
    features, plain = (each.see(paired.image, attention=True) for each in (two, one))
    patches = two.backbone.grid[0] * two.backbone.grid[1]
    assert {map_.shape[-1] for map_ in features.attention} == {patches + 2}
    assert {map_.shape[-1] for map_ in plain.attention} == {patches + 1}
    assert features.patches.shape == plain.patches.shape == (12, patches, 32)
    assert two.split(features).tokens.shape == (12, patches + 2, 32)
    assert one.split(plain).tokens.shape == (12, patches + 1, 32)
    assert not hasattr(one, "second_token") and one.tasks == ("t2i",) and two.tasks == ("t2i", "i2i")


@pytest.mark.parametrize(("init", "gap"), [("copy", 0.01), ("random", 0.02), ("zeros", 0.0)])
def test_the_second_token_starts_as_told(init, gap):
    method = hpl(trt={"init": init})
    first = method.backbone.image.class_token if init == "copy" else 0
    assert float((method.second_token - first).detach().std(unbiased=False)) == pytest.approx(gap, rel=0.5)


@pytest.mark.covers(62)
def test_texts_meet_the_first_token_and_images_the_second_and_exchanging_them_changes_the_scores(paired):
    method = hpl(trt={"init": "random"})
    with torch.no_grad():
        cls = method.see(paired.image).cls
        found = method.embed_tasks(Batch(image=paired.image))
        text = method.embed_texts(paired)
    for place, task in enumerate(("t2i", "i2i")):
        assert same(found[task], cls[:, place] / cls[:, place].norm(dim=1, keepdim=True))
    assert torch.equal(found["t2i"], method.embed_images(paired))
    assert (text @ found["t2i"].T - text @ found["i2i"].T).abs().max() > 0.01
    assert (found["i2i"] @ found["i2i"].T - found["t2i"] @ found["t2i"].T).abs().max() > 0.01


@pytest.mark.covers(62)
def test_the_i2i_feature_is_the_token_the_token_beside_its_hidden_state_or_the_normed_one(paired):
    with torch.no_grad():
        seen = hpl().split(hpl().see(paired.image))
        hidden = functional.normalize(torch.cat([seen.hidden, seen.i2i], dim=1), dim=1)
        assert same(hpl(i2i_feature="concat").embed_tasks(paired)["i2i"], hidden)
        method = hpl(i2i_feature="bn")
        method.neck.norm.running_mean += 1.0
        assert same(method.embed_tasks(paired)["i2i"], functional.normalize(seen.i2i - 1.0, dim=1))
        raw = hpl(trt={"i2i_proj": "none"}).embed_tasks(paired)["i2i"]
        assert same(raw, functional.normalize(seen.hidden, dim=1)) and raw.shape[1] == 32
        assert hpl(trt={"dual": False, "i2i_proj": "none"}).tasks == ("t2i", "i2i")


@pytest.mark.covers(62)
def test_the_text_losses_leave_the_second_projection_alone(paired):
    method = hpl(trt={"i2i_proj": "own"}, triplet=FAR)
    found = method.losses(paired, "finetune")
    weight = method.second_projection.weight
    assert grads(found["sdm"], weight) == grads(found["id_t2i"], weight) == [0.0]
    assert all(grads(found[name], weight)[0] > 0 for name in ("triplet", "id_i2i", "cic"))
    # It starts as a copy of the first one.
    seen = method.split(method.see(paired.image))
    assert same(seen.i2i, method.see(paired.image).cls[:, 1])


def cut(method, monkeypatch):
    """Make `see` return outputs that are leaves; the list gets those of every call."""
    kept, see = [], method.see

    def leaves(images, **options):
        features = see(images, **options)
        names = ("cls", "patches", "hidden_cls", "hidden_patches")
        kept.append(replace(features, **{n: getattr(features, n).detach().requires_grad_() for n in names}))
        return kept[-1]

    monkeypatch.setattr(method, "see", leaves)
    return kept


@pytest.mark.covers(112)
@pytest.mark.parametrize("proj", ["shared", "own", "none"])
def test_each_task_s_losses_reach_their_own_class_output_alone(paired, monkeypatch, proj):
    method = hpl(triplet=FAR, trt={"i2i_proj": proj})
    kept = cut(method, monkeypatch)
    found = method.losses(paired, "finetune")

    def at(loss):
        parts = torch.autograd.grad(
            found[loss], (kept[0].cls, kept[0].hidden_cls), retain_graph=True, allow_unused=True
        )
        return [max(float(g[:, place].abs().max()) for g in parts if g is not None) for place in (0, 1)]

    for loss in ("sdm", "id_t2i"):
        assert at(loss)[0] > 0 and at(loss)[1] == 0, loss
    for loss in ("triplet", "id_i2i", "cic"):
        assert at(loss)[0] == 0 and at(loss)[1] > 0, loss
    assert at("tgps")[0] > 0 and at("tgps")[1] == 0
    # I_v reads all of F^v: through the pseudo-words these two reach both.
    for loss in ("vgps", "cmpr"):
        assert min(at(loss)) > 0, loss


@pytest.mark.covers(64)
@pytest.mark.parametrize(("isolation", "closed"), [("full", True), ("cls", False), ("none", False)])
def test_full_isolation_alone_keeps_a_task_s_gradient_from_the_other_token(paired, isolation, closed):
    method = hpl(trt={"isolation": isolation}, triplet=FAR)
    found = method.losses(paired, "finetune")
    first, second = method.backbone.image.class_token, method.second_token
    crossing = [grads(found[n], first)[0] for n in ("triplet", "id_i2i", "cic")]
    crossing += [grads(found[n], second)[0] for n in ("sdm", "id_t2i", "tgps")]
    assert all(value == 0 for value in crossing) if closed else all(value > 0 for value in crossing)
    assert grads(found["sdm"], first)[0] > 0 and grads(found["triplet"], second)[0] > 0
    # Everything between the input and the outputs is shared even so.
    assert min(grads(found[n], method.shared_weight())[0] for n in ("sdm", "triplet")) > 0


@pytest.mark.covers(64)
def test_task_cosine_is_that_of_the_two_tasks_weighted_gradients_at_the_shared_weight(paired):
    method = hpl(triplet=FAR)
    found = method.losses(paired, "finetune")
    assert "task_cosine" not in method.training_report()
    norms = method.gradient_norms(found)
    sides = []
    for names in (("sdm", "id_t2i", "tgps", "vgps", "cmpr"), ("triplet", "id_i2i", "cic")):
        total = sum(method.weight(name) * found[name] for name in names)
        sides.append(torch.autograd.grad(total, method.shared_weight(), retain_graph=True)[0].flatten())
    expected = float(sides[0] @ sides[1] / sides[0].norm() / sides[1].norm())
    report = method.training_report()
    assert report["task_cosine"] == pytest.approx(expected, abs=1e-5)
    assert set(norms) == set(found) and {"pseudo/diversity", "pseudo/mismatch"} < set(report)
    single = hpl(train_tasks=("t2i",))
    single.gradient_norms(single.losses(paired, "finetune"))
    assert "task_cosine" not in single.training_report()


# L_base


@pytest.mark.covers(63)
def test_the_base_loss_is_the_sum_of_four_and_each_is_what_its_formula_gives(paired):
    method = hpl(prompts="none", triplet={"margin": 0.5, "squared": False, "normalize": True}).train()
    found = method.losses(paired, "finetune")
    assert set(found) == BASE
    torch.testing.assert_close(method.objective(found), sum(found.values()))
    cls, text = method.see(paired.image).cls, method.backbone.encode_text(paired.texts["full"]).pooled
    t2i, i2i, person = cls[:, 0], cls[:, 1], paired.person
    assert same(found["sdm"], losses.sdm(t2i, text, person, temperature=0.02))
    logits = [each @ method.classifier.weight.T + method.classifier.bias for each in (t2i, text)]
    assert same(found["id_t2i"], sum(functional.cross_entropy(each, person) for each in logits) / 2)
    unit = functional.normalize(i2i, dim=1)
    hardest = 0.0
    for row in range(12):
        distance = (unit - unit[row]).square().sum(dim=1).clamp_min(1e-12).sqrt()
        far, near = distance[person == person[row]].max(), distance[person != person[row]].min()
        hardest += torch.relu(far - near + 0.5) / 12
    torch.testing.assert_close(found["triplet"], hardest, atol=1e-4, rtol=1e-4)
    normed = (i2i - i2i.mean(dim=0)) / (i2i.var(dim=0, unbiased=False) + 1e-5).sqrt()
    expected = functional.cross_entropy(normed @ method.neck.classifier.weight.T, person)
    assert same(found["id_i2i"], expected)


@pytest.mark.covers(16, 63)
@pytest.mark.parametrize("reads", ["all", "i2i"])
def test_each_base_term_reads_the_samples_it_is_for(paired, reads):
    mixed = bare(paired, torch.arange(len(paired)) % 3 == 1)  # two images without a caption per person
    method = hpl(triplet=FAR, i2i_losses_on=reads).train()
    before = method.losses(mixed, "finetune")
    alone = method.losses(with_noise(mixed, ~mixed.has_text), "finetune")
    pairs = method.losses(with_noise(mixed, mixed.has_text), "finetune")
    for name in ("sdm", "id_t2i", "tgps", "vgps", "cmpr"):
        assert same(before[name], alone[name]) and not same(before[name], pairs[name]), name
    for name in ("triplet", "id_i2i"):
        assert not same(before[name], alone[name]), name
        assert same(before[name], pairs[name]) == (reads == "i2i"), name
    assert not same(before["cic"], alone["cic"]) and not same(before["cic"], pairs["cic"])
    whole = method.losses(mixed.pairs(), "finetune")
    assert all(same(before[name], whole[name]) for name in ("sdm", "id_t2i", "tgps", "vgps", "cmpr"))


@pytest.mark.covers(16)
def test_a_batch_without_any_caption_has_zero_text_losses_and_a_gradient(mixed):
    method = hpl(triplet=FAR).train()
    nothing = torch.zeros(len(mixed), dtype=torch.bool)
    for batch in (bare(replace(mixed, texts={"full": mixed.texts["full"]}), nothing[:8]), replace(mixed, texts={})):
        batch = replace(batch, has_text=nothing)
        found = method.losses(batch, "finetune")
        assert set(found) == BASE | PROMPTED
        assert all(found[name].item() == 0 for name in ("sdm", "id_t2i", "tgps", "vgps", "cmpr"))
        method.objective(found).backward()
        first = method.losses(batch, "prompt-stage")
        assert first["ic"] > 0 and first["proto_i2t"] > 0


# Prompts


@pytest.mark.covers(65)
@pytest.mark.parametrize("template", ["A photo of {id} and {inst} person", "A photo of a {id} and {inst} person"])
def test_the_three_prompts_of_a_person_fit_the_context_with_the_default_numbers_of_tokens(template):
    config = HplConfig()
    assert (config.n_id_tokens, config.n_inst_tokens) == (4, 4)
    assert config.template == "A photo of {id} and {inst} person"
    made = hpl(template=template, n_id_tokens=4, n_inst_tokens=4).templates
    words = len(template.format(id="", inst="").split()) + 2
    assert made["whole"].length == words + 8 < 77
    assert made["identity"].length == 6 + 4 and made["instance"].length == 6 + 4
    assert len(made["identity"].places("inst")) == len(made["instance"].places("id")) == 0


@pytest.mark.covers(65)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template": "A photo of {id} person"}, r"method\.template.*inst"),
        ({"identity_template": "A photo of a person"}, r"identity_template.*id"),
        ({"instance_template": "A photo"}, r"instance_template.*inst"),
        ({"identity_template": "{id} {inst}"}, "takes {id} alone"),
        ({"template": "{id} {inst} {hat}"}, "hat"),
        ({"template": "{id} {inst} " + "red " * 40}, "tokens"),
        ({"n_id_tokens": 40}, "tokens"),
        ({"train_tasks": ()}, "train_tasks"),
        ({"train_tasks": ("t2i", "t2i")}, "train_tasks"),
        ({"inversion": {"heads": 5}}, "5 heads"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, said):
    with pytest.raises(UsageError, match=said):
        hpl(**change)


@pytest.mark.covers(66)
def test_there_are_n_by_m_by_w_identity_tokens_and_only_the_batch_s_people_get_a_gradient(paired):
    method = hpl(n_id_tokens=3)
    assert method.id_tokens.shape == (6, 3, method.backbone.width_text)
    assert float(method.id_tokens.detach().std()) == pytest.approx(0.02, rel=0.2)
    people = paired.person.unique().tolist()
    assert 0 < len(people) < 6
    method.begin("prompt-stage")
    method.objective(method.losses(paired, "prompt-stage")).backward()
    reached = method.id_tokens.grad.abs().amax(dim=2)
    assert (reached[people] > 0).all()
    assert not reached[[person for person in range(6) if person not in people]].any()


def test_shared_tokens_are_one_set_for_everybody(paired):
    method = hpl(id_tokens="global")
    assert method.id_tokens.shape == (1, 2, 32)
    prompts = method.identity_prompts()
    assert prompts.shape[0] == 6 and torch.equal(prompts, prompts[:1].expand(6, -1))
    assert [row[:2] for row in method.prompt_rows([f"p{n}" for n in range(6)])] == [("shared", "")]
    # Eq. 11 cannot tell people apart then.
    method.prototypes = None
    assert method.losses(paired, "finetune")["cic"].item() == pytest.approx(torch.tensor(6.0).log().item(), rel=1e-5)


@pytest.mark.covers(67)
@pytest.mark.parametrize("readout", ["queries", "linear", "first", "pool"])
@pytest.mark.parametrize("reads", ["proj", "hidden"])
def test_pseudo_words_of_images_and_texts_have_one_shape_and_depend_on_their_input(paired, readout, reads):
    method = hpl(n_inst_tokens=3, inversion={"layers": 1, "heads": 2, "readout": readout, "input": reads})
    seen = method.split(method.see(paired.image))
    text = method.backbone.encode_text(paired.texts["full"])
    image = method.pseudo_image(seen.tokens)
    words = method.pseudo_text(method.text_tokens(text), paired.texts["full"].mask)
    assert image.shape == words.shape == (12, 3, method.backbone.width_text)
    assert torch.pdist(image.flatten(1)).min() > 0
    kinds = {row: [] for row in range(12)}
    for row in range(12):  # texts of one person are the same words
        kinds[int(paired.person[row])].append(words[row])
    assert all(same(each, many[0]) for many in kinds.values() for each in many)
    assert torch.pdist(torch.stack([many[0].flatten() for many in kinds.values() if many])).min() > 1e-5


@pytest.mark.covers(68)
def test_four_layers_are_the_default_and_inversion_consistency_reaches_every_one_of_both_networks(paired):
    assert HplConfig().inversion.layers == 4
    method = hpl(inversion={"heads": 2})
    loss = method.losses(paired, "prompt-stage")["ic"]
    for network in (method.invert_image, method.invert_text):
        assert len(network.blocks.layers) == 4
        for layer in network.blocks.layers:
            for name, parameter in layer.named_parameters():
                assert grads(loss, parameter)[0] > 0, name


@pytest.mark.covers(69)
@pytest.mark.parametrize("spec", ["clip:micro", "vit-bert:micro"])
def test_pseudo_words_of_a_text_do_not_depend_on_its_padding(spec):
    method = on(spec)
    texts = ["a man", "a tall young woman wearing blue jeans and a red coat"]
    tokens = method.backbone.tokenize(texts)
    features = method.text_tokens(method.backbone.encode_text(tokens))
    together = method.pseudo_text(features, tokens.mask)
    noise = torch.where(tokens.mask[..., None], features, torch.tensor(50.0))
    assert same(method.pseudo_text(noise, tokens.mask), together)
    short = method.backbone.tokenize(texts[:1])
    alone = method.pseudo_text(method.text_tokens(method.backbone.encode_text(short)), short.mask)
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("spec", "last"), [("clip:micro", True), ("vit-bert:micro", False)])
def test_the_linear_readout_of_a_text_reads_the_token_that_sums_it_up(spec, last):
    """The end token of CLIP, [CLS] of BERT."""
    method = on(spec, inversion={"layers": 1, "heads": 2, "readout": "linear"})
    tokens = method.backbone.tokenize(["a man", "a tall young woman wearing blue jeans"])
    features = method.text_tokens(method.backbone.encode_text(tokens))
    found = method.pseudo_text(features, tokens.mask)
    by_place = [
        method.invert_text(features, tokens.mask, torch.tensor(places))
        for places in ([0, 0], (tokens.mask.sum(dim=1) - 1).tolist())
    ]
    assert same(found, by_place[last]) and not same(found, by_place[not last])


def on(spec, **changes):
    settings = {"inversion": {"layers": 1, "heads": 2}, "n_id_tokens": 2, "n_inst_tokens": 2, **changes}
    torch.manual_seed(0)
    return build_method("hpl", settings, build(spec), 6).eval()


@pytest.mark.covers(70)
@pytest.mark.parametrize("spec", ["clip:micro", "vit-bert:micro"])
def test_the_prompt_encoder_fed_with_words_gives_what_the_text_encoder_gives(spec):
    method = on(spec)
    tower = method.backbone
    ids = {name: tower.tokenize([words]).ids[:, 1:-1] for name, words in (("id", "tall young"), ("inst", "red blue"))}
    assert all(value.shape[1] == 2 for value in ids.values())
    slots = {name: tower.embed_tokens(value) for name, value in ids.items()}
    for template, text in (
        ("whole", "A photo of tall young and red blue person"),
        ("identity", "A photo of tall young person"),
        ("instance", "A photo of red blue person"),
    ):
        found = method.encode_prompts(template, slots, 1)
        assert torch.equal(found, tower.encode_text(tower.tokenize([text])).pooled), template
    plain = on(spec, prompts="plain", plain_template="A photo of a tall person")
    expected = plain.backbone.encode_text(plain.backbone.tokenize(["A photo of a tall person"])).pooled
    assert same(plain.encode_prompts("whole", {}, 1), expected)
    # It is another encoder: it starts as a copy and shares no weight.
    mine, theirs = ({p.data_ptr() for p in tower_.parameters()} for tower_ in (method.prompt_text, tower.text))
    assert not mine & theirs


@pytest.mark.covers(71)
def test_a_person_has_one_identity_prompt_and_the_cached_table_is_that_of_a_fresh_computation(paired):
    method = hpl()
    fresh = method.identity_prompts()
    assert fresh.shape == (6, 32) and torch.pdist(fresh).min() > 0
    again = method.identity_prompts(torch.tensor([2, 5, 2]), block=2)
    assert torch.equal(again[0], again[2]) and same(again, fresh[[2, 5, 2]])
    method.begin("finetune")
    assert torch.equal(method.prototypes, fresh) and not method.prototypes.requires_grad
    cached = method.losses(paired, "finetune")["cic"]
    method.prototypes = None
    assert same(cached, method.losses(paired, "finetune")["cic"])
    method.prototypes = torch.zeros(6, 32)
    assert not same(cached, method.losses(paired, "finetune")["cic"]), "the table is not read"


@pytest.mark.covers(71)
@pytest.mark.parametrize(
    ("change", "cached"),
    [
        ({}, True),
        ({"stage2": {"train_id_tokens": True}}, False),
        ({"stage2": {"train_prompt_encoder": True}}, False),
        ({"two_stage": False}, False),
        ({"weights": {"cic": 0.0}}, False),
        ({"prompts": "none"}, False),
        ({"prompts": "plain"}, True),
    ],
)
def test_the_table_is_cached_exactly_where_stage_two_cannot_change_it(change, cached):
    method = hpl(**change)
    method.begin("prompt-stage")
    assert method.prototypes is None
    method.begin("finetune")
    assert (method.prototypes is not None) == cached


@pytest.mark.covers(71)
def test_the_cached_table_has_no_dropout_in_it():
    torch.manual_seed(0)
    method = build_method("hpl", {"inversion": {"layers": 1, "heads": 2}}, build("vit-bert:micro"), 6)
    for module in method.prompt_text.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    method.begin("finetune")  # as the trainer does with a model that it has just built
    method.prompt_text.eval()
    assert same(method.prototypes, method.identity_prompts())


# Stage I


def sentence(method, words, slots):
    """The feature of a prompt, put together by hand: `words` around `slots` (W vectors each), one person."""
    tower, pieces = method.backbone, []
    for text, slot in zip(words, [*slots, None], strict=True):
        pieces.append(tower.embed_tokens(tower.tokenize([text]).ids[:, 1:-1])[0])
        pieces += [] if slot is None else [slot]
    start, end = (
        tower.embed_tokens(torch.tensor([[number]]))[0] for number in (tower.tokenizer.start_id, tower.tokenizer.end_id)
    )
    whole = torch.cat([start, *pieces, end])[None]
    return tower.encode_embedded(whole, torch.ones(whole.shape[:2], dtype=torch.bool)).pooled[0]


WORDS = ["A photo of", "and", "person"]


def mean_squares(a, b, space="unit"):
    if space == "unit":
        a, b = (each / each.norm(dim=-1, keepdim=True) for each in (a, b))
    return sum(float((x - y).detach().square().sum()) for x, y in zip(a, b, strict=True)) / len(a)


def pseudo(method, batch):
    """P^v of all images, P^t of all texts, v_t2i and t_eos."""
    seen = method.split(method.see(batch.image))
    text = method.backbone.encode_text(batch.texts["full"])
    words = method.invert_text(text.tokens, batch.texts["full"].mask)
    return (
        method.invert_image(torch.cat([method.see(batch.image).cls, method.see(batch.image).patches], 1)),
        words,
        seen.t2i,
        text.pooled,
    )


@pytest.mark.covers(72)
@pytest.mark.parametrize("space", ["unit", "raw"])
def test_inversion_consistency_is_eq_6_and_its_text_half_reads_captioned_samples_alone(mixed, space):
    method = hpl(l2_space=space)
    with torch.no_grad():
        image, words, t2i, eos = pseudo(method, mixed)
        tokens, owner = method.id_tokens[mixed.person], mixed.person[mixed.has_text]
        v = torch.stack([sentence(method, WORDS, (tokens[i], image[i])) for i in range(12)])
        t = torch.stack([sentence(method, WORDS, (method.id_tokens[p], words[i])) for i, p in enumerate(owner)])
        found = method.losses(mixed, "prompt-stage")["ic"].item()
        assert len(t) == 8 < len(v)
        assert found == pytest.approx(mean_squares(v, t2i, space) + mean_squares(t, eos, space), rel=1e-4)
        # Without captions only the image half is left.
        alone = method.losses(replace(mixed, texts={}, has_text=torch.zeros(12, dtype=torch.bool)), "prompt-stage")
        assert alone["ic"].item() == pytest.approx(mean_squares(v, t2i, space), rel=1e-4)


@pytest.mark.covers(73)
@pytest.mark.parametrize("positives", ["id", "literal"])
def test_the_identity_contrast_compares_v_t2i_with_the_identity_prompts_of_the_batch(mixed, positives):
    method = hpl(proto_positives=positives, tau_prompt=0.5, trt={"init": "random"})
    with torch.no_grad():
        found = method.losses(mixed, "prompt-stage")
        image = functional.normalize(method.see(mixed.image).cls[:, 0], dim=1)
        every = torch.stack([sentence(method, ["A photo of", "person"], (method.id_tokens[p],)) for p in range(6)])
        every = functional.normalize(every, dim=1)
    person = mixed.person.tolist()
    if positives == "literal":
        scores = image @ every[mixed.person].T / 0.5
        target = torch.arange(12)
        expected = functional.cross_entropy(scores.T, target), functional.cross_entropy(scores, target)
    else:
        owners = sorted(set(person))
        scores = (image @ every[owners].T / 0.5).double()
        t2i = -sum(
            float(scores.T.log_softmax(1)[u, [i for i in range(12) if person[i] == owner]].mean())
            for u, owner in enumerate(owners)
        ) / len(owners)
        i2t = functional.cross_entropy(scores, torch.tensor([owners.index(p) for p in person]))
        expected = torch.tensor(t2i), i2t.float()
    for name, value in zip(("proto_t2i", "proto_i2t"), expected, strict=True):
        assert found[name].item() == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.covers(73)
def test_stage_one_s_objective_is_the_plain_sum_of_its_three_losses(mixed):
    method = hpl()
    method.begin("prompt-stage")
    found = method.losses(mixed, "prompt-stage")
    assert set(found) == CONSTRUCTION == set(method.current_weights("prompt-stage"))
    torch.testing.assert_close(method.objective(found), sum(found.values()))


@pytest.mark.covers(72)
def test_kept_features_give_the_losses_of_the_encoders(mixed):
    method = hpl()
    kept = method.frozen_features(Batch(image=mixed.image)) | method.frozen_features(Batch(texts=mixed.texts))
    assert set(kept) == {"image", "image_tokens", "text", "text_tokens"}
    # Kept texts are as long as the longest of all texts.
    longer = torch.cat([kept["text_tokens"], torch.full((8, 5, 32), 9.0)], dim=1)
    held = replace(mixed, image=None, frozen={**kept, "text_tokens": longer})
    direct, cached = (method.losses(batch, "prompt-stage") for batch in (mixed, held))
    assert all(torch.equal(direct[name], cached[name]) for name in CONSTRUCTION)
    broken = replace(held, frozen={**held.frozen, "image": held.frozen["image"] + 1})
    assert not same(method.losses(broken, "prompt-stage")["ic"], direct["ic"])


@pytest.mark.covers(74)
def test_stage_one_trains_inversion_networks_and_identity_tokens_and_nothing_else(mixed):
    before, method, after = step(hpl(), mixed, "prompt-stage", PromptConfig(lr=1e-2, lr_new=1e-2))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {"id_tokens", "invert_image", "invert_text"}
    assert changed == set(method.prompt_state()) - {"second_token"}
    assert torch.equal(method.prompt_state()["second_token"], before["second_token"])


def step(method, batch, stage, config):
    """State before and after one step of a stage."""
    optimizer = build_optimizer(method, stage, config)
    method.begin(stage)
    method.train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.objective(method.losses(batch, stage)).backward()
    optimizer.step()
    return before, method, method.state_dict()


@pytest.mark.covers(75)
def test_the_default_prompt_stage_has_ten_epochs_two_rates_and_a_factor_of_0_8_per_epoch():
    config, method = PromptConfig(), hpl()
    assert config.epochs == 10 and config.optimizer == "adam"
    optimizer = build_optimizer(method, "prompt-stage", config)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert set(rates) == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (0.02 if name == "id_tokens" else 5e-5), name
    trace = [learning_rate_factor(config, epoch) for epoch in range(config.epochs)]
    assert trace == pytest.approx([0.8**epoch for epoch in range(10)])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    # The shipped recipe does not change it.
    shipped = PromptConfig(**load_recipe("hpl")["prompt"])
    names = ("epochs", "lr_new", "lr_prompt", "gamma", "schedule", "warmup_epochs")
    assert [getattr(shipped, name) for name in names] == [10, 5e-5, 0.02, 0.8, "exponential", 0]
    assert (shipped.sampler, shipped.batch, shipped.batch_images, shipped.instances) == ("mixed", 64, 64, 4)


# Stage II


@pytest.mark.covers(76, 77)
def test_each_half_of_the_alignment_compares_the_other_modality_s_prompt_with_a_class_feature(paired, monkeypatch):
    method = hpl()
    kept = cut(method, monkeypatch)
    found = method.losses(paired, "finetune")
    text, image_cls, patches = method.backbone.text, kept[0].cls, kept[0].patches
    # tgps: t~ (through I_t and the text encoder) and v_t2i, nothing else of the image.
    assert reach(found["tgps"], method.invert_text) > 0 and reach(found["tgps"], method.invert_image) == 0
    assert reach(found["tgps"], text) > 0 and grads(found["tgps"], image_cls)[0] > 0
    assert grads(found["tgps"], patches) == [0.0]
    # vgps: v~ (through I_v, which reads all of F^v) and t_eos.
    assert reach(found["vgps"], method.invert_image) > 0 and reach(found["vgps"], method.invert_text) == 0
    assert reach(found["vgps"], text) > 0 and min(grads(found["vgps"], image_cls, patches)) > 0


@pytest.mark.covers(76, 77)
@pytest.mark.parametrize("space", ["unit", "raw"])
def test_the_alignment_is_eq_10_on_captioned_samples(mixed, space):
    method = hpl(l2_space=space)
    with torch.no_grad():
        image, words, t2i, eos = pseudo(method, mixed)
        rows = mixed.has_text.nonzero().flatten().tolist()
        tokens = method.id_tokens[mixed.person]
        t = torch.stack([sentence(method, WORDS, (tokens[row], words[i])) for i, row in enumerate(rows)])
        v = torch.stack([sentence(method, WORDS, (tokens[row], image[row])) for row in rows])
        found = method.losses(mixed, "finetune")
    assert found["tgps"].item() == pytest.approx(mean_squares(t, t2i[rows], space), rel=1e-4)
    assert found["vgps"].item() == pytest.approx(mean_squares(v, eos, space), rel=1e-4)


@pytest.mark.covers(76, 77)
def test_detaching_a_side_of_the_alignment_leaves_the_other_s_gradient(paired, monkeypatch):
    for detach, prompts, features in (("prompt", False, True), ("feature", True, False)):
        method = hpl(ilpa_detach=detach)
        kept = cut(method, monkeypatch)
        found = method.losses(paired, "finetune")
        assert (reach(found["tgps"], method.invert_text) > 0) == prompts
        assert (reach(found["vgps"], method.invert_image) > 0) == prompts
        assert (grads(found["tgps"], kept[0].cls)[0] > 0) == features
        assert (reach(found["vgps"], method.backbone.text) > 0) == features
        torch.testing.assert_close(found["tgps"], hpl().losses(paired, "finetune")["tgps"])


@pytest.mark.covers(78)
def test_an_image_is_classified_among_the_prompts_of_all_people(mixed):
    method = hpl(tau_prompt=0.3, trt={"init": "random"})
    every = functional.normalize(method.identity_prompts(), dim=1)
    image = functional.normalize(method.see(mixed.image).cls[:, 1], dim=1)
    scores = image @ every.T / 0.3
    assert scores.shape == (12, 6)
    expected = functional.cross_entropy(scores, mixed.person)
    assert same(method.losses(mixed, "finetune")["cic"], expected)
    summed = hpl(tau_prompt=0.3, trt={"init": "random"}, cic_reduction="sum").losses(mixed, "finetune")["cic"]
    torch.testing.assert_close(summed, 12 * expected)


@pytest.mark.covers(78)
@pytest.mark.parametrize(("over", "reads"), [("all", True), ("batch", False)])
def test_prompts_of_people_who_are_not_in_the_batch_count_exactly_under_all(paired, over, reads):
    method = hpl(cic_over=over, two_stage=False)
    before = method.losses(paired, "finetune")["cic"]
    absent = [person for person in range(6) if person not in paired.person.tolist()]
    with torch.no_grad():
        method.id_tokens[absent] += torch.randn_like(method.id_tokens[absent])
    assert same(before, method.losses(paired, "finetune")["cic"]) != reads
    cached = hpl(cic_over=over)
    fresh = cached.losses(paired, "finetune")["cic"]
    cached.begin("finetune")
    assert same(cached.losses(paired, "finetune")["cic"], fresh)


@pytest.mark.covers(79)
def test_prompt_regularisation_is_the_squared_distance_of_the_pairs_pseudo_words(mixed, monkeypatch):
    method = hpl()
    with torch.no_grad():
        image, words, _, _ = pseudo(method, mixed)
    by_loop = sum(
        float((words[i] - image[row]).square().sum())
        for i, row in enumerate(mixed.has_text.nonzero().flatten().tolist())
    )
    assert method.losses(mixed, "finetune")["cmpr"].item() == pytest.approx(by_loop / 8, rel=1e-4)
    assert reach(method.losses(mixed, "finetune")["cmpr"], method.invert_text) > 0
    monkeypatch.setattr(method, "pseudo_text", lambda tokens, mask: image[mixed.has_text])
    monkeypatch.setattr(method, "pseudo_image", lambda tokens: image[mixed.has_text])
    assert method.losses(mixed, "finetune")["cmpr"].item() == 0.0


@pytest.mark.covers(80)
def test_the_published_weights_are_the_defaults():
    config = HplConfig()
    assert (config.lambda1, config.lambda2) == (0.4, 0.06)
    assert hpl().current_weights() == {
        "sdm": 1.0, "id_t2i": 1.0, "triplet": 1.0, "id_i2i": 1.0, "cic": 1.0, "tgps": 0.4, "vgps": 0.4, "cmpr": 0.06,
    }  # fmt: skip
    changed = hpl(lambda1=0.2, lambda2=0.5, weights={"vgps": 0.9}).current_weights()
    assert (changed["tgps"], changed["vgps"], changed["cmpr"]) == (0.2, 0.9, 0.5)


@pytest.mark.covers(86)
def test_a_lambda_of_zero_removes_its_terms_and_other_values_scale_them(paired):
    full = hpl().losses(paired, "finetune")
    for lambda1 in (0.0, 0.4, 1.0):
        method = hpl(lambda1=lambda1)
        found = method.losses(paired, "finetune")
        assert ({"tgps", "vgps"} <= set(found)) == (lambda1 > 0)
        base = sum(full[name] for name in BASE | {"cic"}) + 0.06 * full["cmpr"]
        torch.testing.assert_close(method.objective(found), base + lambda1 * (full["tgps"] + full["vgps"]))
    neither = hpl(lambda1=0.0, lambda2=0.0)
    found = neither.losses(paired, "finetune")
    assert set(found) == BASE | {"cic"}
    assert reach(neither.objective(found), neither.invert_image) == 0
    assert "cmpr" not in hpl(lambda2=0.0).losses(paired, "finetune")


ROWS = {
    "3: none": ({"trt": {"dual": False}, "prompts": "none"}, BASE),
    "3: TRT": ({"prompts": "none"}, BASE),
    "3: TRT + HPL": ({"cmpr": False}, BASE | {"cic", "tgps", "vgps"}),
    "3: TRT + HPL + CMPR": ({}, BASE | PROMPTED),
    "4: tgps": ({"cmpr": False, "weights": {"vgps": 0.0}}, BASE | {"cic", "tgps"}),
    "4: vgps": ({"cmpr": False, "weights": {"tgps": 0.0}}, BASE | {"cic", "vgps"}),
    "4: no ILPA but L_cic": ({"cmpr": False, "weights": {"tgps": 0.0, "vgps": 0.0}}, BASE | {"cic"}),
}


@pytest.mark.covers(83, 84)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_ablation_tables_has_its_losses_and_trains(mixed, row):
    settings, expected = ROWS[row]
    method = hpl(**settings)
    assert set(method.current_weights()) == set(method.losses(mixed, "finetune")) == expected
    before, _, after = step(method, mixed, "finetune", TrainConfig(lr=1e-2))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    learns = method.config.needs_prompt_stage
    assert learns == ("prompts" not in settings)
    assert set(method.current_weights("prompt-stage")) == (CONSTRUCTION if learns else set())


@pytest.mark.covers(85)
@pytest.mark.parametrize(
    ("tasks", "expected"),
    [(("t2i",), {"sdm", "id_t2i", "tgps", "vgps", "cmpr"}), (("i2i",), {"triplet", "id_i2i", "cic"})],
)
def test_a_single_task_model_has_the_losses_of_its_task(folder, tasks, expected):
    method = hpl(train_tasks=tasks, triplet=FAR)
    assert method.train_texts == (("full",) if "t2i" in tasks else ())
    batch = training_batch(method, folder)
    assert bool(batch.texts) == ("t2i" in tasks)
    for stage, names in (("prompt-stage", CONSTRUCTION), ("finetune", expected)):
        method = hpl(train_tasks=tasks, triplet=FAR)
        found = method.losses(batch, stage)
        assert set(found) == names
        before, _, after = step(method, batch, stage, TrainConfig(lr=1e-2))
        assert any(not torch.equal(before[name], after[name]) for name in before)
    plain = hpl(train_tasks=tasks, trt={"dual": False}, prompts="none")
    assert set(plain.losses(batch, "finetune")) == expected & BASE


HEADS = {"second_token", "classifier", "neck"}
TOWERS = {"backbone.image", "backbone.text"}
NETWORKS = {"invert_image", "invert_text"}
USUAL = TOWERS | HEADS | NETWORKS
FREEZING = {
    "default": ({}, USUAL),
    "image frozen": ({"freeze": ("image",)}, USUAL - {"backbone.image"}),
    "both frozen": ({"freeze": ("image", "text")}, USUAL - TOWERS),
    "networks kept": ({"stage2": {"train_inversion": False}}, USUAL - NETWORKS),
    "tokens too": ({"stage2": {"train_id_tokens": True}}, USUAL | {"id_tokens"}),
    "prompt encoder too": ({"stage2": {"train_prompt_encoder": True}}, USUAL | {"prompt_text"}),
    "one stage": ({"two_stage": False}, USUAL | {"id_tokens"}),
    "own projection": (
        {"trt": {"i2i_proj": "own"}, "prompts": "none"},
        TOWERS | HEADS | {"second_projection"},
    ),
}


def part_of(name):
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "backbone" else pieces[0]


@pytest.mark.covers(81, 108)
@pytest.mark.parametrize("case", FREEZING)
def test_a_step_of_stage_two_changes_exactly_what_the_settings_say(mixed, case):
    settings, expected = FREEZING[case]
    made = hpl(triplet=FAR, **settings)
    before, method, after = step(made, mixed, "finetune", TrainConfig(lr=1e-2, weight_decay=0.0))
    parameters = dict(method.named_parameters())
    changed = {name for name in parameters if not torch.equal(before[name], after[name])}
    roles = method.parameters_by_role("finetune")
    listed = {name for members in roles.values() for name, _ in members}
    assert changed == listed
    assert {part_of(name) for name in changed} == expected
    # Frozen encoders are as they were, whole.
    for side in method.config.freeze:
        names = [name for name in before if name.startswith(f"backbone.{side}.")]
        assert names and all(torch.equal(before[name], after[name]) for name in names)
    assert "second_token" in dict(roles["image"])


@pytest.mark.covers(81)
def test_the_shipped_recipe_has_the_published_schedule():
    config = TrainConfig(**load_recipe("hpl")["train"])
    assert (config.epochs, config.warmup_epochs, config.schedule, config.lr) == (60, 5, "cosine", 1e-5)
    assert (config.sampler, config.batch, config.batch_images, config.instances) == ("mixed", 64, 64, 4)
    assert load_recipe("hpl")["backbone"]["image_size"] == [384, 128]
    rates = [config.lr * learning_rate_factor(config, epoch) for epoch in range(60)]
    assert rates[:6] == pytest.approx([1e-6, 2.8e-6, 4.6e-6, 6.4e-6, 8.2e-6, 1e-5])
    assert all(a > b for a, b in itertools.pairwise(rates[5:])) and 0 < rates[-1] < 2e-8
    HplConfig(**{k: v for k, v in load_recipe("hpl")["method"].items() if k != "name"})


@pytest.mark.covers(82, 109)
def test_one_stage_trains_stage_one_s_losses_beside_the_others(mixed):
    method = hpl(two_stage=False)
    assert not method.config.needs_prompt_stage and HplConfig().needs_prompt_stage
    assert set(method.losses(mixed, "finetune")) == set(method.current_weights()) == BASE | PROMPTED | CONSTRUCTION
    assert hpl(stage2={"keep_ic": 0.3}).current_weights()["ic"] == 0.3
    kept = hpl(stage2={"keep_ic": 0.3})
    found = kept.losses(mixed, "finetune")
    assert set(found) == BASE | PROMPTED | {"ic"}
    without = {name: value for name, value in found.items() if name != "ic"}
    torch.testing.assert_close(kept.objective(found), kept.objective(without) + 0.3 * found["ic"])


@pytest.mark.covers(99)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"template": "A photo of a {id} and {inst} person."},
        {"template": "{inst} {id}"},
        {"template": "A person wearing {inst}", "n_inst_tokens": 7},
        {"template": "A photo of {id} and {inst} person", "n_id_tokens": 0},
    ],
)
def test_other_templates_and_numbers_of_tokens_run_in_both_stages(mixed, change):
    expected = hpl().losses(mixed, "finetune")
    method = hpl(**change)
    first, second = method.losses(mixed, "prompt-stage"), method.losses(mixed, "finetune")
    assert "ic" in first and (set(first) == CONSTRUCTION) == (change.get("n_id_tokens") != 0)
    assert set(second) == BASE | PROMPTED
    assert all(torch.isfinite(value) for value in (*first.values(), *second.values()))
    assert same(second["tgps"], expected["tgps"]) == (change == {})
    step(hpl(**change), mixed, "prompt-stage", PromptConfig())


@pytest.mark.covers(104)
def test_the_second_token_and_the_networks_cost_what_their_sizes_say():
    def count(**changes):
        return sum(parameter.numel() for parameter in hpl(**changes).parameters())

    width = hpl().backbone.width_image
    plain = {"prompts": "none"}
    assert count(**plain) - count(**plain, trt={"dual": False}) == width
    method = hpl(inversion={"heads": 2}, n_inst_tokens=5)
    w, words = 32, 32
    block = (3 * w * w + 3 * w) + (w * w + w) + (4 * w * w + 4 * w) + (4 * w * w + w) + 4 * w
    network = 4 * block + 2 * w + 2 * w + 5 * w + (w * words + words)
    for inversion in (method.invert_image, method.invert_text):
        assert sum(parameter.numel() for parameter in inversion.parameters()) == network


@pytest.mark.covers(110)
def test_a_plain_prompt_learns_nothing_and_tells_nobody_apart(mixed):
    method = hpl(prompts="plain", triplet=FAR)
    names = {name.partition(".")[0] for name, _ in method.named_parameters()}
    assert not names & {"id_tokens", "invert_image", "invert_text"} and not method.config.needs_prompt_stage
    found = method.losses(mixed, "finetune")
    assert set(found) == BASE | {"cic", "tgps", "vgps"}
    # All prompts are the same sentence: chance, and no gradient.
    assert found["cic"].item() == pytest.approx(torch.tensor(6.0).log().item(), rel=1e-5)
    assert reach(found["cic"], method.backbone.image) < 1e-5 < reach(found["tgps"], method.backbone.image)
    sentence_ = method.backbone.encode_text(method.backbone.tokenize(["A photo of a person"])).pooled
    eos = method.backbone.encode_text(mixed.texts["full"]).pooled
    assert found["vgps"].item() == pytest.approx(mean_squares(sentence_.expand(8, -1), eos), rel=1e-4)


@pytest.mark.covers(110)
def test_hard_prompts_are_words_and_the_gradient_passes_to_what_they_were_moved_from(mixed):
    method = hpl(prompts="words")
    method.begin("prompt-stage")
    table = method.backbone.embed_tokens(torch.arange(method.backbone.tokenizer.vocabulary_size)[None])[0]
    seen = method.split(method.see(mixed.image))
    tokens, image = method.tokens_of(mixed.person), method.pseudo_image(seen.tokens)
    text = method.backbone.encode_text(mixed.texts["full"])
    words = method.pseudo_text(text.tokens, mixed.texts["full"].mask)
    raw = method.id_tokens[mixed.person]
    for vectors in (tokens, image, words):
        gap = torch.cdist(vectors.flatten(0, 1), table).min(dim=1).values
        assert gap.max() < 1e-3
    assert torch.cdist(raw.flatten(0, 1), table).min(dim=1).values.min() > 1e-2
    # Each went to its nearest word by cosine.
    cosine = functional.normalize(raw.flatten(0, 1), dim=1) @ functional.normalize(table, dim=1).T
    assert same(tokens.flatten(0, 1), table[cosine.argmax(dim=1)])
    found = method.losses(mixed, "prompt-stage")
    assert grads(found["proto_i2t"], method.id_tokens)[0] > 0
    assert reach(found["ic"], method.invert_image) > 0 and reach(found["ic"], method.invert_text) > 0


@pytest.mark.parametrize("prompts", ["plain", "none"])
def test_without_learnt_tokens_there_are_no_prompt_rows(prompts):
    assert hpl(prompts=prompts).prompt_rows([f"p{number}" for number in range(6)]) == []


def test_features_hold_both_tokens_and_the_pseudo_words(paired):
    method = hpl()
    found = method.features(Batch(image=paired.image))
    assert list(found) == ["embedding", "i2i", "pseudo"]
    assert same(found["i2i"], method.embed_tasks(paired)["i2i"])
    assert same(found["pseudo"], pseudo(method, paired)[0].flatten(1))
    assert list(hpl(prompts="none", trt={"dual": False}).features(paired)) == ["embedding"]
