"""Which device to compute on."""

import torch

from reidctl.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA when there is one, else the CPU.

    Raises:
        UsageError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"`{name}` is not a device.", hint="Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"Device `{name}` was asked for, but PyTorch sees no CUDA device on this machine.",
            hint="Use --device cpu, or install a PyTorch build that fits the driver.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"Device `{name}` was asked for, but there are {torch.cuda.device_count()} CUDA device(s).")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Device `{name}` is not supported.", hint="Use auto, cpu, cuda or cuda:N.")
    return device
