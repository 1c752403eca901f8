"""Lets mkdocstrings find the examples in docstrings, which Keras does not indent."""

import re
import textwrap

import griffe

EXAMPLE = re.compile(r"^Example:\n(.*?)(?=^\w+:\n|\Z)", re.DOTALL | re.MULTILINE)


class Examples(griffe.Extension):
    """Gives `Example:` the form of Google's `Examples:`."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                lambda match: "Examples:" + textwrap.indent(match[1], "    "),
                obj.docstring.value,
            )
