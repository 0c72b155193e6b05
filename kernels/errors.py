"""What goes wrong with a backend for reasons that are the machine's."""


class UnavailableError(Exception):
    """A backend cannot run here, or has not enough of what it needs; the message says why and what to do."""
