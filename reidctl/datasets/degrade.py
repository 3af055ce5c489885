"""Captions made worse on purpose: dropped words, cut ends, typing errors, words out of order.

How far a retrieval model falls when its queries get worse is a property worth measuring. For a curve to mean
something, two levels must differ in nothing but the level: all draws for a caption are made once, from (seed, kind,
key), and the level only decides how many of them take effect. So whatever a level does to a caption, every higher
level does too, and no caption depends on another or on the order of the table.

`drop` and `shuffle` follow random deletion and random swap of EDA (Wei & Zou 2019, arXiv:1901.11196). Differs from
EDA: punctuation and capitals stay (EDA keeps lower-case letters only); a text that would lose every word keeps the one
with the largest draw instead of a fresh random one, which would not be nested; and words move along a path from their
order to a random order instead of by independent swaps, which can undo one another.
"""

import hashlib
import random
import re
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reidctl.errors import UsageError

KINDS = ("drop", "shorten", "typo", "shuffle")

_TOKEN = re.compile(r"([\W_]*)(.*?)([\W_]*)", re.DOTALL)
_END = re.compile(r"[.!?…]")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_TRIES = 30


@dataclass(frozen=True, slots=True)
class _Word:
    """A word and the punctuation that leans on it."""

    before: str
    core: str
    after: str
    starts: bool = False

    def __str__(self) -> str:
        return f"{self.before}{self.core}{self.after}"

    @property
    def ends(self) -> str:
        """The mark that ends a sentence here; empty if none does."""
        found = _END.search(self.after)
        return found[0] if found else ""


def degrade(text: str, kind: str, level: float, *, seed: int, key: str) -> str:
    """Return a worse version of a caption; the same arguments give the same text on every machine.

    * drop: every word is left out with probability `level`.
    * shorten: of n words the first ⌈(1 - level) n⌉ stay.
    * typo: every word of two letters or more gets, with probability `level`, one error: a neighbouring key, two letters
      swapped, one left out, or one typed twice. The result is never another word of the caption.
    * shuffle: word i of n goes to its rank by (1 - level) i / n + level v_i with v_i uniform in [0, 1): near its place
      at low levels, anywhere at 1. The word pairs that are reversed at a level stay reversed at every higher one.

    At least one word stays. A text without a word that the kind can change is returned as it is.

    Args:
        text: the caption.
        kind: one of `KINDS`.
        level: in [0, 1]; 0 returns the text unchanged.
        seed: of all draws.
        key: what tells captions apart: the caption id.

    Raises:
        UsageError: an unknown kind, or a level outside [0, 1].
    """
    check(kind, level)
    words = _parse(text)
    if level == 0 or not words:
        return text
    draws = _generator(seed, kind, key)
    if kind == "typo":
        changed = _mistype(words, level, draws)
    elif kind == "shuffle":
        changed = _shuffle(words, level, draws)
    else:
        stays = _drop(words, level, draws) if kind == "drop" else _first(words, level)
        changed = words if len(stays) == len(words) else _keep(words, stays)
    return text if changed == words else " ".join(map(str, changed))


def check(kind: str, level: float) -> None:
    """Refuse a kind or a level that does not exist.

    Raises:
        UsageError: see `degrade`.
    """
    if kind not in KINDS:
        raise UsageError(f"No kind of degradation `{kind}`.", hint=f"One of: {', '.join(KINDS)}.")
    if not 0 <= level <= 1:
        raise UsageError(f"The level {level:g} is not between 0 and 1.", hint="0.3 changes about 30 % of the words.")


def words_of(text: str) -> list[str]:
    """Return the words of a text without punctuation at their ends, case-folded."""
    return [word.core.casefold() for word in _parse(text)]


def word_overlap(original: str, changed: str) -> float:
    """Return the share of the original's words that are still there, counted with repetition; 1 for no words."""
    before, after = Counter(words_of(original)), Counter(words_of(changed))
    total = before.total()
    return (before & after).total() / total if total else 1.0


