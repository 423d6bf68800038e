"""Errors of foreign code that cannot run a model, and errors as one line."""

# Such a peer is reported with its reason; a contestant that is ours fails in the same way, because a missing row is
# visible and a broken benchmark run is not.
PEER_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    AssertionError,
    OSError,
)


class PeerFailure(RuntimeError):
    """Why a peer cannot run, in one line."""


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    if isinstance(error, PeerFailure):
        return str(error)
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0][:200]}" if message else type(error).__name__
