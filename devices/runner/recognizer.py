"""An artifact directory and what computes it: speech in, text and stage times out.

What computes is an Engine: onnxruntime over the graphs of an ONNX artifact (sessions.py), Core ML
over the packages of a Core ML one (coreml.py). Prompts, rules, windows, beams and second thoughts
are the same for both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .audio import Pcm, checked_samples, is_silent, read_wav, shortest
from .decode.listen import Listener, Options, Segment, plain
from .decode.rules import Logits, Rules, detect, greedy
from .decode.text import read_tokens, to_text
from .engines.contract import check_files, read_manifest
from .problem import RunnerProblem

if TYPE_CHECKING:
    from .engines.coreml import Opener


class Decoder(Protocol):
    """The decoder over one encoded window: feeds tokens, keeps their keys and values."""

    fed: int
    """How many tokens it was fed; at 0 it begins again."""
    clock: list[float]
    """Where the seconds of the next call go."""

    def __call__(self, ids: Sequence[int]) -> Logits:
        """Feed tokens behind those already fed; return the logits (vocab,) after the last.

        The array may be the engine's own: the next call writes over it.
        """

    def branches(self, count: int) -> "Sequence[Decoder]":
        """Return decoders over the same window with keys and values in memory of their own."""

    def follow(self, other: Any) -> None:
        """Go on from where another decoder over the same window is."""

    def parts(self) -> dict[str, np.ndarray]:
        """Return what can be seen of the parts between sound and logits."""


class Engine(Protocol):
    """An artifact's graphs, opened."""

    def decoder_over(self, window: Pcm, times: "Transcript") -> Decoder:
        """Return the decoder over one window (1, samples), which is encoded here."""


@dataclass
class Transcript:
    """What is said in one recording, and how long each stage took, in seconds.

    `language` is the code that prompted the model: asked for, named by the checkpoint or detected;
    None where the model knows English only. `graph_s` is the encoder
    graph: log-mel, encoder, cross keys and values; `mel_s` is log-mel's part of it, where that is
    known. Lists of seconds have one entry a window, `per_token_s` one a decoder step after the
    prompt's.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    language: str | None = None
    graph_s: list[float] = field(default_factory=list)
    mel_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what is printed of it."""
        segments = [segment.as_dict() for segment in self.segments]
        return {"text": self.text, "language": self.language, "segments": segments}


