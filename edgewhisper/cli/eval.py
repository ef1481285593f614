"""`edgewhisper eval`: error rates of a checkpoint or an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from edgewhisper.cli.options import DEFAULT, MODEL, SPEECH, Json, Normalizer, Units
from edgewhisper.cli.output import emit, say, write_text


def eval_cli(
    source: Annotated[
        str | None, Argument(help=f"artifact, or checkpoint: {MODEL}; default: {DEFAULT}")
    ] = None,
    speech: Annotated[
        Path | None,
        Option(
            help=f"clips with reference texts: {SPEECH}; default: clips included with EdgeWhisper"
        ),
    ] = None,
    normalizer: Normalizer = None,
    compute_units: Units = None,
    texts: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="also write the text and the word counts of each clip to this file, as JSON lines",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Compute the word and character error rates of a model."""
    from edgewhisper import shipped, transcription

    source = source or str(shipped.default_artifact())
    speech = speech or shipped.speech_for([Path(source)])
    score, clips = transcription.evaluate(source, speech, normalizer, compute_units)
    if texts is not None:
        write_text(texts, "".join(json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips))
    emit(score.as_dict(), json_file)
    if json_file != "-":
        low, high = score.wer_interval
        say(f"WER {score.wer:.2%}  (95 % interval {low:.2%} to {high:.2%})   CER {score.cer:.2%}")
        say(f"mean WER of the clips {score.wer_per_utterance_mean:.2%}")
        say(
            f"{score.substitutions} substitutions, {score.deletions} deletions, "
            f"{score.insertions} insertions in {score.words} words; "
            f"{score.exact} of {score.utterances} clips exact; normalizer {score.normalizer}"
        )
