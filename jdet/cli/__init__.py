"""The command line: `jdet demo`, `generate`, `run-batch`, `convert`, `certify`, `env`.

A module a command, or two. jax is imported inside the commands: `jdet --help` and a mistyped
option answer at once.
"""

import sys
from collections.abc import Sequence

from jdet.cli import certify, demo, env, files, generate
from jdet.cli.common import app, fail

__all__ = ["app", "certify", "demo", "env", "files", "generate", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # Not standalone: typer would frame its own errors, and exit.
        return app(arguments or ["--help"], prog_name="jdet", standalone_mode=False) or 0
    except (ValueError, NotImplementedError, OSError) as error:
        return fail(error)
    except Exception as error:
        # click's usage errors: typer has a click of its own, and exports no base class.
        if message := getattr(error, "format_message", None):
            return fail(message())
        from jdet.compiler import EnvironmentRefused

        if isinstance(error, EnvironmentRefused):
            return fail(error)
        raise
