"""Run a checkpoint in whisper.cpp, with the library of pywhispercpp.

    python -m benchmarks.rivals.whisper_cpp MODEL CLIPS.json --threads 2 --tokens 64

MODEL is a folder written by ggml.py. pywhispercpp's binding of whisper_decode() takes one token and
returns one logit, so the C functions are called through ctypes:

    whisper_pcm_to_mel   mel_s; always 30 s, followed by silence
    whisper_encode       encoder_s; includes the decoder's cross keys and values
    whisper_decode       prompt_s for the prompt, per_token_s for each further token

All other options have their defaults. Flash attention, on by default, pads the keys to a multiple
of 256 positions and attends to the padding as well (whisper.cpp's pull request 3941). The full
window has 36 such positions, which is too few to matter; with the embedded model's 300 positions,
words are repeated. Models with another window than Whisper's therefore run without it.

The other work of whisper_full() (sampling, fallback, timestamps) is left out, which favours the
engine. Our runner's loop chooses the tokens by whisper_full()'s rules for no_timestamps: the prompt
has language and task for a multilingual model only; tokens after the end of text are suppressed,
and at the beginning also the end of text and blank; non-speech tokens are allowed (suppress_nst is
off by default); at most half of the text positions, less four, are decoded.

`make rivals-env` installs pywhispercpp's wheel and, if there is a C++ compiler, builds its source
package for this processor into the folder `source` of the environment. That build is used if it
exists, unless EDGEWHISPER_WHISPER_CPP is "wheel". `build` in the answer has the choice and the
library's system information.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.protocol import (
    RULES,
    Engine,
    forced,
    main,
    noted,
    only_window,
    prompt_language,
)
from devices.runner.decode.greedy import greedy
from devices.runner.decode.rules import Rules
from devices.runner.problem import RunnerProblem

MODEL = "ggml-model.bin"
"""The model's file in the folder written by ggml.py."""
SOURCE = Path(sys.prefix) / "source"
"""The folder of the environment with the library built from source."""
CHOICE = "EDGEWHISPER_WHISPER_CPP"

Quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
FLOATS = ctypes.POINTER(ctypes.c_float)
FULL_WINDOW = 30 * 16_000


class Heads(ctypes.Structure):
    """whisper_aheads of whisper.cpp 1.8."""

    _fields_ = (("count", ctypes.c_size_t), ("heads", ctypes.c_void_p))


class Options(ctypes.Structure):
    """whisper_context_params of whisper.cpp 1.8."""

    _fields_ = (
        ("use_gpu", ctypes.c_bool),
        ("flash_attn", ctypes.c_bool),
        ("gpu_device", ctypes.c_int),
        ("dtw_token_timestamps", ctypes.c_bool),
        ("dtw_aheads_preset", ctypes.c_int),
        ("dtw_n_top", ctypes.c_int),
        ("dtw_aheads", Heads),
        ("dtw_mem_size", ctypes.c_size_t),
    )


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "whisper_log_set": (None, (Quiet, ctypes.c_void_p)),
    "whisper_context_default_params": (Options, ()),
    "whisper_init_from_file_with_params": (ctypes.c_void_p, (ctypes.c_char_p, Options)),
    "whisper_pcm_to_mel": (ctypes.c_int, (ctypes.c_void_p, FLOATS, ctypes.c_int, ctypes.c_int)),
    "whisper_encode": (ctypes.c_int, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
    "whisper_decode": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), *(ctypes.c_int,) * 3),
    ),
    "whisper_get_logits": (FLOATS, (ctypes.c_void_p,)),
    "whisper_n_vocab": (ctypes.c_int, (ctypes.c_void_p,)),
    "whisper_n_text_ctx": (ctypes.c_int, (ctypes.c_void_p,)),
    "whisper_token_to_str": (ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_int)),
    "whisper_print_system_info": (ctypes.c_char_p, ()),
}


