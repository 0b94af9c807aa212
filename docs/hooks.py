"""What mkdocs.yml calls while the site is built: nothing that exists elsewhere is written twice.

In a page these lines are replaced:

    <!-- readme: HEADING -->                       that section of README.md, its subsections too
    <!-- readme: HEADING, from "A", to "B" -->     of it the lines from one that begins with A up to
                                                   one that begins with B; either may be missing
    <!-- options -->                               default_config of scope_jax/methods.py: keys,
                                                   defaults and the comments beside them
    <!-- methods -->                               METHODS of the same file
    <!-- shipped configs -->                       the first paragraph of each file in configs/

A heading, a line or a picture that is not there stops the build.
"""

import ast
import html
import io
import pathlib
import re
import tokenize

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
METHODS_FILE = ROOT / "scope_jax" / "methods.py"
PICTURES = "from_readme"  # folder of the site
_README = re.compile(r'^<!-- readme: ([^,]+?)(?:, from "(.+?)")?(?:, to "(.+?)")? -->$', re.M)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Adds the pictures that quoted parts of the README show."""
    for path in sorted(set(re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", readme()))):
        if not path.startswith(("http", "docs/")):
            if not (ROOT / path).is_file():
                raise PluginError(f"README.md shows {path}, which does not exist")
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Returns a page with the lines of the module's docstring replaced."""
    up = "../" * page.file.src_uri.count("/")

    def quote(match: re.Match) -> str:
        return rewrite_links(section(*match.groups()), up)

    markdown = _README.sub(quote, markdown)
    for name, make in {
        "options": options, "methods": methods, "shipped configs": shipped_configs,
    }.items():  # fmt: skip
        if (line := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(line, make())
    if left := re.search(r"<!-- (?:readme|options|methods|shipped).*", markdown):
        raise PluginError(f"{page.file.src_uri}: {left[0]} is not understood")
    return markdown


# ---- of the README -------------------------------------------------------------------------------


def readme() -> str:
    return (ROOT / "README.md").read_text()


def section(heading: str, start: str | None = None, stop: str | None = None) -> str:
    """Returns the text below a heading of the README; see the module's docstring."""
    lines, fenced, found, level = readme().splitlines(), False, None, 0
    for line in lines:
        mark = None if fenced else re.match(r"(#+) (.*)", line)
        if found is not None and mark and len(mark[1]) <= level:
            break
        if found is not None:
            found.append(line)
        elif mark and mark[2] == heading:
            found, level = [], len(mark[1])
        fenced ^= line.lstrip().startswith("```")
    if found is None:
        raise PluginError(f"README.md has no heading {heading!r}")
    for text, keep_after in ((start, True), (stop, False)):
        if text is not None:
            at = [i for i, line in enumerate(found) if line.startswith(text)]
            if not at:
                raise PluginError(f"README.md: no line of {heading!r} begins with {text!r}")
            found = found[at[0] :] if keep_after else found[: at[0]]
    return "\n".join(found).strip("\n")


def in_site(path: str) -> str:
    """Returns where a picture of the README lies in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{PICTURES}/{path.replace('/', '_')}"


def rewrite_links(text: str, up: str = "") -> str:
    """Returns Markdown of the README as it is right in a page: its files are named, not linked, for
    no public repository of them is known.
    """

    def change(match: re.Match) -> str:
        shows, label, target = match.groups()
        if target.startswith(("http", "#")):
            return match[0]
        if shows:
            return f"![{label}]({up}{in_site(target)})"
        return f"`{target}`" if label in (target, f"`{target}`") else f"{label} (`{target}`)"

    return _LINK.sub(change, text.replace(" ± ", "\u00a0±\u00a0"))  # an interval stays on a line


# ---- of the code ---------------------------------------------------------------------------------


def options() -> str:
    """Returns every option of default_config: a table a group, defaults and comments as in code."""
    source = METHODS_FILE.read_text()
    tree = ast.parse(source)
    function = next(n for n in tree.body if getattr(n, "name", "") == "default_config")
    top = next(n for n in ast.walk(function) if isinstance(n, ast.Dict))
    comments = comments_of(source)
    loose, groups = [], []
    for key, value, said in entries(top, comments):
        if isinstance(value, ast.Dict):
            within = comments if is_group(value) else {}
            rows = [(f"{key}.{k}", v, s) for k, v, s in entries(value, within)]
            groups.append(f"### {key}\n\n" + (f"{escape(said)}\n\n" if said else "") + table(rows))
        else:
            loose.append((key, value, said))
    return "\n\n".join(["### Of the run\n\n" + table(loose), *groups])


def comments_of(source: str) -> dict[int, tuple[bool, str]]:
    """Returns {line: (the line holds nothing else, its comment)}."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = alone, token.string.lstrip("# ")
    return found


def entries(node: ast.Dict, comments):
    """Yields (key, value's node, comment) of a dict display: of a value the comments on the lines
    just above its key and on its own lines; of a group those above it.
    """
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant)
        above, line = [], key.lineno - 1
        while comments.get(line, (False, ""))[0]:
            above.insert(0, comments[line][1])
            line -= 1
        own = range(key.lineno, (value.end_lineno or key.lineno) + 1)
        beside = [] if isinstance(value, ast.Dict) and is_group(value) else own
        said = [*above, *(comments[i][1] for i in beside if i in comments)]
        yield key.value, value, " ".join(said)


def is_group(value: ast.Dict) -> bool:
    return (value.end_lineno or value.lineno) > value.lineno


def table(rows) -> str:
    lines = ["| key | default | |", "| --- | --- | --- |"]
    for key, value, said in rows:
        lines.append(f"| `{key}` | {code(ast.unparse(value))} | {escape(said)} |")
    return "\n".join(lines)


def code(text: str) -> str:
    """Returns text as code in a table's cell."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def escape(comment: str) -> str:
    text = html.escape(comment, quote=False).replace("|", "&#124;").replace("*", "\\*")
    return text.replace("_", "\\_").replace("[", "\\[")


def methods() -> str:
    """Returns a table of METHODS: what each changes."""
    from scope_jax.methods import METHODS

    lines = ["| method | what it sets |", "| --- | --- |"]
    for name, changes in METHODS.items():
        said = "<br>".join(code(f"{key}={value}") for key, value in changes.items())
        lines.append(f"| `{name}` | {said or 'nothing: the defaults'} |")
    return "\n".join(lines)


def shipped_configs() -> str:
    lines = ["| `--config` | what it is |", "| --- | --- |"]
    for file in sorted((ROOT / "configs").glob("*.py")):
        first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
        lines.append(f"| `{file.stem}` | {escape(' '.join(first.split()))} |")
    return "\n".join(lines)
