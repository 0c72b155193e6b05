"""The one error type of the package: everything a user can cause is a TcinferError with a one-line message."""


class TcinferError(Exception):
    """Something is wrong with what the user gave us: a file, an option, a text, an id.

    The message is one line that names the thing and the way out; the command line prints it and exits with
    status 1.
    """


class FileError(TcinferError):
    """A file is not what it should be: damaged, truncated, hostile, of a newer version or of an unknown kind."""


class TokenizerError(TcinferError):
    """A text cannot be turned into ids (or back) with what the model file holds."""
