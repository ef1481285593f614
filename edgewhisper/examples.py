"""Training examples: log-mel features, decoder inputs and labels of clips.

A model with several windows (config.edgewhisper, "windows") is trained as it decodes: a batch is
cut to the shortest window that holds its longest clip, and clips of the same window are batched
together. This is also cheaper, because the encoder's cost grows faster than its length. A batch
here is the global batch of a step, over all processes and passes.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speech.noises import level_at
from devices.runner.audio import shortest
from edgewhisper.decoding import log_mel
from edgewhisper.progress import progress_bar
from export.problem import Problem
from export.prompt import language_code, prompt_ids
from export.shrink import windows_of

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip

IGNORED = -100
"""Label of positions that the loss ignores."""

SAMPLE_RATE = 16_000
CACHED_BYTES = 512_000_000
"""Memory limit for cached features."""

WindowRule = Callable[[int, int], int]
"""(number of the batch, encoder positions that its longest clip needs) -> encoder positions."""

UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages written without spaces: Whisper starts their transcripts without a space."""


@dataclass
class Batch:
    """The inputs and labels of clips."""

    input_features: Tensor
    """(clips, mels, frames) in the batch's window."""
    decoder_input_ids: Tensor
    """(clips, tokens): start, prompt and text, padded with the end token."""
    labels: Tensor
    """(clips, tokens): the next token of each input, IGNORED in the prompt and the padding."""
    whole_features: Tensor | None = None
    """(clips, mels, frames) in the model's full window."""
    clips: tuple[int, ...] | None = None
    """Indices of the clips, if they are not augmented: equal indices have equal features."""
    lengths: tuple[int, ...] | None = None
    """Encoder positions that each clip fills."""

    def to(self, device: torch.device) -> "Batch":
        """Return a copy of the batch on this device."""
        return Batch(
            self.input_features.to(device),
            self.decoder_input_ids.to(device),
            self.labels.to(device),
            None if self.whole_features is None else self.whole_features.to(device),
            self.clips,
            self.lengths,
        )


