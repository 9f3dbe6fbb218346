"""Line and bar charts as SVG text, with nothing but the standard library: log axes, a legend, colours that differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # Okabe and Ito's
Series = Mapping[str, Sequence[tuple[float, float]]]


def frame(title: str, body: list[str], height: int = HEIGHT) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="{LEFT}" y="22" font-size="14" font-weight="bold" fill="#222222">{escape(title)}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333"{extra}>{escape(words)}</text>'


def ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of the base that lie in the range, at most nine."""
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    every = max(1, -(-(last - first + 1) // 9))
    return [float(base) ** i for i in range(first, last + 1, every)]


def short(value: float) -> str:
    """1536 as 1,536, 0.25 as 0.25, 1e6 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def lines(
    title: str, x_name: str, y_name: str, series: Series, dashed: Sequence[str] = (), points: Sequence[str] = ()
) -> str:
    """A log-log chart. dashed: names drawn as bounds; points: names drawn as labelled dots without a line."""
    every = [point for shown in series.values() for point in shown if point[0] > 0 and point[1] > 0]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    low_y, high_y = min(y for _, y in every) / 1.3, max(y for _, y in every) * 1.3
    low_x, high_x = (low_x / 1.1, high_x * 1.1) if low_x < high_x else (low_x / 2, high_x * 2)

    def place(x: float, y: float) -> tuple[float, float]:
        along = math.log(x / low_x) / math.log(high_x / low_x)
        up = math.log(y / low_y) / math.log(high_y / low_y)
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    body = []
    for value in ticks(low_x, high_x, 10 if high_x / low_x > 500 else 2):
        x, _ = place(value, low_y)
        body.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
        body.append(text(x, HEIGHT - BOTTOM + 16, short(value)))
    for value in ticks(low_y, high_y, 10 if high_y / low_y > 500 else 2):
        _, y = place(low_x, value)
        body.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>')
        body.append(text(LEFT - 6, y + 4, short(value), "end"))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(text(16, middle, y_name, extra=f' transform="rotate(-90 16 {middle:.1f})"'))
    for i, (name, shown) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        at = [place(x, y) for x, y in shown if x > 0 and y > 0]
        if not at:
            continue
        if name not in points:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            dash = ' stroke-dasharray="6 4"' if name in dashed else ""
            body.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if name not in dashed:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in at]
        body.append(f'<rect x="{LEFT + 10}" y="{TOP + 6 + 17 * i}" width="12" height="4" fill="{colour}"/>')
        body.append(text(LEFT + 28, TOP + 12 + 17 * i, name, "start"))
    return frame(title, body)


def bars(title: str, unit: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Groups of horizontal bars, values written at their ends."""
    names = list(dict.fromkeys(name for _, group in rows for name in group))
    most = max((value for _, group in rows for value in group.values()), default=1.0)
    left, y, body = 230, TOP + 22, []
    for i, name in enumerate(names):
        body.append(
            f'<rect x="{left + 110 * i}" y="{TOP - 6}" width="12" height="8" fill="{COLOURS[i % len(COLOURS)]}"/>'
        )
        body.append(text(left + 16 + 110 * i, TOP + 2, name, "start"))
    for label, group in rows:
        body.append(text(left - 8, y + 7 * len(group) + 3, label, "end"))
        for name, value in group.items():
            width = max(1.0, value / most * (WIDTH - left - 70))
            colour = COLOURS[names.index(name) % len(COLOURS)]
            body.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="11" fill="{colour}"/>')
            body.append(text(left + width + 5, y + 10, f"{value:.3g}{unit}", "start"))
            y += 14
        y += 10
    return frame(title, body, y + 10)
