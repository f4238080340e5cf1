"""How a run ends, and what its process says about it."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Documented exit codes of `snapgen train` and of every command that trains."""

    DONE = 0
    INFRASTRUCTURE = 69  # EX_UNAVAILABLE: a device, a file system or another host failed; submit again
    DIVERGED = 70  # EX_SOFTWARE: too many updates in a row were not finite; look before submitting again
    PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal with nothing lost; submit again
    BAD_CONFIG = 78  # EX_CONFIG: the config, the data or the workdir is wrong; correct it


class RunError(Exception):
    """An error that ends a run with a documented exit code and a message meant for the user."""

    code = ExitCode.INFRASTRUCTURE


class ConfigError(RunError, ValueError):
    """The run cannot start, or cannot go on, as it was asked for."""

    code = ExitCode.BAD_CONFIG


class DamagedError(ConfigError):
    """A file of a workdir, such as a checkpoint, is not what was saved."""


class DivergedError(RunError):
    """Updates are not finite any more. The last checkpoint holds the last good state."""

    code = ExitCode.DIVERGED


class PreemptedError(RunError):
    """A signal asked the run to stop; all that it had done is saved."""

    code = ExitCode.PREEMPTED
