"""What the pages that people read share: figures in words, pictures as SVG, and blocks as Markdown."""

import html
import io
import re

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#7d8590", "#d9822b", "#2f7fd1", "#8e63ce", "#2a9d6f", "#c94f6d")


# --- words -----------------------------------------------------------------------------------------------


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- pictures --------------------------------------------------------------------------------------------


def drawing():
    """The settings to draw with: text as text, the same bytes for the same figures, no $ taken for mathematics."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quartet", "text.parse_math": False})


def canvas(height: float, title: str):
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


def svg_of(figure, name: str) -> str:
    """A figure as SVG to be put into a page: text as text, the page's colour, ids of its own, no addresses."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font(-family)?: ([\d.]+px )?[^;\"]*sans-serif", r"font\1: \2system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" ', 1)


# --- Markdown --------------------------------------------------------------------------------------------


def as_markdown(blocks: list[tuple]) -> str:
    def escape(text: str, signs: str = r"[\\*_`]") -> str:
        return html.escape(re.sub(signs, r"\\\g<0>", " ".join(text.split())), quote=False)

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
                signs = r"[|]" if kind == "numbers" else r"[\\|*_`\[\]~]"
                lines = [[escape(cell, signs) for cell in cells] for cells in (header, *rows)]
                lines.insert(1, ["---"] * len(header))
                parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"
