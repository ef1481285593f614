"""An artifact directory and its two sessions: speech in, text and stage times out.

Memory: a graph's file is parsed and its weights are packed for their products; large weights stand
in a file of their own, which is mapped. What was needed for loading only is given back after each
of the two. The decoder is loaded first, for that takes most, and works without an arena, which
would keep what packing took. Memory patterns are off: onnxruntime would plan one block for every
length that the past ever had.
"""

import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from .audio import Pcm, is_silent, read_wav, shortest
from .contract import check_files, check_session, read_manifest, running
from .decode import Logits, Rules, greedy
from .listen import Listener, Options, Segment, plain
from .machine import give_back_memory, return_large_blocks, usable_cores
from .problem import RunnerProblem
from .text import read_tokens, to_text

MOST_IDS = 32
"""Tokens that the decoder takes in one step."""

State = dict[str, Any]
"""Names of decoder inputs -> their OrtValue."""

Past = dict[str, np.ndarray]
"""Names of the decoder's own caches -> their memory."""


@dataclass
class Transcript:
    """What is said in one recording, and how long each stage took, in seconds.

    `language` is the code that prompted the model, where it is told one. `graph_s` is the encoder
    graph: log-mel, encoder, cross keys and values. Lists of seconds have one entry a window,
    `per_token_s` one a decoder step after the prompt's.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    language: str | None = None
    graph_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what is printed of it."""
        segments = [segment.as_dict() for segment in self.segments]
        return {"text": self.text, "language": self.language, "segments": segments}


class Recognizer:
    """The sessions over one artifact.

    `guards` are two rules that transformers' generate() does not have: a silent window is not
    decoded at all, and a text that has fallen into a loop is cut. The gate turns them off to
    compare token for token.

    What the folder holds is checked first (contract.py). With `hashed` false, sizes of files are
    compared with the manifest's and contents are not: for who has done that already.
    """

    def __init__(
        self,
        artifact: str | Path,
        threads: int | None = None,
        guards: bool = True,
        hashed: bool = True,
    ) -> None:
        folder = self.folder = Path(artifact)
        self.manifest, self.guards = read_manifest(folder), guards
        check_files(folder, self.manifest, hashed)
        self.rules = Rules.from_manifest(self.manifest["decoding"])
        audio = self.manifest["audio"]
        self.window_samples: int = audio["window_samples"]
        self.windows: list[int] = audio.get("windows_samples", [self.window_samples])
        self.table = read_tokens(folder / "tokens.json")
        return_large_blocks()
        self.decoder = open_session(folder / "decoder.onnx", session_options(threads, arena=False))
        give_back_memory(folder)
        self.encoder = open_session(folder / "encoder.onnx", session_options(threads))
        give_back_memory(folder)
        for name, session in (("encoder", self.encoder), ("decoder", self.decoder)):
            check_session(folder / f"{name}.onnx", session, self.manifest["contract"][name])
        self.cache = empty_cache(self.decoder)
        self.more_pasts: list[Past] = []

    def transcribe(self, audio: Pcm | str | Path, **options: Any) -> Transcript:
        """Return the transcript of a WAV file or of 16 kHz samples of any length.

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

    def window(self, pcm: Pcm, times: Transcript | None = None) -> list[int]:
        """Return the greedy tokens of one window, without prompt and end token."""
        if self.guards and is_silent(pcm):
            return []
        step = self.decoder_over(pcm, times or Transcript())
        return greedy(step, self.rules, self.guards)

    def decoder_over(self, pcm: Pcm, times: Transcript) -> "Decoder":
        """Return the decoder over one window, which is encoded here."""
        return Decoder(self, pcm, times)

    def pasts(self, count: int) -> list[Past]:
        """Return memory for so many decoders' own caches; it is taken once and kept."""
        while len(self.more_pasts) < count:
            self.more_pasts.append({n: np.zeros_like(v.numpy()) for n, v in self.cache.items()})
        return self.more_pasts[:count]

    def known(self, language: str | None) -> str | None:
        """Return the model's code for a language, None where it cannot be told of it."""
        found = plain(language or "")
        return found if found in self.rules.languages else None

    def logits(self, pcm: Pcm, tokens: Sequence[int]) -> Logits:
        """Return the raw logits before each of the tokens and after the last, (tokens+1, vocab).

        The tokens are fed as given, whatever the model itself would have said.
        """
        step = self.decoder_over(pcm, Transcript())
        fed = [self.rules.prompt, *((token,) for token in tokens)]
        return np.stack([step(ids).copy() for ids in fed])

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return to_text(tokens, self.table)


