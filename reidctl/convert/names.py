"""Which code wrote a checkpoint, by the names of its tensors, and what those tensors are called in our methods.

Names are those of the public code at the commits that docs/checkpoints.md lists. A tensor takes the first rule that
fits its whole name; what no rule knows is an error, not something to pass over.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from reidctl.errors import DataError, UsageError

Rule = tuple[str, str]
"""A regular expression for a whole name, and the name (with groups) in our method; for dropped ones, the reason."""

IMAGE, TEXT = "backbone.image.visual.", "backbone.text.text."
# The names of CLIP's text tower, which OpenAI's code keeps beside `visual.` without a prefix.
_TEXT_PART = r"((?:transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection(?:\.weight)?)"
_NOT_WEIGHTS = r"input_resolution|context_length|vocab_size"


@dataclass(frozen=True)
class Form:
    """The names that one public code gives to its weights.

    Attributes:
        name: as `--from` has it.
        method: the method of ours that it becomes.
        says: what it is, for messages.
        rules: see `Rule`.
        dropped: rules of tensors that our method does not hold.
        image_size: (height, width) that the code trains with.
        openai: whether it starts from OpenAI's CLIP, whose activation is QuickGELU.
        statistics: mean and standard deviation of all three channels, None for CLIP's.
        interpolation: how its code resizes images for a test.
    """

    name: str
    method: str
    says: str
    rules: tuple[Rule, ...]
    dropped: tuple[Rule, ...] = ()
    image_size: tuple[int, int] | None = None
    openai: bool = True
    statistics: float | None = None
    interpolation: str = "bilinear"


_CLIP_DROPPED: tuple[Rule, ...] = (
    (r"(?:base_model\.)?(?:logit_scale|logit_bias)", "methods bring their own temperature"),
    (r"(?:base_model\.|text\.)?attn_mask", "the causal mask is computed"),
    (_NOT_WEIGHTS, "a size, not a weight"),
)
_IRRA_TOWERS: tuple[Rule, ...] = (
    (r"(?:base_model\.)?visual\.(.*)", rf"{IMAGE}\1"),
    (rf"(?:base_model\.)?{_TEXT_PART}", rf"{TEXT}\1"),
)
_CLIP_REID: tuple[Rule, ...] = (
    (r"image_encoder\.(.*)", rf"{IMAGE}\1"),
    (r"text_encoder\.(.*)", rf"{TEXT}\1"),
    (r"prompt_learner\.cls_ctx", "id_tokens"),
    (r"cv_embed", "camera_vectors"),
)
_CLIP_REID_DROPPED: tuple[Rule, ...] = (
    (r"prompt_learner\.token_(?:prefix|suffix)", "embeddings of the sentence's words, read for the table of words"),
    (r"(?:text_encoder\.)?attn_mask", "the causal mask is computed"),
)
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "irra",
            "irra",
            "IRRA (anosorae/IRRA)",
            (
                *_IRRA_TOWERS,
                (r"classifier\.(weight|bias)", r"classifier.\1"),
                (r"(cross_attn\..*|ln_(?:pre_t|pre_i|post)\..*)", r"mlm.\1"),
                (r"cross_modal_transformer\.(.*)", r"mlm.transformer.\1"),
                (r"mlm_head\.(dense|ln)\.(.*)", r"mlm.\1.\2"),
                (r"mlm_head\.fc\.(.*)", r"mlm.classifier.\1"),
            ),
            _CLIP_DROPPED,
            image_size=(384, 128),
        ),
        Form(
            "rde",
            "rde",
            "RDE (QinYang79/RDE)",
            (
                *_IRRA_TOWERS,
                (r"visul_emb_layer\.fc\.(.*)", r"tse_image.linear.\1"),
                (r"visul_emb_layer\.mlp\.layers\.0\.(.*)", r"tse_image.hidden.\1"),
                (r"visul_emb_layer\.mlp\.bns\.0\.(.*)", r"tse_image.norm.\1"),
                (r"visul_emb_layer\.mlp\.layers\.1\.(.*)", r"tse_image.out.\1"),
                (r"texual_emb_layer\.linear\.(.*)", r"tse_text.linear.\1"),
                (r"texual_emb_layer\.mlp\.layers\.0\.(.*)", r"tse_text.hidden.\1"),
                (r"texual_emb_layer\.mlp\.bns\.0\.(.*)", r"tse_text.norm.\1"),
                (r"texual_emb_layer\.mlp\.layers\.1\.(.*)", r"tse_text.out.\1"),
            ),
            (
                *_CLIP_DROPPED,
                (r"visul_emb_layer\.linear\..*", "its code never calls this layer"),
                (r"(?:visul|texual)_emb_layer\.mlp\.bns\.1\..*", "its code never calls this norm"),
            ),
            image_size=(384, 128),
        ),
        Form(
            "mllm4text",
            "clip",
            "MLLM4Text-ReID or another CLIP trained on LUPerson (IRRA's towers without heads)",
            _IRRA_TOWERS,
            _CLIP_DROPPED,
            image_size=(384, 128),
        ),
        Form(
            "clip-reid",
            "clip-reid",
            "CLIP-ReID (Syliz517/CLIP-ReID)",
            (
                *_CLIP_REID,
                (r"bottleneck_proj\.(.*)", r"necks.0.proj.norm.\1"),
                (r"bottleneck\.(.*)", r"necks.0.hidden.norm.\1"),
                (r"classifier_proj\.(.*)", r"necks.0.proj.classifier.\1"),
                (r"classifier\.(.*)", r"necks.0.hidden.classifier.\1"),
            ),
            _CLIP_REID_DROPPED,
            image_size=(256, 128),
            statistics=0.5,
        ),
        Form(
            "mta-clip",
            "mta-clip",
            "our own `mta-clip`, or CLIP-ReID's names with prompts and heads of each dataset",
            (
                (r"((?:backbone|context|necks|sga)\..*|id_tokens|camera_vectors)", r"\1"),
                *_CLIP_REID,
                (r"prompt_learner\.(shared|domain)_ctx", r"context.\1"),
                (r"bottleneck_proj\.(\d+)\.(.*)", r"necks.\1.proj.norm.\2"),
                (r"bottleneck\.(\d+)\.(.*)", r"necks.\1.hidden.norm.\2"),
                (r"classifier_proj\.(\d+)\.(.*)", r"necks.\1.proj.classifier.\2"),
                (r"classifier\.(\d+)\.(.*)", r"necks.\1.hidden.classifier.\2"),
            ),
            _CLIP_REID_DROPPED,
            image_size=(256, 128),
            statistics=0.5,
        ),
        Form(
            "open-clip",
            "clip",
            "a plain CLIP (OpenAI, open_clip)",
            (
                (r"visual\.(.*)", rf"{IMAGE}\1"),
                (r"text\.(?!attn_mask)(.*)", rf"{TEXT}\1"),
                (_TEXT_PART, rf"{TEXT}\1"),
            ),
            _CLIP_DROPPED,
            openai=False,
            interpolation="bicubic",
        ),
    )
}
_HEADS = ("classifier.", "cross_attn.", "mlm_head.", "cross_modal_transformer.")


@dataclass(frozen=True)
class Renamed:
    """Tensors under the names of our method.

    Attributes:
        weights: tensors by our names.
        dropped: reasons by the names of the file.
        kept_aside: dropped tensors by the names of the file.
    """

    weights: dict[str, Tensor]
    dropped: dict[str, str]
    kept_aside: dict[str, Tensor] = field(default_factory=dict)


def form_of(weights: Mapping[str, Tensor], asked: str, where: str) -> Form:
    """Return the form of a checkpoint: the one asked for, or with `auto` the one that its names show.

    Raises:
        UsageError: an unknown form.
        DataError: names that no form has, or a CLIP without a Vision Transformer.
    """
    if asked not in ("auto", *FORMS):
        raise UsageError(f"`--from {asked}` is not known.", hint=f"One of: auto, {', '.join(FORMS)}.")
    _require_vit(weights, where)
    name = asked if asked != "auto" else _detect(weights)
    if not name:
        raise DataError(
            f"{where} holds {len(weights)} tensors of no known code (first: {', '.join(list(weights)[:3])}).",
            hint=f"Known are {', '.join(FORMS)}; docs/checkpoints.md lists the names of each.",
        )
    return FORMS[name]


def _detect(weights: Iterable[str]) -> str:
    names = tuple(weights)

    def some(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if some("visul_emb_layer.", "texual_emb_layer."):
        return "rde"
    if some("image_encoder."):
        return "mta-clip" if some("prompt_learner.shared_ctx", "prompt_learner.domain_ctx") else "clip-reid"
    if some("backbone.image.") and some("necks."):
        return "mta-clip"
    if some(*_HEADS) and some("base_model.visual.", "visual."):
        return "irra"
    if some("base_model.visual."):
        return "mllm4text"
    return "open-clip" if some("visual.") else ""


def _require_vit(weights: Iterable[str], where: str) -> None:
    resnet = [name for name in weights if re.search(r"(?:^|\.)(?:visual|image_encoder)\.layer\d\.", name)]
    if resnet:
        raise DataError(
            f"{where} has a ResNet image tower ({len(resnet)} tensors such as {resnet[0]}); there is none here.",
            hint="Convert the checkpoint of a Vision Transformer.",
        )


def rename(weights: Mapping[str, Tensor], form: Form, where: str) -> Renamed:
    """Return the tensors by our names, as float32 where they are fractions.

    Raises:
        DataError: names that the form does not have, with their number, or two names for one tensor of ours.
    """
    found: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for name, value in weights.items():
        ours = _first(name, form.rules)
        if ours is not None:
            if ours in found:
                raise DataError(f"{where} holds two tensors for `{ours}`, the second is `{name}`.")
            found[ours] = value.float() if value.is_floating_point() else value
        elif (reason := _first(name, form.dropped)) is not None:
            dropped[name] = reason
        else:
            unknown.append(name)
    _refuse_unknown(unknown, len(weights), form, where)
    return Renamed(found, dropped, {name: weights[name] for name in dropped})


def _first(name: str, rules: Sequence[Rule]) -> str | None:
    """What the first fitting rule makes of a name."""
    for pattern, result in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(result)
    return None


def _refuse_unknown(unknown: Sequence[str], count: int, form: Form, where: str) -> None:
    if not unknown:
        return
    more = ", ..." if len(unknown) > 3 else ""
    raise DataError(
        f"{len(unknown)} of the {count} tensors in {where} have no place in {form.says}: "
        f"{', '.join(unknown[:3])}{more}.",
        hint=f"Give another --from ({', '.join(FORMS)}), or take these tensors out of the file.",
    )
