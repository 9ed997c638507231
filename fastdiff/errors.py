"""The exceptions that users see, each told in one line."""


class UserError(ValueError):
    """Bad input from outside (a file, a flag, a value, a network that is away).

    The message names the file, flag or value, what was expected, and what to do. Entry points print it as one
    line and exit with status 1; library callers may catch it as `ValueError`.
    """


class UsageError(UserError):
    """A flag has a value that it cannot have, whatever is on the disk; exit status 2."""


class TrainingFailed(Exception):
    """A run that cannot go on, such as one whose loss is not finite; printed as one line, exit status 1."""
