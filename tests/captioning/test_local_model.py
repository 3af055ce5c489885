import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tinyvlm
import torch
from tinyvlm import ask, requests, settings

from reidctl.captioning.backends import local_model
from reidctl.captioning.backends.local import LocalDescriber
from reidctl.errors import DataError, UsageError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tinyvlm.save_vlm(family, folder / family) for family in tinyvlm.FAMILIES}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return [tinyvlm.save_picture(tmp_path / "0.png", 0)]


def test_the_model_is_in_eval_mode_with_sdpa_and_the_log_says_what_it_is(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="reidctl"):
        model, _, _ = local_model.load(str(models["qwen2_vl"]), None, settings().local)
    assert not model.training and model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert "on cpu, float32, 0.1 million parameters" in caplog.text
    half, _, _ = local_model.load(str(models["qwen2_vl"]), None, settings(local={"dtype": "bfloat16"}).local)
    assert half.dtype == torch.bfloat16


def test_bfloat16_is_for_cuda_and_float32_for_the_cpu_unless_told() -> None:
    assert local_model._dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert local_model._dtype("auto", torch.device("cpu")) == torch.float32
    assert local_model._dtype("float16", torch.device("cpu")) == torch.float16


def test_a_folder_is_known_by_name_and_content(models: dict[str, Path], tmp_path: Path) -> None:
    first = LocalDescriber(str(models["llava"]), settings())
    assert (first.name, first.source, first.deferred) == ("hf", "mllm", False)
    assert len(first.model) == len("hf:llava#") + 8 and first.model.startswith("hf:llava#")
    (tmp_path / "llava").symlink_to(models["llava"])
    assert LocalDescriber(f"{tmp_path}/llava/", settings()).model == first.model
    other = tinyvlm.save_vlm("llava", tmp_path / "other" / "llava", width=64)
    assert LocalDescriber(str(other), settings()).model != first.model
    (tmp_path / "longer").mkdir()
    longer = copy(models["llava"], tmp_path / "longer" / "llava")
    with (longer / "model.safetensors").open("ab") as stream:
        stream.write(b" ")
    assert LocalDescriber(str(longer), settings()).model != first.model


@pytest.mark.parametrize("place", [0, 3 * 2**20, -1], ids=["first", "middle", "last"])
def test_other_weights_of_the_same_size_are_another_model(tmp_path: Path, place: int) -> None:
    names = []
    for changed in (False, True):
        folder = tmp_path / str(changed) / "m"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        weights = bytearray(6 * 2**20)
        weights[place] = changed
        (folder / "model.safetensors").write_bytes(weights)
        names.append(local_model.fingerprint(folder))
    # what lies in the middle alone is not looked at: a known limit
    assert (names[0] == names[1]) == (place == 3 * 2**20)


