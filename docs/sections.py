"""What mkdocs.yml gives to griffe, which reads the docstrings: it takes "Returns:" for a section
only behind an empty line, and ours have none there.
"""

import inspect
import re

import griffe

_TITLE = re.compile(r"(?<!\n)\n(?=(?:Args|Returns|Raises):\n)")


class SpacedSections(griffe.Extension):
    def on_instance(self, *, obj, **_):  # of every function, class and attribute
        if obj.docstring is not None:
            text = inspect.cleandoc(obj.docstring.value)
            obj.docstring.value = _TITLE.sub("\n\n", text)
