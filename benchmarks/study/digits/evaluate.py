"""Run the fixed evaluation of a digits checkpoint; the last line of stdout is JSON.

    python -m benchmarks.study.digits.evaluate --fsdd free-spoken-digit-dataset/recordings \
        [--checkpoint DIR] [--out scores.json]

For each speaker, a fixed plan gives 120 sequences of one to six recordings, clean and with white
noise 10 dB below the speech. The speakers lucas and theo (if the recordings have him) were never
trained on. For the other speakers, only the held-out recordings 0..4 are used. Silence, noise and
words that are not digits must give empty texts.

Without --fsdd, only the sets without a download are scored: the shipped clips, silence and noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.study.digits import CHECKPOINT, SAMPLE_RATE, SPEECH, WINDOW_S
from benchmarks.study.digits.banks import HELD_OUT_OTHER, HELD_OUT_SPEAKERS
from benchmarks.study.digits.clips import coloured_noise
from benchmarks.study.digits.model import quiet_transformers
from benchmarks.study.digits.spectra import Row, read_clip, read_rows
from benchmarks.study.digits.synthesise import HELD_OUT_WORDS, TEST_VARIANTS, random_voice, speak
from benchmarks.wer import count

SEQUENCES = 120
SEED = 3
LONGEST = WINDOW_S * SAMPLE_RATE - 3200  # samples; a sequence stops before it grows longer


@dataclass(frozen=True)
class Spoken:
    """Audio (samples,) float32 at 16 kHz and its text."""

    samples: np.ndarray
    text: str


@dataclass(frozen=True)
class Score:
    """Word errors out of words, and exactly transcribed clips out of clips."""

    errors: int
    words: int
    exact: int
    clips: int

    @property
    def wer(self) -> float:
        """Word error rate; 0 if there are no words."""
        return self.errors / self.words if self.words else 0.0


# ---------------------------------------------------------------- the fixed set


def sequence_plan(recordings: int, count: int = SEQUENCES, seed: int = SEED) -> list[dict]:
    """Return the recordings and pauses in seconds of each sequence, drawn with a fixed seed."""
    rng = np.random.default_rng(seed)
    plan = []
    for index in range(count):
        words = 1 + index % 6
        plan.append(
            {
                "lead_s": round(float(rng.uniform(0.05, 0.5)), 4),
                "clips": [int(rng.integers(recordings)) for _ in range(words)],
                "gaps_s": [round(float(rng.uniform(0.03, 0.35)), 4) for _ in range(words)],
            }
        )
    return plan


def plan_hash(plan: list[dict]) -> str:
    """Return a hash of a plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def pause(seconds: float) -> np.ndarray:
    """Return digital silence."""
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def lay_out(step: dict, clips: list[np.ndarray], texts: list[str]) -> Spoken:
    """Return one sequence of the plan; words that do not fit the window are left out."""
    parts, words = [pause(step["lead_s"])], []
    for index, gap_s in zip(step["clips"], step["gaps_s"], strict=True):
        if sum(map(len, parts)) + len(clips[index]) > LONGEST:
            break
        parts += [clips[index] * 0.5, pause(gap_s)]
        words.append(texts[index])
    return Spoken(np.concatenate(parts), " ".join(words))


def speaker_sequences(rows: list[Row]) -> list[Spoken]:
    """Return the 120 sequences of one speaker's recordings."""
    clips = [read_clip(row.path) for row in rows]
    texts = [row.text for row in rows]
    return [lay_out(step, clips, texts) for step in sequence_plan(len(rows))]


def add_white_noise(spoken: list[Spoken], snr_db: float) -> list[Spoken]:
    """Add white noise `snr_db` below the power of each sequence."""
    rng = np.random.default_rng([SEED, 10])
    noisy = []
    for item in spoken:
        rms = np.sqrt((item.samples**2).mean())
        noise = rng.standard_normal(len(item.samples)) * rms * 10 ** (-snr_db / 20)
        noisy.append(Spoken((item.samples + noise).astype(np.float32), item.text))
    return noisy


def nothing(samples: np.ndarray) -> Spoken:
    """Return audio without digits, cut to one window."""
    return Spoken(samples[: WINDOW_S * SAMPLE_RATE].astype(np.float32), "")


def silences() -> list[Spoken]:
    """Return silence of several lengths, and noise 60 to 90 dB below full scale."""
    rng = np.random.default_rng(11)
    zeros = [nothing(pause(seconds)) for seconds in (0.5, 1, 2, 4, 6)]
    faint = [
        nothing(coloured_noise(rng, 6 * SAMPLE_RATE, tilt) * 10 ** (level_db / 20))
        for level_db in (-60, -75, -90)
        for tilt in (0.0, 0.5, 1.0)
    ]
    return zeros + faint


def noises(level_db: float) -> list[Spoken]:
    """Return twelve Gaussian noises of three colours and four lengths at a level in dBFS."""
    rng = np.random.default_rng(12)
    return [
        nothing(coloured_noise(rng, round(seconds * SAMPLE_RATE), tilt) * 10 ** (level_db / 20))
        for seconds in (1.0, 2.5, 4.0, 6.0)
        for tilt in (0.0, 0.5, 1.0)
    ]


