"""The one error type of the package: everything a user can cause is a TcinferError with a one-line message."""

from tcinfer.kernels.errors import TcinferError as TcinferError


class FileError(TcinferError):
    """A file is not what it should be: damaged, truncated, hostile, of a newer version or of an unknown kind."""


class TokenizerError(TcinferError):
    """A text cannot be turned into ids (or back) with what the model file holds."""
