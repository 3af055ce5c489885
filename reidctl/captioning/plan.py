"""Which texts are wanted: the requests in order, and the rows of the captions table that they become."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from reidctl.captioning.backends.base import Describer, Request
from reidctl.captioning.backends.replay import ReplayDescriber
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.journal import Entry
from reidctl.captioning.prompts import Prompt, build_prompt
from reidctl.captioning.styles import style_of_image

NOT_ASKED = "not asked: the budget was spent"


class Plan:
    """The texts of a run.

    Args:
        images: rows of the `images` table: `image_id`, `path`, and where they are known `sha256`, `width`, `height`
            and `attributes`.
        styles: rows of the `styles` table; empty for no style.
        describer: who will be asked.
        config: the `caption` section; its `limit` and `shard` choose the images.
        root: folder that relative image paths start from.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        styles: pd.DataFrame,
        describer: Describer,
        config: CaptionConfig,
        root: Path | None = None,
    ) -> None:
        chosen = images.drop_duplicates("image_id")
        self._names = _names(chosen)
        if config.limit is not None:
            chosen = chosen.head(config.limit)
        if config.shard is not None:
            chosen = chosen[[in_shard(image_id, config.shard) for image_id in chosen["image_id"]]]
        self.images = chosen
        self._instruction: dict[str | None, str] = dict(zip(styles["style_id"], styles["instruction"], strict=True))
        self._instruction[None] = ""
        self._style_ids = styles["style_id"].tolist()
        self.instructions: list[str] = styles["instruction"].tolist()
        self.describer = describer
        self.config = config
        self._root = root
        self._prompts: dict[tuple[str, str | None], Prompt] = {}

    def __len__(self) -> int:
        return len(self.images) * len(self.config.kinds)

    def prompt_digests(self) -> set[str]:
        """Return the digests of all prompts that this run may send."""
        return {self._prompt(kind, style).digest for kind in self.config.kinds for style in self._style_ids or [None]}

    def requests(self) -> Iterator[Request]:
        """Yield the first attempt of every text; the texts of one image follow each other."""
        columns = (self._column(name) for name in ("image_id", "path", "sha256", "attributes"))
        for image_id, path, sha256, given in zip(*columns, strict=True):
            attributes = dict(given) if isinstance(given, Mapping) else {}
            style_id = style_of_image(image_id, self._style_ids, seed=self.config.seed)
            version = self._version(sha256, attributes)
            for kind in self.config.kinds:
                prompt = self._prompt(kind, style_id)
                yield Request(
                    image_id=image_id,
                    image_path=str(self._root / path if self._root else path),
                    kind=kind,
                    system=prompt.system,
                    prompt=prompt.text,
                    digest=prompt.digest,
                    style_id=style_id,
                    instruction=self._instruction[style_id],
                    attributes=attributes,
                    image_version=version,
                    names=tuple(name for name in (image_id, _short(image_id), path) if self._names[name] == 1),
                )

    def sized_requests(self) -> Iterator[tuple[Request, tuple[int, int]]]:
        """Yield every request with the width and height of its image file; 0 where they are not known."""
        kinds = len(self.config.kinds)
        sizes = zip(self._column("width"), self._column("height"), strict=True)
        each = (size for size in sizes for _ in range(kinds))
        for request, (width, height) in zip(self.requests(), each, strict=True):
            yield request, (int(width or 0), int(height or 0))

    def row(self, request: Request, entry: Entry | None) -> dict[str, Any]:
        """Return the `captions` row of a wanted text; without an entry it was never asked."""
        name = hashlib.sha256("\0".join(request.key).encode("utf-8", "surrogatepass")).hexdigest()[:20]
        # A retry that nobody came back for (the run was stopped) has no usable text either.
        status = "failed" if entry is None or entry.status == "retry" else entry.status
        return {
            "caption_id": f"{request.kind}-{name}",
            "image_id": request.image_id,
            "kind": request.kind,
            "source": self.describer.source,
            "conditioned_on": "image",
            "text": entry.text if entry is not None and status == "ok" else None,
            "parent_id": None,
            "char_start": None,
            "char_end": None,
            "style_id": request.style_id,
            "model": self.describer.model,
            "prompt_sha256": request.digest,
            "status": status,
            "reason": NOT_ASKED if entry is None else entry.reason,
        }

    def _column(self, name: str) -> list[Any]:
        return self.images[name].tolist() if name in self.images else [None] * len(self.images)

    def _version(self, sha256: str | None, attributes: Mapping[str, str]) -> str:
        """The image's digest; where the text comes from the attributes, theirs."""
        if isinstance(self.describer, ReplayDescriber):
            # Another recording is another answer to the same question.
            return f"{sha256 or ''}:{self.describer.content}"
        if self.describer.source != "template":
            return sha256 or ""
        return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()

    def _prompt(self, kind: str, style_id: str | None) -> Prompt:
        if (kind, style_id) not in self._prompts:
            instruction = self._instruction[style_id]
            self._prompts[kind, style_id] = build_prompt(kind, instruction, self.config, model=self.describer.model)
        return self._prompts[kind, style_id]


def _names(images: pd.DataFrame) -> Counter[str]:
    """How many images of the whole table each name could mean; an image counts once for each of its names."""
    pairs = zip(images["image_id"], images["path"], strict=True)
    return Counter(name for image_id, path in pairs for name in {image_id, _short(image_id), path})


def _short(image_id: str) -> str:
    return image_id.partition(":")[2] or image_id


def in_shard(image_id: str, shard: str) -> bool:
    """Return whether an image belongs to shard `i/n`: by a digest of its id, the same on every machine."""
    number, _, count = shard.partition("/")
    code = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(code, "big") % int(count) == int(number) - 1


def part_name(shard: str | None) -> str:
    """Return the name of the part file that a process writes: one per shard, so that parts merge by copying."""
    if shard is None:
        return "replies-000.jsonl"
    number, _, count = shard.partition("/")
    return f"replies-{int(number):04d}-of-{int(count):04d}.jsonl"