def word_order(original: str, changed: str) -> float:
    """Return the share of pairs of kept words that stand in the original order: (Kendall's tau + 1) / 2.

    1: nothing moved; 0.5: a random order of different words, on average; 0: reversed. The k-th occurrence of a word
    is matched with the k-th, which is exact for `shuffle`. Fewer than two kept words give 1.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in reversed(list(enumerate(words_of(original)))):
        places[word].append(place)
    order = [places[word].pop() for word in words_of(changed) if places[word]]
    pairs = len(order) * (len(order) - 1) // 2
    return 1 - _inversions(order) / pairs if pairs else 1.0


def _inversions(order: Sequence[int]) -> int:
    seen: list[int] = []
    count = 0
    for place in order:
        count += len(seen) - bisect_right(seen, place)
        insort(seen, place)
    return count


def _generator(seed: int, kind: str, key: str) -> random.Random:
    digest = hashlib.sha256(f"{seed}\0{kind}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _parse(text: str) -> list[_Word]:
    """The words of a text; punctuation that stands alone belongs to the word before it, or to the first word."""
    words: list[_Word] = []
    pending, starts = "", True
    for token in text.split():
        match = _TOKEN.fullmatch(token)
        assert match is not None
        before, core, after = match.groups()
        if core:
            words.append(_Word(pending + before, core, after, starts))
            pending, starts = "", bool(words[-1].ends)
        elif words:
            words[-1] = replace(words[-1], after=f"{words[-1].after} {token}")
            starts = bool(words[-1].ends)
        else:
            pending += f"{token} "
    return words


def _drop(words: Sequence[_Word], level: float, draws: random.Random) -> list[int]:
    chances = [draws.random() for _ in words]
    stays = [place for place, chance in enumerate(chances) if chance >= level]
    return stays or [max(range(len(words)), key=chances.__getitem__)]


def _first(words: Sequence[_Word], level: float) -> list[int]:
    # 1e-9: 0.7 * 10 is a hair below 7 in binary, and a word must not hang on that.
    return list(range(max(1, len(words) - int(level * len(words) + 1e-9))))


def _keep(words: Sequence[_Word], stays: Sequence[int]) -> list[_Word]:
    """The words that stay, as sentences: the first begins as the sentence did, the last takes over its mark."""
    chosen, kept = set(stays), list[_Word]()
    capital, fresh = False, True
    for place, word in enumerate(words):
        if word.starts:
            capital, fresh = word.core[0].isupper(), True
        if place in chosen:
            core = word.core[0].upper() + word.core[1:] if fresh and capital else word.core
            kept.append(replace(word, core=core, starts=fresh))
            fresh = False
        elif word.ends and not fresh and not kept[-1].ends:
            kept[-1] = replace(kept[-1], after=kept[-1].after.rstrip(" ,;:-–—") + word.ends)
    return _closed(kept, words[-1].ends)


def _closed(kept: list[_Word], mark: str) -> list[_Word]:
    """End a text that was cut off before its last mark with that mark."""
    if mark and not kept[-1].ends:
        kept[-1] = replace(kept[-1], after=kept[-1].after.rstrip(" ,;:-–—") + mark)
    return kept


def _mistype(words: Sequence[_Word], level: float, draws: random.Random) -> list[_Word]:
    known = {word.core.casefold() for word in words}
    changed = []
    for word in words:
        # Both draws are made whatever the level: a word has the same error at every level that reaches it.
        chance, own = draws.random(), random.Random(draws.getrandbits(64))
        changed.append(replace(word, core=_typo(word.core, known, own)) if chance < level else word)
    return changed


def _typo(core: str, known: set[str], draws: random.Random) -> str:
    """The word with one error that makes no other word of the caption; the word itself where none is found."""
    letters = [place for place, letter in enumerate(core) if letter.isalpha()]
    if len(letters) < 2:
        return core
    for _ in range(_TRIES):
        made = _mistake(core, draws.choice(letters), draws)
        # "T-shirt" without its T would read as another word with a dash before it.
        if made.casefold() not in known and made[0].isalnum() and made[-1].isalnum():
            return made
    return core


def _mistake(core: str, place: int, draws: random.Random) -> str:
    head, letter, tail = core[:place], core[place], core[place + 1 :]
    kind = draws.randrange(4)
    if kind == 0:
        near = _neighbours(letter.lower())
        key = draws.choice(near) if near else letter
        return head + (key.upper() if letter.isupper() else key) + tail
    if kind == 1 and tail and tail[0].isalpha():
        # Capitals stay where they are: "The" becomes "Hte", as fingers on a keyboard make it.
        first, second = (tail[0].upper(), letter.lower()) if letter.isupper() else (tail[0], letter)
        return head + first + second + tail[1:]
    if kind == 2:
        return head + (tail[:1].upper() + tail[1:] if letter.isupper() and not head else tail)
    return head + letter + letter.lower() + tail if kind == 3 else core


def _neighbours(letter: str) -> str:
    """The keys around a letter on a QWERTY keyboard; empty for a letter that it does not have."""
    for number, row in enumerate(_ROWS):
        place = row.find(letter)
        if place >= 0:
            beside = row[max(0, place - 1) : place] + row[place + 1 : place + 2]
            above = _ROWS[number - 1][place : place + 2] if number else ""
            below = _ROWS[number + 1][max(0, place - 1) : place + 1] if number + 1 < len(_ROWS) else ""
            return beside + above + below
    return ""


def _shuffle(words: Sequence[_Word], level: float, draws: random.Random) -> list[_Word]:
    """Move the words; punctuation and the capital that begins a sentence stay where they are."""
    goals = _goals(words, draws)
    size = len(words)
    order = sorted(range(size), key=lambda place: ((1 - level) * place / size + level * goals[place], place))
    moved = [_lowered(words[source]) if source != place else words[source].core for place, source in enumerate(order)]
    return [
        replace(word, core=core[0].upper() + core[1:] if word.starts and word.core[0].isupper() else core)
        for word, core in zip(words, moved, strict=True)
    ]


def _goals(words: Sequence[_Word], draws: random.Random) -> list[float]:
    """A random goal in [0, 1) for every word; equal words keep their order, for nobody could see them swapped."""
    goals = [draws.random() for _ in words]
    alike: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(words):
        alike[word.core.casefold()].append(place)
    for places in alike.values():
        for place, goal in zip(places, sorted(goals[place] for place in places), strict=True):
            goals[place] = goal
    return goals


def _lowered(word: _Word) -> str:
    """A word without the capital that it had only because it began a sentence; "I" and "USA" keep theirs."""
    core = word.core
    plain = word.starts and core != "I" and core[1:] == core[1:].lower()
    return core[0].lower() + core[1:] if plain else core
