"""The entry point: every way a command can end is an exit code and at most one `error:` line, never a traceback.

Imports next to nothing at the top, so that an interrupt while the rest is imported ends in the same way.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from relp_cli.cli.waiting import settle
from relp_cli.errors import BAD_PLACE, OUT_OF_MEMORY, RelpError, nearest, out_of_memory, visible

RESUMES = "the same command again resumes what was finished"
ENDED = {signal.SIGINT: f"interrupted; {RESUMES}", signal.SIGTERM: f"ended by SIGTERM; {RESUMES}"}
LONGEST = 600  # characters of an error line; more is somebody's file


def run() -> None:
    """Run the command line. Exit codes: 0, 1 (failed), 2 (bad input), 130 (interrupted), 143 (SIGTERM: a cluster's time limit
    or preemption; what is claimed in a shared folder is given back, as after an interrupt)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend, inherited, would not be there
    for number in ENDED:
        signal.signal(number, _interrupt)
    try:
        _usable_streams()
        from typer.main import get_command

        from relp_cli.cli.app import app

        code = get_command(app).main(prog_name="relp", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
    except Exception as error:
        if os.environ.get("RELP_DEBUG"):
            raise
        fail(*explain(error))
    if code == 130:  # typer returns it for an interrupt
        by = _ended_by[0] if _ended_by else signal.SIGINT
        for number in ENDED:
            signal.signal(number, signal.SIG_IGN)
        _give_back()  # who was interrupted twice may not have
        fail(ENDED[by], 128 + by)
    _leave(code)


def explain(error: BaseException) -> tuple[str, int]:
    """What an error means to the person who typed the command, and the exit code."""
    if isinstance(error, RelpError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # typer's own: what was typed is no command of ours
        return _usage(error), 2
    if out_of_memory(error):
        return OUT_OF_MEMORY, 1
    if isinstance(error, BrokenPipeError):  # `| head`: nobody reads on
        return "", 1
    if isinstance(error, OSError) and error.strerror:
        where = "reading or writing" if error.filename is None else os.fsdecode(error.filename)
        return f"{where}: {error.strerror}", 2 if error.errno in (*BAD_PLACE, errno.ENOENT) else 1
    if isinstance(error, RecursionError):
        return f"{_typed()}: something in it is nested too deeply", 2
    if isinstance(error, UnicodeError):
        return f"{_typed()}: text that is not UTF-8 ({error.reason if hasattr(error, 'reason') else error})", 2
    return f"{type(error).__name__}: {error} (RELP_DEBUG=1 shows where)", 1


def fail(message: str, code: int) -> None:
    """One `error:` line on stderr, and the exit code."""
    settle()
    line = visible(message.strip())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 3 :]}"
    if line:
        with suppress(OSError):
            sys.stderr.write(_broken(f"error: {line}") + "\n")
    _leave(code)


def _broken(line: str) -> str:
    """On a terminal, broken between words, and further in than its first word; one line elsewhere."""
    if not sys.stderr.isatty():
        return line
    import shutil
    import textwrap

    width = max(20, shutil.get_terminal_size().columns)
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _usage(error: Any) -> str:
    """Typer's complaint as one line, with what was typed and the nearest option."""
    message, context = error.format_message().rstrip("."), error.ctx
    if not message.strip():  # `relp` alone: the help was printed
        return ""
    where = "relp" if context is None else context.command_path
    name = getattr(error, "option_name", None)
    if name is not None and context is not None and message.startswith("No such option"):
        options = [o for p in context.command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
        return f"{where}: unknown option '{name}'{nearest(name, [*options, '--help'])}"
    cause = getattr(error.__cause__ or error.__context__, "errors", None)  # pydantic's, which holds the value
    return f"{where}: {message}" + (f" (got '{cause()[0]['input']}')" if cause else "")


def _typed() -> str:
    return f"relp {' '.join(sys.argv[1:])}"


_ended_by: list[signal.Signals] = []


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but at once while a module is imported: modules of others catch whatever is raised in them."""
    _ended_by.append(by := signal.Signals(number))
    if by is signal.SIGTERM:  # once: launchers send it several times, and claims are being released
        signal.signal(by, signal.SIG_IGN)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            settle()
            with suppress(OSError):
                os.write(2, f"error: {ENDED[by]}\n".encode())
            _give_back()  # a model's library is imported within a claim
            os._exit(128 + by)
        frame = frame.f_back
    raise KeyboardInterrupt


def _give_back() -> None:
    """What this process has claimed, if it has come to that."""
    if claims := sys.modules.get("relp_cli.jobs.claims"):
        claims.release()


def _usable_streams() -> None:
    """Closed streams swallow what is written; characters that the terminal cannot show are written as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the whole process
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave(code: Any) -> None:
    """Exit, also where nobody reads our output any more: what is still buffered is dropped."""
    settle()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or 1
    sys.exit(code)


if __name__ == "__main__":
    run()
