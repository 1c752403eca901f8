"""The Python blocks of the README and the docs run as printed.

Blocks that begin with "```python notest" lack a model or a file, and are not run.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{file.name}-{number}")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", file.read_text("utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block, capsys):
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
