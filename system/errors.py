"""Every error a user may meet. Each message names the thing, its value, what must hold, and the remedy.

Exit codes follow docs/cli.md: 2 usage or configuration, 3 preflight, 4 training diverged,
5 data integrity, 6 infrastructure gave up.
"""


class DreamfleetError(Exception):
    """Root of all errors we raise for users; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DreamfleetError):
    """A setting, recipe, environment name or command cannot be used."""

    exit_code = 2


class PreflightError(DreamfleetError):
    """The machine is not ready: port taken, no permission, no space, device absent."""

    exit_code = 3


class DivergedError(DreamfleetError):
    """Training produced non-finite values too often to go on."""

    exit_code = 4


class IntegrityError(DreamfleetError):
    """A file on disk or bytes on a wire are not what their digest or schema says."""

    exit_code = 5


class InfrastructureError(DreamfleetError):
    """A process, peer or deadline failed more often than the restart budget allows."""

    exit_code = 6


class SchemaError(ConfigError):
    """Arrays do not match the declared keys, shapes or dtypes."""


class RejectedError(DreamfleetError):
    """A peer refused the data sent; `reason` is the short label of the rejection counter."""

    exit_code = 5

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class DeadlineError(DreamfleetError):
    """A call waited as long as it was allowed to."""

    exit_code = 6


class EnvError(DreamfleetError):
    """An environment broke its contract in a way the adapter could not contain."""

    exit_code = 6


class EnvTimeout(EnvError):
    """An environment did not answer before the deadline."""


class RankLostError(InfrastructureError):
    """A learner rank died, fell silent or does not get on; no rank can go on without it.

    `intact`: this rank's agent is what it was after its last whole update, counted yet or not.
    """

    def __init__(self, message: str, *, ranks: tuple[int, ...] = (), intact: bool = False) -> None:
        super().__init__(message)
        self.ranks, self.intact = ranks, intact
