"""Opens an artifact and transcribes audio with it; returns texts and stage times.

An Engine executes the graphs: onnxruntime for ONNX artifacts (engines/sessions.py), Core ML for
Core ML artifacts (engines/coreml.py). Prompts, decoding rules, windows, beam search and temperature
fallback are the same for both.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifact.manifest import check_files, checked_manifest, read_manifest
from .audio import checked_samples, is_silent, read_wav, shortest
from .decode.encode import encode
from .decode.greedy import detect, greedy
from .decode.listen import Listener
from .decode.options import Options, plain
from .decode.rules import Rules
from .decode.text import read_tokens, to_text
from .interfaces import Decoder, Engine, Logits, Pcm, Segment, Transcript
from .problem import RunnerProblem

if TYPE_CHECKING:
    from .engines.coreml import Opener
    from .engines.voice import Voice


class Recognizer:
    """An opened artifact. Several threads may use it at once: they share the graphs, and each has
    its own key and value caches (5.5 MB per thread for whisper-tiny).

    `guards` are rules that transformers' generate() does not have: silent windows and steady noise
    are not decoded, a text that repeats itself is cut, one that was probably invented is left out,
    and a window whose text is too short is decoded again. The gate turns them off to compare
    tokens.

    The folder is checked first (artifact/). With `hashed` false, file sizes are compared with the
    manifest but contents are not, for callers that have checked them already. A `manifest` is used
    instead of the folder's manifest.json, which an export writes last.

    A Core ML artifact runs in Core ML on `compute_units` (coreml.UNITS). If none are given,
    `open_package` may open its packages in another runtime.
    """

    def __init__(
        self,
        artifact: str | Path,
        threads: int | None = None,
        guards: bool = True,
        hashed: bool = True,
        compute_units: str | None = None,
        open_package: "Opener | None" = None,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        folder = self.folder = Path(artifact)
        manifest = read_manifest(folder) if manifest is None else checked_manifest(folder, manifest)
        self.manifest, self.guards = manifest, guards
        check_files(folder, manifest, hashed)
        self.rules = Rules.from_manifest(manifest["decoding"])
        audio = manifest["audio"]
        self.window_samples: int = audio["window_samples"]
        self.windows: list[int] = audio.get("windows_samples", [self.window_samples])
        self.table = read_tokens(folder / "tokens.json")
        self.engine = self.open_engine(threads, compute_units, open_package)

    def open_engine(
        self, threads: int | None, compute_units: str | None, open_package: "Opener | None"
    ) -> Engine:
        """Return the artifact's engine; its library is imported here."""
        if self.manifest["target"] == "coreml":
            from .engines.coreml import UNITS, Packages, installed

            if open_package is None or compute_units is not None:
                open_package = installed(compute_units or next(iter(UNITS)))
            return Packages(self.folder, self.manifest, open_package)
        if compute_units is not None:
            raise RunnerProblem(
                f"{self.folder}: compute units {compute_units!r} need a Core ML artifact, and this "
                "is not one",
                "leave them out, or export with `--target coreml`",
            )
        from .engines.sessions import Sessions

        return Sessions(self.folder, self.manifest, threads)

    def transcribe(self, audio: Pcm | str | Path, **options: Any) -> Transcript:
        """Return the transcript of a WAV file or of 16 kHz samples of any length.

        A truncated file is transcribed up to its end, with a warning. Samples are a NumPy array
        (samples,), floats in [-1, 1] or int16 (see audio.checked_samples). Keywords are the fields
        of Options: language, task, timestamps, beams, fallback, seed, previous, prompt, hotwords,
        confidence, word_timestamps, vad.
        """
        transcript = Transcript()
        for _ in self.stream(audio, transcript, **options):
            pass
        return transcript

    def row(
        self, pcm: Pcm, on_segment: Callable[[Segment], None], **options: Any
    ) -> dict[str, Any]:
        """Return a transcript as a dictionary; `on_segment` is called with each segment at once."""
        transcript = Transcript()
        for segment in self.stream(pcm, transcript, **options):
            on_segment(segment)
        return transcript.as_dict()

    def stream(
        self, audio: Pcm | str | Path, into: Transcript | None = None, **options: Any
    ) -> Iterator[Segment]:
        """Yield the segments of a recording, each as soon as its window is decoded. The transcript
        `into` is extended with them. Other keywords are those of transcribe()."""
        listener = Listener(self, Options(**options), Transcript() if into is None else into)
        return listener.segments(samples(audio))

    def window(
        self, pcm: Pcm, times: Transcript | None = None, language: str | None = None
    ) -> list[int]:
        """Return the greedy tokens of one window, without prompt and end token. A language that the
        model does not know counts as None (see Options)."""
        pcm = checked_samples(pcm)
        if self.guards and is_silent(pcm):
            return []
        transcript = times or Transcript()
        step = self.decoder_over(pcm, transcript)
        code = self.known(language)
        if code is None and self.rules.auto:
            code, _ = detect(step, self.rules)
            step.fed, step.clock = 0, transcript.prompt_s
        return greedy(step, self.rules.with_options(code, None, False), self.guards)

    def decoder_over(self, pcm: Pcm, times: Transcript) -> Decoder:
        """Encode one window (samples,) and return the decoder over it."""
        return self.engine.decoder_over(pad(pcm, self.windows), times)

    @cached_property
    def voice(self) -> "Voice":
        """The voice activity detector. Raises RunnerProblem if it is not installed."""
        try:
            from .engines.voice import Voice
        except ImportError:  # a Mac with Core ML only
            raise RunnerProblem(
                "vad: the detector runs in onnxruntime, which is not installed",
                "run `pip install onnxruntime`, or leave it out",
            ) from None
        return Voice()

    def known(self, language: str | None) -> str | None:
        """Return the model's code for a language, or None if it has none."""
        code = plain(language or "")
        return code if code in self.rules.languages else None

    def logits(self, pcm: Pcm, tokens: Sequence[int]) -> Logits:
        """Return the raw logits (tokens+1, vocab) before each of the tokens and after the last. The
        tokens are forced, whatever the model itself would choose."""
        return self.parts(pcm, tokens)["logits"]

    def parts(
        self, pcm: Pcm, tokens: Sequence[int], language: str | None = None
    ) -> dict[str, np.ndarray]:
        """Return the same logits, and the intermediate arrays that the engine exposes. The prompt
        is for `language` if the model knows it, otherwise the manifest's."""
        decoder = self.decoder_over(checked_samples(pcm), Transcript())
        prompt = self.rules.with_options(self.known(language), None, False).prompt
        fed = [prompt, *((token,) for token in tokens)]
        logits = np.stack([decoder(ids).copy() for ids in fed])
        return {"logits": logits, **decoder.parts()}

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return to_text(tokens, self.table)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; a prompt begins with a space, as words in a sentence do."""
        return encode(text, self.table)


def samples(audio: Pcm | str | Path) -> Pcm:
    """Return the samples of a WAV file, or the given samples after audio.checked_samples."""
    return (
        read_wav(audio, strict=False) if isinstance(audio, str | Path) else checked_samples(audio)
    )


def pad(pcm: Pcm, windows: Sequence[int]) -> Pcm:
    """Return the samples padded with zeros to the shortest window that holds them, (1, n)."""
    window_samples = shortest(windows, len(pcm))
    if len(pcm) > window_samples:
        raise RunnerProblem(
            f"a window holds {window_samples} samples, {len(pcm)} were given",
            "use transcribe(), which splits longer audio in pauses",
        )
    window = np.zeros((1, window_samples), np.float32)
    window[0, : len(pcm)] = pcm
    return window
