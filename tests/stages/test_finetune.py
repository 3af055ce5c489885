import pytest
from conftest import corpus_of, write_dataset

from reidctl.backbones.weights import build
from reidctl.device import resolve_device
from reidctl.errors import DataError
from reidctl.methods.base import build_method
from reidctl.pixels import PixelStore
from reidctl.stages.finetune import _validation


def validate(folder, images_of_split):
    corpus = corpus_of(folder)
    corpus = type(corpus)(
        images_of_split(corpus.images), corpus.captions.iloc[:0], corpus.identity, corpus.clothing, corpus.root
    )
    method = build_method("clip", {}, build("clip:micro"), 4).eval()
    store = PixelStore(corpus.paths(), method.backbone.image_size, cache_bytes=0)
    return _validation(corpus, store, resolve_device("cpu"))(method)


def test_a_split_without_captions_is_validated_from_image_to_image(tmp_path):
    found = validate(write_dataset(tmp_path / "blocks", people=4), lambda images: images)
    assert 0 <= found["rank1"] <= 1 and 0 < found["mAP"] <= 1


def test_a_split_in_which_nothing_can_be_found_is_a_data_error_and_no_epoch_is_chosen(tmp_path):
    folder = write_dataset(tmp_path / "blocks", people=4)
    with pytest.raises(DataError, match="no epoch can be chosen"):
        validate(folder, lambda images: images.assign(camera_id="c0"))
    with pytest.raises(DataError, match="no epoch can be chosen"):
        validate(folder, lambda images: images.assign(role=None))
