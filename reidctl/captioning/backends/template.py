"""A describer that writes from the attributes of an image, in the form of the style asked for. No model, no network."""

import hashlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.backends.facts import Facts, facts_of, join, with_article
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.form import Form, parse_instruction

_ORNAMENTS = {"identity": ("notably", "rather", "visibly"), "clothing": ("neat", "stylish", "smart", "modern")}
# Nothing is visibly average, or notably a bob.
_FITTING = {"average": "rather", "bob": "neat", "bald": "visibly"}
_FILLERS = (
    ("one pedestrian in view", "One pedestrian is in view."),
    ("no other details are recorded", "No other details are recorded."),
)


@dataclass(frozen=True)
class _Content:
    """What a text says, in (label, phrase without article) pairs.

    Attributes:
        subject: `young man`; empty in clothing texts.
        details: what follows: the body, or the garments.
        extras: what does not fit the same verb: hair and belongings in clothing texts.
    """

    subject: str
    details: tuple[tuple[str, str], ...]
    extras: tuple[tuple[str, str], ...] = ()


class TemplateDescriber:
    """Grammatical English from the attributes of synthped, Market-1501-Attribute or DukeMTMC-attribute.

    Reads `Request.attributes` and `Request.instruction`. The words depend on the image id and the seed alone.
    Identity texts name no clothing; clothing texts name no gender, so that the pair is disentangled by construction.
    """

    name = "template"
    model = "template-3"
    source = "template"
    deferred = False
    repeats = True

    def __init__(self, config: CaptionConfig) -> None:
        self._config = config

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield one text per request; `failed` for an image without the attributes that it needs."""
        for request in requests:
            facts = facts_of(request.attributes, sensitive=self._config.sensitive)
            content = self._identity(facts) if request.kind == "identity" else self._clothing(facts)
            if content is None:
                yield failed(request, f"the image has no attributes for a text of kind {request.kind}")
                continue
            form = parse_instruction(request.instruction)
            text = _write(content, form, request.kind, facts, self._choice(request))
            yield Reply(request, "ok", text=_filled(text, form, self._config.check.min_words))

    def _identity(self, facts: Facts) -> _Content | None:
        hair = (facts.hair,) if facts.hair and self._config.hair == "identity" else ()
        if facts.noun == "person" and not (facts.age or facts.body):
            return None
        details = tuple(map(_labelled_phrase, facts.body + hair))
        subject = f"{facts.age} {facts.noun}".strip()
        return _Content("teenager" if subject == "teenage person" else subject, details)

    def _clothing(self, facts: Facts) -> _Content | None:
        if not facts.garments:
            return None
        hair = (_labelled_phrase(facts.hair),) if facts.hair and self._config.hair == "clothing" else ()
        return _Content("", facts.garments, hair + tuple(("Carried", item) for item in facts.belongings))

    def _choice(self, request: Request) -> int:
        code = hashlib.sha256(f"{self._config.seed}\0{request.image_id}\0{request.kind}".encode()).digest()
        return int.from_bytes(code[:4], "big")


def _fitting(phrase: str) -> str:
    """The ornament that a phrase needs; empty where any does."""
    return next((ornament for word, ornament in _FITTING.items() if word in phrase.split()), "")


def _labelled_phrase(phrase: str) -> tuple[str, str]:
    return phrase.split()[-1].capitalize(), phrase


def _write(content: _Content, form: Form, kind: str, facts: Facts, choice: int) -> str:
    if form.ornate:
        words = _ORNAMENTS[kind]
        ornate = [
            (label, f"{_fitting(phrase) or words[(choice + index) % len(words)]} {phrase}")
            for index, (label, phrase) in enumerate(content.details)
        ]
        content = _Content(content.subject, tuple(ornate), content.extras)
    if form.opening == "label":
        text = _labelled(content, form)
    elif form.fragments:
        phrases = [content.subject, *(phrase for _, phrase in content.details + content.extras)]
        text = ("; " if form.separators else ", ").join(phrase for phrase in phrases if phrase) + "."
    elif kind == "identity":
        text = _identity_sentences(content, form, facts)
    else:
        text = _clothing_sentences(content, form)
    return text


def _filled(text: str, form: Form, min_words: int) -> str:
    """The text with its case and end mark, and where little is known with words that say nothing of the person."""
    for note, sentence in _FILLERS:
        if len(text.split()) >= min_words:
            break
        if form.opening == "label":
            text += f" Note: {note}."
        elif form.fragments:
            text = f"{text.removesuffix('.')}{';' if form.separators else ','} {note}."
        else:
            text += f" {sentence}"
    text = text[0].upper() + text[1:]
    if form.exclaiming:
        text = text.removesuffix(".") + "!"
    return text.lower() if form.lower else text


def _labelled(content: _Content, form: Form) -> str:
    items = [f"Person: {content.subject}"] if content.subject else []
    # "Build: slim", not "Build: slim build".
    for label, phrase in content.details + content.extras:
        items.append(f"{label}: {phrase.removesuffix(' ' + label.lower())}")
    return ("; " if form.sentences == 1 else ". ").join(items) + "."


def _identity_sentences(content: _Content, form: Form, facts: Facts) -> str:
    who = {"man": "He", "woman": "She", "boy": "He", "girl": "She"}.get(facts.noun, "They")
    be, have, appear = ("are", "have", "appear") if who == "They" else ("is", "has", "appears")
    starts = {
        "image": ("The image shows {}", "The image appears to show {}"),
        "pronoun": (f"{who} {be} {{}}", f"{who} {appear} to be {{}}"),
        "imperative": ("Look for {}", "Look for what appears to be {}"),
        "verb": ("Seen here is {}", "Seen here is probably {}"),
        "noun": ("The person is {}", "The person appears to be {}"),
    }
    phrases = [with_article(phrase) for _, phrase in content.details]
    if content.subject == "person" and form.opening == "noun":
        # Nothing but the body is known: not "The person is a person with".
        return f"The person {'appears to have' if form.hedged else 'has'} {_join(phrases, form)}."
    start = starts[form.opening][form.hedged].format(with_article(content.subject))
    if form.sentences == 1 or not phrases:
        return f"{start}{' with ' + _join(phrases, form) if phrases else ''}."
    again = (f"{who} {'probably ' * form.hedged}{have} {{}}", f"{who} also {have} {{}}", f"{who} {have} {{}} as well")
    return _spread(f"{start}.", phrases, again, form)


def _clothing_sentences(content: _Content, form: Form) -> str:
    starts = {
        "image": ("The image shows a person in {}", "The image appears to show a person in {}"),
        "pronoun": ("They wear {}", "They appear to wear {}"),
        "imperative": ("Look for someone in {}", "Look for someone who seems to wear {}"),
        "verb": ("Dressed in {}", "Seemingly dressed in {}"),
        "noun": ("The person is wearing {}", "The person appears to be wearing {}"),
    }
    start = starts[form.opening][form.hedged]
    garments = [with_article(phrase) for _, phrase in content.details]
    extras = [with_article(phrase) for _, phrase in content.extras]
    if form.sentences == 1:
        tail = f"{';' if form.separators else ','} with {join(extras)}" if extras else ""
        return f"{start.format(_join(garments, form))}{tail}."
    again = ("They also wear {}", "The outfit also includes {}")
    if form.hedged:
        again = ("They may also wear {}", "The outfit probably includes {} too")
    last = "They appear to have {}" if form.hedged else "They can be seen with {}"
    # One sentence is kept for what is not worn.
    worn = form.sentences - bool(extras)
    if worn <= 1 or len(garments) == 1:
        text = f"{start.format(_join(garments, form))}."
    else:
        text = _spread(f"{start.format(garments[0])}.", garments[1:], again, form, worn - 1)
    return f"{text} {last.format(_join(extras, form))}." if extras else text


def _spread(start: str, phrases: list[str], again: tuple[str, ...], form: Form, count: int | None = None) -> str:
    """The start, then even shares of the phrases in `count` (default: what is left of the form's) more sentences."""
    parts = max(1, min(form.sentences - 1 if count is None else count, len(phrases), len(again)))
    size = -(-len(phrases) // parts)
    groups = [phrases[index : index + size] for index in range(0, len(phrases), size)]
    following = [f"{words.format(_join(group, form))}." for words, group in zip(again, groups, strict=False)]
    return " ".join([start, *following])


def _join(phrases: list[str], form: Form) -> str:
    if form.separators and len(phrases) > 1:
        return f"{'; '.join(phrases[:-1])}{' -' if len(phrases) == 2 else ';'} and {phrases[-1]}"
    if form.connected and len(phrases) > 1:
        return f"{join(phrases[:-1])} together with {phrases[-1]}"
    return join(phrases)
