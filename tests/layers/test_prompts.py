import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from reidctl.backbones.weights import build
from reidctl.layers.prompts import PromptTemplate, nearest_words, to_words

WHOLE = "A photo of {id} and {inst} person"
SIZES = {"id": 4, "inst": 3}


@pytest.fixture(scope="module")
def backbones():
    torch.manual_seed(0)
    return {spec: build(spec).eval() for spec in ("clip:micro", "vit-bert:micro")}


@pytest.fixture(params=["clip:micro", "vit-bert:micro"])
def backbone(request, backbones):
    return backbones[request.param]


@pytest.fixture
def clip(backbones):
    return backbones["clip:micro"]


def template(backbone, text=WHOLE, sizes=SIZES, context=None):
    return PromptTemplate(text, sizes, backbone.tokenize, context=context or backbone.context_length)


def numbers(made, sizes=SIZES):
    """Token ids of a prompt, its slots filled with -1 (`id`) and -2 (`inst`): an embedding that is the id itself."""
    slots = {
        name: torch.full((2, sizes[name], 1), float(value))
        for name, value in (("id", -1), ("inst", -2))
        if name in sizes
    }
    prompt = made(lambda ids: ids[..., None].float(), slots, 2)
    assert torch.equal(prompt.embeddings[0], prompt.embeddings[1]) and prompt.mask.all()
    assert prompt.mask.shape == prompt.embeddings.shape[:2]
    return prompt.embeddings[0, :, 0].long().tolist()


@pytest.mark.covers(65)
@pytest.mark.parametrize(
    ("text", "before"),
    [(WHOLE, "a photo of"), ("A photo of a {id} and {inst} person", "a photo of a")],
)
def test_the_words_stand_around_the_slots_in_order_and_the_end_token_is_last(clip, text, before):
    made = template(clip, text)
    ids = numbers(made)
    end = len(before.split()) + 1
    decode = SimpleTokenizer().decode
    assert ids[0] == clip.tokenizer.start_id and ids[-1] == clip.tokenizer.end_id
    assert decode(ids[1:end]).strip() == before
    assert ids[end : end + 4] == [-1] * 4
    assert decode(ids[end + 4 : end + 5]).strip() == "and"
    assert ids[end + 5 : end + 8] == [-2] * 3
    assert decode(ids[end + 8 : -1]).strip() == "person"
    assert len(ids) == made.length == end + 10 < 77
    assert made.places("id") == range(end, end + 4) and made.places("inst") == range(end + 5, end + 8)
    assert made.places("other") == range(0)


def test_a_slot_of_size_zero_vanishes_and_a_slot_may_be_first_or_last(clip):
    before, after = (clip.tokenize([words]).ids[0].tolist() for words in ("a photo of and", "person"))
    assert numbers(template(clip, WHOLE, {"id": 0, "inst": 3}), {"inst": 3}) == [*before[:-1], -2, -2, -2, *after[1:]]
    start, end = clip.tokenizer.start_id, clip.tokenizer.end_id
    assert numbers(template(clip, "{id}{inst}")) == [start, *[-1] * 4, *[-2] * 3, end]


@pytest.mark.covers(65)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A {person}", "person"),
        ("A {id} and {id}", "each once"),
        ("A {} person", "slot"),
        ("A {id} " + 60 * "red ", "tokens"),
    ],
)
def test_unknown_and_repeated_slots_and_sentences_that_do_not_fit_are_refused(clip, text, said):
    with pytest.raises(ValueError, match=said):
        template(clip, text)


def test_a_prompt_that_just_fits_is_taken_and_one_token_more_is_not(clip):
    length = template(clip).length
    assert template(clip, context=length).length == length
    with pytest.raises(ValueError, match=f"tokens or more, the text tower reads {length - 1}"):
        template(clip, context=length - 1)


