"""The command line. Its packages are an extra, so they are imported only when it is called."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from backsketch.signals import noted

if TYPE_CHECKING:
    import typer

EXTRA = (
    "accelerate",
    "datasets",
    "matplotlib",
    "numpy",
    "PIL",
    "rich",
    "sklearn",
    "typer",
)


def make_app() -> typer.Typer:
    """The application with all its commands."""
    import typer

    from backsketch.commands.bench import bench_command
    from backsketch.commands.doctor import doctor_command
    from backsketch.commands.profile import profile_command
    from backsketch.commands.root import root_command
    from backsketch.commands.sweep import report_command, sweep_command
    from backsketch.commands.train import train_command

    app = typer.Typer(
        name="backsketch",
        help="Cheaper training with unbiased, randomized backward passes.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(root_command)
    app.command("train")(train_command)
    app.command("profile")(profile_command)
    app.command("bench")(bench_command)
    app.command("sweep")(sweep_command)
    app.command("report")(report_command)
    app.command("doctor")(doctor_command)
    return app


def main() -> None:
    """Entry point: exit code 0, 2 for what the user can set right, 130 after Ctrl-C."""
    try:
        with noted():  # from the beginning: making the application imports a lot
            make_app()()
    except KeyboardInterrupt:
        print("stopped before anything was begun", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        if _plain(sys.argv[1:]):
            return
        print(
            f'backsketch: the command line needs {package}: pip install "backsketch[train]"',
            file=sys.stderr,
        )
        sys.exit(2)


def _plain(arguments: list[str]) -> bool:
    """Do what needs no extra package, if that is what was asked for; returns whether it was."""
    if arguments == ["--version"]:
        print(f"backsketch {version('backsketch')}")
    elif arguments == ["doctor"]:
        from backsketch.commands.doctor import print_plainly

        print_plainly()
    else:
        return False
    return True


if __name__ == "__main__":
    main()
