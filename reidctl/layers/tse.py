"""Token selection embedding (RDE): the tokens that the global feature looks at most, as one vector."""

import torch
from torch import Tensor, nn

from reidctl.layers.syncbn import SyncBatchNorm


class TokenSelection(nn.Module):
    """An embedding of the most attended tokens of an image or a text.

    z_s = tokens of the k largest attention weights, each scaled to length 1;  max_s( MLP(z_s) + W z_s )
    Qin et al. 2024 (RDE), arXiv:2308.09911, section "Token Selection Embedding"; layers and sizes from the authors'
    code: the MLP is a linear map to half the width, batch normalisation over tokens, ReLU, a linear map. Differs from
    the code: where a text has fewer than k words, padding fills the selection there and enters the norm's statistics;
    here only words do. Both leave it out of the maximum.

    Args:
        width_in: D, the joint width of the tokens.
        width: of the embedding; even.
    """

    def __init__(self, width_in: int, width: int = 1024) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        self.hidden = nn.Linear(width_in, width // 2)
        self.norm = SyncBatchNorm(width // 2)
        self.out = nn.Linear(width // 2, width)

    def forward(self, tokens: Tensor, looks: Tensor, count: int, usable: Tensor | None = None) -> Tensor:
        """Return the embedding (B, width), at least float32, not normalised.

        Args:
            tokens: shape (B, T, D).
            looks: how much the global feature attends to each token, shape (B, T); read for its order alone.
            count: k >= 1; fewer are taken where there are fewer.
            usable: tokens that may be selected, at least one of each row, bool (B, T); None: all.
        """
        order = looks.detach() if usable is None else looks.detach().masked_fill(~usable, -1.0)
        chosen = order.topk(min(count, tokens.shape[1]), dim=1).indices  # (B, k)
        picked = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        real = None if usable is None else usable.gather(1, chosen)
        each = self.each(picked, real)
        if real is not None:
            each = each.masked_fill(~real[..., None], -torch.inf)
        best = each.max(dim=1).values
        return best.to(torch.promote_types(best.dtype, torch.float32))

    def each(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Return what every token would give as the only one, shape (B, T, width).

        Args:
            tokens: shape (B, T, D).
            real: tokens that the norm counts, bool (B, T); None: all.
        """
        length = tokens.norm(dim=-1, keepdim=True) + 1e-8
        flat = (tokens / length).flatten(0, 1)  # (B T, D)
        normal = self.norm(self.hidden(flat), None if real is None else real.flatten())
        made: Tensor = self.out(normal.relu()) + self.linear(flat)
        return made.view(*tokens.shape[:2], -1)
