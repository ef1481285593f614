"""Clips as training takes them: features, what decoding is given and what it shall find.

A model made for windows of several lengths (config.edgewhisper, "windows") is trained as it will
decode: a batch is cut to the shortest window that holds its longest clip, and clips of one window
come together. That is also the cheaper way: an encoder at a third of its length does less than a
third of the work. A batch here is the whole one of a step, over all processes and passes.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from devices.runner.audio import shortest
from edgewhisper.decoding import log_mel
from edgewhisper.progress import progress_bar
from edgewhisper.runs import main_process
from export.problem import Problem
from export.prompt import language_code, prompt_ids
from export.shrink import windows_of

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip

IGNORED = -100
"""Label of a padding position: it counts nowhere."""

SAMPLE_RATE = 16_000
CACHED_BYTES = 512_000_000
"""Features of clips that are used again are kept in memory up to this."""

WindowRule = Callable[[int, int], int]
"""Number of a batch, and encoder positions that its longest clip needs -> the batch's positions."""

UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages whose transcripts Whisper does not begin with a space."""


@dataclass
class Batch:
    input_features: Tensor
    """(clips, mels, frames) of the batch's window."""
    decoder_input_ids: Tensor
    """(clips, tokens): start, prompt, text; the end token as padding."""
    labels: Tensor
    """(clips, tokens): what comes next; IGNORED in the prompt, which decoding is given and does
    not have to find, and in the padding."""
    whole_features: Tensor | None = None
    """(clips, mels, frames) of the model's full window."""
    clips: tuple[int, ...] | None = None
    """Numbers of the clips, where nothing augments them: the same number, the same features."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.input_features.to(device),
            self.decoder_input_ids.to(device),
            self.labels.to(device),
            None if self.whole_features is None else self.whole_features.to(device),
            self.clips,
        )


class Examples:
    """Clips as features and labels. Position p of the endless stream of shuffled clips is always
    the same clip with the same augmentation, whoever asks for it and whenever."""

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
        """`window` decides how long each batch is; None: the shortest window that holds it."""
        self.extractor = processor.feature_extractor
        self.windows, self.batch_size = windows_of(model.config), batch_size
        self.rule = window
        self.seed, self.noise_snr_db, self.mask_mels = seed, noise_snr_db, mask_mels
        if not clips:
            raise Problem("training: there are no clips to train on", hint="name a speech manifest")
        spelled = [(clip, *token_ids(clip, model, processor.tokenizer)) for clip in clips]
        window_s = self.extractor.n_samples / self.extractor.sampling_rate
        room = model.config.max_target_positions
        fitting = [
            (clip, given, found)
            for clip, given, found in spelled
            if seconds(clip) <= window_s and len(given) + len(found) - 1 <= room
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
        self.texts = [(given, found) for _, given, found in fitting]
        self.needed = [needed_positions(clip, self.extractor, self.windows) for clip in self.clips]
        self._orders: dict[int, tuple[int, ...]] = {}
        self._kept: dict[int, Tensor] = {}
        frames = self.extractor.nb_max_frames
        self._room = CACHED_BYTES // (4 * self.extractor.feature_size * frames)

    def __len__(self) -> int:
        return len(self.clips)

    def index(self, position: int) -> int:
        """The clip at a position of the stream: each epoch is one permutation of all clips."""
        epoch, place = divmod(position, len(self))
        return self.order(epoch)[place]

    def order(self, epoch: int) -> tuple[int, ...]:
        if len(self.windows) == 1:
            return permutation(self.seed, epoch, len(self))
        if epoch not in self._orders:
            if len(self._orders) > 3:
                self._orders.clear()
            self._orders[epoch] = self._by_window(epoch)
        return self._orders[epoch]

    def _by_window(self, epoch: int) -> tuple[int, ...]:
        """A permutation whose batches hold clips of one window each, but for those at a seam."""
        shuffled = permutation(self.seed, epoch, len(self))
        ordered = sorted(shuffled, key=lambda i: shortest(self.windows, self.needed[i]))
        head = -epoch * len(self) % self.batch_size  # they fill the last batch of the epoch before
        batches = [
            ordered[i : i + self.batch_size] for i in range(head, len(self), self.batch_size)
        ]
        full = sum(len(batch) == self.batch_size for batch in batches)
        turns = np.random.default_rng([self.seed, 2, epoch]).permutation(full).tolist()
        mixed = [batches[i] for i in turns] + batches[full:]
        return (*ordered[:head], *(i for batch in mixed for i in batch))

    def window(self, position: int) -> int:
        """Encoder positions of the batch that this position of the stream belongs to."""
        number = position // self.batch_size
        members = range(number * self.batch_size, (number + 1) * self.batch_size)
        needed = max(self.needed[self.index(p)] for p in members)
        return self.rule(number, needed) if self.rule else shortest(self.windows, needed)

    def tokens(self, positions: Sequence[int]) -> int:
        """How many tokens are to be found there."""
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
        """These clips as they are, in the shortest window that holds them."""
        features = torch.stack([self._plain(i) for i in indices])
        needed = max(self.needed[i] for i in indices)
        return self.batch(indices, features, shortest(self.windows, needed))

    def batch(self, indices: Sequence[int], features: Tensor, positions: int) -> Batch:
        """Clips by their features (clips, mels, frames), cut to so many encoder positions."""
        texts = [self.texts[i] for i in indices]
        inputs = padded([given + found[:-1] for given, found in texts], texts[0][1][-1])
        labels = [[IGNORED] * (len(given) - 1) + found for given, found in texts]
        heard = features[..., : 2 * positions]  # two mel frames make a position
        return Batch(heard, inputs, padded(labels, IGNORED), features)

    def features(self, position: int) -> Tensor:
        """(mels, frames), augmented by random numbers of the seed and the position."""
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
        # durations are rounded: what is over by less than a frame is no mistake
        if len(pcm) > min(window + self.extractor.hop_length, self.extractor.n_samples):
            raise Problem(
                f"training: {self.clips[index].audio} lasts {len(pcm) / SAMPLE_RATE:.2f} s, which "
                "is longer than its manifest says and than the model's window",
                hint="correct the duration in the manifest, or leave it out",
            )
        return pcm


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, 0, epoch]).permutation(size).tolist())


def padded(rows: list[list[int]], filler: int) -> Tensor:
    """(rows, longest row) int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def token_ids(
    clip: "Clip", model: "WhisperForConditionalGeneration", tokenizer: Any
) -> tuple[list[int], list[int]]:
    """What decoding is given (start, and the prompt of the clip's language), and what it shall
    find (the text as Whisper writes it, and the end)."""
    text = clip.text.strip()
    spaced = f" {text}" if text and language_code(clip.lang) not in UNSPACED else text
    ids = tokenizer(spaced, add_special_tokens=False).input_ids
    return prompt_ids(model.generation_config, clip.lang), [*ids, model.config.eos_token_id]


