"""Inversion networks: from the token features of an image or a text to pseudo-words that a text encoder can read."""

from typing import Literal

import torch
from torch import Tensor, nn

Readout = Literal["queries", "linear", "first", "pool"]


class Inversion(nn.Module):
    """A small ViT-style Transformer from T token features to M pseudo-token embeddings.

    HPL (arXiv:2511.13575) Eq. 3-4: N_I = 4 layers "following the ViT block architecture": pre-norm, GELU, not causal.
    How 194 vision tokens become a few prompt tokens is not said. `queries`: M learnable tokens are appended and their
    outputs are the pseudo-tokens; `linear`: one map of the summary token's output to all M (as in GET); `first`: the
    first M outputs; `pool`: one map of the average output.

    The last map's weights are scaled so that a pseudo-token starts with the root mean square `scale` of a word
    embedding; far outside of it the text encoder has never seen anything.

    Args:
        inputs: width of the token features.
        outputs: width W of a word embedding.
        count: M.
        width, layers, heads: of the Transformer.
        readout: see above.
        scale: root mean square of the word embeddings.
        mlp_ratio: hidden width of a block's MLP over `width`.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        count: int,
        width: int,
        layers: int = 4,
        heads: int = 8,
        readout: Readout = "queries",
        scale: float = 0.02,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"an inversion network of width {width} cannot have {heads} heads")
        self.count, self.outputs, self.readout = count, outputs, readout
        self.enter = nn.Identity() if inputs == width else nn.Linear(inputs, width)
        block = nn.TransformerEncoderLayer(
            width, heads, round(width * mlp_ratio), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        # The library copies one block; every block of a network starts with weights of its own.
        for layer in self.blocks.layers:
            _initialise(layer)
        self.norm_in = nn.LayerNorm(width)
        if readout == "queries":
            self.queries = nn.Parameter(torch.randn(count, width))
        whole = readout in ("linear", "pool")
        self.leave = nn.Linear(width, outputs * count if whole else outputs)
        # The norm's output has a root mean square of 1 per element: `width` of them, each times this, add up to scale.
        nn.init.normal_(self.leave.weight, std=scale * width**-0.5)
        nn.init.zeros_(self.leave.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return pseudo-tokens (B, M, W) of token features (B, T, inputs).

        Args:
            tokens: token features.
            mask: True on real tokens, shape (B, T); what stands elsewhere is not read.
            summary: which token sums up each row, shape (B,), for the readout `linear`; default the first.
        """
        seen = self.norm_in(self.enter(tokens))
        batch, length = seen.shape[:2]
        if self.readout == "queries":
            seen = torch.cat([seen, self.queries.to(seen.dtype).expand(batch, -1, -1)], dim=1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(batch, self.count)], dim=1)
        out = self.blocks(seen, src_key_padding_mask=None if mask is None else ~mask)
        if self.readout == "queries":
            chosen = out[:, length:]
        elif self.readout == "first":
            chosen = self._first(out, mask)
        else:
            chosen = self._one(out, mask, summary)
        return self.leave(chosen).view(batch, self.count, self.outputs)  # type: ignore[no-any-return]

    def _first(self, out: Tensor, mask: Tensor | None) -> Tensor:
        """The first M outputs; a row with fewer real tokens repeats its last one."""
        last = out.new_full((len(out),), out.shape[1], dtype=torch.long) if mask is None else mask.sum(dim=1)
        place = torch.arange(self.count, device=out.device)[None].minimum(last[:, None] - 1)
        return out.gather(1, place[..., None].expand(-1, -1, out.shape[2]))

    def _one(self, out: Tensor, mask: Tensor | None, summary: Tensor | None) -> Tensor:
        if self.readout == "pool":
            if mask is None:
                return out.mean(dim=1)
            weight = mask[..., None].to(out.dtype)
            return (out * weight).sum(dim=1) / weight.sum(dim=1)
        if summary is None:
            return out[:, 0]
        return out[torch.arange(len(out), device=out.device), summary]


def diversity(tokens: Tensor) -> float:
    """Return how much pseudo-tokens (B, M, W) differ from input to input, in [0, 1]; 0 if all are the same.

    sqrt(mean_i ||P_i - mean P||^2 / mean_i ||P_i||^2): the part of their length that depends on the input.
    """
    flat = tokens.float().flatten(1)
    whole = flat.square().sum(dim=1).mean()
    own = (flat - flat.mean(dim=0)).square().sum(dim=1).mean()
    return float((own / whole.clamp_min(1e-24)).sqrt())


def mismatch(image: Tensor, text: Tensor) -> float:
    """Return the distance of the two pseudo-token sets of a pair over their length, >= 0; 0 if they are equal.

    sqrt(mean_i ||P_i^t - P_i^v||^2 / mean_i (||P_i^t||^2 + ||P_i^v||^2) * 2), for (B, M, W) each.
    """
    a, b = image.float().flatten(1), text.float().flatten(1)
    length = (a.square().sum(dim=1) + b.square().sum(dim=1)).mean() / 2
    return float(((a - b).square().sum(dim=1).mean() / length.clamp_min(1e-24)).sqrt())


def _initialise(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
