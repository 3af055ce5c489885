"""Soft prompts: sentences of plain words with slots that vectors fill, and the nearest words to such vectors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from reidctl.batch import Tokens

Tokenize = Callable[[list[str]], Tokens]
Embed = Callable[[Tensor], Tensor]

_SLOT = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Prompt:
    """B prompts as embeddings, all of one length.

    Attributes:
        embeddings: shape (B, L, W), before positions are added.
        mask: all True, shape (B, L).
    """

    embeddings: Tensor
    mask: Tensor


class PromptTemplate(nn.Module):
    """A sentence such as "A photo of {id} and {inst} person": words are token ids, `{name}` is a slot.

    A soft prompt (CoOp: Zhou et al. 2022, arXiv:2109.01134) puts vectors where a word's embedding would stand, so that
    they can be learnt; a template without slots is a hard prompt.

    Args:
        text: the sentence.
        sizes: how many vectors each slot takes, by name; a slot of size 0 vanishes.
        tokenize: of the text tower that reads the prompt; adds a start and an end token.
        context: most tokens that the tower reads.

    Raises:
        ValueError: an unknown or repeated slot, or more than `context` tokens.
    """

    def __init__(self, text: str, sizes: Mapping[str, int], tokenize: Tokenize, *, context: int) -> None:
        super().__init__()
        self.text = text
        parts = _SLOT.split(text)  # words, slot, words, slot, ..., words
        self.slots = tuple(parts[1::2])
        for name in self.slots:
            if name not in sizes or self.slots.count(name) > 1:
                raise ValueError(f"template `{text}`: slot `{{{name}}}` is not one of {sorted(sizes)}, each once")
        whole = [tokenize([words]).ids[0] for words in parts[::2]]
        words = [ids[1:-1] for ids in whole]
        words[0] = torch.cat([whole[0][:1], words[0]])
        words[-1] = torch.cat([words[-1], whole[0][-1:]])
        self.sizes = {name: sizes[name] for name in self.slots}
        self.length = sum(map(len, words)) + sum(self.sizes.values())
        # The tokenizer cuts what is too long, so a piece as long as the context may have lost its end.
        if self.length > context or max(map(len, whole)) >= context:
            raise ValueError(f"template `{text}` has {self.length} tokens or more, the text tower reads {context}")
        for place, ids in enumerate(words):
            self.register_buffer(f"words{place}", ids.clone(), persistent=False)

    def forward(self, embed: Embed, slots: Mapping[str, Tensor], batch: int) -> Prompt:
        """Return the prompts with their slots filled.

        Args:
            embed: token ids (1, L) -> embeddings (1, L, W), the text tower's own table.
            slots: vectors (B, size, W) by slot name; names that the template lacks are not read.
            batch: B.
        """
        pieces: list[Tensor] = []
        for place in range(len(self.slots) + 1):
            ids = cast(Tensor, getattr(self, f"words{place}"))
            if len(ids):
                pieces.append(embed(ids[None]).expand(batch, -1, -1))
            if place < len(self.slots) and self.sizes[self.slots[place]]:
                pieces.append(slots[self.slots[place]].to(pieces[0].dtype))
        embeddings = torch.cat(pieces, dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return Prompt(embeddings, mask)

    def places(self, name: str) -> range:
        """Return the token positions that a slot fills; empty if the template has no such slot."""
        start = 0
        for place, slot in enumerate(self.slots):
            start += len(cast(Tensor, getattr(self, f"words{place}")))
            if slot == name:
                return range(start, start + self.sizes[slot])
            start += self.sizes[slot]
        return range(0)


def nearest_words(vectors: Tensor, table: Tensor, *, count: int = 1, block: int = 4096) -> tuple[Tensor, Tensor]:
    """Return the words whose embeddings lie nearest to vectors, by cosine, best first; of equal ones the lower id.

    Args:
        vectors: shape (R, W).
        table: word embeddings, shape (V, W).
        count: how many words per vector.
        block: vectors that are compared at a time, to bound memory at block * V numbers.

    Returns:
        Row indices into `table` and cosines, both (R, count).
    """
    words = functional.normalize(table.float(), dim=-1)
    found = []
    for part in torch.split(functional.normalize(vectors.float(), dim=-1), block):
        cosine, order = (part @ words.T).sort(dim=1, descending=True, stable=True)
        found.append((order[:, :count], cosine[:, :count]))
    if not found:
        return torch.zeros(0, count, dtype=torch.long), torch.zeros(0, count)
    return torch.cat([order for order, _ in found]), torch.cat([cosine for _, cosine in found])


def to_words(vectors: Tensor, table: Tensor) -> Tensor:
    """Return vectors (..., W) moved to the embedding of their nearest word; gradients pass as if they were not.

    Straight-through estimator, as for the hard prompts of Wen et al. 2023 (arXiv:2302.03668).
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    with torch.no_grad():
        words = functional.normalize(table.float(), dim=-1)
        found = [functional.normalize(part.float(), dim=-1) @ words.T for part in torch.split(flat, 4096)]
        nearest = torch.cat([cosine.argmax(dim=1) for cosine in found])
        moved = table[nearest].to(vectors.dtype).reshape(vectors.shape)
    return vectors + (moved - vectors).detach()
