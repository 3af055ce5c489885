"""Images that have one vector, or one for texts and another for images."""

import numpy as np
import pytest
import torch
from conftest import corpus_of
from twotask import TwoTask, install, made, other_captions

from reidctl.embedding import embed_blank, embed_blank_tasks, embed_gallery, embed_gallery_tasks

CPU = torch.device("cpu")


def test_both_vectors_of_an_image_come_from_one_forward_pass(blocks, monkeypatch):
    install(monkeypatch)
    found = embed_gallery_tasks(made(), corpus_of(blocks), device=CPU, batch=10)
    assert TwoTask.passes == 3 and {task: values.shape[0] for task, values in found.items()} == {"t2i": 24, "i2i": 24}
    assert not np.allclose(found["t2i"], found["i2i"], atol=0.1)
    for values in found.values():
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
    assert embed_gallery(made(), corpus_of(blocks), device=CPU, batch=10).tobytes() == found["t2i"].tobytes()


def test_one_vector_stands_for_both_tasks_and_is_the_same_array(blocks, monkeypatch):
    method, corpus = made(), corpus_of(blocks)
    passes = []
    embed = method.embed_images
    monkeypatch.setattr(method, "embed_images", lambda batch: (passes.append(len(batch)), embed(batch))[1])
    found = embed_gallery_tasks(method, corpus, device=CPU, batch=16)
    assert passes == [16, 8] and found["i2i"] is found["t2i"]
    assert embed_gallery(method, corpus, device=CPU, batch=16).tobytes() == found["t2i"].tobytes()
    blank = embed_blank_tasks(method, corpus, device=CPU)
    assert blank["i2i"] is blank["t2i"] and embed_blank(method, corpus, device=CPU).tobytes() == blank["t2i"].tobytes()


@pytest.mark.parametrize("task", ["t2i", "i2i"])
def test_no_query_text_reaches_either_vector(blocks, monkeypatch, task):
    install(monkeypatch)
    before = embed_gallery_tasks(made(), corpus_of(blocks), device=CPU)[task]
    other_captions(blocks)
    assert embed_gallery_tasks(made(), corpus_of(blocks), device=CPU)[task].tobytes() == before.tobytes()


def test_equal_grey_pictures_share_one_vector_per_task(blocks, monkeypatch):
    install(monkeypatch)
    found = embed_blank_tasks(made(), corpus_of(blocks), device=CPU, batch=5)
    assert TwoTask.passes == 1
    for values in found.values():
        assert values.shape[0] == 24 and (values == values[0]).all()
    assert not np.allclose(found["t2i"][0], found["i2i"][0], atol=0.1)
    assert embed_blank(made(), corpus_of(blocks), device=CPU).tobytes() == found["t2i"].tobytes()


def test_a_gallery_of_no_image_has_no_vectors(blocks):
    corpus = corpus_of(blocks).of_split("train")
    corpus = type(corpus)(corpus.images.iloc[:0], corpus.captions.iloc[:0], [], [], corpus.root)
    assert embed_gallery_tasks(made(), corpus, device=CPU)["i2i"].shape == (0, 0)
