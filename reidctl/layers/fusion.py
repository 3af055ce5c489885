"""Gated fusion of an image and a text feature, with or without a sequence model (the BDAM papers' fusion module)."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from reidctl.config import Section
from reidctl.layers.mamba import Kernel, MambaStack
from reidctl.layers.matching import Encoded

Kind = Literal["mamba", "transformer", "simple", "none"]
Sequence = Literal["vector", "pair", "chunks", "tokens"]
Order = Literal["text_first", "image_first"]


class FusionSettings(Section):
    """Settings of `Fusion`; see there for each."""

    kind: Kind = "mamba"
    sequence: Sequence = "tokens"
    """`vector` is what the papers print, a sequence of one token; `tokens` is the only reading under which their prose
    about long-range dependencies means something."""
    order: Order = "text_first"
    width: int = 256
    out_dim: int = 256
    layers: int | None = None
    align: bool = True
    gate: bool = True
    bidirectional: bool = False
    prenorm: bool = False
    chunks: int = 8
    heads: int = 8
    dropout: float = 0.1


class FusionOutput(NamedTuple):
    """What the fusion returns.

    Attributes:
        feature: fused feature, shape (B, out_dim), NOT normalised.
        weights: gate weights of image and text, shape (B, 2), each row sums to 1.
    """

    feature: Tensor
    weights: Tensor


class Fusion(nn.Module):
    """Fuses image and text features: align, gate, mix, project.

    f_img = FFN_v(image), f_txt = FFN_t(text);  (W_img, W_txt) = softmax(W_f [f_img; f_txt]);
    f_fusion = W_img f_img + W_txt f_txt;  f^{l+1} = Mamba(f^l) + f^l;  f_final = Linear(f).   BDAM, section "Fusion".

    **A missing modality** is replaced by a learned null vector (one null token in the `tokens` reading): the gate
    sees it in the missing slot, and nothing of that modality enters. An image encoded without text therefore has
    one feature, whatever texts exist; a text likewise. No sample sees another sample of the batch.

    **What the sequence model sees.** Everything the papers print is (B, D), a sequence of ONE token, on which Mamba
    has no recurrence. The readings:

    * `vector`: that literal sequence of length 1 (a gated MLP);
    * `pair`: two tokens, W_img f_img and W_txt f_txt, read at the last one;
    * `chunks`: f_fusion cut into `chunks` tokens of width / chunks channels, put together again afterwards;
    * `tokens`: all image tokens scaled by W_img and all text tokens by W_txt, read as the mean over real tokens.

    Args:
        image_dim: width of image features and tokens.
        text_dim: width of text features and tokens.
        width: inner width (papers: 256).
        out_dim: width of the fused feature.
        kind: the sequence model: `mamba` (papers), `transformer`, `simple` (concatenate and project; reads the
            two vectors whatever `sequence` says) or `none` (the ablation "w/o Mamba").
        sequence: see above.
        order: which modality comes first in `pair` and `tokens`; Mamba is causal, the last one sees both.
        layers: number of sequence layers; default 2 for `mamba` and 4 for `transformer`, as in the papers.
        align: feed-forward alignment; False is one linear map (the ablation "w/o Alignment").
        gate: False fixes both weights to 0.5 (the ablation "w/o Gate").
        bidirectional: scan in both directions (`mamba` only).
        prenorm: normalise before each Mamba layer; the papers print no norm.
        chunks: tokens of the `chunks` reading; must divide `width`.
        heads: attention heads of `transformer`.
        dropout: in the alignment and in `transformer`.
        use_kernel: see `Mamba`.

    Raises:
        ValueError: `chunks` or `heads` does not divide the width it cuts.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        width: int = 256,
        out_dim: int = 256,
        kind: Kind = "mamba",
        sequence: Sequence = "vector",
        order: Order = "text_first",
        layers: int | None = None,
        align: bool = True,
        gate: bool = True,
        bidirectional: bool = False,
        prenorm: bool = False,
        chunks: int = 8,
        heads: int = 8,
        dropout: float = 0.1,
        use_kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        if width % chunks:
            raise ValueError(f"chunks ({chunks}) must divide width ({width})")
        self.kind, self.sequence, self.order, self.chunks = kind, sequence, order, chunks
        self.align_image = _alignment(image_dim, width, dropout, deep=align)
        self.align_text = _alignment(text_dim, width, dropout, deep=align)
        self.null_image = nn.Parameter(torch.randn(width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(width) * 0.02)
        self.gate = nn.Linear(2 * width, 2, bias=False) if gate else None
        inner = width // chunks if sequence == "chunks" else width
        self.body: nn.Module | None = None
        if kind == "mamba":
            options: dict[str, Any] = {"bidirectional": bidirectional, "use_kernel": use_kernel}
            self.body = MambaStack(2 if layers is None else layers, inner, prenorm=prenorm, **options)
        elif kind == "transformer":
            self.body = _transformer(inner, 4 if layers is None else layers, heads, dropout)
        elif kind == "simple":
            self.body = nn.Linear(2 * width, width)
        self.project = nn.Linear(width, out_dim)

    def forward(
        self,
        image: Tensor | None,
        text: Tensor | None,
        *,
        image_tokens: Tensor | None = None,
        text_tokens: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> FusionOutput:
        """Return the fused feature and the gate weights of B samples.

        Args:
            image: pooled image features, shape (B, image_dim); None encodes the text alone.
            text: pooled text features, shape (B, text_dim); None encodes the image alone.
            image_tokens: shape (B, N, image_dim); read by `tokens` only, and required there with `image`.
            text_tokens: shape (B, L, text_dim); read by `tokens` only, and required there with `text`.
            text_mask: True on real text tokens, shape (B, L), bool; None means all. Padding changes nothing.

        Raises:
            ValueError: both modalities are missing, or `tokens` lacks the tokens of one that is given.
        """
        given = image if image is not None else text
        if given is None:
            raise ValueError("fusion needs an image or a text feature")
        f_image = self.align_image(image) if image is not None else self.null_image.expand(len(given), -1)
        f_text = self.align_text(text) if text is not None else self.null_text.expand(len(given), -1)
        images = texts = None
        if self.reads_tokens:
            images = self._tokens(image, image_tokens, self.align_image, self.null_image)
            texts = self._tokens(text, text_tokens, self.align_text, self.null_text)
        return self.mix(Encoded(f_image, images), Encoded(f_text, texts, text_mask if text is not None else None))

    @property
    def reads_tokens(self) -> bool:
        """Whether it reads tokens besides the pooled vectors."""
        return self.sequence == "tokens" and self.kind != "simple"

    def encode_image(self, image: Tensor, tokens: Tensor) -> Encoded:
        """Return images (B, image_dim) with tokens (B, N, image_dim) aligned: all that `mix` needs of them."""
        return Encoded(self.align_image(image), self.align_image(tokens) if self.reads_tokens else None)

    def encode_text(self, text: Tensor, tokens: Tensor, mask: Tensor) -> Encoded:
        """Return texts (B, text_dim) with tokens (B, L, text_dim) and their mask aligned; see `encode_image`."""
        if not self.reads_tokens:
            return Encoded(self.align_text(text))
        return Encoded(self.align_text(text), self.align_text(tokens), mask)

    def mix(self, image: Encoded, text: Encoded) -> FusionOutput:
        """Return the fused feature of aligned images and texts, pair by pair; a batch of one token broadcasts."""
        weights = self._weights(image.pooled, text.pooled)
        w_image, w_text = weights[:, :1] * image.pooled, weights[:, 1:] * text.pooled  # (B, width) each
        if self.kind == "simple":
            assert self.body is not None
            return FusionOutput(self.project(self.body(torch.cat([w_image, w_text], dim=1))), weights)
        if image.tokens is None or text.tokens is None:
            return FusionOutput(self.project(self._mix_vectors(w_image, w_text)), weights)
        images, texts = weights[:, :1, None] * image.tokens, weights[:, 1:, None] * text.tokens
        return FusionOutput(self.project(self._mix_tokens(images, texts, text.mask)), weights)

    def _weights(self, f_image: Tensor, f_text: Tensor) -> Tensor:
        if self.gate is None:
            return f_image.new_full((len(f_image), 2), 0.5)
        weights: Tensor = self.gate(torch.cat([f_image, f_text.to(f_image.dtype)], dim=1)).softmax(dim=1)
        return weights

    def _tokens(self, pooled: Tensor | None, tokens: Tensor | None, align: nn.Module, null: Tensor) -> Tensor:
        """The aligned tokens of a modality, or its one null token, which any batch size broadcasts."""
        if pooled is None:
            return null[None, None]
        if tokens is None:
            raise ValueError('sequence="tokens" needs the tokens of every modality that is given')
        aligned: Tensor = align(tokens)
        return aligned

    def _mix_vectors(self, w_image: Tensor, w_text: Tensor) -> Tensor:
        fused = w_image + w_text
        if self.sequence == "pair":
            pair = [w_text, w_image] if self.order == "text_first" else [w_image, w_text]
            return self._run(torch.stack(pair, dim=1), None)[:, -1]
        count = self.chunks if self.sequence == "chunks" else 1
        return self._run(fused.reshape(len(fused), count, -1), None).reshape(len(fused), -1)

    def _mix_tokens(self, images: Tensor, texts: Tensor, text_mask: Tensor | None) -> Tensor:
        image_mask = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
        text_mask = (
            torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device) if text_mask is None else text_mask
        )
        parts = [(texts, text_mask), (images, image_mask)]
        if self.order == "image_first":
            parts.reverse()
        sequence, mask = torch.cat([part for part, _ in parts], dim=1), torch.cat([part for _, part in parts], dim=1)
        # Padding between the modalities would reach the causal convolution: real tokens move up, in their order.
        positions = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        sequence = sequence.gather(1, positions[..., None].expand_as(sequence))
        mask = mask.gather(1, positions)
        mixed = self._run(sequence, mask).masked_fill(~mask[..., None], 0.0)
        return mixed.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def _run(self, sequence: Tensor, mask: Tensor | None) -> Tensor:
        """The sequence model on (B, T, inner), same shape out."""
        if self.body is None:
            return sequence
        if self.kind == "transformer":
            return self.body(sequence, src_key_padding_mask=None if mask is None else ~mask)  # type: ignore[no-any-return]
        return self.body(sequence, mask)  # type: ignore[no-any-return]


def _alignment(source: int, width: int, dropout: float, *, deep: bool) -> nn.Module:
    if not deep:
        return nn.Linear(source, width)
    return nn.Sequential(nn.Linear(source, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width))


def _transformer(width: int, layers: int, heads: int, dropout: float) -> nn.Module:
    if width % heads:
        raise ValueError(f"heads ({heads}) must divide the token width ({width})")
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def gate_balance(weights: Tensor) -> Tensor:
    """Return the squared distance of the batch's mean image weight from one half, in [0, 1/4].

    (mean_i W_img,i - 1/2)².  One literal reading of seed 002's "gate regularization", which has no formula there.

    Args:
        weights: `FusionOutput.weights`, shape (B, 2).
    """
    return (weights[:, 0].float().mean() - 0.5).square()


def gate_entropy(gate: Tensor) -> Tensor:
    """Return how decided a sigmoid gate is: log 2 minus its mean binary entropy, in nats, in [0, log 2].

    log 2 + mean(g log g + (1 - g) log(1 - g)); 0 where every value is one half.  The other literal reading.

    Args:
        gate: values in [0, 1], any shape.
    """
    gate = gate.float().clamp(1e-6, 1 - 1e-6)
    return (gate * gate.log() + (1 - gate) * (-gate).log1p()).mean() + math.log(2)
