"""The child process of `speedstack.eval.lm_eval.sandbox`: reads a program from stdin, locks itself in, runs it.

An isolated Python starts it as a file, so it imports the standard library alone.
"""

import ctypes
import json
import os
import platform
import resource
import socket
import struct
import sys

CANNOT_ISOLATE = 97
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RETURN_ALLOW, RETURN_KILL, RETURN_PERMISSION_DENIED = 0x7FFF0000, 0x80000000, 0x00050000 | 1
LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_GREATER_OR_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06
# Architecture -> (its audit number, numbers of the refused system calls).
REFUSED = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41,
            "socketpair": 53,
            "kill": 62,
            "ptrace": 101,
            "setpgid": 109,
            "setsid": 112,
            "tkill": 200,
            "tgkill": 234,
            "process_vm_writev": 311,
            "pidfd_send_signal": 424,
            "io_uring_setup": 425,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ptrace": 117,
            "kill": 129,
            "tkill": 130,
            "tgkill": 131,
            "setpgid": 154,
            "setsid": 157,
            "socket": 198,
            "socketpair": 199,
            "process_vm_writev": 271,
            "pidfd_send_signal": 424,
            "io_uring_setup": 425,
        },
    ),
}
X32_BIT = 0x40000000


def limit_resources(seconds: float, memory_bytes: int, file_bytes: int, num_files: int) -> None:
    """Set hard limits, which an unprivileged program cannot raise."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, num_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def refuse_system_calls() -> bool:
    """Install the filter; returns whether a socket is now refused."""
    if platform.machine() not in REFUSED or not sys.platform.startswith("linux"):
        return False
    audit_number, calls = REFUSED[platform.machine()]
    numbers = list(calls.values())
    # seccomp(2): the filter reads struct seccomp_data, the call's number at 0, the architecture at 4.
    program = [(LOAD_WORD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, audit_number), (RETURN, 0, 0, RETURN_KILL)]
    program += [(LOAD_WORD, 0, 0, 0), (JUMP_IF_GREATER_OR_EQUAL, len(numbers) + 1, 0, X32_BIT)]
    program += [(JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(RETURN, 0, 0, RETURN_ALLOW), (RETURN, 0, 0, RETURN_PERMISSION_DENIED)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, None, 0, 0) != 0:
        return False
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        return False
    try:
        socket.socket().close()
    except PermissionError:
        return True
    return False


def main() -> None:
    """Run the program; write the nonce if it came to its end."""
    task = json.load(sys.stdin)
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if not refuse_system_calls():
        os._exit(CANNOT_ISOLATE)
    limit_resources(**task["limits"])
    code = compile(task["source"], "<program>", "exec")
    exec(code, {"__name__": "__main__"})
    os.write(answers, task["nonce"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
