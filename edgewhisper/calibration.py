"""Mean and covariance of the inputs and outputs of a model's layers, from one pass over speech.

    here          shape    meaning
    rows          (n, d)   input (or output) of a module at n positions
    mean          (d,)     sum x / n
    covariance    (d, d)   sum x x^T / n - mean mean^T

Both sums are accumulated in float64, one window at a time. Memory is one (d, d) matrix for each
point, independent of the amount of speech. Layers that read the same tensor share a point, see
whisper.input_of.

Windows are as in decoding: the shortest window of the model that holds the clip. Most clips are
padded at the end. All positions are counted, as in the published methods; `mask_padding` excludes
those of the padding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from devices.runner.audio import shortest, split
from edgewhisper.decoding import log_mel, windows_samples
from edgewhisper.examples import token_ids
from edgewhisper.random_tokens import drawn
from edgewhisper.whisper import reads_audio, side_and_layer
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip


COPIES = 4
"""Decoder inputs with random tokens for each clip."""


@dataclass(frozen=True)
class Point:
    """A place where rows are collected: the input or the output of a module."""

    module: str
    side: Literal["input", "output"] = "input"


# ---------------------------------------------------------------------------------- arithmetic


class Moments:
    """Streaming count, mean and covariance of rows."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0.0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add rows (n, width) of any floating type, with one weight for all or weights (n,)."""
        rows = exact(rows)
        if isinstance(weight, Tensor):
            self.count += float(weight.sum())
            self.total += weight @ rows
            self.products.addmm_(rows.T, rows * weight[:, None])
            return
        self.count += weight * len(rows)
        self.total += weight * rows.sum(dim=0)
        self.products.addmm_(rows.T, rows, alpha=weight)

    def of(self, features: Tensor) -> "Moments":
        """Return the moments of some of the features, given by their indices."""
        part = Moments(len(features), self.total.device)
        part.count, part.total = self.count, self.total[features]
        part.products = self.products[features][:, features]
        return part

    @property
    def mean(self) -> Tensor:
        """The mean of all rows, (width,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance of all rows, (width, width)."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


def exact(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU if its device (Apple's MPS) has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


# -------------------------------------------------------------------------------------- speech


@dataclass(frozen=True)
class Window:
    """The model's input for one window of speech."""

    features: Tensor
    """(1, mels, frames)"""
    positions: int
    """Number of encoder positions that are counted, from the start."""
    tokens: Tensor | None = None
    """Decoder input (1, tokens). None if the decoder is not needed, or if the clip was cut into
    several windows, because the words of each are then unknown."""
    extended: tuple[Tensor, ...] = ()
    """The decoder input with random tokens between prompt and text, in COPIES variants."""
    weight: float = 1.0
    """Weight of its positions in statistics."""


@dataclass(frozen=True)
class Speech:
    """Clips as windows, computed in every pass and not stored."""

    clips: "Sequence[Clip]"
    processor: "WhisperProcessor"
    mask_padding: bool = False
    random_tokens: int = 0
    """Number of random tokens in each window's `extended`. 0: `extended` is empty."""

    def windows(
        self, model: "WhisperForConditionalGeneration", decoder: bool = False
    ) -> Iterator[Window]:
        """Yield the windows of each clip. Long clips are cut at pauses, as in transcription."""
        extractor = self.processor.feature_extractor
        windows = windows_samples(model, extractor)
        for clip in self.clips:
            pcm = clip.pcm()
            cuts = split(pcm, extractor.n_samples)
            whole = decoder and len(cuts) == 1
            inputs = self._inputs(clip, model) if whole else []
            tokens = inputs[0] if inputs else None
            for cut in cuts:
                piece = pcm[cut]
                window = shortest(windows, len(piece))
                positions = window // (2 * extractor.hop_length)
                if self.mask_padding:
                    positions = sounding_positions(len(piece), extractor.hop_length, positions)
                features = log_mel(extractor, [piece], window)
                yield Window(features, positions, tokens, tuple(inputs[1:]))

    def _inputs(self, clip: "Clip", model: "WhisperForConditionalGeneration") -> list[Tensor]:
        """Return a clip's decoder input, then variants with random tokens before the text, without
        those that are too long. The input itself is the shortest."""
        prompt, text = token_ids(clip, model, self.processor.tokenizer)
        between: list[list[int]] = [[]]
        if self.random_tokens:
            seed = crc32(clip.text.encode())
            between += drawn(self.processor.tokenizer, COPIES, self.random_tokens, seed)
        rows = [[*prompt, *row, *text[:-1]] for row in between]
        longest = model.config.max_target_positions
        return [torch.tensor([ids]) for ids in rows if len(ids) <= longest]


