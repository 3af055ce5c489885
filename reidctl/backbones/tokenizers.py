"""Text to token ids: CLIP's byte-pair encoding and BERT's WordPiece, both offline, both with character offsets."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, cast

import torch

from reidctl.batch import Tokens
from reidctl.errors import DataError

Span = tuple[int, int]
_CACHE_SIZE = 200_000


class Tokenizer(ABC):
    """Turns texts into padded, truncated token ids.

    Args:
        context_length: most tokens of a text, the special ones included.
    """

    start_id: int
    end_id: int
    pad_id: int
    mask_id: int
    word_ids: range
    vocabulary_size: int

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._known: dict[str, list[int]] = {}

    @abstractmethod
    def _pieces(self, text: str) -> list[tuple[int, Span]]:
        """All token ids of `text` without special tokens, each with its characters."""

    @abstractmethod
    def word(self, token: int) -> str:
        """Return what the token of an id reads; pieces inside a word as their vocabulary writes them."""

    def encode(self, text: str) -> list[int]:
        """Return all token ids of `text`, without special tokens and without truncation."""
        ids = self._known.get(text)
        if ids is None:
            ids = [token for token, _ in self._pieces(text)]
            # Captions repeat every epoch; the bound is there for servers that see new texts for ever.
            if len(self._known) < _CACHE_SIZE:
                self._known[text] = ids
        return ids

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return the texts as tokens, padded at the right; a text that is too long keeps its end token."""
        rows = [[self.start_id, *self.encode(text)[: self.context_length - 2], self.end_id] for text in texts]
        length = max((len(row) for row in rows), default=2)
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return Tokens(ids.view(len(rows), length), torch.arange(length)[None] < lengths[:, None])

    def truncation_rate(self, texts: Sequence[str]) -> float:
        """Return the fraction of texts that do not fit into the context; 0.0 for no texts."""
        cut = sum(len(self.encode(text)) > self.context_length - 2 for text in texts)
        return cut / len(texts) if texts else 0.0

    def offsets(self, text: str) -> list[Span]:
        """Return the characters of `text` behind each kept token; special tokens have empty spans."""
        spans = [span for _, span in self._pieces(text)][: self.context_length - 2]
        end = spans[-1][1] if spans else 0
        return [(0, 0), *spans, (end, end)]


@lru_cache(maxsize=1)
def _clip_bpe() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding as shipped with open_clip (49,408 ids, lower-cased)."""

    pad_id = 0

    def __init__(self, context_length: int = 77) -> None:
        super().__init__(context_length)
        self.start_id = int(_clip_bpe().sot_token_id)
        self.end_id = int(_clip_bpe().eot_token_id)
        self.vocabulary_size = self.end_id + 1
        # CLIP has no mask token. IRRA gives the id of the last, very rare merge to it; so do we.
        self.mask_id = self.start_id - 1
        self.word_ids = range(1, self.mask_id)

    def word(self, token: int) -> str:
        # Pieces of white space or control characters read as their vocabulary writes them.
        return str(_clip_bpe().decode([token])).strip() or str(_clip_bpe().decoder[token])

    def _pieces(self, text: str) -> list[tuple[int, Span]]:
        bpe = _clip_bpe()
        letters = [(small, index) for index, letter in enumerate(text) for small in letter.lower()]
        lowered = "".join(small for small, _ in letters)
        where = [index for _, index in letters] + [len(text)]
        pieces: list[tuple[int, Span]] = []
        cursor = 0  # in `lowered`
        for word in bpe.pat.findall(bpe.clean_fn(text)):
            found = lowered.find(word, cursor)
            # Cleaning may have replaced characters (mojibake, HTML entities): such a word gets an empty span.
            begin = cursor if found < 0 else found
            size = 0 if found < 0 else len(word)
            cursor = begin + size
            for token, (first, last) in self._word_pieces(word):
                start = where[begin + min(first, size)]
                pieces.append((token, (start, where[begin + last - 1] + 1 if size else start)))
        return pieces

    @staticmethod
    def _word_pieces(word: str) -> list[tuple[int, Span]]:
        """The byte-pair pieces of one cleaned word with their characters inside it."""
        bpe = _clip_bpe()
        owner = [index for index, letter in enumerate(word) for _ in letter.encode()]  # byte -> character
        mapped = "".join(bpe.byte_encoder[byte] for byte in word.encode())
        pieces: list[tuple[int, Span]] = []
        byte = 0
        for piece in bpe.bpe(mapped).split(" "):
            end = min(byte + len(piece.removesuffix("</w>")), len(owner))
            pieces.append((bpe.encoder[piece], (owner[byte], owner[end - 1] + 1)))
            byte = end
        return pieces


def shipped_vocabulary() -> tuple[str, ...]:
    """Return the small English WordPiece vocabulary that the tiny BERT sizes use."""
    text = (resources.files("reidctl.backbones") / "tiny_vocab.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece.

    Args:
        context_length: most tokens of a text, [CLS] and [SEP] included.
        vocabulary: the pieces in the order of their ids; default: the one shipped for the tiny sizes.
        lower_case: lower-case and strip accents, as the uncased BERT models do.

    Raises:
        DataError: the vocabulary lacks a special token.
    """

    def __init__(
        self, context_length: int = 64, *, vocabulary: Sequence[str] | None = None, lower_case: bool = True
    ) -> None:
        super().__init__(context_length)
        ids = {piece: index for index, piece in enumerate(vocabulary or shipped_vocabulary())}
        for special in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if special not in ids:
                raise DataError(f"The WordPiece vocabulary has no {special}.", hint="Give a BERT vocab.txt.")
        self.pad_id, self.start_id, self.end_id = ids["[PAD]"], ids["[CLS]"], ids["[SEP]"]
        self.vocabulary_size = len(ids)
        self.mask_id = ids.get("[MASK]", ids["[UNK]"])
        # BERT's vocabularies put the special tokens in front of the words.
        self.word_ids = range(1 + max(self.pad_id, self.start_id, self.end_id, self.mask_id), len(ids))
        self._fast = self._build(ids, lower_case)

    @staticmethod
    def _build(ids: dict[str, int], lower_case: bool) -> Any:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import models, normalizers, pre_tokenizers

        fast = FastTokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        fast.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return fast

    def word(self, token: int) -> str:
        return str(self._fast.id_to_token(token))

    def _pieces(self, text: str) -> list[tuple[int, Span]]:
        encoding = self._fast.encode(text, add_special_tokens=False)
        return list(zip(cast(list[int], encoding.ids), cast(list[Span], encoding.offsets), strict=True))
