"""The table of word embeddings, which CLIP-ReID's checkpoints do not hold."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reidctl.backbones.tokenizers import ClipTokenizer
from reidctl.convert.names import TEXT
from reidctl.errors import DataError

WORDS = f"{TEXT}token_embedding.weight"
LAST_NORM = f"{TEXT}ln_final.weight"
# CLIP-ReID's sentence with four places for the person's tokens; they follow the start token and "A photo of a".
_SENTENCE, _BEFORE, _OWN = "A photo of a X X X X person.", 5, 4
_SAME = 2e-3
"""Largest difference of a word's embedding between two files: both may be rounded to float16."""


def word_table(
    weights: Mapping[str, Tensor], sentence: Mapping[str, Tensor], given: Tensor | None, where: str
) -> tuple[Tensor, str]:
    """Return the table of word embeddings, (vocabulary, W), for a checkpoint that does not hold it, and a note.

    CLIP-ReID saves the embeddings of its sentence alone. Its training never changes the table, so another file of the
    CLIP that it started from has the right one.

    Args:
        weights: tensors by our names; the width is read from the last norm.
        sentence: `prompt_learner.token_prefix` and `token_suffix`, (1, words, W), as far as the file has them.
        given: the table of another file; None: words outside the sentence get zeros.
        where: the file, for messages.

    Raises:
        DataError: the other file has other words than the sentence's.
    """
    tokens = ClipTokenizer()
    ids = tokens([_SENTENCE]).ids[0].tolist()
    ids += [tokens.pad_id] * (tokens.context_length - len(ids))
    width = len(weights[LAST_NORM])
    rows = {**_aligned(ids[:_BEFORE], sentence, "prefix"), **_aligned(ids[_BEFORE + _OWN :], sentence, "suffix")}
    if given is None:
        table = torch.zeros(tokens.vocabulary_size, width)
        for token, vector in rows.items():
            table[token] = vector
        return table, (
            f"The file holds the embeddings of its sentence's {len(rows)} words alone: image to image works, sentences "
            "of other words do not. Give --words and a file of the CLIP it started from."
        )
    hint = "Give the weights of the CLIP that the training started from."
    if given.shape != (tokens.vocabulary_size, width):
        raise DataError(
            f"--words has a table of {tuple(given.shape)} where {where} needs {(tokens.vocabulary_size, width)}.",
            hint=hint,
        )
    apart = [token for token, vector in rows.items() if float((given[token] - vector).abs().max()) > _SAME]
    if apart:
        raise DataError(
            f"The words of --words are not those of {where}: {len(apart)} of {len(rows)} differ.", hint=hint
        )
    return given, "The table of words is that of the file given with --words."


def _aligned(ids: Sequence[int], sentence: Mapping[str, Tensor], part: str) -> dict[int, Tensor]:
    """The embeddings of a part of the sentence by token."""
    vectors = sentence.get(f"prompt_learner.token_{part}")
    return {} if vectors is None else dict(zip(ids, vectors[0].float(), strict=False))
