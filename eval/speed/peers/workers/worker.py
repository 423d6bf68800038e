"""Runs a peer in a process of its own, with the interpreter of the environment that has it:

    PYTHON worker.py PEER.py

PEER.py has `load(options)`, which returns a line that describes the peer and a function `run(prompts, num_new_tokens)`
for several prompts, ids each, decoded at once and greedily past end tokens. `run` returns a list of the tokens of each
sequence, a list of their arrivals, each (seconds from the call, how many), and the seconds that the call took. A peer
may have `environment()` too, the variables that its process must have been started with.

Requests are lines of JSON on standard input, the first one the options; every one is answered by a line on standard
output, which has the key "error" where it failed. The end of input ends the process. Time is measured here, so that
none of what passes between the processes is in it.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO


def serve(load: Callable[[dict[str, Any]], Any], requests: Iterable[str], replies: TextIO) -> None:
    """Answers every line of `requests`. A peer that does not load is not asked to run."""
    run = None
    for line in requests:
        request = json.loads(line)
        try:
            if run is None:
                description, run = load(request)
                reply = {"description": description}
            else:
                tokens, arrivals, total_seconds = run(request["prompts"], request["num_new_tokens"])
                reply = {"tokens": tokens, "arrivals": arrivals, "total_seconds": total_seconds}
        except Exception as error:  # whatever it is, the other side tells its user
            reply = {"error": reason_of(error)}
        print(json.dumps(reply), file=replies, flush=True)


def reason_of(error: BaseException) -> str:
    """The exception that began it all, as a short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def main() -> None:
    """Serves the peer that the command line names."""
    peer = runpy.run_path(sys.argv[1])
    variables = peer["environment"]() if "environment" in peer else {}
    if missing := {name: value for name, value in variables.items() if name not in os.environ}:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)
    # What the peer's library prints goes to standard error: lines of its own would be taken for answers.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(peer["load"], sys.stdin, replies)


if __name__ == "__main__":
    main()
