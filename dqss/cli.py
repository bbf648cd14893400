"""What the entry points share: bad input is one line and exit code 2, never a stack trace."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dqss.errors import UserError
from dqss.io import output_error
from dqss.progress import Interrupted

BAD_INPUT = 2
CONFIG_FILE = "config.yaml"
"""Where a run folder keeps the configuration that made it."""


def run(main: Callable[[], Any], argv: list[str] | None = None) -> None:
    """Run a Hydra main function and exit as a well-behaved command does.

    Exit codes: 0; 2 for bad input; 130 and 143 for an orderly stop by SIGINT and SIGTERM.
    """
    # Hydra would print its own half of a stack trace and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = sys.argv[1:] if argv is None else argv
    resume = next((word.split("=", 1)[1] for word in arguments if word.startswith("resume=")), None)
    if resume not in (None, "", "null"):
        sys.argv.append(f"hydra.run.dir={resume}")
    try:
        main()
    except Interrupted as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def explain(error: BaseException) -> str | None:
    """One line for an error that is the user's to mend; None for one that is ours."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, UserError):
            return str(chain)
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return str(output_error(str(error.filename), error))
    return None


def make(config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a configuration group; what its target complains about comes out as it is.

    Raises:
        UserError: from the target itself, or for arguments that it does not take.
    """
    try:
        return instantiate(config, *args, **kwargs)
    except HydraException as error:
        line = explain(error)
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, (TypeError, ValueError)):
            raise UserError(" ".join(str(error.__cause__).split())) from None
        raise UserError(line or str(error)) from None
