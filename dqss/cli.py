"""What the entry points share: bad input is one line and exit code 2, never a stack trace."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    OmegaConfBaseException,
)
from yaml import YAMLError  # type: ignore[import-untyped]

from dqss.arguments import argument_types, check_arguments, check_value, names_a_path
from dqss.data.base import CalibrationDataModule
from dqss.errors import UserError, near_match
from dqss.explain import explain, in_one_line
from dqss.models import LoadedModel
from dqss.progress import Interrupted

BAD_INPUT = 2
CONFIG_FILE = "config.yaml"
"""Where a run folder keeps the configuration that made it."""

OPEN_GROUPS = ("data", "model")
"""Groups of a finished search that a later command may change."""

LOSSES = {
    "kl": "dqss.losses.KLDivergence",
    "mse": "dqss.losses.MeanSquaredError",
    "l1": "dqss.losses.MeanAbsoluteError",
    "luma": "dqss.losses.LumaSquaredError",
    "task": "dqss.losses.TaskLoss",
    "picture": "dqss.losses.PictureLoss",
}
"""Short names of losses and distances."""
Rewrite = Callable[[list[str]], list[str]]


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """``hydra.main`` for the configuration of that name; what goes wrong inside becomes one line."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(task)
        def guarded(config: DictConfig) -> Any:
            # In here, because Hydra adds lines of its own to what leaves a job.
            try:
                return task(config)
            except (Exception, KeyboardInterrupt) as error:
                _leave(error)
                raise

        started: Callable[[], Any] = hydra.main(
            version_base="1.3", config_path="pkg://dqss.conf", config_name=config_name
        )(guarded)
        return started

    return decorate


def run(main: Callable[[], Any], *rewrites: Rewrite) -> None:
    """Run a :func:`command` and exit as a well-behaved program does.

    Exit codes: 0; 2 for bad input; 130 and 143 for an orderly stop by SIGINT and SIGTERM.

    Args:
        main: the command.
        rewrites: change the command line's arguments before Hydra reads them.
    """
    # Hydra would print its own half of a stack trace and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if importlib.util.find_spec("dqss.conf") is None:
            raise UserError("dqss is not installed: run 'pip install -e .' in the folder of its setup.cfg")
        for rewrite in (*rewrites, one_folder):
            sys.argv[1:] = rewrite(sys.argv[1:])
        main()
    except (Exception, KeyboardInterrupt) as error:
        _leave(error)
        raise


def _leave(error: BaseException) -> None:
    """Exit with a line for what is not a fault of this program; return for what is."""
    if isinstance(error, Interrupted):
        print(f"stopped by {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    line = explain(error)
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
        sys.exit(BAD_INPUT)


# -- the command line -------------------------------------------------------------------------


def overrides(arguments: Iterable[str]) -> list[Override]:
    """The words among ``arguments`` that override the configuration; ill-formed ones are left out."""
    parser = OverridesParser.create()
    found = []
    for word in arguments:
        if word.startswith("~") or ("=" in word and not word.startswith("-")):
            try:
                found += parser.parse_overrides([word])
            except HydraException:
                continue  # Hydra has its say about it later
    return found


def value_of(arguments: Iterable[str], key: str) -> str | None:
    """The value that the command line gives to ``key``, None where it gives none."""
    values = [found.value() for found in overrides(arguments) if found.key_or_group == key]
    return str(values[-1]) if values and values[-1] is not None else None


def is_multirun(arguments: Iterable[str]) -> bool:
    """Whether the arguments ask for a sweep."""
    return any(word in ("-m", "--multirun") for word in arguments)


def assignment(key: str, value: object) -> str:
    """``key=value`` as Hydra reads it, whatever characters are in the value."""
    text = str(value)
    if all(letter.isalnum() or letter in "/._-+:%" for letter in text):
        return f"{key}={text}"
    quoted = text.replace('"', '\\"')
    return f'{key}="{quoted}"'


def one_folder(arguments: list[str]) -> list[str]:
    """``run_dir=X`` moves Hydra's own files there as well; in a sweep, each run is in a folder below."""
    place = value_of(arguments, "run_dir")
    if place is None:
        return arguments
    word = assignment("hydra.sweep.dir" if is_multirun(arguments) else "hydra.run.dir", place)
    return replaced(arguments, "run_dir", [word])


def place_run(
    arguments: list[str],
    refuse_occupied: Callable[[Path], None],
    check_resume: Callable[[list[str], Path], None],
) -> list[str]:
    """Refuse a bad ``resume=`` or run folder before Hydra writes to it; Hydra's files go there too.

    Args:
        arguments: of the command line.
        refuse_occupied: raises for a folder in which nothing new can begin.
        check_resume: raises for one in which nothing can go on, or not with these arguments.
    """
    resume = value_of(arguments, "resume")
    if resume is None:
        place = value_of(arguments, "run_dir") or value_of(arguments, "hydra.run.dir")
        if place is not None and not is_multirun(arguments):
            refuse_occupied(Path(place))
        return arguments
    folder = Path(resume)
    check_resume(arguments, folder)
    # The folder keeps the record of the command that began the run.
    words = [assignment("resume", folder), assignment("hydra.run.dir", folder), "hydra.output_subdir=null"]
    return replaced(replaced(arguments, "run_dir", []), "resume", words)


def replaced(arguments: list[str], key: str, words: list[str]) -> list[str]:
    """Other words where ``key`` was set: in its place, since Hydra wants all overrides together."""
    found: list[str] = []
    for word in arguments:
        found += words if word.startswith(f"{key}=") else [word]
    return found


# -- configuration groups ---------------------------------------------------------------------


def make(config: DictConfig, where: str) -> Any:
    """Instantiate a configuration group; what its target complains about comes out as it is.

    Args:
        config: with ``_target_`` and its arguments.
        where: the group's name, for messages.

    Raises:
        UserError: from the target itself, or for arguments that it does not take.
    """
    _check(_plain(config), where)
    try:
        return instantiate(config)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, (TypeError, ValueError)):
            raise UserError(f"{where}: {in_one_line(error.__cause__)}") from error
        raise UserError(f"{where}: {in_one_line(error)}") from error


