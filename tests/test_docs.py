"""The documentation: its code runs as printed, and it names everything public.

A block that begins with "```python notest" lacks a model or a file, and is not run. One
that begins with "```python jax" runs on that backend only. Of a comparison ("```diff")
the code after the change runs. `nox` also builds the site.
"""

import dataclasses
import importlib
import inspect
import operator
import pathlib
import pkgutil
import re
import urllib.parse

import keras
import pytest

import keras_slsam

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)(?: (\w+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A script, or the package of benchmarks, and what follows it.
PROGRAM = re.compile(r"(examples/\w+\.py|-m benchmarks)\b(.*)")
BACKENDS = ("jax", "tensorflow", "torch")
# A module of the package with an `__all__` is public.
MODULES = [keras_slsam] + [
    module
    for info in pkgutil.walk_packages(keras_slsam.__path__, "keras_slsam.")
    if ".gradients" not in info.name  # of all backends
    if hasattr(module := importlib.import_module(info.name), "__all__")
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
# The base class of the optimizers. Results of functions have their example there.
WITHOUT_EXAMPLE = "keras_slsam.optimizers.SharpnessAware"


def code(page):
    """Yields the code of a page for this backend, each at its line of the file."""
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        language, word, block = match.groups()
        if language == "diff":
            lines = [line for line in block.splitlines() if not line.startswith("-")]
            block = "\n".join(line[1:] for line in lines)
        elif language != "python":
            continue
        if word is None or word == keras.backend.backend():
            yield "\n" * text.count("\n", 0, match.start(3)) + block
        else:
            assert word in (*BACKENDS, "notest"), f"{page.name}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """In order, and in one namespace, as a reader would run it."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in code(page):
        exec(compile(block, str(page), "exec"), namespace)
    if page.name == "index.md":
        results = namespace["results"]
        assert results["SAM"] > results["AdamW"] + 0.03
    if page.name == "coming-from.md":
        active = keras.ops.convert_to_numpy(namespace["optimizer"].active)
        assert active.shape == (3,)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_name_scripts_and_flags_that_exist(page):
    """Commands take too long to run here."""
    for language, _, block in FENCE.findall(page.read_text("utf-8")):
        for line in block.replace("\\\n", " ").splitlines() * (language == "bash"):
            for program, arguments in PROGRAM.findall(line):
                files = ROOT.glob(program if "/" in program else "benchmarks/*.py")
                source = "".join(file.read_text("utf-8") for file in files)
                for flag in re.findall(r"(?<= )--[\w-]+", arguments):
                    assert f'"{flag}"' in source, line


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_with_an_example(name):
    value = PUBLIC[name]
    docstring = inspect.getdoc(value)
    assert docstring
    is_result = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    assert ">>> " in docstring or is_result or name == WITHOUT_EXAMPLE


def test_public_names_are_on_the_pages_of_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    hooks = importlib.import_module("hooks")
    shown = [name for _, names in hooks.reference().values() for name in names]
    assert len(set(shown)) == len(shown)
    get = operator.attrgetter(*(name.removeprefix("keras_slsam.") for name in shown))
    found = {id(value) for value in get(keras_slsam)}
    assert found == {id(value) for value in PUBLIC.values()}
    assert not hooks.undocumented()


def test_method_cards_have_one_shape():
    _, *cards = (DOCS / "cards.md").read_text("utf-8").split("\n## ")
    labels = [re.findall(r"^- \*\*(.*?)\*\*", card, re.MULTILINE) for card in cards]
    expected = ["Values.", "Cost.", "Does not help", "Source."]
    assert labels == [expected] * len(cards) and len(cards) >= 7
    assert all(card.count("```python\n") == 1 for card in cards)


def test_every_example_is_in_the_gallery():
    page = (DOCS / "gallery.md").read_text("utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        assert f"](../examples/{script.name})" in page, script.name
    for picture in re.findall(r"\((pictures/.*?)\)", page):
        assert (DOCS / picture).stat().st_size < 60_000


def test_the_drawing_is_the_one_that_its_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "pictures")
    drawn = importlib.import_module("draw").picture()
    assert drawn == (DOCS / "pictures" / "backward.svg").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_have_the_right_form(page):
    """Files exist, also on a code host. Addresses cannot be fetched here."""
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]*)\)", text):
        parts = urllib.parse.urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, target
        elif parts.path:
            assert (page.parent / parts.path).exists(), target
    for url in re.findall(r"\bhttp\S*", text):
        assert url.startswith("https://"), url
