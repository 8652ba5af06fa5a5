"""The page of a quickstart: its frame, pictures and tables in it, and what it is made from."""
import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
img {{ max-width: 100%; height: auto; image-rendering: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25rem .9rem .25rem 0; text-align: left; }}
td:nth-child(n+2) {{ font-variant-numeric: tabular-nums; }} tr {{ border-bottom: 1px solid #e5e5e5; }}
small {{ color: #666; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def png(picture: np.ndarray, alt: str) -> str:
    """An <img> that carries a uint8 (H, W, 3) picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """An HTML table."""
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def only(folder: Path, pattern: str) -> Path:
    """The newest match. Raises FileNotFoundError with what to do when there is none."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds no {pattern}: run scripts/quickstart.sh to its end first")
    return found[-1]


def read_json(path: Path) -> dict:
    """A result's content. Raises FileNotFoundError with what to do when it is not there."""
    return json.loads(only(path.parent, path.name).read_text())


@dataclass
class Part:
    """What a run of the quickstart has of one model."""

    name: str  # GPT or ARPG
    log: list[dict]  # rows of the training's metrics
    config: dict  # of the model
    sections: str  # HTML
    numbers: list[tuple[str, str, str]]
    pictures: np.ndarray  # uint8 (H, W, 3): samples, a row for each class

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.config["vocab_size"]
