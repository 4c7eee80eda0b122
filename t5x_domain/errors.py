"""The one exception that is shown to a user as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: names the file and line, key or flag, and what to do about it.

    Command-line verbs print the message and exit with status 2; library callers can catch it.
    """
