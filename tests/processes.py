"""Several processes that train together, from a test."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from accelerate import debug_launcher


def launch(function: Callable[..., Any], *args: Any, processes: int = 2) -> None:
    """Run a module-level function in every process of a gloo group; fails where one of them fails.

    Forked from a process of its own: forks of one whose autograd has started threads cannot train.
    """
    launcher = get_context("spawn").Process(target=_launch, args=(function, args, processes))
    launcher.start()
    launcher.join()
    assert launcher.exitcode == 0, (
        f"{function.__name__} failed in one of {processes} processes; see its traceback above"
    )


def _launch(function: Callable[..., Any], args: tuple[Any, ...], processes: int) -> None:
    debug_launcher(function, args=args, num_processes=processes)
