"""What goes wrong: the package's one error type, and what a backend says for reasons that are the machine's."""


class TcinferError(Exception):
    """Something is wrong with what the user gave us: a file, an option, a text, an id.

    The message is one line that names the thing and the way out; the command line prints it and exits with
    status 1.
    """


class UnavailableError(TcinferError):
    """A backend cannot run here, or has not enough of what it needs; the message says why and what to do."""
