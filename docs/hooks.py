"""What the site needs beside the pages: links to files outside of docs/, and pictures from results/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(
    r"\]\(((?:\.\./)+)((?:tests|results|src|benchmarks|examples)/[^)#\s]+|[A-Z]+\.md)([^)]*)\)"
)


def on_files(files: Any, config: Any) -> Any:
    """Put the committed figures beside the pages."""
    for picture in sorted((ROOT / "results").rglob("*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show a path that leads outside of the pages as a name; a picture gets its place on the site."""
    depth = page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        target = match[2]
        if target.endswith(".png"):
            return "](" + "../" * depth + target + ")"
        if config.repo_url:
            return f"]({config.repo_url}/blob/main/{target}{match[3]})"
        return f"](#){{ title='{target}' }}"

    return LINK.sub(replaced, markdown)
