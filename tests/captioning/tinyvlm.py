"""Tiny vision-language checkpoints with random weights, written to disk in the layout that published ones have."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from reidctl.captioning.backends.base import Reply, Request
from reidctl.captioning.backends.local import LocalDescriber
from reidctl.captioning.config import CaptionConfig

FAMILIES = ("qwen2_vl", "llava", "idefics3")
# Their relatives; smolvlm's processor needs the package num2words, although only for videos.
RELATIVES = ("qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision", "smolvlm")
# Layouts of published templates, reduced to what the tests look at: roles, turn ends, image placeholders.
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROMPTS = (
    "Describe the person.",
    "Describe the clothing of the person in the image, in one long sentence, from head to foot.",
    "What is worn?",
)
WORDS = (
    "the person is a young adult man woman with slim build wears red blue shirt trousers and black shoes in an image of"
)
_MARKS: dict[str, list[str]] = {
    "qwen2_vl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                 "<|video_pad|>"],
    "llava": ["<pad>", "<s>", "</s>", "<image>"],
    "idefics3": ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
                 "<global-img>", "<video>"],
}  # fmt: skip
_END = {"qwen2_vl": "<|im_end|>", "llava": "</s>", "idefics3": "<end_of_utterance>"}
_PAD = {"qwen2_vl": "<|endoftext|>", "llava": "<pad>", "idefics3": "<|endoftext|>"}


def save_tokenizer(family: str, folder: Path, *, plain: tuple[str, ...] = (), extra: tuple[str, ...] = ()) -> Any:
    """Write and return a byte-level BPE tokenizer with the family's tokens, `plain` ones and `extra` special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [WORDS] * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in _MARKS[family]])
    inner.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in extra])
    inner.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=_END[family],
        pad_token=_PAD[family],
        additional_special_tokens=[mark for mark in _MARKS[family] if mark not in (_END[family], _PAD[family])],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_vlm(
    family: str,
    folder: Path,
    *,
    template: str | None = "default",
    ends: float | None = 0.2,
    plain: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    width: int = 32,
    layers: int = 2,
) -> Path:
    """Write a checkpoint of a family and return its folder.

    Args:
        family: one of FAMILIES or RELATIVES.
        folder: is made.
        template: chat template; None for none.
        ends: share of the vocabulary that the generation settings name as end tokens, so that the random model stops
            by itself now and then; None for the family's one token.
        plain, extra: added tokens that are not special, like `<think>`, and that are, but have no role.
        width, layers: of the language model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    line = "idefics3" if family == "smolvlm" else "qwen2_vl" if family.startswith("qwen") else family.split("_")[0]
    tokenizer = save_tokenizer(line, folder, plain=plain, extra=extra)
    torch.manual_seed(0)
    make = {"qwen2_vl": _qwen, "llava": _llava, "idefics3": _idefics}[line]
    model, processor = make(family, tokenizer, _text(tokenizer, width, layers))
    if template is not None:
        default = {"qwen2_vl": QWEN_TEMPLATE, "llava": None, "idefics3": IDEFICS_TEMPLATE}[line]
        processor.chat_template = default if template == "default" else template
    _liven(model)
    _set_ends(model, tokenizer, ends)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_picture(path: Path, seed: int, *, size: tuple[int, int] = (48, 96)) -> Path:
    """Write a picture of coarse coloured blocks, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (6, 3, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _text(tokenizer: Any, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _qwen(family: str, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    patch, wide = 16 if family == "qwen3_vl" else 14, text["hidden_size"]
    vision = {"depth": 2, "num_heads": 2, "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {
        "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": wide},
        "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": wide, "window_size": 56,
                       "fullatt_block_indexes": [1]},
        "qwen3_vl": {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": wide,
                     "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }[family]  # fmt: skip
    head = wide // text["num_attention_heads"]
    part = head // 2 // 3
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [head // 2 - 2 * part, part, part]}
    config = getattr(transformers, f"{name}Config")(
        text_config={**text, "head_dim": head, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}
    images = Qwen2VLImageProcessor(patch_size=patch, size=size)
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, Qwen2VLVideoProcessor())
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _llava(family: str, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[family]
    tower = "siglip_vision_model" if family == "llava_onevision" else "clip_vision_model"
    vision = {"model_type": tower, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    grid = {} if family == "llava" else {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config={**text, "model_type": "llama"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        **grid,
    )
    square = {"height": 28, "width": 28}
    if family == "llava_onevision":
        from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

        images = transformers.LlavaOnevisionImageProcessor(size=square, **grid)
        processor = transformers.LlavaOnevisionProcessor(
            images, tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=4, vision_feature_select_strategy="full"
        )
        return transformers.LlavaOnevisionForConditionalGeneration(config), processor
    images = {"llava": transformers.CLIPImageProcessor, "llava_next": transformers.LlavaNextImageProcessor}[family](
        size={"shortest_edge": 28}, crop_size=square, **grid
    )
    processor = getattr(transformers, f"{name}Processor")(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _idefics(family: str, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config={**text, "model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    edges = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    images = getattr(transformers, f"{name}ImageProcessor")(**edges)
    videos = {"video_processor": SmolVLMVideoProcessor(**edges)} if family == "smolvlm" else {}
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, image_seq_len=4, **videos)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _liven(model: Any) -> None:
    """Enlarge the weights: with the usual initial ones every picture gets the same reply."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)


def _set_ends(model: Any, tokenizer: Any, share: float | None) -> None:
    ends = [tokenizer.eos_token_id]
    if share is not None:
        generator = torch.Generator().manual_seed(7)
        order = torch.randperm(len(tokenizer), generator=generator)
        ends += [int(index) for index in order[: int(share * len(tokenizer))] if index != tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Published checkpoints bring sampling settings like these; ours take precedence.
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=3, top_p=0.5, repetition_penalty=1.6)


def settings(*, batch: int = 4, temperature: float = 0.0, max_tokens: int = 24, **more: Any) -> CaptionConfig:
    """Return a caption section for a local model."""
    remote = {"temperature": temperature, "max_tokens": max_tokens} | more.pop("remote", {})
    return CaptionConfig.model_validate({"remote": remote, "local": {"batch": batch}, **more})


def requests(pictures: list[Path], *, prompt: str | None = None, system: str = "Answer in English.") -> list[Request]:
    """Return one request per picture, with prompts of different lengths."""
    return [
        Request(path.stem, str(path), "identity", system, prompt or PROMPTS[number % 3], f"d{number}")
        for number, path in enumerate(pictures)
    ]


def ask(folder: Path, wanted: list[Request], config: CaptionConfig | None = None) -> dict[str, Reply]:
    """Return the reply to each request, by image."""
    replies = list(LocalDescriber(str(folder), config or settings()).describe(wanted))
    assert sorted(reply.request.image_id for reply in replies) == sorted(request.image_id for request in wanted)
    return {reply.request.image_id: reply for reply in replies}


def outcome(reply: Reply) -> tuple[str, str | None, str | None, int, int]:
    """Return all that a reply says but whose it is."""
    return reply.status, reply.text, reply.reason, reply.tokens_in, reply.tokens_out