def test_a_sentence_without_slots_that_is_too_long_is_refused_too(clip):
    with pytest.raises(ValueError, match="tokens"):
        template(clip, 60 * "red ", {})


@pytest.mark.covers(70, 110)
def test_a_template_of_words_alone_is_the_tokenised_sentence(backbone):
    text = "A photo of a person"
    prompt = template(backbone, text, {})(backbone.embed_tokens, {}, 3)
    tokens = backbone.tokenize([text])
    assert torch.equal(prompt.embeddings, backbone.embed_tokens(tokens.ids).expand(3, -1, -1))
    found = backbone.encode_embedded(prompt.embeddings, prompt.mask).pooled
    torch.testing.assert_close(found, backbone.encode_text(tokens).pooled.expand(3, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.covers(70)
def test_slots_filled_with_the_embeddings_of_words_give_the_feature_of_the_sentence(backbone):
    filled = {"id": "tall young", "inst": "red blue"}
    ids = {name: backbone.tokenize([words]).ids[:, 1:-1] for name, words in filled.items()}
    made = template(backbone, WHOLE, {name: value.shape[1] for name, value in ids.items()})
    prompt = made(backbone.embed_tokens, {name: backbone.embed_tokens(value) for name, value in ids.items()}, 1)
    tokens = backbone.tokenize([WHOLE.format(**filled)])
    assert prompt.embeddings.shape[1] == tokens.ids.shape[1]
    found = backbone.encode_embedded(prompt.embeddings, prompt.mask).pooled
    assert torch.equal(found, backbone.encode_text(tokens).pooled)
    other = backbone.encode_text(backbone.tokenize([WHOLE.format(id="red blue", inst="tall young")])).pooled
    assert not torch.allclose(found, other, atol=1e-4)


def test_each_row_of_a_batch_gets_its_own_slots_and_the_gradient_reaches_them(clip):
    slots = {name: torch.randn(2, size, clip.width_text, requires_grad=True) for name, size in SIZES.items()}
    prompt = template(clip)(clip.embed_tokens, slots, 2)
    pooled = clip.encode_embedded(prompt.embeddings, prompt.mask).pooled
    gradients = torch.autograd.grad(pooled[0].square().sum(), list(slots.values()))
    for gradient in gradients:
        assert (gradient[0].abs().amax(dim=1) > 0).all() and not gradient[1].any()


def test_the_nearest_words_are_those_of_a_loop_over_all_words_and_of_equal_ones_the_lower_id():
    generator = torch.Generator().manual_seed(0)
    vectors, table = torch.randn(5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    table[13] = 2 * table[4]  # the same direction: the same cosine
    vectors[0] = table[4]
    ids, cosines = nearest_words(vectors, table, count=3, block=2)
    for row, vector in enumerate(vectors):
        scored = [float(vector @ word / vector.norm() / word.norm()) for word in table]
        order = sorted(range(20), key=lambda word: (-round(scored[word], 5), word))[:3]
        assert ids[row].tolist() == order
        assert cosines[row].tolist() == pytest.approx([scored[word] for word in order], abs=1e-5)
    assert ids[0, :2].tolist() == [4, 13]
    empty = nearest_words(torch.zeros(0, 8), table, count=3)
    assert [part.shape for part in empty] == [(0, 3), (0, 3)]


@pytest.mark.covers(110)
def test_a_vector_moved_to_its_nearest_word_is_that_word_and_its_gradient_passes_unchanged():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(20, 8, generator=generator)
    vectors = torch.randn(2, 3, 8, generator=generator).requires_grad_()
    moved = to_words(vectors, table)
    ids, _ = nearest_words(vectors.detach().flatten(0, 1), table)
    torch.testing.assert_close(moved.detach(), table[ids[:, 0]].view(2, 3, 8))
    pull = torch.randn(2, 3, 8, generator=generator)
    assert torch.equal(torch.autograd.grad((moved * pull).sum(), vectors)[0], pull)
