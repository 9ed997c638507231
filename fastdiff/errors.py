"""The one exception that users see: a mistake they can mend, told in one line."""


class UserError(ValueError):
    """Bad input from outside (a file, a flag, a value, a network that is away).

    The message names the file, flag or value, what was expected, and what to do. Entry points print it as one
    line and exit with status 1; library callers may catch it as `ValueError`.
    """
