"""`clip`: the two towers as they are. Zero-shot, or fine-tuned with the symmetric contrastive loss."""

from typing import ClassVar, Literal

from torch import Tensor

from reidctl import losses
from reidctl.batch import Batch
from reidctl.methods.base import Method, MethodConfig, unit
from reidctl.parts import Parts


class ClipConfig(MethodConfig):
    """Settings of `clip`."""

    temperature: float = 0.02
    """Of the contrastive loss; fixed, not learned."""
    positives: Literal["pair", "id"] = "pair"
    """`pair`: only an image's own caption is positive, as in CLIP; `id`: every caption of the person."""


class Clip(Method):
    """A dual encoder: cosine of the class token and the end-of-text token.

    Without training it is the zero-shot baseline. Training minimises InfoNCE in both directions
    (Radford et al. 2021, arXiv:2103.00020, section 2.3), the `ITC` baseline of IRRA.
    """

    name = "clip"
    summary = "dual encoder, zero-shot or fine-tuned with InfoNCE"
    Config = ClipConfig
    loss_weights: ClassVar = {"itc": 1.0}
    config: ClipConfig

    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return `image` and `text`, unit vectors (B, D), and `person` (B,)."""
        image, text = self.embed_images(batch), self.embed_texts(batch)
        return Parts({"image": image, "text": text, "person": batch.require("person")})

    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return `itc`, the symmetric contrastive loss."""
        positives = parts["person"] if self.config.positives == "id" else None
        itc = losses.info_nce(parts["image"], parts["text"], temperature=self.config.temperature, positives=positives)
        return {"itc": itc}

    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit class-token features, shape (B, D)."""
        return unit(self.backbone.encode_image(batch.require("image")).cls[:, 0])

    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit end-of-text features, shape (B, D)."""
        return unit(self.backbone.encode_text(batch.texts["full"]).pooled)


METHOD = Clip
