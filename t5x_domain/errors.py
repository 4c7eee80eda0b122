"""The exceptions that are shown to a user as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: names the file and line, key or flag, and what to do about it.

    Command-line verbs print the message and exit with status 2; library callers can catch it.
    """


class StorageError(Exception):
    """A bucket that has not answered for long: names the path and the attempts.

    Nothing for the user to mend: command-line verbs print the message and exit with status 1, which launchers take for
    "start it again, a few times".
    """