class WhisperCpp(Engine):
    """whisper.cpp's C functions, called through ctypes."""

    imports = ("_pywhispercpp",)
    packages = ("pywhispercpp",)

    def __init__(self, model: Path, threads: int, tokens: int | None) -> None:
        super().__init__(model, threads, tokens)
        place = find_library()
        self.threads, self.library = threads, open_library(place)
        written = json.loads((model / RULES).read_text(encoding="utf-8"))
        self.window_samples: int = written["window_samples"]
        options = self.library.whisper_context_default_params()
        options.flash_attn &= self.window_samples == FULL_WINDOW
        load = self.library.whisper_init_from_file_with_params
        self.context = load(bytes(model / MODEL), options)
        if not self.context:
            raise RunnerProblem(f"{model / MODEL}: whisper.cpp cannot load it")
        self.vocabulary: int = self.library.whisper_n_vocab(self.context)
        self.rules = forced(self.full_rules(Rules.from_manifest(written)), tokens)
        origin = "built from source" if SOURCE in place.parents else "wheel"
        self.build = f"{origin}: {self.library.whisper_print_system_info().decode().strip()}"
        self.fed = 0

    def full_rules(self, rules: Rules) -> Rules:
        """Return the rules of whisper_full() with no_timestamps; see the module's docstring."""
        word = self.library.whisper_token_to_str
        blank = (i for i in range(rules.eos) if word(self.context, i) == b" ")
        return replace(
            rules,
            suppress_tokens=tuple(range(rules.eos + 1, self.vocabulary)),
            begin_suppress_tokens=(rules.eos, *list(blank)[:1]),
            max_new_tokens=self.library.whisper_n_text_ctx(self.context) // 2 - 4,
        )

    def transcribe(self, path: Path, language: str | None = None) -> tuple[list[int], str]:
        pcm = only_window(path, self.window_samples)
        with noted(self.watch.mel_s):
            self.call("whisper_pcm_to_mel", pcm.ctypes.data_as(FLOATS), len(pcm))
        with noted(self.watch.encoder_s):
            self.call("whisper_encode", 0)
        self.fed = 0
        code = prompt_language(self.rules, language)
        tokens = greedy(self.step, self.prompted(code), stop_loops=False)
        return tokens, self.text(tokens)

    def prompted(self, code: str | None) -> Rules:
        """Return the rules with another language in the prompt; None keeps the prompt."""
        rules = self.rules.with_options(code, None, timestamps=False)
        return replace(rules, max_new_tokens=self.rules.max_new_tokens)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library with the number of threads as last argument."""
        code = getattr(self.library, name)(self.context, *arguments, self.threads)
        if code:
            raise RunnerProblem(f"{name} of whisper.cpp ended with code {code}")

    def step(self, ids: Sequence[int]) -> Any:
        """Decode more tokens; return the logits (vocab,) after the last."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        with noted(self.watch.per_token_s if self.fed else self.watch.prompt_s):
            self.call("whisper_decode", tokens, len(ids), self.fed)
            rows = self.library.whisper_get_logits(self.context)
        self.fed += len(ids)
        return np.ctypeslib.as_array(rows, (len(ids), self.vocabulary))[-1]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ordinary tokens; the library returns their bytes up to a zero."""
        spell = self.library.whisper_token_to_str
        content = b"".join(spell(self.context, t) for t in tokens if t < self.rules.eos)
        return content.decode(errors="replace").strip()


def uses_source() -> bool:
    """Return whether to use the library built from source."""
    return SOURCE.is_dir() and os.environ.get(CHOICE) != "wheel"


def find_library() -> Path:
    """Return the library that pywhispercpp's module is linked with."""
    module = importlib.util.find_spec("_pywhispercpp")
    assert module is not None and module.origin is not None  # it has been imported
    libraries = sorted(Path(module.origin).parent.glob("libwhisper.*"))
    if not libraries:
        raise RunnerProblem(
            f"{module.origin}: there is no libwhisper in its folder",
            "install the version of pywhispercpp that requirements.txt names",
        )
    return libraries[0]


def open_library(place: Path) -> Any:
    """Load the library, set the types of its functions and turn off its log."""
    library = ctypes.CDLL(str(place))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.whisper_log_set(MUTE, None)
    return library


MUTE = Quiet(lambda level, text, data: None)
"""The log callback; referenced here because the library calls it until the process ends."""


if __name__ == "__main__":
    if uses_source():
        sys.path.insert(0, str(SOURCE))
    sys.exit(main(WhisperCpp))
