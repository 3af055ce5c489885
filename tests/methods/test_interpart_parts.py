"""`interpart` part by part: halves of a batch, phrase tables of several processes, and nothing asked of the device."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import training_batch
from torch.utils._python_dispatch import TorchDispatchMode

from reidctl.backbones.weights import build
from reidctl.batch import Batch, PhraseSets
from reidctl.layers.ppim import one_of_each
from reidctl.methods import interpart
from reidctl.methods.base import build_method
from reidctl.parts import join

MASKED = {"contrast": "phrase_masked"}
GROUND = {"weights": {"ground": 0.5}}
SETTINGS = {
    "default": {},
    "max": {"ppim": {"kind": "max"}},
    "slots": {"ppim": {"kind": "slots"}},
    "sigmoid": {"ppim": {"kind": "sigmoid"}},
    "masked": {"ppim": MASKED},
    "masked, equal words alone": {"ppim": MASKED | {"similar": 1.0}},
    "masked max": {"ppim": MASKED | {"kind": "max"}},
    "span": {"phrase_encode": "span"},
    "masked span": {"phrase_encode": "span", "ppim": MASKED},
    "tal": {"base_loss": "tal"},
    "bias": {"attn_constraint": "bias"},
    "selfself": {"attn_constraint": "selfself"},
    "none": {"attn_constraint": "none"},
    "maps follow": {"align_stop": False},
    "ground": GROUND,
    "ground alone": {"attn_constraint": "none", "weights": {"ground": 0.5, "ppim": 0.0}},
    "no ppim": {"weights": {"ppim": 0.0}},
    "global": {"attn_constraint": "none", "weights": {"ppim": 0.0}},
}
CAPTIONS = (
    "A person wears a red shirt and blue trousers.",
    "A red shirt.",
    "A green coat, black shoes, a white hat and a yellow bag.",
    "Nothing.",
    "Blue trousers, and the red shirt of somebody.",
    "A blue shirt and red trousers.",
)
"""Of one to four phrases, some said by several; the fourth caption's is taken away."""
SILENT = 3


def make(**changes):
    """A method with little of SDM, warm: log(1e-8) and 1 / 0.02 make 3e-6 of a gradient out of an ulp of a feature."""
    torch.manual_seed(0)
    settings = {"temperature": 0.5, **changes, "weights": {"sdm": 0.05} | changes.get("weights", {})}
    method = build_method("interpart", settings, build("clip:micro"), 12)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as after some training
        for parameter in method.ppim.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    return method.train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("interpart-parts") / "blocks", people=12)


def phrases_of(method, numbers) -> PhraseSets:
    """The phrases of captions by number, in a table of their own."""
    sets = method.phrases_of([CAPTIONS[number] for number in numbers])
    silent = torch.tensor([number == SILENT for number in numbers])
    return replace(
        sets,
        index=sets.index.masked_fill(silent[:, None], -1),
        part=sets.part.masked_fill(silent[:, None], -1),
        span=sets.span.masked_fill(silent[:, None, None], 0),
    )


def numbered(rows) -> list[int]:
    return [row % len(CAPTIONS) for row in rows]


def batch_of(method, folder) -> Batch:
    """Twelve images of eight people with two rounds of the captions; a table holds what its captions say."""
    batch, numbers = training_batch(method, folder, range(0, 24, 2)), numbered(range(12))
    texts = {"full": method.backbone.tokenize([CAPTIONS[number] for number in numbers])}
    # `take` leaves out of the table what a caption no longer says.
    sets = phrases_of(method, numbers).take(torch.arange(12))
    return replace(batch, texts=texts, phrases=sets)


def with_tables(method, parts, rows) -> list[Batch]:
    """Parts of a batch, each with a table made of its own captions, as each of several processes makes it."""
    return [replace(part, phrases=phrases_of(method, numbered(some))) for part, some in zip(parts, rows, strict=True)]


def settled(method, monkeypatch, count):
    """Let `ground` draw for image i what does not depend on which images stand beside it; returns whom to ask next."""
    queue: list[int] = []
    order = torch.rand(count, 8, generator=torch.Generator().manual_seed(3))

    def first(mask):
        return mask.float().argmax(dim=1)

    def drawn(named):
        rows = [queue.pop(0) for _ in range(len(named))]
        return order[rows]

    monkeypatch.setattr(interpart, "one_of_each", first)
    monkeypatch.setattr(interpart.torch, "rand_like", drawn)
    return queue


