"""The fusion module: gate, readings, ablations, null tokens, and what must not leak."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reidctl.layers.fusion import Fusion, gate_balance, gate_entropy

KINDS = ("mamba", "transformer", "simple", "none")
READINGS = ("vector", "pair", "chunks", "tokens")


def inputs(batch: int = 3, image_tokens: int = 5, text_tokens: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "image": (batch, 12),
        "text": (batch, 10),
        "image_tokens": (batch, image_tokens, 12),
        "text_tokens": (batch, text_tokens, 10),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def fusion(**options: object) -> Fusion:
    torch.manual_seed(0)
    settings: dict[str, object] = {"width": 16, "out_dim": 7, "chunks": 2, "heads": 2, **options}
    return Fusion(12, 10, **settings).eval()  # type: ignore[arg-type]


@pytest.mark.covers(56, 137, 139, 141)
@pytest.mark.parametrize(("kind", "sequence"), list(itertools.product(KINDS, READINGS)))
def test_every_kind_and_reading_returns_a_feature_and_weights_that_sum_to_one(kind: str, sequence: str) -> None:
    module, given = fusion(kind=kind, sequence=sequence), inputs()
    alone = [
        module(given["image"], None, image_tokens=given["image_tokens"]),
        module(None, given["text"], text_tokens=given["text_tokens"]),
    ]
    for output in (module(**given), *alone):
        assert output.feature.shape == (3, 7)
        assert output.feature.isfinite().all()
        assert torch.allclose(output.weights.sum(1), torch.ones(3))
    assert module(**given).weights.std(dim=0).min() > 0  # per sample, not per batch


@pytest.mark.covers(136, 137, 138, 139)
def test_vector_reading_equals_the_printed_equations() -> None:
    module, given = fusion(), inputs()
    image, text = given["image"], given["text"]
    ffn = [module.align_image, module.align_text]
    f_image, f_text = (
        (F.gelu(x @ m[0].weight.T + m[0].bias)) @ m[3].weight.T + m[3].bias
        for m, x in zip(ffn, (image, text), strict=True)
    )
    weights = (torch.cat([f_image, f_text], 1) @ module.gate.weight.T).softmax(1)
    f = weights[:, :1] * f_image + weights[:, 1:] * f_text
    for block in module.body.layers:
        f = block.mixer(f[:, None])[:, 0] + f
    expected = f @ module.project.weight.T + module.project.bias
    output = module(image, text)
    assert torch.allclose(output.feature, expected, atol=1e-6)
    assert torch.allclose(output.weights, weights)


@pytest.mark.covers(138)
def test_the_papers_sizes_give_875520_parameters_in_two_mamba_layers() -> None:
    module = Fusion(768, 768)
    assert sum(p.numel() for p in module.body.parameters()) == 875_520
    assert len(module.body.layers) == 2


@pytest.mark.covers(56)
def test_comparators_are_ordered_by_parameters() -> None:
    counts = [
        sum(p.numel() for p in Fusion(768, 768, kind=kind).parameters())
        for kind in ("none", "simple", "mamba", "transformer")
    ]
    assert counts == sorted(counts) and len(set(counts)) == 4
    assert len(Fusion(768, 768, kind="transformer").body.layers) == 4


@pytest.mark.covers(136, 137)
def test_ablations_remove_exactly_their_part() -> None:
    given = inputs()
    plain = fusion(align=False)
    assert isinstance(plain.align_image, torch.nn.Linear) and plain.align_image.out_features == 16
    ungated = fusion(gate=False)
    assert torch.equal(ungated(**given).weights, torch.full((3, 2), 0.5))
    assert not any(name.startswith("gate") for name, _ in ungated.named_parameters())


@pytest.mark.covers(55, 139)
@pytest.mark.parametrize("sequence", ["vector", "chunks"])
def test_zeroed_mamba_equals_the_ablation_without_mamba(sequence: str) -> None:
    mamba, none, given = fusion(sequence=sequence), fusion(kind="none", sequence=sequence), inputs()
    for block in mamba.body.layers:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    none.load_state_dict({name: value for name, value in mamba.state_dict().items() if not name.startswith("body")})
    assert torch.allclose(mamba(**given).feature, none(**given).feature, atol=1e-6)


@pytest.mark.covers(142)
@pytest.mark.parametrize(("kind", "sequence"), list(itertools.product(KINDS, READINGS)))
def test_an_image_encoded_alone_is_bit_identical_whatever_texts_exist(kind: str, sequence: str) -> None:
    module, given = fusion(kind=kind, sequence=sequence), inputs()
    first = module(given["image"], None, image_tokens=given["image_tokens"])
    other = module(
        given["image"],
        None,
        image_tokens=given["image_tokens"],
        text_tokens=torch.full((3, 9, 10), torch.nan),
        text_mask=torch.ones(3, 9, dtype=torch.bool),
    )
    assert torch.equal(first.feature, other.feature)
    assert torch.equal(first.weights, other.weights)


@pytest.mark.covers(142)
@pytest.mark.parametrize(("kind", "sequence"), list(itertools.product(KINDS, READINGS)))
def test_no_sample_sees_another_sample(kind: str, sequence: str) -> None:
    module, given = fusion(kind=kind, sequence=sequence), inputs()
    full = module(**given).feature
    single = module(**{name: value[1:2] for name, value in given.items()}).feature
    assert torch.allclose(full[1:2], single, atol=1e-6)


@pytest.mark.covers(139)
@pytest.mark.parametrize("order", ["text_first", "image_first"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "transformer", "none"])
def test_text_padding_changes_nothing(order: str, bidirectional: bool, kind: str) -> None:
    module = fusion(kind=kind, sequence="tokens", order=order, bidirectional=bidirectional)
    given = inputs()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    padded = module(**given, text_mask=mask).feature
    for row, length in enumerate((4, 2, 1)):
        alone = {name: value[row : row + 1] for name, value in given.items()}
        alone["text_tokens"] = alone["text_tokens"][:, :length]
        assert torch.allclose(padded[row : row + 1], module(**alone).feature, atol=1e-6)


@pytest.mark.covers(56)
@pytest.mark.parametrize("sequence", READINGS)
def test_pytorchs_fast_path_gives_what_the_ordinary_one_gives(sequence: str) -> None:
    """In evaluation without gradients PyTorch runs an encoder layer as one fused operation, padding mask included."""
    module, given = fusion(kind="transformer", sequence=sequence), inputs()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    ordinary = module(**given, text_mask=mask).feature
    assert ordinary.requires_grad
    with torch.no_grad():
        assert torch.allclose(module(**given, text_mask=mask).feature, ordinary, atol=1e-5)


@pytest.mark.covers(139)
@pytest.mark.parametrize("sequence", ["pair", "tokens"])
def test_the_order_matters_to_a_causal_scan(sequence: str) -> None:
    given = inputs()
    a, b = (fusion(sequence=sequence, order=order)(**given).feature for order in ("text_first", "image_first"))
    assert not torch.allclose(a, b)


@pytest.mark.covers(139)
@pytest.mark.parametrize("sequence", READINGS)
def test_every_parameter_of_the_sequence_model_is_trained(sequence: str) -> None:
    module = fusion(sequence=sequence, kind="mamba")
    module(**inputs()).feature.square().sum().backward()
    gradients = {name: p.grad for name, p in module.body.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    without_effect = {name for name, gradient in gradients.items() if not gradient.any()}
    # One token has no recurrence: the state matrix is there, and does nothing.
    assert without_effect == ({name for name in gradients if name.endswith("A_log")} if sequence == "vector" else set())


def test_null_vectors_are_trained_where_they_stand_in() -> None:
    module, given = fusion(sequence="tokens"), inputs()
    module(given["image"], None, image_tokens=given["image_tokens"]).feature.square().sum().backward()
    assert module.null_text.grad.any() and module.null_image.grad is None


def test_missing_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="needs an image or a text"):
        fusion()(None, None)
    with pytest.raises(ValueError, match="tokens"):
        fusion(sequence="tokens")(inputs()["image"], None)
    with pytest.raises(ValueError, match="must divide"):
        fusion(sequence="chunks", chunks=3)


@pytest.mark.covers(57)
@pytest.mark.parametrize(("kind", "sequence"), list(itertools.product(KINDS, READINGS)))
@pytest.mark.parametrize("text_given", [True, False])
def test_bfloat16_and_a_batch_of_one_are_finite(kind: str, sequence: str, text_given: bool) -> None:
    module, given = fusion(kind=kind, sequence=sequence).train(), inputs(batch=1)
    given["text"] = given["text"] if text_given else None  # type: ignore[assignment]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(**given)
    output.feature.float().sum().backward()
    assert output.feature.isfinite().all() and output.weights.isfinite().all()


@pytest.mark.covers(147)
def test_gate_regularisers_by_hand() -> None:
    assert gate_balance(torch.tensor([[0.9, 0.1], [0.7, 0.3]])).item() == pytest.approx(0.09)
    assert gate_balance(torch.tensor([[0.9, 0.1], [0.1, 0.9]])).item() == pytest.approx(0, abs=1e-9)
    assert gate_entropy(torch.full((2, 3), 0.5)).item() == pytest.approx(0, abs=1e-6)
    quarter = 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert gate_entropy(torch.tensor([0.25, 0.75])).item() == pytest.approx(math.log(2) + quarter)
    assert gate_entropy(torch.tensor([0.0, 1.0])).item() == pytest.approx(math.log(2), abs=1e-4)
