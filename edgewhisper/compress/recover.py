"""Recovery: a compressed model learns the states of the dense model, on short windows of audio.

A frozen copy of the model before the recipe processes the full window of each clip once. The
compressed model processes windows that are as long as the clip needs, and is trained to give the
same states at its encoder's output and at its decoder's output, and the same next tokens. One
training thus recovers what pruning lost, and makes short windows usable. States supervise every
frame and every token with d_model numbers, so a few hundred clips suffice, with or without texts.

    here             shape
    encoder states   (positions, d_model)   encoder output at the positions that have speech
    decoder states   (tokens, d_model)      last hidden states of the decoder, input of the logits
    p_t, p_s         (tokens, V)            next-token distributions of the dense model, and of this

    e(s, t) = mean (s - t)^2 / var(t), over the positions and features of a clip              (1)
    L = encoder * e(encoder states) + decoder * e(decoder states) + kl * KL(p_t || p_s)       (2)

Sources: hidden states and logits as targets are those of TinyBERT (Jiao et al. 2020,
arXiv:1909.10351) and DistilBERT (Sanh et al. 2019, arXiv:1910.01108); Minitron (Muralidharan et al.
2024, arXiv:2407.14679) recovers pruned language models with them, BaldWhisper (2025,
arXiv:2510.08599) a pruned Whisper. The dense model's full window as the target of a short one is
from whisper-acft, see short.py.

Differences:

- Errors are relative to the variance of the dense states, so that one weight suits all sizes.
- The hidden states inside the stacks are not compared: pruned layers need not divide the
  computation as the dense layers do.
- The dense model's states are computed once for each clip and stored in memory (float16, up to
  512 MB, about 1,500 clips).
- The decoder reads the dense model's transcripts, as Distil-Whisper does (Gandhi et al. 2023,
  arXiv:2311.00430), so the texts of the clips are not used. Empty and implausible transcripts are
  left out, see pseudo_labels.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speech.clips import Clip
from edgewhisper import whisper
from edgewhisper.alignment import position_s
from edgewhisper.compress.context import Context
from edgewhisper.compress.short import windows_for, with_hidden_states
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.compress.teacher import divergence, frozen_copy, load_teacher
from edgewhisper.examples import IGNORED, Batch, WindowRule, token_ids
from edgewhisper.frozen_encoder import StatesCache
from edgewhisper.progress import progress_steps
from edgewhisper.pseudo_labels import pseudo_labelled
from edgewhisper.random_tokens import drawn
from edgewhisper.recipe import Range
from edgewhisper.silence import silence_in_groups
from edgewhisper.training import LossTerm, Training, cross_entropy
from edgewhisper.variants import variants
from export.cost import macs_by_window
from export.layouts import NATIVE
from export.onnx.silence import Silence, silence_of
from export.shrink import windows_of

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Weight = Annotated[float, Range(0)]
REMOVES = ("windows_s",)


@dataclass(frozen=True)
class Options:
    windows_s: tuple[float, ...] = ()
    """Window lengths in seconds, ascending; the full window is always added. Empty: the windows
    that the model has."""
    silence_stride: Annotated[int, Range(1)] = 1
    """Compute so many encoder positions of the silence after the clips of a step as one, as
    `export --silence-stride` does. For models with one window: a step then costs less."""
    teacher: str = ""
    """A directory or hub id of the dense model. Empty: the model before the recipe."""
    full_share: Annotated[float, Range(0, 1)] = 0.1
    """Share of the steps that use the full window. The other steps draw one of the windows that
    hold the longest clip of the step."""
    encoder: Weight = 1.0
    """Weight of the error of the encoder states in (2)."""
    decoder: Weight = 1.0
    """Weight of the error of the decoder states in (2)."""
    kl: Weight = 1.0
    """Weight of the divergence in (2)."""
    variants: Annotated[int, Range(0)] = 0
    """Variants of each clip to train on as well: other speeds and levels, joined clips, noise (see
    variants.py). They are written to the run's directory, and the dense model transcribes them."""
    random_tokens: Annotated[int, Range(0)] = 0
    """Random tokens before the text of every second variant (see random_tokens.py)."""
    training: Training = field(
        default_factory=lambda: Training(
            steps=500, batch_size=6, learning_rate=4e-5, token_table=False
        )
    )


