"""`irra`: implicit relation reasoning and aligning (Jiang & Ye 2023, arXiv:2303.12501; code anosorae/IRRA).

SDM aligns the global features, a shared classifier adds identity, and a masked-language head that looks at the image
through cross-attention adds local relations. Only the two towers are used for retrieval.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn

from reidctl import losses
from reidctl.backbones.base import Backbone
from reidctl.batch import Batch, Tokens
from reidctl.methods.base import Method, MethodConfig, unit
from reidctl.parts import Parts


class IrraConfig(MethodConfig):
    """Settings of `irra`; the defaults are those of the published code."""

    temperature: float = 0.02
    """Of SDM; fixed."""
    mask_rate: float = 0.15
    """Share of the word tokens that the masked-language head must guess."""
    masked_caption_everywhere: bool = True
    """Quirk of the published code: masking writes into the caption itself, so that SDM and the identity loss see the
    masked caption too (anosorae/IRRA issues 13, 52: most of the gain comes from it). False uses a copy."""
    mlm_layers: int = 4
    """Depth of the Transformer after the cross-attention."""


class CrossModalHead(nn.Module):
    """Text tokens attend to image tokens, then a Transformer and a vocabulary classifier.

    Args:
        width: joint width D of the towers.
        layers: depth of the Transformer.
        vocabulary: number of token ids.
    """

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        heads = max(width // 64, 1)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_pre_t = nn.LayerNorm(width)
        self.ln_pre_i = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU, batch_first=True)
        self.ln_post = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)
        self.act = QuickGELU()
        self.ln = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, vocabulary)
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        scale = width**-0.5
        projection = scale * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=scale)
            nn.init.normal_(block.attn.out_proj.weight, std=projection)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=projection)
        nn.init.normal_(self.cross_attn.in_proj_weight, std=scale)
        nn.init.normal_(self.cross_attn.out_proj.weight, std=projection)
        nn.init.normal_(self.dense.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.classifier.weight, std=projection)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Return token features (B, L, D) of texts (B, L, D) that looked at images (B, T, D)."""
        seen = self.ln_pre_i(image)
        text = self.cross_attn(self.ln_pre_t(text), seen, seen, need_weights=False)[0]
        seen_text: Tensor = self.ln_post(self.transformer(text))
        return seen_text

    def logits(self, hidden: Tensor) -> Tensor:
        """Return vocabulary logits (M, V) of token features (M, D)."""
        logits: Tensor = self.classifier(self.ln(self.act(self.dense(hidden))))
        return logits


