"""An SVG picture and its colours, for make_figures.py."""

# ruff: noqa: ANN201, D101, D102, D103 -- a script, like those of benchmarks/

from xml.sax.saxutils import escape

# Mid-tones on a light card, so that the pictures can be read on light and on dark pages.
CARD, EDGE, INK, FAINT, PAPER = "#fcfbf8", "#d5d2c8", "#24292f", "#6a7079", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, SLATE = "#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#4a5568"
TINTS = {BLUE: "#dbe8f5", ORANGE: "#fae3d3", GREEN: "#d9eee2", PURPLE: "#e6defa", SLATE: "#e4e7ec", FAINT: "#efeeea"}
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
# Advance widths of Helvetica's ASCII characters from the space on, in thousandths of the font size.
WIDTHS = [
    *(278, 278, 355, 556, 556, 889, 667, 222, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556, 556, 556),
    *(556, 556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667),
    *(556, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556, 222, 556),
    *(556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722),
    *(500, 500, 500, 334, 260, 334, 584),
]
WIDTH, MARGIN, PILL_SIZE = 900, 22, 10.5


def text_width(text, size):
    return sum(WIDTHS[ord(char) - 32] if " " <= char <= "~" else 556 for char in text) * size / 1000


def pill_width(text):
    return max(text_width(text, PILL_SIZE) * 1.07 + 9, 16)  # bold is wider


class Drawing:
    """An SVG picture on a card, written from top to bottom."""

    def __init__(self, title):
        self._title = title
        self._parts = []

    def add(self, name, body=None, **attributes):
        shown = "".join(f' {key.replace("_", "-")}="{number(value)}"' for key, value in attributes.items())
        self._parts.append(f"<{name}{shown}/>" if body is None else f"<{name}{shown}>{escape(body)}</{name}>")

    def rect(self, x, y, width, height, fill, **attributes):
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, **attributes)

    def rects(self, places, fill):
        """Many of one colour, (x, y, width, height) each, without seams where they touch."""
        cells = ((number(size) for size in place) for place in places)
        path = "".join(f"M{x} {y}h{width}v{height}h-{width}z" for x, y, width, height in cells)
        self.add("path", d=path, fill=fill, shape_rendering="crispEdges")

    def line(self, *points, stroke=INK, **attributes):
        path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.add("path", d=path, fill="none", stroke=stroke, **attributes)

    def text(self, x, y, text, *, size=13, fill=INK, anchor="start", **attributes):
        if text:
            if "font_weight" not in attributes:  # the layout stays what it is where the font is another one
                attributes["textLength"] = text_width(text, size)
            if fill != INK:
                attributes["fill"] = fill
            if anchor != "start":
                attributes["text_anchor"] = anchor
            self.add("text", text, x=x, y=y, font_size=size, **attributes)

    def bold(self, x, y, text, **attributes):
        self.text(x, y, text, font_weight="bold", **attributes)

    def pill(self, x, y, text, colour):
        """A rounded label whose text stands on the line `y`; returns its width."""
        width = pill_width(text)
        self.rect(x, y - 11.5, width, 15.5, colour, rx=7.75)
        self.bold(x + width / 2, y, text, size=PILL_SIZE, fill=PAPER, anchor="middle")
        return width

    def finish(self, height):
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(height)}" width="{WIDTH}" '
                f'height="{number(height)}" font-family="{FONT}" fill="{INK}" role="img">',
                f"<title>{escape(self._title)}</title>",
                f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{number(height - 1)}" rx="10" fill="{CARD}" '
                f'stroke="{EDGE}"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def number(value):
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
