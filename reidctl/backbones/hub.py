"""Finding published weights: the local caches first, the network only when there is one."""

import os
import socket
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from reidctl.errors import DataError

_HUB = "https://huggingface.co"


def offline() -> bool:
    """Whether the Hugging Face hub's name does not resolve, or the user asked for offline work.

    Asking first spares the user the hub client's minute of retries on a machine without network.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return True
    if getproxies().get("https"):
        return False  # behind a proxy, names need not resolve here
    return not _resolves(urlsplit(os.environ.get("HF_ENDPOINT", _HUB)).hostname or "")


def local_only(source: str) -> bool:
    """Whether `source`, a folder or hub id, must or can only be read from this machine."""
    return Path(source).is_dir() or offline()


@lru_cache
def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """Return the first of `names` that the hub repository has, from the cache or downloaded.

    Raises:
        DataError: none of them is cached or downloadable.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    local_only = offline()
    reasons: list[Exception] = []
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=local_only))
        except (OSError, ValueError, HfHubHTTPError) as error:
            reasons.append(error)
    raise unreachable(f"{' or '.join(names)} of {repository}", "the Hugging Face cache and hub", reasons[-1])


def unreachable(what: str, where: str, error: Exception) -> DataError:
    """The error for files that are neither here nor downloadable."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    network = "no network here" if offline() else reason
    return DataError(
        f"Could not get {what}: looked in {where}; nothing was downloaded ({network}).",
        hint="Without network, copy the file to this machine and give its path, e.g. "
        "clip:ViT-B-16//path/to/file.safetensors or vit-bert:/path/to/vit+/path/to/bert.",
    )
