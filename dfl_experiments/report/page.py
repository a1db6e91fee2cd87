"""The report as one HTML page with tables and SVG figures. The page loads no other file."""

import io
from collections.abc import Iterable
from html import escape
from typing import Any

from dfl_experiments.report.figures import Drawing
from dfl_experiments.report.style import METADATA, styled
from dfl_experiments.report.table_text import Table, write

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
HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Direct feedback runs</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Direct feedback runs</h1>
"""


def page(parts: Iterable[tuple[str, Any]]) -> str:
    """Return the page of a report. parts: see `document.parts`."""
    body = [html_of(kind, content) for kind, content in parts]
    return "\n".join([HEAD, *body, "</body>\n</html>\n"])


def html_of(kind: str, content: Any) -> str:
    """Return a part of the report as HTML. Of a part "details", only the title is visible until one clicks on it."""
    if kind == "heading":
        return f"<h2>{escape(content)}</h2>"
    if kind == "figure":
        return figure(content)
    if kind == "table":
        return table(content)
    if kind == "details":
        return f"<details><summary>{content.title}</summary>\n{table(content)}\n</details>"
    if kind == "notes":
        return notes(content)
    items = [f"<li>{escape(text)}</li>" for text in content]
    return "\n".join(["<ul>", *items, "</ul>"])


def table(content: Table) -> str:
    """Return a table and its caption as HTML. The names of the best methods are bold."""
    return f'<div class="wide">{write(content, "html")}</div>\n{notes([content.caption])}'


def notes(texts: Iterable[str]) -> str:
    """Return one HTML paragraph for each note that is not empty."""
    return "\n".join(f'<p class="note">{escape(text)}</p>' for text in texts if text)


def figure(drawing: Drawing) -> str:
    """Return a figure as SVG."""
    file = io.StringIO()
    with styled():
        drawing.figure.savefig(file, format="svg", metadata=METADATA["svg"])
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"
