"""Numbers and texts as reports, pages and the terminal show them."""


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def interval(estimate: dict) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def signed(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) or 0:{'+' if round(value, digits) else ''}.{digits}f}".replace("-", "−")


def difference(estimate: dict, scale: float = 100, unit: str = " points", digits: int = 1) -> str:
    mean, low, high = (signed(scale * estimate[key], digits) for key in ("mean", "low", "high"))
    return f"{estimate['verdict']}, {mean}{unit} [{low}, {high}]"


def shorten(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + "…"