class SpeechWindows:
    """The window rule `windows = "speech"`: the longest clip of a step and up to a second more.
    Every eighth step uses the window of decoding."""

    def __init__(self, model: nn.Module) -> None:
        self.windows = windows_of(model.config)
        self.unit = max(1, self.windows[-1] // 60)

    def __call__(self, step: int, needed: int) -> int:
        decoding = shortest(self.windows, needed)
        # a multiple of the unit, so that cached states of a clip are reused
        units = math.ceil(needed / self.unit) + 1
        return decoding if step % 8 == 7 else min(units * self.unit, decoding)


class Examples:
    """An endless stream of shuffled clips as features and labels. A position of the stream always
    returns the same clip with the same augmentation."""

    def __init__(
        self,
        clips: "Sequence[Clip]",
        model: "WhisperForConditionalGeneration",
        processor: "WhisperProcessor",
        seed: int,
        noise_snr_db: float = math.inf,
        mask_mels: int = 0,
        batch_size: int = 1,
        window: WindowRule | None = None,
    ) -> None:
        """`window` sets the length of each batch; None: the shortest window for its clips."""
        self.extractor = processor.feature_extractor
        self.windows, self.batch_size = windows_of(model.config), batch_size
        self.rule = window
        self.seed, self.noise_snr_db, self.mask_mels = seed, noise_snr_db, mask_mels
        if not clips:
            raise Problem("training: there are no clips to train on", hint="name a speech manifest")
        tokenized = [(clip, *token_ids(clip, model, processor.tokenizer)) for clip in clips]
        window_s = self.extractor.n_samples / self.extractor.sampling_rate
        room = model.config.max_target_positions
        fitting = [
            (clip, prompt, text)
            for clip, prompt, text in tokenized
            if seconds(clip) <= window_s and len(prompt) + len(text) - 1 <= room
        ]
        self.skipped = len(clips) - len(fitting)
        if not fitting:
            raise Problem(
                f"training: all {len(clips)} clips are longer than the window of {window_s:g} s "
                f"or {room} tokens",
                hint="cut the recordings into shorter clips",
            )
        if self.skipped:
            warnings.warn(
                f"training: {self.skipped} of {len(clips)} clips are longer than the window of "
                f"{window_s:g} s or {room} tokens and are left out",
                stacklevel=4,
            )
        self.clips = [clip for clip, _, _ in fitting]
        self.texts = [(prompt, text) for _, prompt, text in fitting]
        self.needed = [needed_positions(clip, self.extractor, self.windows) for clip in self.clips]
        self._orders: dict[int, tuple[int, ...]] = {}
        self._kept: dict[int, Tensor] = {}
        frames = self.extractor.nb_max_frames
        self._room = CACHED_BYTES // (4 * self.extractor.feature_size * frames)

    def __len__(self) -> int:
        return len(self.clips)

    def index(self, position: int) -> int:
        """Return the clip at a position of the stream. Each epoch is a permutation of all clips."""
        epoch, place = divmod(position, len(self))
        return self.order(epoch)[place]

    def order(self, epoch: int) -> tuple[int, ...]:
        """Return the permutation of an epoch."""
        if len(self.windows) == 1:
            return permutation(self.seed, epoch, len(self))
        if epoch not in self._orders:
            if len(self._orders) > 3:
                self._orders.clear()
            self._orders[epoch] = self._by_window(epoch)
        return self._orders[epoch]

    def _by_window(self, epoch: int) -> tuple[int, ...]:
        """Return a permutation whose batches have clips of one window, except between epochs."""
        shuffled = permutation(self.seed, epoch, len(self))
        ordered = sorted(shuffled, key=lambda i: shortest(self.windows, self.needed[i]))
        head = -epoch * len(self) % self.batch_size  # they complete the previous epoch's last batch
        batches = [
            ordered[i : i + self.batch_size] for i in range(head, len(self), self.batch_size)
        ]
        full = sum(len(batch) == self.batch_size for batch in batches)
        sequence = np.random.default_rng([self.seed, 2, epoch]).permutation(full).tolist()
        batches = [batches[i] for i in sequence] + batches[full:]
        return (*ordered[:head], *(i for batch in batches for i in batch))

    def window(self, position: int) -> int:
        """Return the encoder positions of the batch that contains this position of the stream."""
        number = position // self.batch_size
        members = range(number * self.batch_size, (number + 1) * self.batch_size)
        needed = max(self.needed[self.index(p)] for p in members)
        return self.rule(number, needed) if self.rule else shortest(self.windows, needed)

    def tokens(self, positions: Sequence[int]) -> int:
        """Return the number of target tokens at these positions of the stream."""
        return sum(len(self.texts[self.index(p)][1]) for p in positions)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        features = torch.stack([self.features(p) for p in positions])
        indices = [self.index(p) for p in positions]
        batch = self.batch(indices, features, self.window(positions[0]))
        return batch if self.augmented else replace(batch, clips=tuple(indices))

    @property
    def augmented(self) -> bool:
        return self.noise_snr_db != math.inf or self.mask_mels > 0

    def plain(self, indices: Sequence[int]) -> Batch:
        """Return a batch of these clips without augmentation, in the shortest window for them."""
        features = torch.stack([self._plain(i) for i in indices])
        needed = max(self.needed[i] for i in indices)
        return self.batch(indices, features, shortest(self.windows, needed))

    def batch(self, indices: Sequence[int], features: Tensor, positions: int) -> Batch:
        """Return a batch of features (clips, mels, frames), cut to `positions` of the encoder."""
        texts = [self.texts[i] for i in indices]
        inputs = padded([prompt + text[:-1] for prompt, text in texts], texts[0][1][-1])
        labels = [[IGNORED] * (len(prompt) - 1) + text for prompt, text in texts]
        cut = features[..., : 2 * positions]  # two mel frames make a position
        lengths = tuple(self.needed[i] for i in indices)
        return Batch(cut, inputs, padded(labels, IGNORED), features, lengths=lengths)

    def features(self, position: int) -> Tensor:
        """Return the features (mels, frames), augmented as the seed and the position determine."""
        rng = np.random.default_rng([self.seed, 1, position])
        index = self.index(position)
        if self.noise_snr_db == math.inf:
            features = self._plain(index)
        else:
            pcm = add_noise(self._pcm(index), self.noise_snr_db, rng)
            features = log_mel(self.extractor, [pcm])[0]
        return mask(features, self.mask_mels, rng)

    def _plain(self, index: int) -> Tensor:
        if index not in self._kept:
            features = log_mel(self.extractor, [self._pcm(index)])[0]
            if len(self._kept) >= self._room:
                return features
            self._kept[index] = features
        return self._kept[index]

    def _pcm(self, index: int) -> np.ndarray:
        pcm = self.clips[index].pcm()
        window = 2 * self.extractor.hop_length * shortest(self.windows, self.needed[index])
        # durations are rounded, so an excess of less than a frame is accepted
        if len(pcm) > min(window + self.extractor.hop_length, self.extractor.n_samples):
            raise Problem(
                f"training: {self.clips[index].audio} lasts {len(pcm) / SAMPLE_RATE:.2f} s, which "
                "is longer than its manifest says and than the model's window",
                hint="correct the duration in the manifest, or remove it",
            )
        return pcm


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, 0, epoch]).permutation(size).tolist())