def spell_out_loss(method: DictConfig, key: str) -> None:
    """Replace a loss or distance that is given by its short name.

    Raises:
        UserError: for an unknown one.
    """
    name = method.get(key)
    if isinstance(name, str):
        if name not in LOSSES:
            raise UserError(
                f"method.{key}={name}{near_match(name, LOSSES)}: expected one of {', '.join(LOSSES)}"
            )
        method[key] = {"_target_": LOSSES[name]}


def anchor(config: DictConfig) -> None:
    """Make the relative paths in a group absolute, so that it means the same from another folder."""
    target = _target(_plain(config), "")
    for name, hint in argument_types(target).items() if target else ():
        value = config.get(name)
        if names_a_path(hint) and isinstance(value, str):
            config[name] = str(Path(value).expanduser().absolute())


def check_options(config: DictConfig, hints: Mapping[str, Any], groups: Iterable[str]) -> None:
    """Compare options outside of any group with their types; look for misspelt ones.

    Raises:
        UserError: naming the option, and what was expected.
    """
    known = [*hints, *groups]
    for name in map(str, config):
        hint = "" if name in known else near_match(name, known)
        if hint:  # other names may be an experiment's own, for interpolation
            raise UserError(f"{name}: unknown option{hint}")
    for option, kind in hints.items():
        check_value(kind, config[option], option)


def stored_config(folder: Path, option: str, groups: Iterable[str]) -> DictConfig:
    """The configuration that made a run folder.

    Args:
        folder: of a search.
        option: what the user calls it, for messages.
        groups: what must be in it.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{option}={folder}: no {CONFIG_FILE} there; give the folder of a search")
    try:
        stored = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{file} is damaged ({in_one_line(error)[:120]}): restore it or search again"
        ) from error
    missing = [name for name in groups if not isinstance(stored, DictConfig) or name not in stored]
    if missing or not isinstance(stored, DictConfig):
        raise UserError(f"{file} is damaged (no {missing[0]!r} in it): restore it or search again")
    return stored


def model_and_data(config: DictConfig, stored: DictConfig) -> tuple[LoadedModel, CalibrationDataModule, int]:
    """The network and the data of a run folder, as far as the command line does not say otherwise.

    Args:
        config: of the command: ``model``, ``data`` and ``threads``.
        stored: of the run, see :func:`stored_config`.

    Returns:
        Both, and the number of threads, which torch uses from now on.
    """
    threads = config.threads or stored.threads
    if threads:
        torch.set_num_threads(threads)
    loaded: LoadedModel = make(merged(stored.model, config.model), "model")
    data: CalibrationDataModule = make(merged(stored.data, config.data), "data")
    data.configure(loaded.input, loaded.num_classes)
    return loaded, data, threads or torch.get_num_threads()


def merged(stored: DictConfig, changes: DictConfig) -> DictConfig:
    """The stored group with single options changed, or another group in its place."""
    found = changes if "_target_" in changes else OmegaConf.merge(stored, changes)
    assert isinstance(found, DictConfig)
    return found


def open_groups(arguments: list[str]) -> list[str]:
    """``data.x=1`` changes the search's own data group, although nothing is in it yet: ``++data.x=1``."""
    chosen = [found.key_or_group.partition(".")[0] for found in overrides(arguments)]
    prefixes = tuple(f"{name}." for name in OPEN_GROUPS if name in chosen)
    return [f"++{word}" if word.startswith(prefixes) else word for word in arguments]


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return plain if isinstance(plain, dict) else {}


def _check(group: Mapping[str, Any], where: str) -> None:
    """Names and types of a group's options, and of the objects inside."""
    target = _target(group, where)
    if target is None:
        return
    given = {name: value for name, value in group.items() if not name.startswith("_")}
    ours = str(getattr(target, "__module__", "")).startswith("dqss.")
    check_arguments(target, given, where, values=ours)
    for name, value in given.items():
        if isinstance(value, Mapping):
            _check(value, f"{where}.{name}")


def _target(group: Mapping[str, Any], where: str) -> Callable[..., Any] | None:
    path = group.get("_target_")
    if path is None:
        return None
    try:
        found: Any = get_object(path)
    except Exception as error:
        raise UserError(f"{where}._target_={path} cannot be imported: {in_one_line(error)}") from error
    return found if callable(found) else None
