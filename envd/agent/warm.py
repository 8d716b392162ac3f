"""The program of the warm interpreter: it has pyautogui loaded and forks once for each program it is given.

It is not imported by the agent: its text is given to the desktop's own `python -c`, so it may use the standard library
and pyautogui only. A fork is a fresh process in every way that a program can see: it makes its own connection to the X
server, has its own PAUSE and FAILSAFE, and takes all it did to its modules with it when it ends.

Its arguments are the number of a socket and the process id of its parent, with which it dies. On the socket, which
keeps packets apart: we send `ready`; then for each packet that comes (a
program's text, with two descriptors for its output) `pid N`, perhaps `declined` if the child could not reach the X
server and ran nothing, and `exit N`, where a negative N is a signal.
"""

import ctypes
import importlib
import linecache
import os
import signal
import socket
import sys
import time  # noqa: F401 - loaded for the programs
import traceback
import types

LONGEST = 65536


def main() -> None:
    channel, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    die_with(parent)
    import pyautogui

    mouseinfo = sys.modules["mouseinfo"]  # pyautogui loads it
    # The programs never share these connections; left open, they would be counted as two clients for ever.
    for module in (mouseinfo, pyautogui.platformModule):
        module._display.close()
    ourselves = os.getpid()
    channel.send(b"ready")
    while True:
        program, descriptors, _, _ = socket.recv_fds(channel, LONGEST, 2)
        if not program:
            return
        pid = os.fork()
        if pid == 0:
            die_with(ourselves)
            run(channel, program.decode(), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(b"pid %d" % pid)
        _, status = os.waitpid(pid, 0)
        channel.send(b"exit %d" % os.waitstatus_to_exitcode(status))


def run(channel: socket.socket, program: str, descriptors: list[int]) -> None:
    """In the fork: be `python -c program` as nearly as can be. Never returns."""
    os.setsid()
    for target, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, target)
        os.close(descriptor)
    try:
        import pyautogui

        # What the module learnt when it was loaded: the connection, and the keyboard's layout of that moment.
        importlib.reload(pyautogui.platformModule)
    except Exception:  # noqa: BLE001 - whatever it was, a new process will say it better
        channel.send(b"declined")
        os._exit(1)
    channel.close()
    os._exit(execute(program))


def execute(program: str) -> int:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["-c"]
    if sys.version_info >= (3, 13):  # since then tracebacks show the lines of a `-c` program
        linecache.cache["<string>"] = (len(program), None, program.splitlines(keepends=True), "<string>")
    try:
        exec(compile(program, "<string>", "exec"), module.__dict__)
        code = 0
    except BaseException as error:  # noqa: BLE001 - as the interpreter itself does at the end of a program
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # without our own
        traceback.print_exception(type(error), error, frames)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def die_with(parent: int) -> None:
    """End by SIGKILL when `parent` does, or now if it has already."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