def padded(rows: list[list[int]], filler: int) -> Tensor:
    """Return the rows as a tensor (rows, longest row) int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def token_ids(
    clip: "Clip", model: "WhisperForConditionalGeneration", tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the text. The prompt is in the clip's language and begins
    with the start token. The text is spaced as Whisper writes it and ends with the end token."""
    text = clip.text.strip()
    spaced = f" {text}" if text and language_code(clip.lang) not in UNSPACED else text
    ids = tokenizer(spaced, add_special_tokens=False).input_ids
    return prompt_ids(model.generation_config, clip.lang), [*ids, model.config.eos_token_id]


def seconds(clip: "Clip") -> float:
    """Return the clip's duration, from its manifest or its audio."""
    return clip.duration_s if clip.duration_s is not None else len(clip.pcm()) / SAMPLE_RATE


def needed_positions(clip: "Clip", extractor: Any, windows: Sequence[int]) -> int:
    """Return the number of encoder positions that a clip needs."""
    samples = seconds(clip) * extractor.sampling_rate
    return min(max(1, math.ceil(samples / (2 * extractor.hop_length))), windows[-1])


def add_noise(pcm: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add white noise at a random signal-to-noise ratio from snr_db to snr_db + 30 dB."""
    level = level_at(snr_db + rng.uniform(0, 30), pcm)
    return (pcm + level * rng.standard_normal(len(pcm))).astype(np.float32)


def mask(features: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """Set two bands of mels and two spans of frames, each of up to `width`, to the mean."""
    if width == 0:
        return features
    features = features.clone()
    mean = features.mean()
    for axis, size in ((0, features.shape[0]), (1, features.shape[1])) * 2:
        extent = int(rng.integers(0, min(width, size) + 1))
        start = int(rng.integers(0, size - extent + 1))
        features.narrow(axis, start, extent).fill_(mean)
    return features


def batches(
    clips: "Sequence[Clip]",
    model: "WhisperForConditionalGeneration",
    processor: "WhisperProcessor",
    size: int,
    label: str = "processing clips",
) -> Iterator[Batch]:
    """Yield batches of all clips in order, without augmentation, on the model's device. `label` is
    shown with the progress."""
    examples = Examples(clips, model, processor, seed=0)
    device = next(model.parameters()).device
    with progress_bar(len(examples), label) as show:
        for first in range(0, len(examples), size):
            yield examples.plain(range(len(examples))[first : first + size]).to(device)
            show(min(first + size, len(examples)), "")
