"""Results as pictures: what accuracy costs, where the time goes, how warm the device grew."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Sequence[dict[str, Any]]

LARGEST_MARK = 2500
"""Area of the largest artifact's mark, in square points."""
MARKS = "osD^vPX*"
"""One a device, in the order in which they come."""
PARTS = {
    "log-mel": "mel_s",
    "encoder": "encoder_s",
    "prompt": "prompt_s",
    "tokens": "per_token_s",
}
"""What a clip's time is made of; what is left is reading the file, choosing tokens, Python."""


def plots(results: Results) -> dict[str, bytes]:
    """PNG files by name: those for which the results have something to show."""
    timed = [r for r in results if not r["emulated"] and "end_to_end_s" in r["medians"]]
    weighed = [r for r in results if isinstance(r["peak_rss_bytes"], int)]
    warm = [r for r in results if temperatures(r)]
    lasting = [r for r in results if r.get("sustained") and not r["emulated"]]
    found = {}
    if timed:
        found["latency"] = figure(lambda axes: latency(axes, timed))
    if weighed:
        found["memory"] = figure(lambda axes: memory(axes, weighed))
    if timed:
        found["stages"] = figure(lambda axes: stages(axes, timed), rows=len(timed))
    if warm:
        found["temperature"] = figure(lambda axes: temperature(axes, warm))
    if lasting:
        found["sustained"] = figure(lambda axes: sustained(axes, lasting))
    return found


CAPTIONS = {
    "latency": "Word error rate against end-to-end time, both with their 95 % interval; the area "
    "of a mark is the size on disk.",
    "memory": "Word error rate against peak memory.",
    "stages": "Where the time of a clip goes, on average.",
    "temperature": "Temperature while it ran.",
    "sustained": "Time of each clip while it ran on and on.",
}


def figure(draw: Callable[[Axes], None], rows: int = 8) -> bytes:
    """A PNG of what `draw` puts on its axes; `rows` lines of text have room beside it."""
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
        mark(axes, results, result, median, (low, high))
    finish(axes, "end-to-end time per clip, ms")


def memory(axes: Axes, results: Results) -> None:
    for result in results:
        mark(axes, results, result, result["peak_rss_bytes"] / 1e6)
    finish(axes, "peak memory, MB")


def mark(
    axes: Axes,
    results: Results,
    result: dict[str, Any],
    x: float,
    interval: tuple[float, float] | None = None,
) -> None:
    """A result: its shape is the device's, its area the artifact's size."""
    y, bounds = 100 * result["wer"], [100 * bound for bound in result["wer_interval"]]
    largest = max(each["artifact_bytes"] for each in results)
    area = LARGEST_MARK * result["artifact_bytes"] / largest
    shape = MARKS[devices(results).index(result["device"]["name"]) % len(MARKS)]
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
    """One bar a result, the parts of a clip's mean time behind each other."""
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
    """Seconds of each part, averaged over the clips; windows and tokens of a clip add up."""
    clips = len(result["end_to_end_s"])
    parts = {name: sum(result[stage]) / clips for name, stage in PARTS.items()}
    rest = sum(result["end_to_end_s"]) / clips - sum(parts.values())
    return parts | {"rest": max(0.0, rest)}


def before(parts: dict[str, float], name: str) -> float:
    """Where a part begins: at the end of those in front of it."""
    ends = accumulate(parts.values(), initial=0.0)
    return dict(zip(parts, ends, strict=False))[name]


def temperature(axes: Axes, results: Results) -> None:
    """The devices' temperatures, second by second."""
    for result in results:
        times, degrees = zip(*temperatures(result), strict=True)
        axes.plot(times, degrees, label=label(results, result))
    axes.set_xlabel("time, s")
    axes.set_ylabel("temperature, °C")
    axes.grid(alpha=0.3)


def sustained(axes: Axes, results: Results) -> None:
    """The clips of the sustained runs, in the order in which they were transcribed."""
    for result in results:
        told = result["sustained"]
        times = [1000 * seconds for seconds in told["end_to_end_s"]]
        axes.plot(told["at_s"], times, ".", markersize=2, label=label(results, result))
    axes.set_xlabel("time, s")
    axes.set_ylabel("time of a clip, ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def temperatures(result: dict[str, Any]) -> list[tuple[float, float]]:
    """(seconds since the run began, degrees Celsius) of the samples that have both."""
    samples = (result.get("telemetry") or {}).get("samples", [])
    pairs = ((sample.get("at_s"), sample.get("temperature_c")) for sample in samples)
    return [(at, found) for at, found in pairs if isinstance(found, float | int)]


def devices(results: Results) -> list[str]:
    """Their names, in the order in which they come."""
    return list(dict.fromkeys(result["device"]["name"] for result in results))


def label(results: Results, result: dict[str, Any]) -> str:
    """A result's name, and its device's where there are several."""
    several = len(devices(results)) > 1
    text = f"{result['name']} on {result['device']['name']}" if several else str(result["name"])
    return text.replace("$", r"\$")  # which begins a formula


def size(result: dict[str, Any]) -> str:
    return f"{result['artifact_bytes'] / 1e6:.1f} MB"
