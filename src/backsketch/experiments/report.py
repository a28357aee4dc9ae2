"""``backsketch report``: tables, PNG figures and one self-contained HTML page, without running anything."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backsketch.experiments.config import SweepError
from backsketch.experiments.store import SWEEP, Sweep
from backsketch.experiments.views import VIEWS, Page, TextTable
from backsketch.experiments.views import headline as headlines
from backsketch.files import write_whole

__all__ = ["find_sweeps", "report"]

DPI = 110
HEADLINE = "equal_cost"  # the figure of all comparisons, beside their folders
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #2b2d34; }
body { max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
caption { text-align: left; color: #5b6770; padding-bottom: 0.4rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #e4e7ea; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.failed { color: #d1495b; }
"""


def find_sweeps(paths: Sequence[Path]) -> list[Path]:
    """The gathered sweeps at or below some paths, sorted.

    Raises:
        SweepError: there is none.
    """
    found: list[Path] = []
    for path in paths:
        found += [path] if path.is_file() else sorted(path.rglob(SWEEP))
    if not found:
        raise SweepError(
            f"no {SWEEP} in {', '.join(map(str, paths))}: run `backsketch sweep` first"
        )
    return list(dict.fromkeys(found))


def report(paths: Sequence[Path], page: Path | None, console: Console) -> list[Path]:
    """Print the tables of some sweeps, write their figures beside them and all of it as one HTML page.

    Args:
        paths: result folders, or folders of them.
        page: the HTML file; None for none.
        console: where the tables go.

    Returns:
        What was written.

    Raises:
        SweepError: no sweep, a damaged one, or an unknown kind of report.
    """
    written, parts, compared = [], [], []
    for path in find_sweeps(paths):
        sweep = Sweep.load(path)
        if sweep.report not in VIEWS:
            raise SweepError(f"{path}: no view {sweep.report!r}; there are {', '.join(VIEWS)}")
        made = _view(path, sweep)
        for table in made.tables:
            console.print(_rich(made.title, table))
        for job in sweep.failed:
            console.print(f"failed: {job['id']}: {job['error']}", style="red", markup=False)
        images = _drawn(path, made)
        for name, content in images.items():
            written.append(path.parent / f"{name}.png")
            write_whole(written[-1], content)
        parts.append(_section(made, sweep, images))
        if sweep.report == "equal_cost":
            compared.append((path, sweep))
    if len(compared) > 1:
        folder = Path(os.path.commonpath([path.parent for path, _ in compared]))
        summary = Page(HEADLINE, "", figures={HEADLINE: headlines.figure([s for _, s in compared])})
        written.append(folder / f"{HEADLINE}.png")
        image = _drawn(folder, summary)[HEADLINE]
        write_whole(written[-1], image)
        parts.insert(0, _image(HEADLINE, image))
    if page is not None:
        write_whole(page, _document(parts).encode())
        written.append(page)
    return written


def _view(path: Path, sweep: Sweep) -> Page:
    try:
        return VIEWS[sweep.report](sweep)
    except SweepError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise SweepError(
            f"{path} does not hold what the report {sweep.report!r} needs ({told})"
        ) from error


def _drawn(path: Path, page: Page) -> dict[str, bytes]:
    try:
        return {name: _png(page, name) for name in page.figures}
    except ValueError as error:  # a label that matplotlib takes for a formula
        raise SweepError(f"{path} cannot be drawn: {str(error).splitlines()[0]}") from error


def _png(page: Page, name: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date or a version, so that the same results give the same file.
    page.figures[name].savefig(buffer, dpi=DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _rich(title: str, table: TextTable) -> Table:
    # As Text, since what a file says may look like rich's markup.
    made = Table(title=Text(f"{title}: {table.title}"), title_justify="left")
    for number, heading in enumerate(table.header):
        made.add_column(Text(heading), justify="left" if number == 0 else "right")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def _section(page: Page, sweep: Sweep, images: dict[str, bytes]) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in sweep.machine.items() if v is not None)
    lines = [f"<h2>{html.escape(page.title)}</h2>", f"<p>{html.escape(page.about)}</p>"]
    lines += [_html_table(table) for table in page.tables]
    lines += [_image(name, content) for name, content in images.items()]
    for job in sweep.failed:
        told = html.escape(f"{job['id']}: {job['error']}")
        lines.append(f'<p class="failed">failed: {told}</p>')
    return "\n".join([*lines, f"<p><small>{html.escape(machine)}</small></p>"])


def _image(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'


def _html_table(table: TextTable) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    head = f"<caption>{html.escape(table.title)}</caption>{row(table.header, 'th')}"
    return f"<table>{head}\n{body}</table>"


def _document(parts: Sequence[str]) -> str:
    head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>backsketch results</title>'
    return f"{head}<style>{_STYLE}</style></head><body><h1>backsketch results</h1>\n" + "\n".join(
        [*parts, "</body></html>\n"]
    )
