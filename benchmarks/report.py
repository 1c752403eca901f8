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
    replaced; NAME is a command or `machines`. Of commands without a result the page
    keeps what it has.

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
    shown = (
        f"![Step times against AdamW's; a mark is a prediction]({picture_file.name})"
    )
    sections = {
        "machines": results and tables.machines(results),
        "time": of["time"] and f"{shown}\n\n{tables.times(of['time'])}",
        "memory": of["memory"] and tables.memory(of["memory"]),
        "cost": of["cost"] and tables.costs(of["cost"], of["time"]),
        "scale": of["scale"] and tables.scales(of["scale"]),
    }
    text = page.read_text("utf-8")
    for name, table in sections.items():
        if table:
            text = fill(text, name, table)
    page.write_text(text, "utf-8")
    if of["time"]:
        picture.draw(of["time"], of["cost"], picture_file)


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