class Irra(Method):
    """SDM + identity + masked-language losses over a CLIP dual encoder."""

    name = "irra"
    summary = "SDM + ID + masked-language head (Jiang & Ye 2023)"
    Config = IrraConfig
    loss_weights: ClassVar = {"sdm": 1.0, "id": 1.0, "mlm": 1.0}
    # The identity loss of an image needs no caption; IRRA itself has only captioned images.
    learns_without_text: ClassVar = True
    config: IrraConfig

    def __init__(self, config: IrraConfig, backbone: Backbone, persons: int) -> None:
        super().__init__(config, backbone, persons)
        self.classifier = nn.Linear(backbone.dim, persons)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        if self.active("mlm"):
            self.mlm = CrossModalHead(backbone.dim, config.mlm_layers, backbone.tokenizer.vocabulary_size)

    def prepare(self, batch: Batch) -> Batch:
        """Hide words of the captions."""
        if not self.active("mlm") or "full" not in batch.texts:
            return batch
        return hide_words(batch, self.backbone, self.config.mask_rate)

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return `image` (B, D), `person` (B,), `text` (T, D), whose `row` is its image's, and sums of `mlm`."""
        seen = batch.texts["full"]
        if self.config.masked_caption_everywhere and batch.masked is not None:
            seen = batch.masked
        image = self.backbone.encode_image(batch.require("image"))
        text = self.backbone.encode_text(seen)
        row = batch.image_of_text()
        rows = {"image": image.cls[:, 0], "person": batch.require("person"), "text": text.pooled, "row": row}
        if self.active("mlm"):
            rows |= self._guess(batch, torch.cat([image.cls, image.patches], dim=1)[row], text.tokens, seen)
        return Parts(rows, {"row": "image"})

    def _guess(self, batch: Batch, looks: Tensor, words: Tensor, seen: Tokens) -> dict[str, Tensor]:
        """The masked-language loss summed over the hidden words, and their number, each (1,)."""
        assert batch.masked is not None
        if seen is not batch.masked:
            words = self.backbone.encode_text(batch.masked).tokens
        hidden = self.mlm(words, looks)
        # The vocabulary is wide and 15 % of the tokens are asked for: classify only those.
        asked, answer = batch.require("asked"), batch.require("answer")
        logits = self.mlm.logits(hidden[asked[:, 0], asked[:, 1]])
        count = torch.full((1,), float(len(answer)), device=hidden.device)
        return {"mlm": (losses.cross_entropy(logits, answer) * count).float(), "mlm_count": count}

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return `sdm`, `id` and `mlm`, each unweighted; losses of weight 0 are not computed.

        Images without a caption take part in the image half of `id`.
        """
        row, everyone, t = parts["row"], parts["person"], parts["text"]
        v, person = parts["image"][row], everyone[row]
        found: dict[str, Tensor] = {}
        if self.active("sdm"):
            found["sdm"] = losses.sdm(v, t, person, temperature=self.config.temperature)
        if self.active("id"):
            shown = self.classifier(parts["image"])
            found["id"] = losses.id_loss(shown, self.classifier(t), everyone, text_person=person)
        if self.active("mlm"):
            found["mlm"] = parts["mlm"].sum() / parts["mlm_count"].sum().clamp(min=1)
        return found

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit class-token features, shape (B, D)."""
        return unit(self.backbone.encode_image(batch.require("image")).cls[:, 0])

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit end-of-text features, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)


def hide_words(batch: Batch, backbone: Backbone, rate: float) -> Batch:
    """Return a batch with `masked`, `asked` and `answer`: its captions with words hidden; see `mask_tokens`."""
    masked, labels = mask_tokens(batch.texts["full"], backbone, rate)
    asked = (labels >= 0).nonzero()
    return replace(batch, masked=masked, asked=asked, answer=labels[asked[:, 0], asked[:, 1]])


def mask_tokens(tokens: Tokens, backbone: Backbone, rate: float) -> tuple[Tokens, Tensor]:
    """Return tokens with some words hidden, and what was hidden.

    Each word token is chosen with probability `rate` (at least one per text); a chosen token becomes the mask token
    with p = 0.8, a random word with p = 0.1 and stays with p = 0.1 (Devlin et al. 2019, as in IRRA's data loader).

    Args:
        tokens: shape (B, L).
        backbone: whose tokenizer names the mask token.
        rate: in (0, 1).

    Returns:
        The masked tokens, and labels (B, L): the hidden id where one was chosen, -1 elsewhere.
    """
    ids, device = tokens.ids, tokens.ids.device
    tokenizer = backbone.tokenizer
    special = (ids == tokenizer.start_id) | (ids == tokenizer.end_id) | ~tokens.mask
    draw = torch.rand(ids.shape, device=device).masked_fill(special, 2.0)
    # The smallest draw of a text is always chosen, so that every text asks for at least one word.
    lowest = draw.argmin(dim=1, keepdim=True)
    chosen = (draw < rate).scatter(1, lowest, True) & ~special
    what = torch.rand(ids.shape, device=device)
    words = tokenizer.word_ids
    random_words = torch.randint(words.start, words.stop, ids.shape, device=device)
    masked = ids.masked_fill(chosen & (what < 0.8), tokenizer.mask_id)
    masked = torch.where(chosen & (what >= 0.8) & (what < 0.9), random_words, masked)
    return Tokens(masked, tokens.mask), ids.masked_fill(~chosen, -1)


METHOD = Irra
