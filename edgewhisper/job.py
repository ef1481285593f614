"""A compression job: what the user requests, what is loaded for it, and its recipe's steps.

`pipeline.compress` runs a job once; `target_search` runs its recipe many times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewhisper import alignment, runs, whisper
from edgewhisper.checkpoints.openai import ENGLISH
from edgewhisper.compress import METHODS
from edgewhisper.compress.context import Context
from edgewhisper.compress.step_order import refuse_quantised
from edgewhisper.guard import Guard, Loss, likely_cause, trainings_of
from edgewhisper.languages import set_language
from edgewhisper.recipe import Recipe, Step, load_recipe
from edgewhisper.shipped import DEFAULT_MODEL
from edgewhisper.training_speech import (
    OWN_WORDS,
    Speech,
    choose_speech,
    with_own_transcripts,
    with_pseudo_labels,
)
from export.cost import count_parameters, macs, macs_by_window
from export.problem import Problem
from export.prompt import is_multilingual

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

Say = Callable[[str], None]
"""Prints one line for the user."""


@dataclass(frozen=True)
class Request:
    """The arguments of `edgewhisper compress`."""

    model: str | None = None
    """Size name, Hub ID, directory or .pt file. None: the embedded digits model."""
    recipe: str | None = None
    """Name or .toml file. None: see recipe_for."""
    speech: Path | None = None
    """Clips to train on. None: shipped clips."""
    dev: Path | None = None
    """Dev clips. None: every tenth clip of `speech`."""
    out: Path | None = None
    """Output directory, which must not exist. None: a new one in ./edgewhisper-runs."""
    seed: int = 0
    revision: str | None = None
    """Revision of a model on the hub."""
    language: str | None = None
    """Prompts the model for speech in a language that it has no token for."""
    allow_loss: bool = False
    """Write the checkpoint even if it loses more dev WER than the recipe's max_wer_loss."""

    @property
    def source(self) -> str:
        """The model to compress."""
        return self.model or str(DEFAULT_MODEL)


def recipe_for(request: Request) -> Recipe:
    """Return the requested recipe.

    The default is `oneshot`, which trains nothing. For the embedded model it is `quick`, which
    trains for some minutes, or `digits-tspar` if the user gives speech.
    """
    recipe = request.recipe
    if recipe is None and Path(request.source) == DEFAULT_MODEL:
        recipe = "quick" if request.speech is None else "digits-tspar"
    return load_recipe(recipe or "oneshot")


@dataclass(frozen=True)
class Job:
    """A loaded checkpoint, the recipe, and the context that its steps share."""

    source: str
    recipe: Recipe
    dense: WhisperForConditionalGeneration
    """The checkpoint before compression."""
    context: Context
    before: dict[str, Any]
    """The measurements of `dense`, see measure()."""
    speech: dict[str, str | None] = field(default_factory=dict)
    """Source of shipped clips and of their texts. For the user's own clips, the source of the texts
    if the model wrote them, "texts" and "dev_texts"."""

    @property
    def notes(self) -> list[str]:
        """Notes to print before the first step."""
        source, texts, dev_texts = map(self.speech.get, ("source", "texts", "dev_texts"))
        notes = [f"no --speech given: training on {source}"] if source else []
        if source and is_multilingual(self.dense.generation_config):
            notes.append(
                "note: these clips are English, so the error rates do not hold for other "
                "languages; use --speech with clips in your language"
            )
        if texts and not source:
            notes.append(f"note: the clips have no texts: training on {texts}")
        if dev_texts:
            notes.append(
                f"note: WER is measured against {dev_texts}: it shows how much the compressed "
                "model differs from the uncompressed one, not how many words are wrong"
            )
        return notes


def prepare(request: Request, recipe: Recipe, purpose: str = "") -> Job:
    """Load and check everything before the first step, including the output directory.

    `purpose` separates the unfinished state of a search from that of a plain compression. Raises
    Problem if something does not fit.
    """
    source, out = request.source, request.out
    if out is not None and out.exists():
        raise Problem(f"{out} exists already", hint="choose another --out, or remove it first")
    dense = whisper.load(source, request.revision)
    clips = choose_speech(source, request.speech, request.dev, dense.config.vocab_size >= ENGLISH)
    run_dir = unfinished_dir(request, recipe, clips, purpose)
    processor = whisper.load_processor(source, request.revision)
    clips, labelled = with_pseudo_labels(dense, processor, clips, run_dir)
    if clips.source is None or request.language is not None:
        set_language(dense.generation_config, clips.train, clips.dev, request.language)
    for step in recipe.steps:
        refuse_quantised(dense, step.method, step.options)
    own_texts = clips.source is not None and trains(recipe)
    context = Context(
        processor=processor,
        train=with_own_transcripts(dense, processor, clips.train) if own_texts else clips.train,
        dev=clips.dev,
        run_dir=run_dir,
        dense_texts=own_texts or "train" in labelled,
        seed=request.seed,
        original=dense,
        timed=alignment.reference(dense, processor, clips.dev),
        measured_dir=runs.RUNS / "measured",
    )
    speech = {
        "source": clips.source,
        "texts": OWN_WORDS if own_texts else labelled.get("train"),
        "dev_texts": labelled.get("dev"),
    }
    return Job(source, recipe, dense, context, measure(dense, context), speech)


