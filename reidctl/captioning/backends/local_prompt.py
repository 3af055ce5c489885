"""System text and prompt as the one string that a vision-language processor takes."""

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from reidctl.errors import DataError

_MARKUP = re.compile(r"[<>\[\]{}|]")


class ChatPrompts:
    """System text and prompt as the one string that a processor takes."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = tokenizer = processor.tokenizer
        owner = processor if getattr(processor, "chat_template", None) else tokenizer
        self._template = owner if getattr(owner, "chat_template", None) else None
        self._image = str(getattr(processor, "image_token", None) or "<image>")
        special = special_tokens(tokenizer)
        marks = {mark for mark in tokenizer.get_added_vocab() if mark in special or _MARKUP.search(mark)}
        named = {value for key, value in vars(processor).items() if key.endswith("token") and isinstance(value, str)}
        self._marks = sorted(filter(str.strip, marks | special | named), key=len, reverse=True)
        # An unknown word is ordinary text, whatever the tokenizer calls its number.
        ids = {tokenizer.convert_tokens_to_ids(mark) for mark in marks | special}
        self._controls = ids - {tokenizer.unk_token_id, None}
        self._layouts: dict[tuple[bool, bool], Callable[[str, str], str]] = {}
        self._texts: dict[tuple[str, str, bool], str] = {}

    def text(self, system: str, prompt: str, *, image: bool) -> str:
        """Return the prompt; words in it that the tokenizer would take for control tokens are broken up.

        Raises:
            ValueError: a control token cannot be kept out.
            DataError: the chat template cannot be used.
        """
        key = system, prompt, image
        if key not in self._texts:
            if len(self._texts) > 4096:  # every retry has its own reason
                self._texts.clear()
            self._texts[key] = self._build(system, prompt, image)
        return self._texts[key]

    def _build(self, system: str, prompt: str, image: bool) -> str:
        layout = self._layout(bool(system), image)
        wanted = self._count(layout("a" if system else "", "a"))
        for clean in (self._broken_up, _without_markup):
            text = layout(clean(system), clean(prompt))
            if self._count(text) == wanted:
                return text
        raise ValueError("the prompt holds control tokens of the model")

    def _count(self, text: str) -> Counter[int]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Counter(number for number in ids if number in self._controls)

    def _broken_up(self, text: str) -> str:
        for _ in range(8):  # a space may complete another one
            before = text
            for mark in self._marks:
                text = text.replace(mark, f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " ")
            if text == before:
                break
        return text

    def _layout(self, with_system: bool, image: bool) -> Callable[[str, str], str]:
        if self._template is None:
            return self._fallback(image)
        if (with_system, image) not in self._layouts:
            self._layouts[with_system, image] = self._find_layout(with_system, image)
        return self._layouts[with_system, image]

    def _fallback(self, image: bool) -> Callable[[str, str], str]:
        start = f"USER: {self._image}\n" if image else "USER: "
        return lambda system, prompt: f"{start}{_joined(system, prompt)} ASSISTANT:"

    def _find_layout(self, with_system: bool, image: bool) -> Callable[[str, str], str]:
        """The first form of messages whose system text, prompt and picture all come out of the template."""
        for form in _forms(self._image, image):
            with contextlib.suppress(ValueError):
                text = self._render(form("SystemWords" if with_system else "", "PromptWords"))
                bare = self._render(next(_forms(self._image, False))("", "PromptWords")) if image else ""
                complete = "PromptWords" in text and ("SystemWords" in text or not with_system) and text != bare
                if complete and not re.search(r"""['"]type['"]""", text):  # a list printed as it is
                    return lambda system, prompt, form=form: self._render(form(system, prompt))  # type: ignore[misc]
        raise DataError("The model's chat template takes no image with a text.", hint="Use an instruction-tuned model.")

    def _render(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        assert self._template is not None
        options = {"enable_thinking": False} if "enable_thinking" in str(self._template.chat_template) else {}
        try:
            text = self._template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except (TemplateError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from None
        return str(text)


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that a tokenizer calls special, with or without a role of their own."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _forms(mark: str, image: bool) -> Iterator[Callable[[str, str], list[dict[str, Any]]]]:
    """Ways to write one turn as messages, the best first."""
    place: list[dict[str, str]] = [{"type": "image"}] if image else []

    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": [*place, {"type": "text", "text": text}]}

    def system(content: Any) -> list[dict[str, Any]]:
        return [{"role": "system", "content": content}] if content else []

    yield lambda order, prompt: [*system([{"type": "text", "text": order}] if order else ""), user(prompt)]
    yield lambda order, prompt: [*system(order), user(prompt)]
    yield lambda order, prompt: [user(_joined(order, prompt))]
    start = f"{mark}\n" if image else ""
    yield lambda order, prompt: [*system(order), {"role": "user", "content": start + prompt}]
    yield lambda order, prompt: [{"role": "user", "content": start + _joined(order, prompt)}]


def _joined(system: str, prompt: str) -> str:
    return f"{system}\n\n{prompt}" if system else prompt


def _without_markup(text: str) -> str:
    """The text without a character that control tokens are written with, in any of its widths."""
    return _MARKUP.sub(" ", unicodedata.normalize("NFKC", text))