class Recognizer:
    """One artifact, opened. Several threads may use it at once: each has keys and values of its own
    (5.5 MB a thread for whisper-tiny), and the graphs are shared.

    `guards` are two rules that transformers' generate() does not have: a silent window is not
    decoded at all, and a text that has fallen into a loop is cut. The gate turns them off to
    compare token for token.

    What the folder holds is checked first (contract.py). With `hashed` false, sizes of files are
    compared with the manifest's and contents are not: for who has done that already.

    A Core ML artifact is run by Core ML on `compute_units` (coreml.UNITS), or where none are named
    by what `open_package` returns.
    """

    def __init__(
        self,
        artifact: str | Path,
        threads: int | None = None,
        guards: bool = True,
        hashed: bool = True,
        compute_units: str | None = None,
        open_package: "Opener | None" = None,
    ) -> None:
        folder = self.folder = Path(artifact)
        self.manifest, self.guards = read_manifest(folder), guards
        check_files(folder, self.manifest, hashed)
        self.rules = Rules.from_manifest(self.manifest["decoding"])
        audio = self.manifest["audio"]
        self.window_samples: int = audio["window_samples"]
        self.windows: list[int] = audio.get("windows_samples", [self.window_samples])
        self.table = read_tokens(folder / "tokens.json")
        self.engine = self.open_engine(threads, compute_units, open_package)

    def open_engine(
        self, threads: int | None, compute_units: str | None, open_package: "Opener | None"
    ) -> Engine:
        """Return what computes the artifact; both need libraries of their own, imported here."""
        if self.manifest["target"] == "coreml":
            from .engines.coreml import UNITS, Packages, installed

            if open_package is None or compute_units is not None:
                open_package = installed(compute_units or next(iter(UNITS)))
            return Packages(self.folder, self.manifest, open_package)
        if compute_units is not None:
            raise RunnerProblem(
                f"{self.folder}: compute units {compute_units!r} are asked for, and it is no "
                "Core ML artifact",
                "leave them out, or export with `--target coreml`",
            )
        from .engines.sessions import Sessions

        return Sessions(self.folder, self.manifest, threads)

    def transcribe(self, audio: Pcm | str | Path, **options: Any) -> Transcript:
        """Return the transcript of a WAV file or of 16 kHz samples of any length.

        A file that is cut short is transcribed as far as it goes, with a warning. Samples are a
        NumPy array (samples,), floats in [-1, 1] or int16 (see audio.checked_samples).
        Keywords are the fields of Options: language, task, timestamps, beams, fallback, seed,
        previous.
        """
        transcript = Transcript()
        for _ in self.stream(audio, transcript, **options):
            pass
        return transcript

    def stream(
        self, audio: Pcm | str | Path, into: Transcript | None = None, **options: Any
    ) -> Iterator[Segment]:
        """Yield the segments of a recording, each as soon as its window is decoded.

        `into` is a transcript that grows with them; other keywords are those of transcribe().
        """
        listener = Listener(self, Options(**options), Transcript() if into is None else into)
        return listener.segments(samples(audio))

    def window(
        self, pcm: Pcm, times: Transcript | None = None, language: str | None = None
    ) -> list[int]:
        """Return the greedy tokens of one window, without prompt and end token.

        A language that the model does not know counts as None: see Options.
        """
        pcm = checked_samples(pcm)
        if self.guards and is_silent(pcm):
            return []
        transcript = times or Transcript()
        step = self.decoder_over(pcm, transcript)
        code = self.known(language)
        if code is None and self.rules.auto:
            code, _ = detect(step, self.rules)
            step.fed, step.clock = 0, transcript.prompt_s
        return greedy(step, self.rules.told(code, None, False), self.guards)

    def decoder_over(self, pcm: Pcm, times: Transcript) -> Decoder:
        """Return the decoder over one window, which is encoded here."""
        return self.engine.decoder_over(pad(pcm, self.windows), times)

    def known(self, language: str | None) -> str | None:
        """Return the model's code for a language, None where it cannot be told of it."""
        found = plain(language or "")
        return found if found in self.rules.languages else None

    def logits(self, pcm: Pcm, tokens: Sequence[int]) -> Logits:
        """Return the raw logits before each of the tokens and after the last, (tokens+1, vocab).

        The tokens are fed as given, whatever the model itself would have said.
        """
        return self.parts(pcm, tokens)["logits"]

    def parts(
        self, pcm: Pcm, tokens: Sequence[int], language: str | None = None
    ) -> dict[str, np.ndarray]:
        """Return the same logits, and what the engine shows of the parts before them.

        The prompt is for `language` where the model knows it, otherwise the manifest's.
        """
        decoder = self.decoder_over(checked_samples(pcm), Transcript())
        prompt = self.rules.told(self.known(language), None, False).prompt
        fed = [prompt, *((token,) for token in tokens)]
        logits = np.stack([decoder(ids).copy() for ids in fed])
        return {"logits": logits, **decoder.parts()}

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return to_text(tokens, self.table)


def samples(audio: Pcm | str | Path) -> Pcm:
    """Return the samples of a WAV file, or those that are given, see audio.checked_samples."""
    return (
        read_wav(audio, strict=False) if isinstance(audio, str | Path) else checked_samples(audio)
    )


def pad(pcm: Pcm, windows: Sequence[int]) -> Pcm:
    """Return the shortest of the windows that holds the samples, (1, n), with zeros behind them."""
    window_samples = shortest(windows, len(pcm))
    if len(pcm) > window_samples:
        raise RunnerProblem(
            f"a window holds {window_samples} samples, {len(pcm)} were given",
            "use transcribe(), which cuts longer audio in pauses",
        )
    window = np.zeros((1, window_samples), np.float32)
    window[0, : len(pcm)] = pcm
    return window