def unfinished_dir(request: Request, recipe: Recipe, clips: Speech, purpose: str) -> Path:
    """Return the directory of an interrupted run, which the same command resumes."""
    parts = (recipe.text, request.source, clips, request.seed, request.language, purpose)
    key = "\0".join(map(str, parts))
    return runs.RUNS / f"unfinished-{sha256(key.encode()).hexdigest()[:12]}"


def trains(recipe: Recipe) -> bool:
    """Return whether any step of a recipe trains the model."""
    return any(True for step in recipe.steps for _ in trainings_of(step.options))


def run_steps(
    model: WhisperForConditionalGeneration,
    recipe: Recipe,
    context: Context,
    say: Say,
    first: int = 0,
    last: int | None = None,
    guard: Guard | None = None,
) -> WhisperForConditionalGeneration:
    """Run the steps of a recipe in order and return the last step's model.

    `first` and `last` select steps like a slice. With a `guard`, raises AccuracyLoss if a step, or
    the whole recipe, costs more dev WER than the guard allows. The WER after a step is measured
    after the steps behind it that only make the matrices smaller.
    """
    start = before = context.wer(model) if guard else None
    steps = list(enumerate(recipe.steps, start=1))[first:last]
    changed: tuple[int, Step, dict[str, Any]] | None = None
    for place, (number, step) in enumerate(steps):
        say(f"step {number} of {len(recipe.steps)}: {step.method}")
        model, record = run_step(model, step, number, context)
        if not keeps_outputs(step):
            changed = number, step, record
        following = [later for _, later in steps[place + 1 : place + 2]]
        if guard and before and changed and not any(map(keeps_outputs, following)):
            after = context.wer(model)
            number, step, record = changed
            cause = likely_cause(step, record, after.wer)
            guard.check(Loss(number, step.method, before, after), cause, model, say)
            before, changed = after, None
    if guard and start:
        whole = Loss(None, recipe.name, start, context.wer(model))
        guard.check(whole, "remove less or train longer in the steps that lost most", model, say)
    return model


def run_step(
    model: WhisperForConditionalGeneration, step: Step, number: int, context: Context
) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """Run one step; return its model and its record. Each step gets its own run directory and its
    own entry in context.record, also if a method occurs twice."""
    own = replace(context, run_dir=context.run_dir / f"step-{number}", record={})
    model = import_module(METHODS[step.method]).apply(model, step.options, own)
    for name, entry in own.record.items():
        context.record[f"{name}-{number}" if name in context.record else name] = entry
    return model, own.record


def keeps_outputs(step: Step) -> bool:
    """Return whether a step leaves the model's outputs as they are."""
    return step.method == "shrink"


def finish(
    model: WhisperForConditionalGeneration, context: Context
) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """Return a compressed model, ready to be saved, and its measurements."""
    alignment.settle(model)
    return model, measure(model, context)


def measure(model: WhisperForConditionalGeneration, context: Context) -> dict[str, Any]:
    """Return size, multiply-accumulates, dev error rates and timestamp error of a model."""
    timestamp_error_s = None
    if context.timed is not None:
        heads, clips = alignment.heads_of(model), context.timed.clips
        timestamp_error_s = alignment.timestamp_error_s(model, context.processor, clips, heads)
    return {
        "parameters": count_parameters(model),
        "macs": macs(model),
        "macs_by_window": macs_by_window(model),
        "dev": context.wer(model).as_dict(),
        "timestamp_error_s": timestamp_error_s,
    }


def describe(measured: dict[str, Any]) -> str:
    """Return a line with the size and the dev WER of a model."""
    return (
        f"{measured['parameters']['total']:,} parameters, "
        f"{measured['dev']['wer']:.1%} WER on {measured['dev']['utterances']} dev clips"
    )