# ------------------------------------------------------------------------------------- the windows


@dataclass(frozen=True)
class DrawnWindows:
    """Chooses the window of each training step.

    The choice depends only on the seed, the step and the clips, so it is the same on every process
    and in a resumed run.
    """

    windows: tuple[int, ...]
    full_share: float
    seed: int

    def __call__(self, step: int, needed: int) -> int:
        """Return the window of a step whose longest clip fills `needed` encoder positions."""
        rng = np.random.default_rng([self.seed, 4, step])
        short = [n for n in self.windows[:-1] if n >= needed]
        if not short or rng.random() < self.full_share:
            return self.windows[-1]
        return short[int(rng.integers(len(short)))]


@dataclass(frozen=True)
class SpeechAndMargin:
    """Chooses the window of each training step whose silence is computed in groups: that of an
    artifact, or the full window in a share of the steps."""

    silence: Silence
    full_share: float
    seed: int

    def __call__(self, step: int, needed: int) -> int:
        """Return the window of a step whose longest clip fills `needed` encoder positions."""
        if np.random.default_rng([self.seed, 4, step]).random() < self.full_share:
            return self.silence.full
        return self.silence.mel_positions(self.silence.window_of(needed))


# ------------------------------------------------------------------------------------ the loss, (2)


States = tuple[Tensor, Tensor]
"""Encoder states (positions, d_model) and decoder states (tokens, d_model) of a clip."""


def relative_error(student: Tensor, dense: Tensor) -> Tensor:
    """(1) of one clip: states (at least n, d_model) and dense states (n, d_model) -> ()."""
    dense = dense.float()
    return (student[: len(dense)].float() - dense).square().mean() / dense.var()


