"""Words that a mirror image would make wrong."""

import re

# Any of these before `right after` makes `right` a side: "a bag on the right after all", "turning right now".
_DIRECTED = (
    r"the|his|her|their|its|my|on|to|at|from|and|or|slightly|left\w*|right\w*"
    r"|(?:turn|fac|look|walk|head|lean|bend|point|mov|step)\w*"
)
_IDIOM = re.compile(
    r"(?<![a-z])all[\s-]+right(?![a-z-]|\s+(?:hand|side|arm|leg|foot))"
    r"|(?<![a-z])right[\s-]+angle[sd]?(?![a-z])"
    rf"|(?:^|[^\w\s]\s*|(?<![a-z])(?!(?:{_DIRECTED})\s)[a-z]+\s+)right\s+(?:after|away|now)(?![a-z])",
    re.IGNORECASE,
)
_SIDE = re.compile(r"(?<![a-z])(?:left|right)(?:[\s_-]*(?:hand(?:ed|er)?|most|wards?|side))?(?![a-z])", re.IGNORECASE)


def mentions_side(text: str) -> bool:
    """Return whether a text says left or right, so that a mirror image would make it wrong.

    Sides are `left` and `right` as words, and their forms joined or with a space, hyphen or underscore: left-hand,
    left-handed, leftmost, leftward(s), leftside; any case, any punctuation around. Not sides are words that only
    contain them (bright, upright, alright, leftover), `all right`, `right angle(s)`, `right-angled`, and `right after`,
    `right away`, `right now` unless a word before it gives a direction (`on the right after`, `turning right now`).

    A doubtful text counts as one with a side (`he left the shop`, `right behind her`, `left open`): a mirror image
    that is not made costs little, a caption that lies does not. Only English is understood.
    """
    return _SIDE.search(_IDIOM.sub(" ", text)) is not None
