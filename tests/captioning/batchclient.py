"""What the batch tests ask with: requests, settings, and a run that stores replies."""

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from reidctl.captioning.backends.base import Reply, Request
from reidctl.captioning.backends.batch import BatchDescriber
from reidctl.captioning.backends.batch_state import custom_id
from reidctl.captioning.config import BatchConfig, CaptionConfig, RemoteConfig

KEY = "sk-test-0123456789abcdefSECRET"


def asked(picture: str, count: int = 3, digest: str = "d") -> list[Request]:
    return [
        Request(f"image-{index}", picture, kind, "system", f"{kind}: describe", digest)
        for index in range(count)
        for kind in ("identity", "clothing")
    ]


def settings(url: str, *, remote: dict[str, Any] | None = None, **batch: Any) -> CaptionConfig:
    remote = {"backoff_s": 0.01, "attempts": 4, "timeout_s": 5.0} | (remote or {})
    return CaptionConfig(
        mllm="gpt-4",
        remote=RemoteConfig(base_url=url, **remote),
        batch=BatchConfig(**({"enabled": True, "poll_s": 0.01} | batch)),
    )


class Store:
    """What a run keeps: every final reply by key, on disk before the next one is asked for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._path = folder / "stored.jsonl"
        self.times: Counter[str] = Counter()
        self.replies: list[Reply] = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            self.times[line] += 1

    def run(self, describer: BatchDescriber, requests: list[Request]) -> list[Reply]:
        fresh = []
        wanted = (request for request in requests if custom_id(request) not in self.times)
        with closing(describer.describe(wanted)) as replies:
            for reply in replies:
                self.keep(reply)
                fresh.append(reply)
        self.replies += fresh
        return fresh

    def keep(self, reply: Reply) -> None:
        if reply.status != "failed":
            with self._path.open("a") as stream:
                stream.write(custom_id(reply.request) + "\n")
            self.times[custom_id(reply.request)] += 1

    def complete(self, requests: list[Request]) -> bool:
        return self.times == Counter(custom_id(request) for request in requests)


def run(folder: Path, config: CaptionConfig, requests: list[Request]) -> list[Reply]:
    return Store(folder).run(BatchDescriber("gpt-4", config, folder), requests)
