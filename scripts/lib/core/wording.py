"""Numbers and texts as reports, pages and the terminal show them."""


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def gpu_peak(figures: dict) -> str:
    """What follows the peak of a process's memory, in MB, if it used a GPU as well. Older figures do not tell."""
    peak = figures.get("peak_gpu_memory_bytes")
    return f" + {megabytes(peak)} on the GPU" if peak else ""


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def interval(estimate: dict) -> str:
    return f"{estimate['mean']:.3f} {limits(estimate, '{:.3f}'.format)}"


def limits(estimate: dict, form) -> str:
    """An interval's limits in brackets, each written by `form`."""
    if estimate["low"] is None:
        return "[none]"
    return f"[{form(estimate['low'])}, {form(estimate['high'])}]"


def signed(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) or 0:{'+' if round(value, digits) else ''}.{digits}f}".replace("-", "−")


def difference(estimate: dict, scale: float = 100, unit: str = " points", digits: int = 1) -> str:
    def form(value: float) -> str:
        return signed(scale * value, digits)

    return f"{estimate['verdict']}, {form(estimate['mean'])}{unit} {limits(estimate, form)}"


def shorten(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + "…"
