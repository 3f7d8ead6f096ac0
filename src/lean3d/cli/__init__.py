"""The command `lean3d`: a verb, its arguments, one function below."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lean3d.cli import verbs
from lean3d.cli.show import err, out
from lean3d.errors import ConfigError, Lean3dError, did_you_mean
from lean3d.version import __version__

__all__ = ["main"]


@dataclass(frozen=True)
class Verb:
    """A verb of the command."""

    run: Callable[[Sequence[str]], int]
    summary: str
    example: str


VERBS = {
    "train": Verb(verbs.train, "train a model on a folder of clips", "lean3d train my/clips"),
    "eval": Verb(verbs.evaluate, "test a trained model", "lean3d eval runs/mine"),
    "predict": Verb(verbs.predict, "say what is to be seen in a video", "lean3d predict runs/mine clip.mp4"),
    "data": Verb(verbs.data, "check a data set, or prepare it", "lean3d data check my/clips"),
    "stream": Verb(verbs.stream, "watch cameras, streams and files", "lean3d stream 0 --model runs/mine"),
    "report": Verb(verbs.report, "write an HTML page about a run", "lean3d report runs/mine"),
    "models": Verb(verbs.models, "list the models and what they cost", "lean3d models 'smallbig*'"),
    "bench": Verb(verbs.bench, "time nets here, or count their work", "lean3d bench c3d c3d_light --cost"),
    "recipes": Verb(verbs.show_recipes, "list the recipes", "lean3d recipes light"),
    "convert": Verb(verbs.convert, "take weights that others published", "lean3d convert smallbig w.pth"),
    "demo": Verb(verbs.demo, "the whole way once, on made videos", "lean3d demo --out demo"),
    "doctor": Verb(verbs.doctor, "what is missing and how to mend it", "lean3d doctor"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point; leaves by SystemExit.

    0: done. 1: `doctor` found something missing, or `data` bad files or another problem. 2: an error that a message
    explains. 130: Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("LEAN3D_DEBUG", "") not in ("", "0")
    if "--debug" in words:
        words.remove("--debug")
        debug = True
    try:
        sys.exit(_dispatch(words))
    except Lean3dError as error:
        if debug:
            raise
        err.print(Text("error: ", style="bold red") + Text(str(error), style="red"), soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:  # `lean3d models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # no such folder, no space left, no permission: Python's own words say it
        if debug:
            raise
        err.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        message = str(stop) or "stopped"
        err.print(Text(f"\n{message}", style="yellow"), soft_wrap=True)
        sys.exit(getattr(stop, "exit_code", 130))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        _show_verbs()
        return 0
    if words[0] in ("-V", "--version"):
        print(f"lean3d {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        raise ConfigError(f"lean3d has no verb {verb!r}: {did_you_mean(verb, VERBS)}")
    return VERBS[verb].run(rest)


def _show_verbs() -> None:
    out.print("lean3d: video recognition with light 3D ConvNets\n\nusage: lean3d VERB ...\n", markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    table.add_column(style="dim", no_wrap=True)
    for name, verb in VERBS.items():
        table.add_row(name, verb.summary, verb.example)
    out.print(table)
    out.print(
        "\nlean3d VERB --help shows all settings of a verb. lean3d --version. --debug (or LEAN3D_DEBUG=1) shows where "
        "an error came from."
    )