def result(method, batches, queue, rows):
    """Losses of batches that are the parts of one, and the gradients of their weighted sum, by parameter."""
    queue[:] = [row for some in rows for row in some]
    found = method.losses_of(join([method.encode(batch, "finetune") for batch in batches]), "finetune")
    method.zero_grad()
    method.objective(found).backward()
    grads = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}, grads, method.training_report()


ROWS = {"halves": [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]], "uneven": [[1, 2], [3, 9], range(4, 9), [0, 10, 11]]}
"""The second part of `uneven` holds no phrase at all."""


def assert_same(whole, parts):
    assert set(whole[0]) == set(parts[0])
    for name, value in whole[0].items():
        assert parts[0][name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-6), name
    assert set(whole[1]) == set(parts[1])
    away = {name: float((parts[1][name] - grad).norm()) for name, grad in whole[1].items()}
    size = {name: float(grad.norm()) for name, grad in whole[1].items()}
    assert math.hypot(*away.values()) <= 1e-6 * math.hypot(*size.values())
    # No small parameter may hide behind the large ones; biases of keys have no gradient but rounding.
    assert not [name for name in away if away[name] > 1e-5 * size[name] + 1e-6]
    assert parts[2] == pytest.approx(whole[2], rel=1e-5)


@pytest.mark.parametrize(("rows", "tables"), [("halves", "taken"), ("halves", "own"), ("uneven", "own")])
@pytest.mark.parametrize("name", SETTINGS)
def test_parts_encoded_apart_give_the_losses_and_gradients_of_the_whole(name, rows, tables, folder, monkeypatch):
    method = make(**SETTINGS[name])
    batch, split = batch_of(method, folder), ROWS[rows]
    queue = settled(method, monkeypatch, 12)
    order = [row for some in split for row in some]
    whole = result(method, [method.prepare(batch.take(order))], queue, [order])
    if tables == "taken":
        parts = [method.prepare(batch).take(list(some)) for some in split]
    else:
        parts = [method.prepare(part) for part in with_tables(method, [batch.take(list(s)) for s in split], split)]
        assert len({tuple(part.phrases.tokens.ids.flatten().tolist()) for part in parts}) == len(parts)
    assert_same(whole, result(method, parts, queue, split))


def test_without_labels_that_hold_everywhere_two_tables_would_not_give_the_masked_contrast(folder, monkeypatch):
    """The test above can fail: numbers of each part's own table say that different phrases are the same."""
    method = make(**SETTINGS["masked"])
    batch, split = batch_of(method, folder), ROWS["halves"]
    queue = settled(method, monkeypatch, 12)
    whole = result(method, [method.prepare(batch.take([*split[0], *split[1]]))], queue, split)
    parts = [method.prepare(part) for part in with_tables(method, [batch.take(list(s)) for s in split], split)]
    local = [
        replace(part, phrases=replace(part.phrases, label=torch.arange(len(part.phrases.tokens)))) for part in parts
    ]
    found = result(method, local, queue, split)
    assert abs(found[0]["ppim"] - whole[0]["ppim"]) > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_every_part_has_the_same_tensors_whatever_it_holds(name, folder):
    method = make(**SETTINGS[name])
    batch = method.prepare(batch_of(method, folder))
    parts = [method.encode(batch.take(some), "finetune") for some in ([0, 2], [3], [SILENT, SILENT + 6])]
    assert set(parts[0]) == set(parts[1]) == set(parts[2])
    for row in parts[0]:
        assert len({part[row].dtype for part in parts}) == 1 and len({part[row].ndim for part in parts}) == 1
    method.objective(method.losses_of(parts[2], "finetune")).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


# What is asked of the device


class Watch(TorchDispatchMode):
    """Notes what a GPU would have to answer before the program goes on."""

    def __init__(self):
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "multinomial")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if waits or name.startswith(("_unique", "unique")):
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


def asked(method, batch) -> list[str]:
    with Watch() as watch:
        found = method.losses_of(method.encode(batch, "finetune"), "finetune")
        method.objective(found).backward()
    return watch.asked


