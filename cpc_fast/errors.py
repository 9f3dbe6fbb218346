"""What the package raises on purpose: each message says what, where, and what to do."""


class CpcFastError(Exception):
    """Something could not be done; the command line prints it as one sentence and exits with 1."""

    exit_code = 1


class UsageError(CpcFastError):
    """Something was asked for in a way that cannot work; the command line exits with 2."""

    exit_code = 2


class ImageError(CpcFastError):
    """An image or mask that cannot be used; the message holds its path, what is wrong, and what to do."""


class NotWritten(CpcFastError):
    """There was no room for a file; what was there before is untouched. With some space freed, the same can go on."""


class Unreachable(CpcFastError):
    """A folder of images cannot be reached any more. What was done is kept; once it is back, the same can go on."""


class Stopped(CpcFastError):
    """Not an error: it was asked to stop (SIGTERM), and what was done is saved. The command line exits with 0."""

    exit_code = 0


class Interrupted(Stopped):
    """The same after Ctrl-C. The command line exits with 130."""

    exit_code = 130
