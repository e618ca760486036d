"""What all pages for people need: figures as SVG, and blocks as Markdown and HTML."""

import html
import io
import re

INK = "#010203"  # placeholder for the page's text colour until the SVG is written
MARKS = {"✓": "exact match", "◐": "contains the reference answer", "✗": "wrong"}
COLOURS = ("#7d8590", "#d9822b", "#2f7fd1", "#8e63ce", "#2a9d6f", "#c94f6d")


# --- pictures --------------------------------------------------------------------------------------------


def load_matplotlib():
    """The settings to draw with: text as text, the same bytes for the same figures, no $ taken for mathematics."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quartet", "text.parse_math": False})


def new_canvas(height: float, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.patch.set_alpha(0)
    for side in axes.spines:
        axes.spines[side].set_visible(side == "left")
        axes.spines[side].set_color(INK)
    return figure, axes


def render_svg(figure, name: str) -> str:
    """A figure as SVG to embed in a page: text as text, in the page's colour, with unique ids and no URLs."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font(-family)?: ([\d.]+px )?[^;\"]*sans-serif", r"font\1: \2system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor")


def make_standalone(svg: str) -> str:
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" ', 1)


# --- Markdown --------------------------------------------------------------------------------------------


def as_markdown(blocks: list[tuple]) -> str:
    def escape(text: str, pattern: str = r"[\\*_`]") -> str:
        return html.escape(re.sub(pattern, r"\\\g<0>", " ".join(text.split())), quote=False)

    parts = []
    for form, *content in blocks:
        match form:
            case "title" | "heading":
                parts.append(f"{'#' if form == 'title' else '##'} {escape(content[0])}")
            case "text":
                parts.append(escape(content[0]))
            case "points" | "notes":
                parts.append("\n".join(f"- {escape(item)}" for item in content[0]))
            case "figures":
                parts += [f"![{escape(alt)}]({name}.svg)" for name, alt in content[0]]
            case "table":
                kind, header, rows = content
                pattern = r"[|]" if kind == "numbers" else r"[\\|*_`\[\]~]"
                lines = [[escape(cell, pattern) for cell in cells] for cells in (header, *rows)]
                lines.insert(1, ["---"] * len(header))
                parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


# --- HTML ----------------------------------------------------------------------------------------------------


def as_html(blocks: list[tuple], figures: dict) -> str:
    body = []
    for form, *content in blocks:
        match form:
            case "title":
                title = html.escape(content[0])
                body.append(f"<h1>{title}</h1>")
            case "heading":
                body.append(f"<h2>{html.escape(content[0])}</h2>")
                name = html.escape(content[0])
            case "text":
                body.append(f"<p>{html.escape(content[0])}</p>")
            case "points" | "notes":
                items = "".join(f"<li>{html.escape(item)}</li>" for item in content[0])
                body.append(f'<ul class="{form}">{items}</ul>')
            case "figures":
                inline = (
                    figures[key][0].replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
                    for key, alt in content[0]
                )
                body.append(f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in inline)}</div>')
            case "table":
                kind, header, rows = content
                head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
                lines = "".join(f"<tr>{''.join(render_cell(text, kind) for text in row)}</tr>" for row in rows)
                body.append(
                    f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table class="{kind}">'
                    f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
                )
    return (
        '<!doctype html>\n<html lang="en-GB">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def render_cell(text: str, kind: str) -> str:
    """A table's cell. A spread is on its own line; verdicts and marks differ in more than their colour."""
    safe = html.escape(text)
    if kind == "numbers":
        safe = re.sub(r"^(better|worse|within noise), ", r'<b class="\1">\1</b><br>', safe)
        safe = re.sub(r" (\[.*\]|\(.*\))$", r"<br><small>\1</small>", safe)
        return f"<td>{safe}</td>"
    if kind == "answers" and text[:1] in MARKS:
        mark = f'<b role="img" aria-label="{MARKS[text[0]]}">{text[0]}</b>'
        return f'<td class="{MARKS[text[0]].split()[0]}">{mark}{safe[1:]}</td>'
    safe = re.sub(r"^(not reached|reached|within noise)(?=$| \()", r'<b class="\1">\1</b>', safe)
    return f"<td>{safe}</td>"


CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b636d; --line: #d8dde3; --page: #fff; --tint: #f4f6f8;
  --good: #19703f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #343b44; --page: #14171b;
  --tint: #1d2228; --good: #66c58d; --bad: #ff8d84; } }
* { box-sizing: border-box; }
body { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 3rem 0 .75rem; font-size: 1.25rem; }
p, ul { max-width: 46rem; margin: 0 0 1rem; }
ul { padding-left: 1.2rem; }
.notes { color: var(--soft); font-size: .9rem; }
li { margin-bottom: .35rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; border: 1px solid var(--line); border-radius: .5rem; }
table { width: 100%; border-collapse: collapse; font-size: .84rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .55rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .78rem; vertical-align: bottom; background: var(--tint); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
th:first-child { background: var(--tint); }
td:first-child { font-weight: 600; }
.numbers td, .stages td { white-space: nowrap; }
.numbers :is(th, td) { padding-inline: .4rem; }
.words td { min-width: 6.5rem; }
.answers td { min-width: 10.5rem; overflow-wrap: anywhere; }
.answers td:first-child, .words td:first-child { font-weight: 400; }
.wrong { color: var(--soft); }
.better, .reached, td.exact b { color: var(--good); }
.worse, .not, td.wrong b { color: var(--bad); }
small { color: var(--soft); font-size: .78rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
@media (max-width: 40rem) { body { padding-top: 1.5rem; }
  .words :is(th, td):first-child, .answers :is(th, td):first-child { position: static; } }
@media print { @page { size: A4 landscape; margin: 12mm; } body { max-width: none; padding: 0; font-size: 9pt; }
  .scroll { overflow: visible; border: 0; } table { font-size: 7pt; } th, td { padding: 2pt 3pt; }
  .numbers td, .stages td { white-space: normal; } tr, figure { break-inside: avoid; } h2 { break-after: avoid; } }
"""
