from dataclasses import replace

import pytest
import torch
from conftest import write_dataset
from methods.test_method_contract import model, training_batch

from reidctl import losses
from reidctl.batch import Tokens
from reidctl.methods.irra import mask_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("irra") / "blocks", people=6)


def test_masking_hides_words_only_and_at_least_one_per_text(folder):
    method = model("irra")
    tokens = training_batch(method, folder).texts["full"]
    tokenizer = method.backbone.tokenizer
    torch.manual_seed(0)
    masked, labels = mask_tokens(tokens, method.backbone, 0.01)
    chosen = labels >= 0
    assert chosen.any(dim=1).all()
    assert not (chosen & ~tokens.mask).any()
    assert not (chosen & ((tokens.ids == tokenizer.start_id) | (tokens.ids == tokenizer.end_id))).any()
    assert torch.equal(labels[chosen], tokens.ids[chosen])
    assert torch.equal(masked.ids[~chosen], tokens.ids[~chosen])


def test_masking_follows_80_10_10(folder):
    method = model("irra")
    tokens = training_batch(method, folder).texts["full"]
    torch.manual_seed(0)
    kinds = torch.zeros(3)
    for _ in range(300):
        masked, labels = mask_tokens(tokens, method.backbone, 0.5)
        chosen = labels >= 0
        hidden = (masked.ids == method.backbone.tokenizer.mask_id) & chosen
        kept = (masked.ids == labels) & chosen
        kinds += torch.tensor([hidden.sum(), kept.sum(), (chosen & ~hidden & ~kept).sum()])
    assert torch.allclose(kinds / kinds.sum(), torch.tensor([0.8, 0.1, 0.1]), atol=0.01)


def test_the_masked_caption_quirk_decides_what_sdm_sees(folder):
    """Published code masks in place, so SDM sees the masked caption; the switch gives it the clean one."""
    for quirk in (True, False):
        method = model("irra", masked_caption_everywhere=quirk)
        batch = training_batch(method, folder)
        torch.manual_seed(5)
        found = method.losses(batch, "finetune")["sdm"]
        torch.manual_seed(5)
        masked, _ = mask_tokens(batch.texts["full"], method.backbone, method.config.mask_rate)
        image = method.backbone.encode_image(batch.image).cls[:, 0]
        expected = {
            seen: losses.sdm(image, method.backbone.encode_text(tokens).pooled, batch.person, temperature=0.02)
            for seen, tokens in {True: masked, False: batch.texts["full"]}.items()
        }
        assert torch.allclose(found, expected[quirk])
        assert not torch.allclose(found, expected[not quirk])


@pytest.mark.covers(45)
def test_one_classifier_serves_both_modalities(folder):
    method = model("irra", weights={"sdm": 0.0, "mlm": 0.0})
    batch = training_batch(method, folder)
    image = method.backbone.encode_image(batch.image).cls[:, 0]
    text = method.backbone.encode_text(batch.texts["full"]).pooled
    logits = [features @ method.classifier.weight.T + method.classifier.bias for features in (image, text)]
    expected = sum(torch.nn.functional.cross_entropy(each, batch.person) for each in logits) / 2
    assert torch.allclose(method.losses(batch, "finetune")["id"], expected)


@pytest.mark.covers(16)
def test_images_without_a_caption_enter_the_identity_loss_and_nothing_else(folder):
    method = model("irra")
    whole = training_batch(method, folder)
    has_text = torch.arange(len(whole)) % 3 != 1
    words = whole.texts["full"]
    mixed = replace(whole, texts={"full": Tokens(words.ids[has_text], words.mask[has_text])}, has_text=has_text)
    found, alone = {}, {}
    for kept, batch in ((found, mixed), (alone, mixed.pairs())):
        torch.manual_seed(3)
        kept |= method.losses(batch, "finetune")
    assert torch.allclose(found["sdm"], alone["sdm"]) and torch.allclose(found["mlm"], alone["mlm"])
    image = method.backbone.encode_image(whole.image).cls[:, 0]
    every = losses.cross_entropy(method.classifier(image), whole.person)
    captioned = losses.cross_entropy(method.classifier(image[has_text]), whole.person[has_text])
    assert torch.allclose(found["id"] - alone["id"], (every - captioned) / 2, atol=1e-5)
    assert not torch.allclose(every, captioned)
