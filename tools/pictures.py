"""``python -m tools.pictures``: writes the drawings of the documentation, each for light and for
dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs/_static"


@dataclass(frozen=True)
class Palette:
    """Colours; each drawing has its own background, so that it is readable on any page."""

    ground: str
    ink: str
    quiet: str
    box: str
    ours: str
    literal: str


LIGHT = Palette("#ffffff", "#1f2933", "#6b7785", "#eef1f4", "#cfe8dc", "#f7d9b5")
DARK = Palette("#14181c", "#e6eaee", "#98a4b0", "#232a31", "#1f4a3a", "#5c421f")


class Drawing:
    """Boxes, arrows and words, in pixels."""

    def __init__(self, width: int, height: int, title: str, palette: Palette) -> None:
        self.palette = palette
        self._parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
                f' width="{width}" height="{height}" role="img" font-family="system-ui, sans-serif"'
                ' font-size="14">'
            ),
            f"<title>{escape(title)}</title>",
            (
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
                ' markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z"'
                f' fill="{palette.quiet}"/></marker></defs>'
            ),
            f'<rect width="{width}" height="{height}" rx="8" fill="{palette.ground}"/>',
        ]

    def box(self, x: int, y: int, width: int, height: int, *lines: str, fill: str = "") -> None:
        """Draws a box with words in its middle; if there are several lines, the first is bold."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4"'
            f' fill="{fill or self.palette.box}" stroke="{self.palette.quiet}"/>'
        )
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.words(
                x + width / 2,
                top + 18 * number,
                line,
                anchor="middle",
                bold=number == 0 and len(lines) > 1,
            )

    def words(
        self,
        x: float,
        y: float,
        line: str,
        *,
        anchor: str = "start",
        bold: bool = False,
        quiet: bool = False,
    ) -> None:
        """Draws one line of text."""
        weight = ' font-weight="600"' if bold else ""
        colour = self.palette.quiet if quiet else self.palette.ink
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
            f' fill="{colour}"{weight}>{escape(line)}</text>'
        )

    def arrow(self, x1: int, y1: int, x2: int, y2: int, line: str = "", *, above: int = 6) -> None:
        """Draws an arrow from one point to another, with words over its middle."""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{self.palette.quiet}"'
            ' stroke-width="1.5" marker-end="url(#tip)"/>'
        )
        if line:
            self.words((x1 + x2) / 2, (y1 + y2) / 2 - above, line, anchor="middle", quiet=True)

    def text(self) -> str:
        """Returns the file's text."""
        return "\n".join([*self._parts, "</svg>", ""])


def update(palette: Palette) -> str:
    """Draws the parties of a device's update, and their connections."""
    d = Drawing(760, 330, "A device asks obdelta, obdelta asks the registry", palette)
    d.box(
        20,
        20,
        150,
        290,
        "device",
        "supervisor and",
        "balena-engine",
        "runs release A,",
        "shall run B",
    )
    d.box(
        310,
        20,
        150,
        290,
        "obdelta",
        "one build a pair,",
        "proven before",
        "it is named",
        fill=palette.ours,
    )
    d.box(600, 20, 140, 290, "registry", "has A and B", "as it always had")
    d.arrow(170, 60, 310, 60, "A to B?")
    d.arrow(460, 105, 600, 105, "may it? layers")
    d.arrow(600, 140, 460, 140, "A, B, once")
    d.arrow(310, 185, 170, 185, "name of the delta")
    d.arrow(170, 225, 310, 225, "pull that name")
    d.arrow(310, 260, 170, 260, "the delta")
    d.arrow(170, 296, 310, 296, "other pulls")
    d.arrow(460, 296, 600, 296, "streamed through")
    return d.text()


def layers(palette: Palette) -> str:
    """Draws the parts of a v3 delta image."""
    d = Drawing(760, 350, "The layers of a delta image", palette)
    d.words(20, 30, "base A, on the device", bold=True)
    d.words(290, 30, "delta image, over the network", bold=True)
    d.words(560, 30, "target B, on the device", bold=True)
    for number, (base, delta, target, fill) in enumerate(
        (
            ("layer 3: application", "delta: 30 KB", "layer 3: new", palette.literal),
            ("layer 2: libraries", "delta: 2 MB", "layer 2: new", palette.literal),
            ("layer 1: Debian", "copy: 86 bytes", "layer 1: the same", palette.ours),
        )
    ):
        y = 45 + 70 * number
        d.box(20, y, 180, 55, base)
        d.box(290, y, 180, 55, delta, fill=fill)
        d.box(560, y, 180, 55, target)
        d.arrow(200, y + 27, 290, y + 27)
        d.arrow(470, y + 27, 560, y + 27)
    for number, line in enumerate(
        (
            (
                "A layer that both have from the bottom up is one copy, which engines skip. From"
                " the first one that differs"
            ),
            (
                "on, each is a list of commands that makes the layer out of all of A's layers. The"
                " delta's label holds B's"
            ),
            (
                "config whole: its digest is B's image ID, so the engine ends with exactly B or"
                " with an error."
            ),
        )
    ):
        d.words(20, 285 + 20 * number, line, quiet=True)
    return d.text()


def commands(palette: Palette) -> str:
    """Draws the commands of a layer's stream."""
    d = Drawing(760, 250, "Copies and literals", palette)
    d.words(20, 30, "all of A's layers, end to end, uncompressed", bold=True)
    for x, width, name in (
        (20, 190, "libc.so"),
        (210, 160, "app.py"),
        (370, 230, "model.bin"),
        (600, 140, "config"),
    ):
        d.box(x, 42, width, 40, name)
    d.words(20, 128, "the stream", bold=True)
    for x, width, name, fill in (
        (20, 190, "copy", palette.ours),
        (210, 90, "copy", palette.ours),
        (300, 110, "literal", palette.literal),
        (410, 60, "copy", palette.ours),
        (470, 230, "copy", palette.ours),
    ):
        d.box(x, 140, width, 30, name, fill=fill)
    d.words(20, 205, "a layer of B, byte for byte", bold=True)
    for x, width, name in (
        (20, 190, "libc.so"),
        (210, 260, "app.py, edited"),
        (470, 230, "model.bin"),
    ):
        d.box(x, 215, width, 28, name)
    for x, to in ((115, 115), (250, 250), (345, 440), (485, 585)):
        d.arrow(x, 82, to, 139)
    return d.text()


def drawings() -> Iterator[tuple[Path, str]]:
    """Returns the content of every file."""
    for draw in (update, layers, commands):
        for name, palette in (("light", LIGHT), ("dark", DARK)):
            yield FOLDER / f"{draw.__name__}-{name}.svg", draw(palette)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, content in drawings():
        path.write_text(content, "utf-8")
