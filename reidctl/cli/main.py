"""The command line's one `main()`: every error becomes a sentence and an exit code."""

import errno
import os
import signal
import sys
from io import TextIOWrapper
from typing import Any

from reidctl.cli.app import app
from reidctl.cli.output import ClosedPipe
from reidctl.errors import ReidctlError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit: 0 done, 1 bug, 2 usage, 3 data, 4 remote, 5 gate, 130 interrupted, 141 pipe."""
    if {"RANK", "SLURM_PROCID"} & set(os.environ):
        # DDP warns of parameters that it looked for in vain; which losses a batch has is not known before.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A terminated stage unwinds like an interrupted one, so that its temporary files go.
    signal.signal(signal.SIGTERM, _terminate)
    # A file name that this terminal's encoding cannot show is escaped; it must not stop the command.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run()
    # A process that `--devices` started leaves the sentence to the one that started it.
    if code == _INTERRUPTED and "REIDCTL_PARENT" not in os.environ:
        _complain("Interrupted.", "Finished work is kept; run the same command again to continue.")
    sys.exit(code)


def _run() -> int:
    try:
        # Typer turns an interrupt into the return value 130 here, and other exits into theirs.
        code = app(prog_name="reidctl", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ReidctlError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (ClosedPipe, BrokenPipeError, SystemExit):
        # The reader left (Typer exits by itself when that happens while it prints help); closing stdout at exit must
        # not complain about it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _system_error(error)
    except Exception as error:
        return _usage_error(error)


def _system_error(error: OSError) -> int:
    if error.errno in _DISK_FULL:
        _complain(f"No space left for {error.filename or 'an output file'}.", "Free some disk and run again.")
    elif isinstance(error, PermissionError):
        _complain(f"No permission: {error.filename}.", "Choose another --run directory or fix its permissions.")
    elif isinstance(error, (NotADirectoryError, FileExistsError)):
        _complain(f"{error.filename} is in the way: a folder is needed there.", "Choose another --run directory.")
    else:
        raise error
    return 3


def _usage_error(error: Any) -> int:
    """Typer's own errors become a sentence like ours; anything else is a bug and keeps its traceback."""
    kind = type(error).__name__
    if kind == "Abort":
        return _INTERRUPTED
    if not (hasattr(error, "exit_code") and hasattr(error, "format_message")):
        raise error
    if kind == "NoArgsIsHelpError":
        error.show()
    else:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "reidctl"
        message = " ".join(error.format_message().split())
        _complain(message if message.endswith((".", "?")) else f"{message}.", f"See `{where} --help`.")
    return int(error.exit_code)


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _complain(message: str, hint: str) -> None:
    sys.stderr.write(f"reidctl: {message}" + (f" {hint}" if hint else "") + "\n")
