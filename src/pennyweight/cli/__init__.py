"""The command line: parses, calls, prints. Every verb is a function of `pennyweight` that Python calls the same way.

Exit codes: 0 done; 1 it ran and the answer is no (a claim or a receipt that does not hold); 2 what was given cannot be
used, said in one line; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    # here, not at the top: `import pennyweight.cli` must cost nothing
    import typer

    from pennyweight.cli.app import app
    from pennyweight.errors import PennyweightError

    # UsageError of click, or of the copy of click that newer typers carry
    usage_error: Any = typer.BadParameter.__base__
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # not standalone: a message is one line of ours, not a box
        code = app(args=given, prog_name="pennyweight", standalone_mode=False) or 0
        return _stopped(given) if code == 130 else code  # what newer typers make of Ctrl-C
    except PennyweightError as error:
        return _say(" ".join(str(error).split()))
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else "pennyweight"
        return _say(f"{' '.join(error.format_message().split())} (see `{command} --help`)")
    except (typer.Abort, KeyboardInterrupt):
        return _stopped(given)
    except BrokenPipeError:  # `pennyweight rows | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _stopped(given: list[str]) -> int:
    hint = ""
    if given[:1] == ["fit"] and "--dry-run" not in given:
        again = given if "--resume" in given else [*given, "--resume"]
        hint = f"; what is finished is kept, go on with: pennyweight {shlex.join(again)}"
    _say(f"stopped{hint}")
    return 130


def _say(message: str) -> int:
    sys.stdout.flush()
    print(f"pennyweight: {message}", file=sys.stderr)
    return 2
