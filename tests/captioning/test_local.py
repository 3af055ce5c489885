import base64
import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinyvlm
import torch
from PIL import Image
from tinyvlm import ask, outcome, requests, settings

from reidctl.captioning.backends import local
from reidctl.captioning.backends.base import Request, make_describer
from reidctl.captioning.backends.local import LocalDescriber
from reidctl.captioning.backends.local_prompt import ChatPrompts
from reidctl.captioning.backends.picture import data_url
from reidctl.errors import UsageError

SIZES = ((48, 96), (40, 160), (64, 64), (300, 500))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tinyvlm.save_vlm(family, folder / family) for family in tinyvlm.FAMILIES}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [tinyvlm.save_picture(folder / f"{seed}.png", seed, size=SIZES[seed % 4]) for seed in range(8)]


@pytest.mark.covers(132)
@pytest.mark.parametrize("family", tinyvlm.FAMILIES)
def test_a_batch_gives_exactly_the_replies_of_single_runs(
    family: str, models: dict[str, Path], pictures: list[Path]
) -> None:
    wanted = requests(pictures[:3])
    together = ask(models[family], wanted, settings(batch=3))
    for request in wanted:
        alone = ask(models[family], [request], settings(batch=1))[request.image_id]
        assert outcome(together[request.image_id]) == outcome(alone)
    assert all(reply.status != "failed" for reply in together.values())
    # padding was needed, so that the comparison means something
    assert len({reply.tokens_in for reply in together.values()}) > 1


