"""The command `report`: the tables and the picture of docs/benchmarks.md."""

import json
import pathlib
import re

from benchmarks import picture
from benchmarks import tables


def write(
    files: list[pathlib.Path], page: pathlib.Path, picture_file: pathlib.Path
) -> None:
    """Writes the results into a page, between its markers, and draws them.

    A marker is a comment `<!-- NAME -->`, and what stands before `<!-- /NAME -->` is
    replaced; NAME is a command. Of commands without a result the page keeps what it
    has. What `time` measured stands beside the predictions of `cost`, and these in the
    picture of `time`, so the two belong together.

    Args:
        files: What the commands wrote with `--json`, of any backend.
        page: The page in Markdown.
        picture_file: The picture, which is drawn if there are results of `time`.

    Raises:
        SystemExit: if the page lacks a marker.
    """
    results = [json.loads(file.read_text("utf-8")) for file in files]
    of = {
        command: [result for result in results if result["command"] == command]
        for command in ("time", "memory", "cost", "scale")
    }
    if of["time"]:
        picture.draw(of["time"], of["cost"], picture_file)
    shown = (
        f"![Step times against AdamW's; a mark is a prediction]({picture_file.name})"
    )
    sections = {
        "time": lambda rows: f"{shown}\n\n{tables.times(rows)}",
        "memory": tables.memory,
        "cost": lambda rows: tables.costs(rows, of["time"]),
        "scale": tables.scales,
    }
    text = page.read_text("utf-8")
    for name, table in sections.items():
        if of[name]:
            found = f"{table(of[name])}\n\n{tables.machines(of[name])}"
            text = fill(text, name, found)
    page.write_text(text, "utf-8")


def fill(text: str, name: str, table: str) -> str:
    """The text, with `table` between the markers `name`.

    Raises:
        SystemExit: if the text lacks them.
    """
    markers = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, count = markers.subn(
        lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text
    )
    if not count:
        raise SystemExit(f"The page has no marker <!-- {name} --> ... <!-- /{name} -->")
    return filled
