"""The report as one HTML page with tables and SVG figures. The page loads no other file."""

import io
from collections.abc import Iterable
from html import escape

from dfl_experiments.report.figures import Drawing
from dfl_experiments.report.style import METADATA, styled
from dfl_experiments.report.table_text import Table, write

TITLE = "Direct feedback runs"
STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 0 1rem 4rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
.note { font-size: .85rem; opacity: .8; }
figure { margin: 1.5rem 0; overflow-x: auto; background: white; border-radius: .4rem; }
figure svg { max-width: 100%; height: auto; min-width: 20rem; } summary { cursor: pointer; }
"""


def page(parts: Iterable[str]) -> str:
    """Return the page.

    parts: HTML of the page's parts, made by the functions below.
    """
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{TITLE}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{TITLE}</h1>
{body}
</body>
</html>
"""


def heading(text: str) -> str:
    """Return a heading as HTML."""
    return f"<h2>{escape(text)}</h2>"


def table(content: Table) -> str:
    """Return a table and its caption as HTML. The names of the best methods are bold."""
    caption = notes([content.caption]) if content.caption else ""
    return f'<div class="wide">{write(content, "html")}</div>\n{caption}'


def details(content: Table) -> str:
    """Return a table as HTML. Only its title is visible until the reader clicks on it."""
    return f"<details><summary>{content.title}</summary>\n{table(content)}\n</details>"


def figure(drawing: Drawing) -> str:
    """Return a figure as SVG."""
    file = io.StringIO()
    with styled():
        drawing.figure.savefig(file, format="svg", metadata=METADATA["svg"])
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def notes(texts: Iterable[str]) -> str:
    """Return one HTML paragraph for each note."""
    return "\n".join(f'<p class="note">{escape(text)}</p>' for text in texts)


def items(texts: Iterable[str]) -> str:
    """Return an HTML list of the texts."""
    return "\n".join(["<ul>", *(f"<li>{escape(text)}</li>" for text in texts), "</ul>"])