def sounding_positions(samples: int, hop: int, positions: int) -> int:
    """Return the number of encoder positions (two mel frames each) that `samples` extend into."""
    return min(max(1, -(-samples // (2 * hop))), positions)


# --------------------------------------------------------------------------------------- hooks


class LayerHooks:
    """Forward hooks on a model that call `receive(point, rows)` for every window it processes.

    A context manager. Inside it, the model is in evaluation mode and has no layers after the last
    point.
    """

    def __init__(
        self,
        model: "WhisperForConditionalGeneration",
        points: Iterable[Point],
        receive: Callable[[Point, Tensor], None],
    ) -> None:
        self.model, self.points, self.receive = model, list(points), receive
        self.decoder = any(side_and_layer(p.module)[0] == "decoder" for p in self.points)
        self._window: Window
        self._open = ExitStack()

    def __enter__(self) -> "LayerHooks":
        was_training = self.model.training
        self._open.callback(self.model.train, was_training)
        self.model.eval()
        for point in self.points:
            module = self.model.get_submodule(point.module)
            self._open.callback(module.register_forward_hook(self._hook(point)).remove)
        self._open.enter_context(without_later_layers(self.model, self.points))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.close()

    def _hook(self, point: Point) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        sound = reads_audio(point.module)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = (inputs[0] if point.side == "input" else output)[0]  # (positions, d)
            self.receive(point, rows[: self._window.positions] if sound else rows)

        return hook

    @torch.no_grad()
    def run(self, window: Window) -> None:
        """Run the model on a window."""
        self._window = window
        device = next(self.model.parameters()).device
        encoded = self.model.model.encoder(window.features.to(device))
        if self.decoder and window.tokens is not None:
            self.model.model.decoder(
                input_ids=window.tokens.to(device),
                encoder_hidden_states=encoded.last_hidden_state,
                use_cache=False,
            )


@contextmanager
def without_later_layers(model: nn.Module, points: Iterable[Point]) -> Iterator[None]:
    """Remove the layers after the last point, so that a pass for early layers is short."""
    last = {"encoder": -1, "decoder": -1}
    for point in points:
        side, layer = side_and_layer(point.module)
        last[side] = max(last[side], layer)
    stacks = {side: getattr(model.model, side) for side in last}
    whole = {side: stack.layers for side, stack in stacks.items()}
    if last["decoder"] >= 0:  # the decoder reads the output of the whole encoder
        last["encoder"] = len(whole["encoder"]) - 1
    for side, stack in stacks.items():
        stack.layers = whole[side][: last[side] + 1]
    try:
        yield
    finally:
        for side, stack in stacks.items():
            stack.layers = whole[side]


# -------------------------------------------------------------------------------------- passes


def collect(
    model: "WhisperForConditionalGeneration",
    points: Iterable[Point],
    speech: Speech,
    heard: Callable[[], None] = lambda: None,
) -> dict[Point, Moments]:
    """Return the moments of every point over all windows. `heard` is called after each window.
    Raises Problem if no clip is usable for a point in the decoder."""
    points = list(points)
    moments: dict[Point, Moments] = {}

    def add(point: Point, rows: Tensor) -> None:
        if point not in moments:
            moments[point] = Moments(rows.shape[1], exact(rows[:0]).device)
        moments[point].add(rows)

    with LayerHooks(model, points, add) as hooks:
        for window in speech.windows(model, hooks.decoder):
            hooks.run(window)
            heard()
    for point in points:
        refuse_unseen(point, moments.get(point), speech)
    return moments


def collect_together(
    models: "Sequence[WhisperForConditionalGeneration]",
    points: Sequence[Sequence[Point]],
    speech: Speech,
    heard: Callable[[], None] = lambda: None,
) -> Moments:
    """Return the moments of concatenated rows: all points of model 0, then those of model 1, ...
    Their covariance includes the cross-covariance between the models."""
    rows: dict[tuple[int, Point], Tensor] = {}
    columns = [(number, point) for number, of_model in enumerate(points) for point in of_model]
    moments: Moments | None = None
    with ExitStack() as stack:
        group = [
            stack.enter_context(LayerHooks(model, of_model, storer(rows, number)))
            for number, (model, of_model) in enumerate(zip(models, points, strict=True))
        ]
        decoder = any(hooks.decoder for hooks in group)
        for window in speech.windows(models[0], decoder):
            rows.clear()
            for hooks in group:
                hooks.run(window)
            if rows:  # empty if the decoder did not run
                joint = torch.cat([exact(rows[key]) for key in columns], dim=1)
                moments = moments or Moments(joint.shape[1], joint.device)
                moments.add(joint)
            heard()
    refuse_unseen(points[0][0], moments, speech)
    assert moments is not None
    return moments


def storer(rows: dict[tuple[int, Point], Tensor], number: int) -> Callable[[Point, Tensor], None]:
    def store(point: Point, tensor: Tensor) -> None:
        rows[number, point] = tensor

    return store


def refuse_unseen(point: Point, moments: Moments | None, speech: Speech) -> None:
    """Raise Problem if no rows were collected for a point."""
    if moments is None:
        raise Problem(
            f"calibration: none of {len(speech.clips)} clips could be used for {point.module}",
            hint="add clips that are shorter than the model's window, with their texts",
        )
