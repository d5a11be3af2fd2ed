"""Entry point of the ``symprune`` command."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from itertools import pairwise

from symprune_lightning import __version__
from symprune_lightning.cli.commands import COMMANDS
from symprune_lightning.cli.help import (
    HELP,
    ONE_DEVICE,
    PRUNE_HELP,
    SUMMARIES,
    TOPICS,
    UsageError,
    section,
    suggestion,
)
from symprune_lightning.errors import (
    PruningError,
    RankError,
    SweepError,
    VerificationError,
)

USER_ERRORS = (
    ValueError,
    TypeError,
    ImportError,
    OSError,
    PruningError,
    RankError,
    VerificationError,
    SweepError,
)
"""Errors that are reported without a traceback."""


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("Tip:" in message[:8] and "litlogger" in message)


def _silence(arguments: list[str]) -> None:
    """Silence what Lightning and other packages print before the parser reads ``--quiet``."""
    # an advertisement of another package, printed for each Trainer
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    if "--quiet" not in arguments and "--json" not in arguments:
        return
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.ERROR)  # "Seed set to 0"
    if "tqdm" not in sys.modules:  # read when it is imported: the bar of .gguf files has no switch
        os.environ.setdefault("TQDM_DISABLE", "1")


def _lightning(command: str, arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        _print_help(command, arguments)
        return
    from symprune_lightning.cli.arguments import check_arguments

    check_arguments(arguments)
    from symprune_lightning.cli.parser import run

    streams = "--stream=true" in arguments or ("--stream", "true") in pairwise(arguments)
    run([command, *[ONE_DEVICE] * streams, *arguments])


def _print_help(command: str, arguments: list[str]) -> None:
    """Print the help of a subcommand of LightningCLI, or of the topic after ``--help``."""
    position = arguments.index("--help") if "--help" in arguments else arguments.index("-h")
    topic = "".join(arguments[position + 1 : position + 2])
    if not topic or topic.startswith("-"):
        print(PRUNE_HELP.format(command=command, summary=SUMMARIES[command]), end="")
        return
    topics = ["pruning", *TOPICS, "all"]
    if topic not in topics:
        raise ValueError(f"there is no help on {topic!r}; topics are: {', '.join(topics)}")
    from symprune_lightning.cli.parser import run

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run([command, "--pruning.help" if topic == "pruning" else "--help"])
    print(text.getvalue() if topic in ("pruning", "all") else section(text.getvalue(), topic))


def _run(arguments: list[str]) -> None:
    _silence(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help", *arguments[2:]]
    if arguments[:1] in ([], ["--help"], ["-h"]):
        print(HELP, end="")
    elif arguments == ["--version"]:
        print(f"symprune-lightning {__version__}")
    elif arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
    elif arguments[0] in SUMMARIES:
        _lightning(arguments[0], arguments[1:])
    else:
        commands = ["prune", *COMMANDS, *(name for name in SUMMARIES if name != "prune")]
        raise ValueError(
            f"there is no command {arguments[0]!r}{suggestion(arguments[0], commands) or '.'} The "
            f"commands are: {', '.join(commands)}"
        )


def _exit_code_of(stop: BaseException) -> int | None:
    """Return 128 + the number of the signal that has ended the run; ``None`` for another end."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT  # Lightning turns KeyboardInterrupt into SystemExit
    # the class is Lightning's, which --help does not import
    if type(stop).__name__ == "SIGTERMException":
        return 128 + signal.SIGTERM
    return None


def error_message(error: Exception) -> str:
    """Return one sentence for an error, with its notes, such as the shapes of the batch.

    Examples:
        >>> error_message(ValueError("sparsity is 1.5"))
        'sparsity is 1.5'
        >>> error_message(IndexError("index out of range"))
        'IndexError: index out of range (SYMPRUNE_TRACEBACK=1 shows where it was raised)'
    """
    text = ", ".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, USER_ERRORS):
        return text
    # of the model or of a library: its name helps to search for it
    return f"{type(error).__name__}: {text} (SYMPRUNE_TRACEBACK=1 shows where it was raised)"


def main() -> None:
    """Run the command line of this process."""
    arguments = sys.argv[1:]
    # recipes may name the user's classes; last, so that installed packages take precedence
    sys.path.append(os.getcwd())
    try:
        _run(arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = _exit_code_of(stop)
        if code is None:
            raise
        # only these keep a journal
        resumes = arguments[0] in ("prune", "compare") and "--output" in " ".join(arguments)
        advice = "; rerun the same command to resume" * resumes
        print(f"symprune: interrupted{advice}", file=sys.stderr)
        sys.exit(code)
    except UsageError as error:
        print(f"symprune: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if os.environ.get("SYMPRUNE_TRACEBACK"):
            raise
        sys.exit(f"symprune: {error_message(error)}")


if __name__ == "__main__":
    main()
