"""`irra`: implicit relation reasoning and aligning (Jiang & Ye 2023, arXiv:2303.12501; code anosorae/IRRA).

SDM aligns the global features, a shared classifier adds identity, and a masked-language head that looks at the image
through cross-attention adds local relations. Only the two towers are used for retrieval.
"""

from typing import ClassVar

import torch
from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn

from reidctl import losses
from reidctl.backbones.base import Backbone
from reidctl.batch import Batch, Tokens
from reidctl.methods.base import Method, MethodConfig, unit


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

    def losses(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        """Return `sdm`, `id` and `mlm`, each unweighted; losses of weight 0 are not computed.

        Images without a caption take part in the image half of `id`.
        """
        pairs = batch.pairs()
        clean, person = pairs.texts["full"], pairs.require("person")
        masked, labels = mask_tokens(clean, self.backbone, self.config.mask_rate)
        seen = masked if self.config.masked_caption_everywhere and self.active("mlm") else clean
        image = self.backbone.encode_image(batch.require("image"))
        text = self.backbone.encode_text(seen)
        every = slice(None) if batch.has_text is None else batch.has_text
        classes, patches = image.cls[every], image.patches[every]
        v, t = classes[:, 0], text.pooled
        found: dict[str, Tensor] = {}
        if self.active("sdm"):
            found["sdm"] = losses.sdm(v, t, person, temperature=self.config.temperature)
        if self.active("id"):
            everyone = batch.require("person")
            shown = self.classifier(image.cls[:, 0])
            found["id"] = losses.id_loss(shown, self.classifier(t), everyone, text_person=person)
        if self.active("mlm"):
            words = text.tokens if seen is masked else self.backbone.encode_text(masked).tokens
            hidden = self.mlm(words, torch.cat([classes, patches], dim=1))
            # The vocabulary is wide and 15 % of the tokens are asked for: classify only those.
            asked = labels >= 0
            found["mlm"] = losses.cross_entropy(self.mlm.logits(hidden[asked]), labels[asked])
        return found

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit class-token features, shape (B, D)."""
        return unit(self.backbone.encode_image(batch.require("image")).cls[:, 0])

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit end-of-text features, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)


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
