"""The BNNeck head of the re-identification baselines."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class NeckOutput(NamedTuple):
    """What the neck returns.

    Attributes:
        feature: batch-normalised feature, shape (B, D).
        logits: class scores, shape (B, K).
    """

    feature: Tensor
    logits: Tensor


class BNNeck(nn.Module):
    """Batch normalisation with a frozen bias of zero, then a linear classifier without bias.

    Luo et al. 2019, arXiv:1903.07071, section 3.5; initial values as in CLIP-ReID's code. The triplet loss takes
    the feature BEFORE the neck, the identity loss takes `logits`.

    Args:
        width: D, the feature width.
        classes: K, the number of training people; must be positive.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.norm.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> NeckOutput:
        """Return the normalised feature and the class scores of features (B, D).

        A training batch of one sample has no variance: it uses the running statistics and leaves them alone.
        """
        feature = self.norm(x) if len(x) > 1 or not self.training else self._by_running_statistics(x)
        return NeckOutput(feature, self.classifier(feature))

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