def foreign_words() -> dict[str, list[Spoken]]:
    """Return words in languages and voices that are not in the training data; needs espeak-ng."""
    rng = np.random.default_rng(13)
    spoken = {}
    for language, words in HELD_OUT_WORDS.items():
        voices = [random_voice(rng, TEST_VARIANTS, language) for _ in words.split()]
        clips = [speak(w, v) * 0.5 for w, v in zip(words.split(), voices, strict=True)]
        spoken[f"words {language}"] = [nothing(np.concatenate([pause(0.2), c])) for c in clips]
    return spoken


def recorded_others(rows: list[Row]) -> dict[str, list[Spoken]]:
    """Return held-out recordings without digits, cut to windows."""
    by_kind: dict[str, list[Spoken]] = {}
    for row in rows:
        if any(name in row.path.stem or name == row.text for name in HELD_OUT_OTHER):
            if "_norm" in row.path.stem:  # sentences with numerals in them
                continue
            name = "recorded noise" if row.kind == "noise" else f"recorded {row.kind}s"
            by_kind.setdefault(name, []).append(nothing(read_clip(row.path) * 0.5))
    return by_kind


def shipped(split: str) -> list[Spoken]:
    """Return the shipped clips that fit the window."""
    rows = map(json.loads, (SPEECH / f"{split}.jsonl").read_text().splitlines())
    return [
        Spoken(read_level(SPEECH / row["audio"]), row["text"])
        for row in rows
        if row["duration"] <= WINDOW_S
    ]


def read_level(path: Path) -> np.ndarray:
    """Return samples (n,) float32 at 16 kHz at their recorded level."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLE_RATE:
        raise ValueError(f"{path}: {rate} Hz; shipped clips are {SAMPLE_RATE} Hz")
    return samples


def conditions(source: Path | None) -> dict[str, list[Spoken]]:
    """Return the clips of all conditions by name, in the order of the report."""
    sets: dict[str, list[Spoken]] = {}
    rows = read_rows(source) if source else []
    for speaker in sorted({row.speaker for row in rows if row.kind == "digit"}):
        own = [row for row in rows if row.speaker == speaker and row.kind == "digit"]
        name = f"{speaker} (held-out speaker)"
        if speaker not in HELD_OUT_SPEAKERS:
            own = [row for row in own if int(row.path.stem.rsplit("_", 1)[1]) < 5]
            name = f"{speaker} (training speaker, held-out recordings)"
        sets[f"{name}, clean"] = speaker_sequences(own)
        sets[f"{name}, 10 dB"] = add_white_noise(sets[f"{name}, clean"], 10)
    sets["shipped test clips"] = shipped("test")
    sets["shipped silence, noise and words"] = shipped("other")
    sets["silence"] = silences()
    sets |= {f"noise {level_db} dB": noises(level_db) for level_db in (-45, -30, -15)}
    if shutil.which("espeak-ng"):
        sets |= foreign_words()
    return sets | recorded_others(rows)


# ---------------------------------------------------------------- scoring


def transcribe(checkpoint: Path, audio: list[np.ndarray], batch: int = 24) -> list[str]:
    """Return the checkpoint's text of each clip, by generate() without options."""
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    processor = WhisperProcessor.from_pretrained(checkpoint)
    model = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    texts: list[str] = []
    for first in range(0, len(audio), batch):
        features = processor.feature_extractor(
            audio[first : first + batch], sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        with torch.no_grad():
            ids = model.generate(features)
        texts += processor.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def score(spoken: list[Spoken], texts: list[str]) -> Score:
    """Count errors; in clips without digits every output word is an error."""
    errors = [sum(count(s.text, h)[:3]) for s, h in zip(spoken, texts, strict=True)]
    words = sum(len(s.text.split()) for s in spoken)
    return Score(sum(errors), words, sum(e == 0 for e in errors), len(spoken))


def evaluate(checkpoint: Path, source: Path | None) -> dict[str, Score]:
    """Return the scores of all conditions."""
    sets = conditions(source)
    texts = iter(transcribe(checkpoint, [s.samples for items in sets.values() for s in items]))
    return {name: score(items, [next(texts) for _ in items]) for name, items in sets.items()}


def table(scores: dict[str, Score]) -> str:
    """Return the scores as a Markdown table."""
    lines = ["| condition | word error rate | clips right |", "|---|---|---|"]
    for name, s in scores.items():
        wer = f"{100 * s.wer:.1f} % ({s.errors}/{s.words})" if s.words else "must be empty"
        lines.append(f"| {name} | {wer} | {s.exact}/{s.clips} |")
    return "\n".join(lines)


def load_scores(path: Path) -> dict[str, Score]:
    """Read the scores written by `--out`."""
    rows = json.loads(path.read_text())
    return {name: Score(**{k: v for k, v in s.items() if k != "wer"}) for name, s in rows.items()}


def main() -> None:
    """Score a checkpoint; print a table and JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--fsdd", type=Path, help="FSDD recordings, or a JSONL manifest")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    quiet_transformers()
    scores = evaluate(options.checkpoint, options.fsdd)
    print(table(scores))
    result = {name: asdict(s) | {"wer": round(s.wer, 4)} for name, s in scores.items()}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
