"""Draws backward.svg: the products of a step, and which of them each method executes.

python docs/pictures/draw.py
"""

import pathlib

LAYERS, ACTIVE = 6, (3, 5)  # of the example
COLUMNS = ("forward", "to inputs", "to weights")
WIDTH, HEIGHT, GAP = 62, 26, 6  # of a cell
INK, FULL, SAVED, PAPER = "#263238", "#3f51b5", "#ffca28", "#fafafa"


def dense():
    """Returns the products of a dense pass: sets of layers, one per column."""
    layers = set(range(1, LAYERS + 1))
    return layers, layers - {1}, layers


def sparse():
    """Returns the products of a pass with inactive layers."""
    layers = set(range(1, LAYERS + 1))
    return layers, {n for n in layers if n > min(ACTIVE)}, set(ACTIVE)


# Title, passes, and the layers whose forward product the second pass may reuse.
PANELS = [
    ("AdamW, S2-SAM", [dense()], set()),
    ("SAM", [dense(), dense()], set()),
    ("SL-SAM + S2-SAM", [sparse()], set()),
    ("SL-SAM", [sparse(), sparse()], set(range(1, min(ACTIVE)))),
]


def text(x, y, words, size=17, anchor="middle", weight="normal"):
    """Returns words at a point."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{words}</text>'
    )


def cell(x, y, fill):
    """Returns a product: a filled box, or an empty one if it is skipped."""
    style = f'fill="{fill}"' if fill else f'fill="none" stroke="{INK}" opacity=".25"'
    return f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" {style}/>'


def panel(x, y, title, passes, reusable):
    """Draws a method: three columns per pass, with the input at the bottom."""
    count = sum(len(layers) for columns in passes for layers in columns)
    counted = f"{count} products"
    if reusable:
        counted += f", {count - len(reusable)} on PyTorch"
    yield text(x, y, f"{title}: {counted}", 20, "start", "bold")
    for number, columns in enumerate(passes):
        left = x + 74 + number * (3 * (WIDTH + GAP) + 24)
        for column, (name, layers) in enumerate(zip(COLUMNS, columns)):
            at = left + column * (WIDTH + GAP)
            for line, word in enumerate(name.split()):
                yield text(at + WIDTH / 2, y + 30 + 18 * line, word)
            for layer in range(1, LAYERS + 1):
                top = y + 58 + (LAYERS - layer) * (HEIGHT + GAP)
                reused = number == 1 and column == 0 and layer in reusable
                fill = SAVED if reused else FULL if layer in layers else None
                yield cell(at, top, fill)
    for layer in range(1, LAYERS + 1):
        top = y + 58 + (LAYERS - layer) * (HEIGHT + GAP)
        is_active = layer in ACTIVE and title.startswith("SL")
        label = f"layer {layer}"
        weight = "bold" if is_active else "normal"
        yield text(x + 64, top + 19, label, 17, "end", weight)


def picture():
    """Returns the whole picture as a string."""
    height = 58 + LAYERS * (HEIGHT + GAP) + 44
    parts = []
    for number, (title, passes, reusable) in enumerate(PANELS):
        parts += panel(16, 36 + number * height, title, passes, reusable)
    bottom = 36 + len(PANELS) * height
    for at, fill, words in (
        (16, FULL, "executed"),
        (180, None, "skipped"),
        (336, SAVED, "reused on PyTorch"),
    ):
        parts += [
            cell(at, bottom, fill),
            text(at + 70, bottom + 19, words, 17, "start"),
        ]
    size = f"0 0 560 {bottom + 46}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" '
            f'font-family="sans-serif" fill="{INK}">',
            f'<rect width="560" height="{bottom + 46}" rx="12" fill="{PAPER}"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    file = pathlib.Path(__file__).with_name("backward.svg")
    file.write_text(picture(), "utf-8")