class Decoder:
    """The decoder over one encoded window: feeds tokens, keeps their keys and values.

    Keys and values stand in buffers that the graph fills in place, step by step; only ids and
    logits cross over.
    """

    def __init__(self, recognizer: Recognizer, pcm: Pcm, times: Transcript) -> None:
        self.session, self.fed = recognizer.decoder, 0
        self.path = recognizer.folder / "decoder.onnx"
        self.clock, self.next_clock = times.prompt_s, times.per_token_s
        started = time.perf_counter()
        with running(recognizer.folder / "encoder.onnx"):
            cross = encode(recognizer.encoder, pad(pcm, recognizer.windows))
        times.graph_s.append(time.perf_counter() - started)
        self.binding = bind(self.session, cross | recognizer.cache)
        self.cross, self.past = cross, views(recognizer.cache)

    def __call__(self, ids: Sequence[int]) -> Logits:
        """Feed tokens behind those already fed; return the logits (vocab,) after the last.

        The array is onnxruntime's own: the next call writes over it.
        """
        for start in range(0, len(ids), MOST_IDS):
            found = self.step(ids[start : start + MOST_IDS])
        self.clock = self.next_clock
        return found

    def step(self, ids: Sequence[int]) -> Logits:
        """Feed at most MOST_IDS tokens."""
        started = time.perf_counter()
        self.binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        self.binding.bind_cpu_input("past_length", np.array([self.fed], np.int32))
        with running(self.path):
            self.session.run_with_iobinding(self.binding)
        self.fed += len(ids)
        found: Logits = self.binding.get_outputs()[0].numpy()[0, 0]
        self.clock.append(time.perf_counter() - started)
        return found

    def branch(self, past: Past) -> "Decoder":
        """Return a decoder over the same window that has been fed as many tokens as this one, with
        keys and values in other memory."""
        other = copy(self)
        other.past = past
        other.binding = bind(self.session, self.cross | {n: value(a) for n, a in past.items()})
        return other


def samples(audio: Pcm | str | Path) -> Pcm:
    """Return the samples of a WAV file, or the samples that are given."""
    return read_wav(audio) if isinstance(audio, str | Path) else audio


def views(state: State) -> Past:
    """Return the memory of caches: onnxruntime lends it out."""
    return {name: held.numpy() for name, held in state.items()}


def bind(decoder: ort.InferenceSession, state: State) -> Any:
    """Return a binding in which every cache is read and written where it is."""
    binding = decoder.io_binding()
    for name, array in state.items():
        binding.bind_ortvalue_input(name, array)
    for output in decoder.get_outputs():
        name = output.name.replace("present.", "past.").replace("heard.", "cross.")
        if name in state:
            binding.bind_ortvalue_output(output.name, state[name])
        else:
            binding.bind_output(output.name)
    return binding


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


def encode(session: ort.InferenceSession, window: Pcm) -> State:
    """Run the encoder graph; its outputs bear the names of the decoder's inputs."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, {"pcm": value(window)}), strict=True))


def empty_cache(decoder: ort.InferenceSession) -> State:
    """Return room for the keys and values of all tokens that the decoder can be fed."""
    shapes = {output.name: output.shape for output in decoder.get_outputs()}
    return {
        name.replace("present.", "past."): value(np.zeros(shape, np.float32))
        for name, shape in shapes.items()
        if name.startswith("present.")
    }


def value(array: np.ndarray) -> Any:
    """Return the array as onnxruntime holds it."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def session_options(threads: int | None, arena: bool = True) -> ort.SessionOptions:
    """Return the options of a session: small memory, and no core busy with waiting.

    A thread that waits for the next operator looks out for it for 0.1 ms, then sleeps. Measured on
    whisper-tiny on two threads, that makes a token a fifth faster than sleeping at once, for 6 %
    more CPU time; onnxruntime's default, a thousand times as long, took 2.8 times the CPU time on
    two busy cores, and heats a small board for nothing.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = arena
    options.enable_mem_reuse = not arena
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.log_severity_level = 4  # errors become letters
    return options


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Return a session on the CPU, or the letter that says why the graph does not load."""
    if not path.is_file():
        raise RunnerProblem(f"{path}: there is no such file", "copy the artifact again")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each status code
        reason = str(error).strip().splitlines()[0]
        raise RunnerProblem(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({reason})",
            "copy the artifact again, or update onnxruntime",
        ) from None
