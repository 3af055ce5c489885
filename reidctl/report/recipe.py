"""The settings of a stage as text that people can read and put into a file."""

from collections.abc import Mapping
from typing import Any

import yaml


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Return resolved settings as YAML, in their own order, long texts unbroken.

    Args:
        settings: of a stage's record: JSON values only.
    """
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=False)
