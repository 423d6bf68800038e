"""What foreign code raises when it cannot run a model, and an error as one line."""

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
    """Why a peer cannot run, as a line that says all."""


def one_line(error: BaseException) -> str:
    """An exception as one short line: its type and the first line of its message."""
    if isinstance(error, PeerFailure):
        return str(error)
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0][:200]}" if message else type(error).__name__
