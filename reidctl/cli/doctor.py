"""`reidctl doctor`: what this machine has."""

import json
import os
import shutil
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from reidctl.cli import options as o
from reidctl.cli.output import table, write

EPILOG = "Example:  reidctl doctor --json"

_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "scikit-learn", "openai", "pandas", "pyarrow")


def command(json_: o.Json = False) -> None:
    """Show versions, devices, disk, keys and optional extras; contacts nobody."""
    facts = _facts()
    if json_:
        write([json.dumps(facts)])
        return
    write(table(["", "found"], [[name, str(value)] for name, value in facts.items()]))


def _facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"python": sys.version.split()[0], "reidctl": metadata.version("reidctl")}
    facts |= {name: metadata.version(name) for name in _LIBRARIES}
    cuda = torch.cuda.is_available()
    facts["cuda devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    facts["cpu threads"] = torch.get_num_threads()
    facts["free disk (GB)"] = round(shutil.disk_usage(Path.cwd()).free / 1e9, 1)
    facts["mamba-ssm kernels"] = "installed" if util.find_spec("mamba_ssm") else "not installed (plain scan is used)"
    # Whether a key is set, never the key.
    facts["OPENAI_API_KEY"] = "set" if os.environ.get("OPENAI_API_KEY") else "not set (needed for --mllm gpt-4 only)"
    return facts
