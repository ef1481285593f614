"""Every step that trains, on a model of two layers: for tests that stop it or share it.

As a program, under torchrun, it takes all of them one after the other:
small_steps.py SEED PLACE writes PLACE/NAME/rank-N.pt.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from small_whisper import random_whisper

from benchmarks.speech.clips import read_manifest
from edgewhisper import shipped, whisper
from edgewhisper.compress import imp, kdq, lite, merge, qat, recover, shear, short, tspar, wsap
from edgewhisper.compress.context import Context
from edgewhisper.training import Training, train

RATE = 1e-3
BRIEF = Training(steps=2, batch_size=4, learning_rate=RATE, noise_snr_db=10.0, checkpoint_steps=1)
PASSES = replace(BRIEF, batch_size=5, accumulate=2)
FLOAT = kdq.Precision(encoder=32, decoder=32, token_table=32)
TEACHER = "a teacher"


@dataclass(frozen=True)
class Step:
    apply: Callable[[Any, Any, Context], Any]
    options: Any
    decoder_layers: int = 2


def fine_tune(model: Any, options: Training, context: Context) -> Any:
    """The training loop alone."""
    log = train(
        model,
        context.processor,
        context.train,
        options,
        run_dir=context.run_dir / "loop",
        seed=context.seed,
    )
    context.record["training"] = {**log.summary(), "losses": log.losses}
    return model


STEPS = {
    "fine-tuning": Step(fine_tune, PASSES),
    "tspar-subgradient": Step(tspar.apply, tspar.Options(search=False, c1=0.2, training=BRIEF)),
    "tspar-proximal-recovery": Step(
        tspar.apply,
        tspar.Options(reg_mode="proximal", evaluations=2, keep=0.1, training=BRIEF, recovery=BRIEF),
    ),
    "imp": Step(
        imp.apply, imp.Options(share=0.3, target=0.6, start=BRIEF, training=BRIEF, recovery=BRIEF)
    ),
    "wsap": Step(wsap.apply, wsap.Options(recovery=BRIEF)),
    "merge": Step(merge.apply, merge.Options(baseline=BRIEF, training=BRIEF)),
    "merge-search": Step(
        merge.apply, merge.Options(search="bayes", trials=2, trial=BRIEF, training=BRIEF), 4
    ),
    "shear": Step(shear.apply, shear.Options(rank=4, training=replace(BRIEF, steps=4))),
    "kdq-limit-guided": Step(
        kdq.apply,
        kdq.Options(
            teacher=TEACHER,
            distil_share=0.5,
            quantise_share=0.5,
            training=replace(BRIEF, steps=4),
        ),
    ),
    "kdq-dp-passes": Step(
        kdq.apply,
        kdq.Options(
            teacher=TEACHER,
            matching="dp",
            features="normalised",
            encoder=True,
            quantise=FLOAT,
            training=PASSES,
        ),
    ),
    "kdq-weights": Step(
        kdq.apply,
        kdq.Options(teacher=TEACHER, guided_mode="KDQ", matching="nolimit", training=BRIEF),
    ),
    "qat": Step(qat.apply, qat.Options(encoder=4, keep=0.1, training=BRIEF)),
    "short": Step(short.apply, short.Options(full_share=0.3, kl=0.5, ce=0.2, training=PASSES)),
    "recover": Step(recover.apply, recover.Options(windows_s=(2.0,), training=PASSES)),
    "lite": Step(
        lite.apply,
        lite.Options(theta_attn=0.9, theta_mlp=0.9, round_to=1, clips=4, recovery=BRIEF),
    ),
}


def take(name: str, seed: int, place: Path, train_clips: int = 7) -> tuple[Any, dict[str, Any]]:
    """Draw a model, take the step, keep its state under `place` -> the model and the record.

    Where the step wants a teacher, `make_teacher` has made one beside `place`.
    """
    step = STEPS[name]
    torch.manual_seed(seed)
    digits, clips = shipped.DEFAULT_MODEL, read_manifest(shipped.SPEECH / "test.jsonl")
    model = random_whisper(digits, d_model=16, ffn=16, decoder_layers=step.decoder_layers)
    options = step.options
    if getattr(options, "teacher", ""):
        options = replace(options, teacher=str(place.parent / TEACHER))
    processor = whisper.load_processor(digits)
    context = Context(
        processor, clips[:train_clips], clips[:2], place, seed, copy.deepcopy(model), True
    )
    return step.apply(model, options, context), context.record


def make_teacher(seed: int, folder: Path) -> None:
    torch.manual_seed(seed + 1)
    digits = shipped.DEFAULT_MODEL
    teacher = random_whisper(digits, d_model=24, ffn=32, encoder_layers=3, decoder_layers=4)
    whisper.save(teacher, whisper.load_processor(digits), folder / TEACHER, {})


if __name__ == "__main__":
    seed, folder = int(sys.argv[1]), Path(sys.argv[2])
    for name in STEPS:
        model, record = take(name, seed, folder / name)
        told = (model.state_dict(), getattr(model.config, "edgewhisper", None), record)
        torch.save(told, folder / name / f"rank-{torch.distributed.get_rank()}.pt")
