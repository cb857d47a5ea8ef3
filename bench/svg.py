# SPDX-License-Identifier: Apache-2.0
"""As much of SVG as a few plots need."""

from __future__ import annotations

from html import escape
from pathlib import Path

FONT = "Helvetica, Arial, sans-serif"
GREY = "#999"


class Drawing:
    """Shapes in pixels, origin at the top left, on a white ground."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" font-family="{FONT}" font-size="12">'
        )
        self._shapes = [f"<title>{escape(title)}</title>"]
        self.rect(0, 0, width, height, "white")

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}"/>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, ink: str = GREY, wide: float = 1
    ) -> None:  # fmt: skip
        self._shapes.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}" '
            f'stroke-width="{wide:g}"/>'
        )

    def dot(self, x: float, y: float, fill: str, radius: float = 3) -> None:
        self._shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" fill-opacity="0.55"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", size: int = 12,
        ink: str = "#222", bold: bool = False,
    ) -> None:  # fmt: skip
        weight = ' font-weight="bold"' if bold else ""
        self._shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{ink}"{weight}>{escape(words)}</text>'
        )

    def write(self, path: Path) -> None:
        path.write_text("\n".join([self._head, *self._shapes, "</svg>"]) + "\n")
