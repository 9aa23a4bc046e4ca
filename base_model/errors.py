"""The exceptions a command turns into an exit status.

RushesError
├── UserError     the user or the environment: one line saying what, where and what to do   (exit status 2)
├── GuardStop     a guard or a self-check stopped the run on purpose                         (exit status 3)
└── Interrupted   Ctrl-C or SIGTERM, after everything was saved                             (exit status 130 or 143)
"""


class RushesError(Exception):
    """Base of every error that is reported in one line, without a traceback."""

    exit_status = 1


class UserError(RushesError):
    """Bad input, a missing file, a full disk, an unknown key: something the user can mend."""

    exit_status = 2


class GuardStop(RushesError):
    """A safety limit, a quality guard or the self-check at step 0 ended the run; what was reached is saved."""

    exit_status = 3


class Interrupted(RushesError):
    """A signal arrived; the run saved its state and can go on with `--resume`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
