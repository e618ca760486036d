"""Figures in words, as reports, pages and the terminal show them."""


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def interval(found: dict) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def signed(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) or 0:{'+' if round(value, digits) else ''}.{digits}f}".replace("-", "−")


def difference(found: dict, scale: float = 100, unit: str = " points", digits: int = 1) -> str:
    mean, low, high = (signed(scale * found[key], digits) for key in ("mean", "low", "high"))
    return f"{found['verdict']}, {mean}{unit} [{low}, {high}]"


def shorten(text: str, most: int = 240) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "…"