def test_a_hub_id_is_recorded_and_loaded_with_the_commit_in_the_cache(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Path]
) -> None:
    import huggingface_hub.constants

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "models--owner--name"
    (root / "snapshots").mkdir(parents=True)
    copy(models["llava"], root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    describer = LocalDescriber("owner/name", settings())
    assert describer.model == f"hf:owner/name@{commit}"
    assert LocalDescriber(f"owner/name@{commit}", settings()).model == describer.model
    assert LocalDescriber("owner/name@v1.0", settings()).model == "hf:owner/name@v1.0"
    asked: list[Any] = []
    monkeypatch.setattr("reidctl.captioning.backends.local.load", lambda *args: asked.append(args) or [][0])
    with pytest.raises(IndexError):
        list(describer.describe(requests(pictures)))
    assert asked[0][:2] == ("owner/name", commit)


def test_a_hub_id_is_recorded_with_its_revision() -> None:
    assert LocalDescriber("owner/name@v1.0", settings()).model == "hf:owner/name@v1.0"
    assert LocalDescriber("owner/name", settings()).model == "hf:owner/name"


@pytest.mark.parametrize("name", ["a/b/c", "owner/name@", "https://example.org/x", "a b", "-x/y"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        LocalDescriber(name, settings())


def test_a_hub_id_without_network_says_to_download_it(monkeypatch: pytest.MonkeyPatch, pictures: list[Path]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    describer = LocalDescriber("owner/not-here@abc", settings())
    with pytest.raises(DataError, match="owner/not-here is not on this machine") as caught:
        list(describer.describe(requests(pictures[:1])))
    assert "(no network here)" in str(caught.value)
    assert "`hf download owner/not-here --revision abc`" in caught.value.hint


def test_a_hub_id_that_is_fetched_without_its_commit_is_told(
    monkeypatch: pytest.MonkeyPatch, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("reidctl.captioning.backends.local.local_only", lambda source: source == "owner/here")
    monkeypatch.setattr("reidctl.captioning.backends.local.load", lambda *_: [][0])
    for name in ("owner/not-here", "owner/not-here@v1.0", "owner/here"):
        with pytest.raises(IndexError):
            list(LocalDescriber(name, settings()).describe(requests(pictures)))
    assert ["owner/not-here is fetched now" in line for line in caplog.messages] == [True]


def copy(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.name not in without:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_folders_that_hold_no_usable_model_are_data_errors(
    models: dict[str, Path], tmp_path: Path, pictures: list[Path]
) -> None:
    source = models["qwen2_vl"]
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = copy(source, tmp_path / "pickled", without=("model.safetensors",))
    torch.save({}, pickled / "pytorch_model.bin")
    silent = copy(source, tmp_path / "silent", without=("processor_config.json",))
    mute = copy(source, tmp_path / "mute", without=("tokenizer.json", "tokenizer_config.json"))
    cut = copy(source, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    garbled = copy(source, tmp_path / "garbled")
    (garbled / "config.json").write_text("{")
    for folder, message in (
        (tmp_path / "none", "There is no folder"),
        (empty, "it has no config.json"),
        (pickled, "no weights in safetensors files, only pickled ones"),
        (silent, "has no processor"),
        (mute, "its files are missing or damaged"),
        (cut, "cannot be read"),
        (garbled, "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            ask(folder, requests(pictures[:1]))


def test_a_text_only_model_is_a_data_error(tmp_path: Path, pictures: list[Path]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tinyvlm.save_tokenizer("llava", tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="is a `llama` model, which does not turn an image"):
        ask(tmp_path, requests(pictures[:1]))


def test_weights_that_lack_tensors_are_a_data_error(
    models: dict[str, Path], tmp_path: Path, pictures: list[Path]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(models["llava"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lack 1 tensors"):
        ask(folder, requests(pictures[:1]))


def test_code_that_comes_with_a_model_is_not_run(models: dict[str, Path], tmp_path: Path, pictures: list[Path]) -> None:
    folder = copy(models["llava"], tmp_path / "m")
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tinyvlm.change_json(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.C", "AutoModelForImageTextToText": "modeling_own.M"},
    )
    with pytest.raises(DataError, match="program code of its own"):
        ask(folder, requests(pictures[:1]))
    assert not (tmp_path / "ran").exists()


def test_an_unknown_model_type_asks_for_a_newer_transformers(
    models: dict[str, Path], tmp_path: Path, pictures: list[Path]
) -> None:
    folder = copy(models["llava"], tmp_path / "m")
    tinyvlm.change_json(folder / "config.json", model_type="of_next_year")
    with pytest.raises(UsageError, match="does not know the model type"):
        ask(folder, requests(pictures[:1]))


def test_an_old_transformers_is_named_with_the_version_needed(
    models: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = types.ModuleType("transformers")
    old.__dict__["__version__"] = "4.44.2"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(UsageError, match=r"need transformers 4\.46 or newer; here is 4\.44\.2"):
        ask(models["llava"], requests(pictures[:1]))


def test_a_missing_package_of_a_processor_is_named(
    models: dict[str, Path], tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*args: Any, **options: Any) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(UsageError, match="num2words"):
        ask(models["llava"], requests(pictures[:1]))
