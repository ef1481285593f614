"""Statistics of layer outputs on calibration speech: mean, covariance and variances.

The covariance of a layer's outputs follows from that of its inputs, so layers that share an input
share one matrix, and no activation is stored.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from edgewhisper.calibration import Moments, Point, Speech, collect, exact
from edgewhisper.compress.low_rank import inputs_of, spectrum, square_root, weight_of
from edgewhisper.progress import progress_steps
from edgewhisper.whisper import input_of

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


class Roots(NamedTuple):
    """Mean (d,) and a square root (d, r) of a covariance."""

    mean: Tensor
    root: Tensor


class OutputStatistics:
    """Mean and covariance of the outputs of layers, by name."""

    def __init__(
        self, model: nn.Module, moments: dict[Point, Moments], points: Mapping[str, Point]
    ) -> None:
        """`moments` is emptied to save memory; `points` is what `observation_points` returns."""
        self.points = points
        self.positions = max(m.count for m in moments.values())
        self.roots: dict[Point, Roots] = {}
        self.variances: dict[str, Tensor] = {}
        with progress_steps(len(moments) + len(points), "lite: principal components") as done:
            while moments:  # keeping moments and roots together would need twice the memory
                point, moment = moments.popitem()
                self.roots[point] = Roots(moment.mean, square_root(moment.covariance))
                done()
            for name in points:
                self.variances[name] = spectrum(self.of(model, name).root)
                done()

    def of(self, model: nn.Module, name: str) -> Roots:
        """Return mean and root of Y, the outputs of a layer.

        Y = W X + b, so mean(Y) = W mean(X) + b and Cov(Y) = (W R) (W R)^T with R of X.
        """
        roots = self.roots[self.points[name]]
        if self.points[name].side == "output":
            return roots
        linear = model.get_submodule(name)
        read = inputs_of(linear, roots.mean)
        weight = weight_of(model, name)
        mean = weight @ roots.mean[read]
        mean = mean if linear.bias is None else mean + exact(linear.bias)
        return Roots(mean, weight @ roots.root[read])


def calibrate(
    model: "WhisperForConditionalGeneration", names: Sequence[str], speech: Speech
) -> OutputStatistics:
    """Run the speech through the model; return the statistics of the layers' outputs."""
    points = observation_points(model, names)
    with progress_steps(len(speech.clips), "lite: calibrating") as done:
        moments = collect(model, dict.fromkeys(points.values()), speech, done)
    return OutputStatistics(model, moments, points)


def observation_points(model: nn.Module, names: Sequence[str]) -> dict[str, Point]:
    """Return the point to observe for each layer: its input, or its output to save memory.

    The statistics of the input give those of the output, and layers may share an input.
    """
    readers: dict[str, list[str]] = {}
    for name in names:
        readers.setdefault(input_of(name), []).append(name)
    points = {}
    for source, group in readers.items():
        shapes = [weight_of(model, name).shape for name in group]
        direct = sum(d_out**2 for d_out, _ in shapes) < max(d_in for _, d_in in shapes) ** 2
        for name in group:
            points[name] = Point(name, "output") if direct else Point(source)
    return points
