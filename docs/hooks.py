"""Hooks of MkDocs: the pages that are not files in docs/, and details of the others."""

import html
import logging
import pathlib
import re

import griffe
import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
# A `../` in a link leaves docs/. On the site the file has a page of its own.
OUTSIDE = re.compile(r"\]\(\.\./([^)#]*?)(\.py)?([)#])")
# On a code host a link may show the name of a file. On the site it shows the title.
NAMED = re.compile(r"\[([\w-]+\.md)\]\((?=\1)")
# What follows the language, such as `notest`, is for the tests of the blocks.
INFO = re.compile(r"^```(python|diff) \w+$", re.MULTILINE)
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
SHORT = re.compile(r"<td>(?=[^<]{1,16}</td>)")
HEADING = re.compile(r'(?<=<span class="doc doc-object-name )([^>]*>)([^<]*)')
log = logging.getLogger("mkdocs.hooks")


def on_config(config):
    (api,) = [entry["API"] for entry in config.nav if "API" in entry]
    for uri, (title, _) in reference().items():
        api.append({title: uri})


def on_files(files, config):
    def add(uri, content):
        files.append(File.generated(config, uri, content=content))

    for name in undocumented():
        log.warning("The public name %s has no docstring.", name)
    for uri, (title, names) in reference().items():
        inherits = "\n    options: { inherited_members: true }"
        blocks = [
            f"::: {name}{inherits if name.endswith('SharpnessAware') else ''}"
            for name in names
        ]
        add(uri, "\n\n".join([f"# {title}", *blocks]))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        add(name, (ROOT / name).read_text("utf-8"))
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text("utf-8")
        add(f"examples/{file.stem}.md", f"# {file.name}\n\n````python\n{code}````\n")
    return files


def on_page_markdown(markdown, files, **_):
    def title(match):
        content = files.get_file_from_path(match[1]).content_string
        return f"[{content.splitlines()[0].removeprefix('# ')}]("

    markdown = NAMED.sub(title, markdown)
    markdown = INFO.sub(r"```\1", markdown)
    return OUTSIDE.sub(lambda m: f"]({m[1]}{'.md' if m[2] else ''}{m[3]}", markdown)


def on_page_content(content, **_):
    def convert(match):
        display = "block" if match[1] == "div" else "inline"
        latex = html.unescape(match[2]).strip()
        math = latex2mathml.converter.convert(latex, display=display)
        return f'<{match[1]} class="{display}">{math}</{match[1]}>'

    # On a phone a long name is broken before a dot or an underscore, not within a word.
    content = HEADING.sub(lambda m: m[1] + re.sub(r"(?=[._])", "<wbr>", m[2]), content)
    # A short cell, such as `0.848 ± 0.003` or `3e-4`, is not broken into lines.
    return SHORT.sub('<td class="short">', MATH.sub(convert, content))


def reference():
    """Returns the pages of the reference: a dict from URIs to titles and names.

    A module with an `__all__` has a page. A name is shown where it is shortest.
    """
    package = load()
    modules = {n: m.exports for n, m in modules_of(package) if m.exports}
    pages = {
        module: [
            f"keras_slsam.{name if name in package.exports else f'{module}.{name}'}"
            for name in exports
            if f"{module}.{name}" not in modules
        ]
        for module, exports in modules.items()
    }
    elsewhere = {name for exports in modules.values() for name in exports}
    pages["train-step"] = [
        f"keras_slsam.{name}"
        for name in package.exports
        if name not in elsewhere and name not in modules
    ]
    return {
        f"reference/{name}.md": (re.sub("[-.]", " ", name).capitalize(), pages[name])
        for name in sorted(pages, key=lambda name: (name != "optimizers", name))
    }


def modules_of(parent, prefix=""):
    """Yields the names and the modules below a package."""
    for name, module in parent.modules.items():
        yield prefix + name, module
        yield from modules_of(module, f"{prefix}{name}.")


def undocumented():
    """Returns the names in the reference that have no docstring."""
    package = load()
    names = [name for _, names in reference().values() for name in names]
    return [n for n in names if not package[n.removeprefix("keras_slsam.")].docstring]


def load():
    return griffe.load("keras_slsam", search_paths=[ROOT])