def seconds(clip: "Clip") -> float:
    return clip.duration_s if clip.duration_s is not None else len(clip.pcm()) / SAMPLE_RATE


def needed_positions(clip: "Clip", extractor: Any, windows: Sequence[int]) -> int:
    """Encoder positions that a clip reaches into."""
    samples = seconds(clip) * extractor.sampling_rate
    return min(max(1, math.ceil(samples / (2 * extractor.hop_length))), windows[-1])


def add_noise(pcm: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """White noise between snr_db and 30 dB below that, relative to the clip's mean power."""
    level = math.sqrt(float(np.mean(pcm**2))) * 10 ** (-(snr_db + rng.uniform(0, 30)) / 20)
    return (pcm + level * rng.standard_normal(len(pcm))).astype(np.float32)


def mask(features: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """(mels, frames) with two bands and two stretches of up to `width` set to the mean."""
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
    label: str = "listening",
) -> Iterator[Batch]:
    """Every clip once, as it is, in the manifest's order, on the model's device; progress is shown
    under that label."""
    examples = Examples(clips, model, processor, seed=0)
    device = next(model.parameters()).device
    with progress_bar(len(examples), None, main_process(), label) as show:
        for first in range(0, len(examples), size):
            yield examples.plain(range(len(examples))[first : first + size]).to(device)
            show(min(first + size, len(examples)), "")
