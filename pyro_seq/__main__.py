"""The command line: ``pyro-seq demo``, ``fit`` and ``evaluate``, or ``python -m pyro_seq demo`` and so on."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyro_seq.fit.commands import add_commands

__all__ = ["main"]

_DEMO = """\
Declare one local-level model of the annual flow of the Nile, 1871 to 1970, and infer its level in four ways: a Kalman
filter (exact), a particle filter, and two guides trained by SVI, a filtering network and amortized variational filtering
(AVF). Prints the log evidence by each and writes a figure. Takes a minute or two; uses no network."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    :param arguments: those after the program's name; ``sys.argv`` when omitted.
    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(prog="pyro-seq", description="Sequential latent variable models for Pyro.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="four inferences of one model, on the Nile series", description=_DEMO)
    demo.add_argument("--steps", type=_at_least_one, default=300, metavar="N",
                      help="SVI steps for each of the two guides (default: %(default)s)")
    demo.add_argument("--output", type=_figure, default=Path("nile.png"), metavar="FILE",
                      help="where the figure goes; its suffix says the format (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N",
                      help="of all random numbers; the same seed gives the same numbers (default: %(default)s)")
    demo.set_defaults(run=_demo)
    add_commands(commands)
    given = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        return given.run(given)
    except (ValueError, TypeError, OSError, ImportError) as error:  # what the user can mend, without a traceback
        print(f"pyro-seq: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("interrupted: the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, which ends a run as Ctrl-C does."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} steps; at least 1 is needed")
    return value


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def _demo(given: argparse.Namespace) -> int:
    import torch

    from pyro_seq.demo import EXACT_LOG_EVIDENCE, as_text, compare_on_nile, save_figure

    torch.set_num_threads(1)  # On tensors this small, several threads mostly wait for each other.
    table = compare_on_nile(given.steps, given.seed)
    print(f"""
{as_text(table)}

The exact log evidence is {EXACT_LOG_EVIDENCE} nats, by the Kalman filter. A lower bound lies below it, by as much as the guide
differs from the posterior: neither guide sees the future, so however long it trains a gap remains. The log of an unbiased
estimate is itself biased a little low. Seconds are those of the run alone, without the training.""")
    save_figure(table, given.output)
    print(f"\nFigure: {given.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
