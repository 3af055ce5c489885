"""Hierarchical Context Prompting (HCP) of MTA-CLIP: words that all datasets, one dataset or one person share.

The README names shared prompts P_S and prompts P_Dk of each dataset k and nothing else. Without tokens of each person
all people of a dataset have one text feature, which no contrast of identities can use, so CLIP-ReID's stay; order,
lengths and the sentence around them are ours.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from reidctl.batch import Tokens
from reidctl.config import Section
from reidctl.layers.prompts import Prompt, PromptTemplate

Layout = Literal["concat", "add", "domain", "words"]


class HcpConfig(Section):
    """Prompts in three levels; only that there are shared and dataset-specific ones is published."""

    enabled: bool = True
    """False leaves the sentence of `clip-reid`."""
    layout: Layout = "concat"
    """`concat` is [P_S][P_Dk][X_id]; `add` adds P_Dk to the tokens of the person; `domain` has no tokens of people, so
    that images are contrasted by dataset; `words` says P_S and P_Dk in plain words that are not learnt."""
    template: str = "A photo of a {shared} {domain} {id} person."
    n_shared: int = Field(default=4, ge=0)
    n_domain: int = Field(default=4, ge=0)
    shared_words: str = "pedestrian seen by a surveillance camera,"
    """P_S of the layout `words`; P_Dk is the dataset's name."""


class HierarchicalContext(nn.Module):
    """Prompts "A photo of a [P_S][P_Dk][X_id] person." for people of K datasets.

    Args:
        config: see `HcpConfig`.
        domains: names of the K datasets.
        n_id: tokens of a person.
        width: W of the text tower.
        tokenize, context: of the text tower.

    Raises:
        ValueError: a template without a slot that the layout fills, `add` with other lengths than the person's, or more
            tokens than the tower reads.
    """

    def __init__(
        self,
        config: HcpConfig,
        domains: Sequence[str],
        n_id: int,
        width: int,
        tokenize: Callable[[list[str]], Tokens],
        *,
        context: int,
    ) -> None:
        super().__init__()
        self.layout = config.layout
        missing = [slot for slot in ("shared", "domain", "id") if f"{{{slot}}}" not in config.template]
        if missing:
            raise ValueError(f"hcp.template has no slot {{{missing[0]}}}")
        if config.layout == "add" and config.n_domain != n_id:
            raise ValueError(f"layout add puts {config.n_domain} tokens of a dataset onto {n_id} of a person")
        words = config.layout == "words"
        if not words:
            self.shared = nn.Parameter(0.02 * torch.randn(config.n_shared, width))
            self.domain = nn.Parameter(0.02 * torch.randn(len(domains), config.n_domain, width))
        sizes = {"shared": config.n_shared, "domain": config.n_domain, "id": n_id}
        names = domains if words else [""]
        texts = [_sentence(config, name) for name in names]
        self.templates = nn.ModuleList(PromptTemplate(text, sizes, tokenize, context=context) for text in texts)

    def forward(self, embed: Callable[[Tensor], Tensor], tokens: Tensor, domain: int) -> Prompt:
        """Return the prompts of people of one dataset.

        Args:
            embed: see `PromptTemplate.forward`.
            tokens: of the people, (B, n_id, W); for the layout `domain` only B is read.
            domain: k.
        """
        if self.layout == "words":
            words: Prompt = self.templates[domain](embed, {"id": tokens}, len(tokens))
            return words
        every = (len(tokens), -1, -1)
        slots = {"shared": self.shared.expand(*every), "domain": self.domain[domain].expand(*every), "id": tokens}
        if self.layout == "add":
            slots["id"] = tokens + slots["domain"]
        prompt: Prompt = self.templates[0](embed, slots, len(tokens))
        return prompt

    def cosines(self) -> Tensor:
        """Return the cosine of every shared with every token of each dataset, (K, n_shared, n_domain)."""
        if self.layout == "words":
            return torch.zeros(0)
        return torch.einsum("sw,kdw->ksd", F.normalize(self.shared, dim=-1), F.normalize(self.domain, dim=-1))

    def orthogonality(self) -> Tensor:
        """Return the mean of |cos(P_S, P_Dk)|^2 over tokens and datasets, in [0, 1]; 0 without tokens of one kind."""
        squared = self.cosines().square()
        return squared.mean() if squared.numel() else squared.sum()


def _sentence(config: HcpConfig, name: str) -> str:
    """The template with the slots that the layout does not fill taken out or put into words."""
    text = config.template
    if config.layout == "words":
        return text.replace("{shared}", _plain(config.shared_words)).replace("{domain}", _plain(name))
    gone = {"add": "{domain}", "domain": "{id}"}.get(config.layout)
    return text.replace(f"{gone} ", "").replace(gone, "") if gone else text


def _plain(words: str) -> str:
    """Letters, digits, commas and spaces: a name must not bring a slot of its own."""
    return re.sub(r"[^\w,]+|_", " ", words).strip()