class DenseStates:
    """The states of a frozen model for each clip: computed once and stored in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, StatesCache()

    def __call__(self, batch: Batch, row: int) -> States:
        """Return both states of one clip of a batch, which is processed alone."""
        if batch.clips is None:
            return self.computed(batch, row)
        return self.cache(batch.clips[row], lambda: self.computed(batch, row))

    @torch.no_grad()
    def computed(self, batch: Batch, row: int) -> States:
        assert batch.whole_features is not None
        assert batch.lengths is not None
        ids = batch.decoder_input_ids[row, : tokens_of(batch.labels[row])]
        self.model.to(ids.device)
        outputs = self.model(
            batch.whole_features[row : row + 1],
            decoder_input_ids=ids[None],
            use_cache=False,
            output_hidden_states=True,
        )
        heard = outputs.encoder_last_hidden_state[0, : batch.lengths[row]]
        # float16: its rounding is far below the errors, and twice as many clips fit in the cache
        return heard.half(), outputs.decoder_hidden_states[-1][0].half()


def tokens_of(labels: Tensor) -> int:
    """Return the number of inputs up to the last label; labels (tokens,)."""
    return int((labels != IGNORED).nonzero()[-1]) + 1


def recovery(dense: nn.Module, options: Options) -> LossTerm:
    """Return the loss term: (2), minus the cross entropy that the training loop adds."""
    states = DenseStates(dense)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        targets = [states(batch, row) for row in range(len(batch.labels))]
        labelled = batch.labels != IGNORED  # (clips, tokens)
        shares = labelled.sum(dim=1) / labelled.sum()  # (clips,)
        heard = [
            relative_error(s, t)
            for s, (t, _) in zip(outputs.encoder_last_hidden_state, targets, strict=True)
        ]
        read = [
            relative_error(s, t)
            for s, (_, t) in zip(outputs.decoder_hidden_states[-1], targets, strict=True)
        ]
        errors = options.encoder * torch.stack(heard) + options.decoder * torch.stack(read)
        rows = [t[chosen[: len(t)]] for (_, t), chosen in zip(targets, labelled, strict=True)]
        kl = divergence(dense.proj_out(torch.cat(rows).float()), outputs.logits[labelled])
        loss = (shares * errors).sum() + options.kl * kl
        return loss - cross_entropy(outputs.logits, batch.labels)

    return term


# ----------------------------------------------------------------------------- walking the model


def dense_model(model: nn.Module, options: Options, context: Context) -> nn.Module:
    """Return the frozen model whose states are the targets."""
    if options.teacher:
        return load_teacher(options.teacher, model, context.processor, "recover")
    return frozen_copy(model if context.original is None else context.original)


def recovery_clips(
    dense: Any, options: Options, context: Context, longest_s: float
) -> tuple[list[Clip], Counter[str]]:
    """Return the training clips and their variants with the dense model's transcripts, and the
    number of clips that were left out per reason."""
    clips, left_out = list(context.train), Counter[str]()
    if not context.dense_texts or options.teacher:
        cache = context.run_dir.parent / "transcripts.json"  # the steps of a recipe share it
        clips, left_out = pseudo_labelled(dense, context.processor, clips, cache)
    if options.variants:
        made = variants_of(context, options, longest_s)
        cache = context.run_dir / "variants-transcripts.json"
        labelled, more_left_out = pseudo_labelled(dense, context.processor, made, cache)
        if options.random_tokens:
            labelled[::2] = with_random_tokens(labelled[::2], dense, options.random_tokens, context)
        clips, left_out = clips + labelled, left_out + more_left_out
    return clips, left_out


def with_random_tokens(
    clips: Sequence[Clip], dense: Any, number: int, context: Context
) -> list[Clip]:
    """Return the clips with random tokens before their texts, except texts that become too long."""
    tokenizer, made = context.processor.tokenizer, []
    for clip, ids in zip(clips, drawn(tokenizer, len(clips), number, context.seed), strict=True):
        longer = replace(clip, text=f"{tokenizer.decode(ids).strip()} {clip.text}")
        prompt, text = token_ids(longer, dense, tokenizer)
        fits = len(prompt) + len(text) <= dense.config.max_target_positions
        made.append(longer if fits else clip)
    return made


def variants_of(context: Context, options: Options, longest_s: float) -> list[Clip]:
    """Return variants of the training clips, which fit in `longest_s` seconds."""
    number = options.variants * len(context.train)
    with progress_steps(number, "recover: writing variants of the clips") as done:
        folder = context.run_dir / "recover-variants"
        return variants(context.train, options.variants, longest_s, context.seed, folder, done)


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Train the model to give the dense model's states, and record its windows in its config.

    `context.record["recover"]` has the windows and the model's multiply-accumulates in each. Raises
    Problem for invalid windows, and what training.train raises.
    """
    refuse_quantised(model, "recover", options)
    dense = dense_model(model, options, context)
    if options.windows_s:
        step_s, full = position_s(context.processor), model.config.max_source_positions
        windows = windows_for(options.windows_s, full, step_s, "recover")
        whisper.set_windows(model.config, windows)
    windows = windows_of(model.config)
    longest_s = windows[-2:][0] * position_s(context.processor)
    clips, left_out = recovery_clips(dense, options, context, longest_s)
    silence = silence_of(model, NATIVE, options.silence_stride)
    rule: WindowRule = DrawnWindows(tuple(windows), options.full_share, context.seed)
    if silence is not None:
        rule = SpeechAndMargin(silence, options.full_share, context.seed)
    with with_hidden_states(model), silence_in_groups(model, silence):
        training = context.trained(
            model,
            options.training,
            "recover",
            clips=clips,
            identity=repr(options),
            loss_term=recovery(dense, options),
            window=rule,
            label="recover: training",
        )
    context.record["recover"] = {
        "windows": windows,
        "left_out": dict(left_out),
        "macs": macs_by_window(model),
        "training": training,
    }
    return model
