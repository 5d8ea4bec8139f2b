"""Loops compiled by numba: they release the GIL, so that threads can run them on slices of the data at once (`threads.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy.typing as npt

Array = npt.NDArray[Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` with the machine code cached on disk, where the installation leaves a place for it."""
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # a read-only install with no writable cache folder: compile once per process
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return made
