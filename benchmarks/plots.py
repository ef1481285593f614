"""Plots of results: accuracy against time and memory, times of the stages, temperature."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Sequence[dict[str, Any]]

LARGEST_MARKER = 2500
"""Area of the largest artifact's marker, in square points."""
MARKERS = "osD^vPX*"
"""Marker shapes of the devices, in order of appearance."""
PARTS = {
    "log-mel": "mel_s",
    "encoder": "encoder_s",
    "prompt": "prompt_s",
    "tokens": "per_token_s",
}
"""Parts of a clip's time; the rest is reading the file, choosing tokens, and Python code."""


def plots(results: Results) -> dict[str, bytes]:
    """Return PNG files by name; plots without data are left out."""
    timed = [r for r in results if not r["emulated"] and "end_to_end_s" in r["medians"]]
    sized = [r for r in results if isinstance(r["peak_rss_bytes"], int)]
    warm = [r for r in results if temperatures(r)]
    sustained_runs = [r for r in results if r.get("sustained") and not r["emulated"]]
    files = {}
    if timed:
        files["latency"] = figure(lambda axes: latency(axes, timed))
    if sized:
        files["memory"] = figure(lambda axes: memory(axes, sized))
    if timed:
        files["stages"] = figure(lambda axes: stages(axes, timed), rows=len(timed))
    if warm:
        files["temperature"] = figure(lambda axes: temperature(axes, warm))
    if sustained_runs:
        files["sustained"] = figure(lambda axes: sustained(axes, sustained_runs))
    return files


CAPTIONS = {
    "latency": "Word error rate against end-to-end time, both with their 95 % interval. The area "
    "of a marker is the size on disk.",
    "memory": "Word error rate against peak memory.",
    "stages": "Mean time of a clip by stage.",
    "temperature": "Temperature during the run.",
    "sustained": "Time of each clip of the sustained run.",
}


def figure(draw: Callable[[Axes], None], rows: int = 8) -> bytes:
    """Return a PNG of what `draw` plots; its height fits `rows` lines of labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7.5, max(2.0, 0.5 * rows + 0.8)), layout="constrained", dpi=150)
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    draw(axes)
    if axes.get_legend_handles_labels()[1]:
        drawn.legend(loc="outside upper center", ncols=2)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def latency(axes: Axes, results: Results) -> None:
    for result in results:
        median = 1000 * result["medians"]["end_to_end_s"]
        low, high = (1000 * bound for bound in result["intervals"]["end_to_end_s"])
        draw_marker(axes, results, result, median, (low, high))
    finish(axes, "end-to-end time per clip, ms")


def memory(axes: Axes, results: Results) -> None:
    for result in results:
        draw_marker(axes, results, result, result["peak_rss_bytes"] / 1e6)
    finish(axes, "peak memory, MB")


def wer_against_size(
    axes: Axes, points: Sequence[tuple[float, float, Sequence[float]]], x_title: str
) -> None:
    """Draw points (size, WER, interval of the WER) as a curve by size. The first one is dense."""
    sizes, rates, bounds = zip(*sorted(points), strict=True)
    lows, highs = zip(*bounds, strict=True)
    percent = [[100 * value for value in values] for values in (rates, lows, highs)]
    axes.fill_between(sizes, percent[1], percent[2], alpha=0.2, label="95 % interval")
    axes.plot(sizes, percent[0], "o-", label="compressed")
    axes.plot(points[0][0], 100 * points[0][1], "s", color="black", label="dense")
    finish(axes, x_title)


def draw_marker(
    axes: Axes,
    results: Results,
    result: dict[str, Any],
    x: float,
    interval: tuple[float, float] | None = None,
) -> None:
    """Draw a result: the shape shows its device, the area its size on disk."""
    y, bounds = 100 * result["wer"], [100 * bound for bound in result["wer_interval"]]
    largest = max(each["artifact_bytes"] for each in results)
    area = LARGEST_MARKER * result["artifact_bytes"] / largest
    shape = MARKERS[devices(results).index(result["device"]["name"]) % len(MARKERS)]
    dots = axes.scatter(x, y, s=area, alpha=0.5, marker=shape)
    color, text = dots.get_facecolor(), f"{label(results, result)}, {size(result)}"
    axes.vlines(x, *bounds, color=color, label=text)
    if interval is not None:
        axes.hlines(y, interval[0], interval[1], color=color)


def finish(axes: Axes, x_title: str) -> None:
    axes.set_xlabel(x_title)
    axes.set_ylabel("word error rate, %")
    axes.set_xlim(left=0, right=1.25 * axes.get_xlim()[1])
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), max(1.0, high))
    axes.grid(alpha=0.3)


def stages(axes: Axes, results: Results) -> None:
    """Draw one stacked bar per result: the parts of a clip's mean time."""
    names = [label(results, result) for result in results]
    parts = [mean_parts(result) for result in results]
    for part in parts[0]:
        widths = [1000 * each[part] for each in parts]
        starts = [1000 * before(each, part) for each in parts]
        axes.barh(range(len(names)), widths, left=starts, label=part)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("mean time per clip, ms")


def mean_parts(result: dict[str, Any]) -> dict[str, float]:
    """Return the mean seconds per clip of each part, summed over its windows and tokens."""
    clips = len(result["end_to_end_s"])
    parts = {name: sum(result[stage]) / clips for name, stage in PARTS.items()}
    rest = sum(result["end_to_end_s"]) / clips - sum(parts.values())
    return parts | {"rest": max(0.0, rest)}


def before(parts: dict[str, float], name: str) -> float:
    """Return where a part of a stacked bar begins."""
    ends = accumulate(parts.values(), initial=0.0)
    return dict(zip(parts, ends, strict=False))[name]


def temperature(axes: Axes, results: Results) -> None:
    """Draw the devices' temperatures over time."""
    for result in results:
        times, degrees = zip(*temperatures(result), strict=True)
        axes.plot(times, degrees, label=label(results, result))
    axes.set_xlabel("time, s")
    axes.set_ylabel("temperature, °C")
    axes.grid(alpha=0.3)


def sustained(axes: Axes, results: Results) -> None:
    """Draw the time of each clip of the sustained runs."""
    for result in results:
        run = result["sustained"]
        times = [1000 * seconds for seconds in run["end_to_end_s"]]
        axes.plot(run["at_s"], times, ".", markersize=2, label=label(results, result))
    axes.set_xlabel("time, s")
    axes.set_ylabel("time of a clip, ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def temperatures(result: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (seconds since the start, degrees Celsius) of the samples that have both."""
    samples = (result.get("telemetry") or {}).get("samples", [])
    pairs = ((sample.get("at_s"), sample.get("temperature_c")) for sample in samples)
    return [(at, degrees) for at, degrees in pairs if isinstance(degrees, float | int)]


def devices(results: Results) -> list[str]:
    """Return the names of the devices in order of appearance."""
    return list(dict.fromkeys(result["device"]["name"] for result in results))


def label(results: Results, result: dict[str, Any]) -> str:
    """Return a result's name, with its device if there are several."""
    several = len(devices(results)) > 1
    text = f"{result['name']} on {result['device']['name']}" if several else str(result["name"])
    return text.replace("$", r"\$")  # $ would begin a formula


def size(result: dict[str, Any]) -> str:
    return f"{result['artifact_bytes'] / 1e6:.1f} MB"
