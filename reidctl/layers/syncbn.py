"""Batch normalisation whose statistics are those of the whole batch, wherever its parts are computed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reidctl.parallel import place, sum_over_ranks


class SyncBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over rows (M, C) that sees the rows of all processes, and may leave rows out.

    y = (x - μ) / √(σ² + ε) · weight + bias, with μ and σ² of all rows that count (Ioffe & Szegedy 2015,
    arXiv:1502.03167, Alg. 1). State and results are those of `nn.BatchNorm1d` on the joined rows, to rounding; in one
    process without left-out rows, bit for bit. Unlike PyTorch's `SyncBatchNorm` it runs on the CPU too.

    Running statistics move only where gradients are taken. A batch that is computed in several passes
    (`train.accumulate`) is normalised by the statistics of each pass, which hold fewer rows, and each pass moves the
    running ones once. A single row has no variance: it is normalised by the running statistics, which then stay.
    """

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the normalised rows (M, C), in the precision of `x`.

        Args:
            x: shape (M, C).
            keep: rows whose numbers enter the statistics, bool (M,); None: all. The others are normalised too.
        """
        if not self.training:
            return self._by(self.running_mean, self.running_var, x)
        if keep is None and place().world == 1 and len(x) > 1:
            return self._alone(x)
        # Sums of squares in bfloat16 would have no digits left.
        with torch.autocast(x.device.type, enabled=False):
            return self._together(x.to(torch.promote_types(x.dtype, torch.float32)), keep).to(x.dtype)

    def _by(self, mean: Tensor | None, variance: Tensor | None, x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)

    def _alone(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        if not torch.is_grad_enabled():
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        self._count_batch()
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )

    def _together(self, x: Tensor, keep: Tensor | None) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        counts = torch.ones_like(x[:, 0]) if keep is None else keep.to(x.dtype)
        # Squares of numbers far from zero cancel; the running mean, the same everywhere, is near the batch's.
        origin, before = self.running_mean.to(x.dtype, copy=True), self.running_var.to(x.dtype, copy=True)
        away = x - origin
        seen = away * counts[:, None]
        sums = sum_over_ranks(torch.cat([seen.sum(dim=0), (seen * away).sum(dim=0), counts.sum()[None]]))
        enough, count = sums[-1] > 1, sums[-1].clamp(min=1)
        mean, square = sums[:-1].div(count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        if torch.is_grad_enabled():
            self._move(origin + mean.detach(), variance.detach(), sums[-1].detach())
        mean, variance = torch.where(enough, mean, 0.0), torch.where(enough, variance, before)
        normal = (away - mean) * (variance + self.eps).rsqrt()
        return normal * self.weight.to(x.dtype) + self.bias.to(x.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Running statistics towards those of a batch, if it has two rows."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self._count_batch()
        unbiased = variance * count / (count - 1).clamp(min=1)
        share = torch.where(count > 1, self.momentum, 0.0)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased, share)

    def _count_batch(self) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