@pytest.mark.parametrize("name", SETTINGS)
def test_encoding_asks_nothing_of_the_device(name, folder):
    method = make(**SETTINGS[name])
    batch = method.prepare(batch_of(method, folder))
    with Watch() as watch:
        method.encode(batch, "finetune")
    assert watch.asked == []


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "tal"])
def test_a_step_asks_nothing_of_the_device_unless_a_shared_loss_drops_rows(name, folder):
    """`losses.tal` leaves out rows without a wrong answer."""
    method = make(**SETTINGS[name])
    batch = method.prepare(batch_of(method, folder))
    assert asked(method, batch) == []


def test_the_watch_sees_what_a_batch_that_was_not_prepared_asks(folder):
    method = make()
    assert "nonzero" in asked(method, batch_of(method, folder))


# Phrases of parts


def test_a_phrase_has_one_label_in_every_table_and_different_phrases_have_different_ones():
    method = make()
    first = method.phrases_of(["A red shirt and blue trousers.", "A green coat."]).labelled()
    second = method.phrases_of(["Blue trousers, a white hat.", "The red shirt of somebody with very long black hair."])
    second = second.labelled()
    words = [first.label[first.index[0]].tolist(), second.label[second.index[0]].tolist()]
    assert words[0][1] == words[1][0], "blue trousers"
    assert words[0][0] == second.label[second.index[1, 0]], "the red shirt"
    assert len({*first.label.tolist(), *second.label.tolist()}) == len(first.label) + len(second.label) - 2
    assert min(first.label.min(), second.label.min()) >= 0
    assert first.labelled() is first
    assert first.tokens.ids.shape[1] != second.tokens.ids.shape[1], "padding is not part of a phrase"


def test_texts_that_are_taken_keep_their_phrases_and_what_is_known_of_them():
    method = make()
    sets = phrases_of(method, range(6)).located().labelled()
    some = sets.take(torch.tensor([5, 3, 1]))
    assert len(some) == 3 and len(some.tokens) == 3
    for row, text in enumerate((5, 3, 1)):
        for place, number in enumerate(sets.index[text].tolist()):
            taken = int(some.index[row, place])
            assert (taken >= 0) == (number >= 0)
            if number < 0:
                continue
            kept = some.tokens.mask[taken]
            length = int(kept.sum())
            assert torch.equal(some.tokens.ids[taken, :length], sets.tokens.ids[number, :length])
            assert int(sets.tokens.mask[number].sum()) == length and some.label[taken] == sets.label[number]
    assert torch.equal(some.part, sets.part[[5, 3, 1]]) and torch.equal(some.span, sets.span[[5, 3, 1]])
    assert torch.equal(some.present, some.mask.flatten().nonzero().flatten())
    assert some.speaking.tolist() == [0, 2]
    wide = some.index.shape[1]
    assert some.apart.tolist() == [1, wide], "the first caption's two phrases, both ways"
    plain = phrases_of(method, range(6)).take(torch.tensor([SILENT]))
    assert plain.label is None and plain.present is None and len(plain.tokens) == 0 and (plain.index < 0).all()


def test_pairs_of_phrases_are_those_of_one_text_about_different_parts():
    part = torch.tensor([[1, 2, 1, 3], [2, 2, -1, -1]])
    index = torch.tensor([[0, 1, 2, -1], [1, 0, -1, -1]])
    method = make()
    sets = replace(method.phrases_of(["x"]), index=index, part=part).located()
    pairs = [(int(place) // 16, int(place) % 16 // 4, int(place) % 4) for place in sets.apart]
    assert pairs == [(0, 0, 1), (0, 1, 0), (0, 1, 2), (0, 2, 1)]


def test_a_move_takes_along_what_is_known_of_phrases():
    sets = phrases_of(make(), range(6))
    known = sets.located().labelled().to("meta")
    for name in ("index", "part", "span", "label", "present", "speaking", "apart"):
        assert getattr(known, name).device.type == "meta", name
    assert sets.to("meta").label is None and known.tokens.ids.device.type == "meta"


def test_the_drawn_phrase_of_the_grounding_term_is_one_that_the_caption_has():
    mask = torch.tensor([[False, True, False], [True, False, True]])
    drawn = torch.stack([one_of_each(mask) for _ in range(50)])
    assert (drawn[:, 0] == 1).all() and set(drawn[:, 1].tolist()) == {0, 2}
