"""Clips as training takes them: features, what decoding is given and what it shall find."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgewhisper.decoding import log_mel
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech import Clip

IGNORED = -100
"""Label of a padding position: it counts nowhere."""

SAMPLE_RATE = 16_000
CACHED_BYTES = 512_000_000
"""Features of clips that are used again are kept in memory up to this."""

UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages whose transcripts Whisper does not begin with a space."""


@dataclass
class Batch:
    input_features: Tensor
    """(clips, mels, frames)"""
    decoder_input_ids: Tensor
    """(clips, tokens): start, prompt, text; the end token as padding."""
    labels: Tensor
    """(clips, tokens): what comes next; IGNORED in the prompt, which decoding is given and does
    not have to find, and in the padding."""

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.input_features, self.decoder_input_ids, self.labels)
        return Batch(*(tensor.to(device) for tensor in tensors))


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
    ) -> None:
        self.extractor = processor.feature_extractor
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
                stacklevel=3,
            )
        self.clips = [clip for clip, _, _ in fitting]
        self.texts = [(given, found) for _, given, found in fitting]
        self._kept: dict[int, Tensor] = {}
        frames = self.extractor.nb_max_frames
        self._room = CACHED_BYTES // (4 * self.extractor.feature_size * frames)

    def __len__(self) -> int:
        return len(self.clips)

    def index(self, position: int) -> int:
        """The clip at a position of the stream: each epoch is one permutation of all clips."""
        epoch, place = divmod(position, len(self))
        return permutation(self.seed, epoch, len(self))[place]

    def tokens(self, positions: Sequence[int]) -> int:
        """How many tokens are to be found there."""
        return sum(len(self.texts[self.index(p)][1]) for p in positions)

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        texts = [self.texts[self.index(p)] for p in positions]
        inputs = [given + found[:-1] for given, found in texts]
        labels = [[IGNORED] * (len(given) - 1) + found for given, found in texts]
        features = torch.stack([self.features(p) for p in positions])
        return Batch(features, padded(inputs, texts[0][1][-1]), padded(labels, IGNORED))

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
        if len(pcm) > self.extractor.n_samples:
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
    """What decoding is given (start and the model's own prompt), and what it shall find (the text
    as Whisper writes it, and the end)."""
    language = clip.lang.split("-")[0].lower()
    text = clip.text.strip()
    spaced = f" {text}" if text and language not in UNSPACED else text
    ids = tokenizer(spaced, add_special_tokens=False).input_ids
    given = [model.config.decoder_start_token_id, *prompt_ids(language, model.generation_config)]
    return given, [*ids, model.config.eos_token_id]


def prompt_ids(language: str, generation: Any) -> list[int]:
    """Language, task, no timestamps; the last alone where the model knows English only."""
    if not getattr(generation, "is_multilingual", False):
        return [generation.no_timestamps_token_id]
    known = generation.lang_to_id
    if f"<|{language}|>" not in known:
        raise Problem(
            f"training: a clip's language is {language!r}, which the model has no token for",
            hint=f"use one of its {len(known)} languages, such as {', '.join(list(known)[:5])}",
        )
    task = generation.task_to_id["transcribe"]
    return [known[f"<|{language}|>"], task, generation.no_timestamps_token_id]


def seconds(clip: "Clip") -> float:
    return clip.duration_s if clip.duration_s is not None else len(clip.pcm()) / SAMPLE_RATE


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
) -> Iterator[Batch]:
    """Every clip once, as it is, in the manifest's order, on the model's device."""
    examples = Examples(clips, model, processor, seed=0)
    order = permutation(0, 0, len(examples))
    positions = sorted(range(len(examples)), key=order.__getitem__)
    device = next(model.parameters()).device
    for first in range(0, len(positions), size):
        yield examples[positions[first : first + size]].to(device)