@pytest.mark.covers(132)
@pytest.mark.parametrize("family", tinyvlm.RELATIVES)
def test_a_batch_of_a_related_model_does_too(
    family: str, tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "smolvlm":
        monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
    folder = tinyvlm.save_vlm(family, tmp_path / family)
    test_a_batch_gives_exactly_the_replies_of_single_runs(family, {family: folder}, pictures)


@pytest.mark.parametrize("family", tinyvlm.FAMILIES)
def test_the_reply_is_what_a_loop_over_the_logits_finds(
    family: str, models: dict[str, Path], pictures: list[Path]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(models[family]).eval()
    processor = AutoProcessor.from_pretrained(models[family])
    ends = set(model.generation_config.eos_token_id)
    for request in requests(pictures[:2]):
        text = ChatPrompts(processor).text(request.system, request.prompt, image=True)
        inputs = processor(text=[text], images=[[Image.open(request.image_path)]], return_tensors="pt")
        start, new = inputs["input_ids"], []
        while len(new) < 24 and not ends & set(new):
            ids = torch.cat([start, torch.tensor([new], dtype=torch.long)], dim=1)
            mask = torch.ones_like(ids)
            extra = {"mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(new)))} if (
                "mm_token_type_ids" in inputs
            ) else {}  # fmt: skip
            with torch.no_grad():
                logits = model(**{**inputs, **extra, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
        reply = ask(models[family], [request])[request.image_id]
        assert (reply.tokens_in, reply.tokens_out) == (start.shape[1], len(new))
        if ends & set(new) and (expected := processor.tokenizer.decode(new[:-1], skip_special_tokens=True).strip()):
            assert (reply.status, reply.text) == ("ok", expected)


def test_the_replies_depend_on_the_picture(models: dict[str, Path], pictures: list[Path]) -> None:
    replies = ask(models["qwen2_vl"], requests(pictures, prompt="Describe the person."))
    assert len({outcome(reply)[1:3] + outcome(reply)[4:] for reply in replies.values()}) > 4
    assert sum(reply.status == "ok" for reply in replies.values()) >= 2


def test_one_bad_image_fails_alone(models: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    # Qwen's processor refuses a side ratio of 200 and more: a picture that can be read and still not be used
    Image.new("RGB", (512, 2)).save(tmp_path / "line.png")
    bad = [tmp_path / "broken.png", tmp_path / "line.png", tmp_path / "missing.png"]
    good = ask(models["qwen2_vl"], requests(pictures[:3], prompt="a"))
    wanted = requests([pictures[0], bad[0], pictures[1], bad[1], bad[2], pictures[2]], prompt="a")
    replies = ask(models["qwen2_vl"], wanted, settings(batch=6))
    assert [replies[path.stem].status for path in bad] == ["failed"] * 3
    assert "cannot be read" in str(replies["broken"].reason) and "ratio" in str(replies["line"].reason)
    assert [outcome(replies[path.stem]) for path in pictures[:3]] == [outcome(good[p.stem]) for p in pictures[:3]]


@pytest.mark.parametrize("family", tinyvlm.FAMILIES)
def test_requests_without_an_image_share_a_batch_with_others(
    family: str, models: dict[str, Path], pictures: list[Path]
) -> None:
    wanted = requests(pictures[:2])
    wanted.insert(1, Request("words", "", "neutral", "", "Take the colours out of: red shirt.", "n"))
    replies = ask(models[family], wanted, settings(batch=3))
    alone = ask(models[family], [wanted[1]])["words"]
    assert outcome(replies["words"]) == outcome(alone) and alone.status != "failed"
    assert alone.tokens_in < replies["0"].tokens_in


def fail_above(size: int, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None = None) -> list[int]:
    """Make generate run out of memory for more than `size` rows; return the list of all sizes that are tried."""
    tried: list[int] = []
    load = local.load

    def loaded(*args: Any) -> Any:
        model, processor, device = load(*args)
        generate = model.generate

        def limited(**inputs: Any) -> Any:
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > size:
                raise (error or torch.cuda.OutOfMemoryError)("CUDA out of memory. Tried to allocate 2 GiB.")
            return generate(**inputs)

        model.generate = limited
        return model, processor, device

    monkeypatch.setattr(local, "load", loaded)
    return tried


def test_out_of_memory_halves_the_batch_and_goes_on(
    models: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(pictures)
    whole = ask(models["llava"], wanted)
    tried = fail_above(2, monkeypatch)
    replies = ask(models["llava"], wanted, settings(batch=5))
    # 5 into 3 and 2, 3 into 2 and 1; the last three had been read as one batch before that was known
    assert tried == [5, 3, 2, 1, 2, 2, 1]
    assert {name: outcome(reply) for name, reply in replies.items()} == {n: outcome(r) for n, r in whole.items()}


def test_a_model_that_never_fits_says_so(
    models: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(0, monkeypatch)
    with pytest.raises(UsageError, match="does not fit into the memory of cpu"):
        ask(models["llava"], requests(pictures))


def test_a_reply_that_ran_into_the_token_limit_is_rejected(tmp_path: Path, pictures: list[Path]) -> None:
    folder = tinyvlm.save_vlm("llava", tmp_path / "endless", ends=None)
    reply = ask(folder, requests(pictures[:1]), settings(max_tokens=5))["0"]
    assert (reply.status, reply.tokens_out) == ("rejected", 5)
    assert reply.reason == "the reply breaks off: it ran into max_tokens"


def test_sampled_replies_depend_neither_on_order_nor_on_neighbours(
    models: dict[str, Path], pictures: list[Path]
) -> None:
    wanted = requests(pictures)
    config = settings(batch=8, temperature=0.7)
    first = ask(models["qwen2_vl"], wanted, config)
    turned = ask(models["qwen2_vl"], wanted[::-1], settings(batch=3, temperature=0.7))
    assert {name: outcome(reply) for name, reply in first.items()} == {n: outcome(r) for n, r in turned.items()}
    for change in (replace(wanted[0], attempt=2), replace(wanted[0], kind="clothing")):
        assert outcome(ask(models["qwen2_vl"], [change], config)["0"]) != outcome(first["0"])
    assert outcome(ask(models["qwen2_vl"], wanted, config.model_copy(update={"seed": 5}))["0"]) != outcome(first["0"])


def test_sampling_draws_from_the_softmax_of_logits_over_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows, seeds = 4000, list(range(4000))
    scores = local._GumbelNoise(seeds, 0.5, torch.device("cpu"))(torch.empty(rows, 0), logits.repeat(rows, 1))
    found = torch.bincount(scores.argmax(1), minlength=4) / rows
    assert torch.allclose(found, torch.softmax(logits / 0.5, 0), atol=0.025)  # three standard errors


def say(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make generate return `text` in the model's own tokens."""
    load = local.load

    def loaded(*args: Any) -> Any:
        model, processor, device = load(*args)
        end = model.config.text_config.eos_token_id
        new = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        model.generate = lambda **inputs: torch.cat([inputs["input_ids"], torch.tensor([new])], dim=1)
        return model, processor, device

    monkeypatch.setattr(local, "load", loaded)


@pytest.fixture(scope="module", params=["letters", "plain", "extra"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which the marks of reasoning are letters, added tokens, or special tokens."""
    marks = {} if request.param == "letters" else {request.param: ("<think>", "</think>", "<|unused|>")}
    return tinyvlm.save_vlm("llava", tmp_path_factory.mktemp("thinkers") / request.param, ends=None, **marks)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("A tall man.", "A tall man."),
        ("<think>A man? Yes.\nTall.</think>\n\nA tall man.", "A tall man."),
        ("It is a man.</think>A tall man.", "A tall man."),
        ("A tall <think>or not?</think>man.", "A tall man."),
        ("<think>A man, and", "the reply is nothing but reasoning"),
        ("<think></think>", "the reply is empty"),
        ('```json\n{"description": "A tall man."}\n```', "A tall man."),
        ('{"description": "A tall', "the reply is broken JSON"),
        (" ", "the reply is empty"),
    ],
)
def test_the_answer_is_taken_out_of_what_the_model_says(
    said: str, expected: str, thinker: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(said + "<|unused|>" * (thinker.name == "extra"), monkeypatch)
    reply = ask(thinker, requests(pictures[:1]))["0"]
    assert (reply.text or reply.reason) == expected
    assert (reply.status == "ok") == (reply.text is not None)


def test_reasoning_that_the_template_opens_must_be_closed(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tinyvlm.QWEN_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    folder = tinyvlm.save_vlm("qwen2_vl", tmp_path / "m", template=template, plain=("<think>", "</think>"), ends=None)
    say("A man, I think.", monkeypatch)
    assert ask(folder, requests(pictures[:1]))["0"].reason == "the reply is nothing but reasoning"


def test_a_start_token_that_the_template_writes_is_not_added_again(tmp_path: Path, pictures: list[Path]) -> None:
    from tokenizers import Tokenizer, processors

    counts = []
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}"
    for start in ("", "<s>"):
        folder = tinyvlm.save_vlm("llava", tmp_path / f"m{start[1:2]}", template=start + template)
        inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = [("<s>", inner.token_to_id("<s>"))]
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=added)
        inner.save(str(folder / "tokenizer.json"))
        tinyvlm.change_json(folder / "tokenizer_config.json", bos_token="<s>")
        counts.append(ask(folder, requests(pictures[:1]))["0"].tokens_in)
    assert counts[0] == counts[1]


def test_a_local_model_sees_the_pictures_that_a_server_gets(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Image.Image] = {}
    encode = local._Speaker._encode

    def watched(self: Any, items: Any) -> Any:
        seen.update({item.request.image_id: item.picture for item in items})
        return encode(self, items)

    monkeypatch.setattr(local._Speaker, "_encode", watched)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (800, 400), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.full((96, 48), 32768, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((96, 48), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.new("RGBA", (48, 96), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    expected = {"turned": (254, 0, 0), "deep": (127, 127, 127), "float": (127, 127, 127), "clear": (255, 255, 255)}
    ask(models["llava"], requests(sorted(tmp_path.iterdir())), settings(remote={"image_side": 200}))
    for name, colour in expected.items():
        assert (seen[name].mode, seen[name].info, dict(seen[name].getexif())) == ("RGB", {}, {})
        assert seen[name].getpixel((8, 8)) == pytest.approx(colour, abs=2)
        path = next(tmp_path.glob(f"{name}.*"))
        assert Image.open(io.BytesIO(base64.b64decode(data_url(str(path), 200)[23:]))).size == seen[name].size
    assert seen["turned"].size == (100, 200)


def test_requests_are_read_one_batch_ahead_at_most(models: dict[str, Path], pictures: list[Path]) -> None:
    read: list[str] = []

    def stream() -> Iterator[Request]:
        for request in requests(pictures):
            read.append(request.image_id)
            yield request

    replies = LocalDescriber(str(models["llava"]), settings(batch=2)).describe(stream())
    next(replies)
    assert len(read) == 4
    replies.close()
    assert len(read) == 4


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list of weak references to all models that are loaded from now on."""
    loaded: list[Any] = []
    load = local.load

    def watched(*args: Any) -> Any:
        found = load(*args)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(local, "load", watched)
    return loaded


@pytest.mark.parametrize("family", tinyvlm.FAMILIES)
def test_a_model_is_loaded_at_the_first_request_and_once_for_all_calls(
    family: str, models: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = watch_loads(monkeypatch)
    describer = make_describer(settings(mllm=f"hf:{models[family]}", batch=2))
    assert isinstance(describer, LocalDescriber) and list(describer.describe([])) == [] and not loaded
    first = [outcome(reply) for reply in describer.describe(requests(pictures[:2]))]
    replies = describer.describe(requests(pictures))
    next(replies)
    replies.close()
    assert [outcome(reply) for reply in describer.describe(requests(pictures[:2]))] == first
    assert len(loaded) == 1 and loaded[0]() is not None
    describer.close()
    assert loaded[0]() is None
    assert [outcome(reply) for reply in describer.describe(requests(pictures[:2]))] == first
    assert len(loaded) == 2
    describer.close()
    describer.close()


def test_a_model_is_freed_with_its_describer(
    models: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = watch_loads(monkeypatch)
    describer = LocalDescriber(str(models["llava"]), settings())
    list(describer.describe(requests(pictures[:1])))
    assert loaded[0]() is not None
    del describer
    assert loaded[0]() is None


def test_memory_that_runs_out_outside_the_accelerator_halves_the_batch_too(
    models: dict[str, Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(2, monkeypatch, MemoryError)
    replies = ask(models["llava"], requests(pictures[:3]), settings(batch=3))
    assert all(reply.status != "failed" for reply in replies.values())
