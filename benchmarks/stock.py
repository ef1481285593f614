"""Finished files of the layouts for other runtimes, in plain onnxruntime, fed as those feed them.

Each class is what the gate asks of an artifact: `window_samples`, `window(pcm)` gives the greedy
tokens, `text(tokens)` their text, and `logits(pcm, tokens)` where logits leave the files unchanged.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from devices.runner.decode import Logits, Rules, greedy
from devices.runner.recognizer import Recognizer, open_session, session_options
from devices.runner.text import read_tokens, to_text
from export.artifact import needed_files, read_manifest


class Hearing(Protocol):
    """What the gate asks of an artifact."""

    window_samples: int

    def window(self, pcm: np.ndarray) -> list[int]: ...

    def text(self, tokens: list[int]) -> str: ...


def open_artifact(folder: Path, threads: int | None = None) -> Hearing:
    """The artifact in a loop of ours, whatever its layout."""
    manifest = read_manifest(folder)
    layout = manifest.get("layout", "native")
    if layout == "native":
        return Recognizer(folder, threads, guards=False)
    return LAYOUTS[layout](folder, manifest, threads)


class _Files:
    """Sessions over an artifact's graphs, and the rules of its manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.rules = Rules.from_manifest(manifest["decoding"])
        self.window_samples: int = manifest["audio"]["window_samples"]
        needed = needed_files(manifest["layout"], manifest["precision"])
        graphs = [name for name in needed if name.endswith(".onnx")]
        self.sessions = [
            open_session(self.folder / name, session_options(threads)) for name in graphs
        ]


class Transformers(_Files):
    """`window` uses the merged decoder, `logits` the two others: the gate sees all files at work.

    The past of the first step is the one that optimum makes up from config.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        from transformers import WhisperConfig, WhisperProcessor

        super().__init__(folder, manifest, threads)
        self.encoder, self.merged, self.first, self.later = self.sessions
        self.processor = WhisperProcessor.from_pretrained(folder)
        config = WhisperConfig.from_pretrained(folder)
        heads = config.num_attention_heads
        self.no_past = np.zeros((1, heads, 0, config.d_model // heads), np.float32)

    def window(self, pcm: np.ndarray) -> list[int]:
        return greedy(self._steps(pcm, merged=True), self.rules, stop_loops=False)

    def logits(self, pcm: np.ndarray, tokens: Sequence[int]) -> Logits:
        step = self._steps(pcm, merged=False)
        fed = [self.rules.prompt, *((token,) for token in tokens)]
        return np.stack([step(ids) for ids in fed])

    def text(self, tokens: list[int]) -> str:
        text: str = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _steps(self, pcm: np.ndarray, merged: bool) -> Callable[[Sequence[int]], Logits]:
        heard = self.encoder.run(
            None, {"input_features": log_mel(self.processor.feature_extractor, pcm)}
        )[0]
        cache: dict[str, np.ndarray] = {}

        def step(ids: Sequence[int]) -> Logits:
            session = self.merged if merged else self.later if cache else self.first
            known = {
                "input_ids": np.array([ids], np.int64),
                "encoder_hidden_states": heard,
                "use_cache_branch": np.array([bool(cache)]),
            }
            names = [spec.name for spec in session.get_inputs()]
            feed = {n: known[n] if n in known else cache.get(n, self.no_past) for n in names}
            outputs = [spec.name for spec in session.get_outputs()]
            found = dict(zip(outputs, session.run(None, feed), strict=True))
            for name, array in found.items():
                past = name.replace("present", "past_key_values")
                if name != "logits" and not (past in cache and ".encoder." in past):
                    cache[past] = array
            return found["logits"][0, -1]

        return step


class Sherpa(_Files):
    """As sherpa-onnx does it: frames as far as the sound goes, zeros behind, all layers' caches in
    one piece, the likeliest token at every step. The rules are in the graph, so its logits are not
    the model's and are not offered."""

    TAIL = 1000
    """Frames of zeros that it puts behind every clip."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        from transformers import WhisperFeatureExtractor

        super().__init__(folder, manifest, threads)
        self.encoder, self.decoder = self.sessions
        told = self.encoder.get_modelmeta().custom_metadata_map
        layers, room, width = (int(told[f"n_text_{size}"]) for size in ("layer", "ctx", "state"))
        self.no_past = np.zeros((layers, 1, room, width), np.float32)
        self.prompt = [int(i) for i in told["sot_sequence"].split(",")]
        self.prompt.append(int(told["no_timestamps"]))
        seconds = self.window_samples // manifest["audio"]["sampling_rate"]
        mels = int(told["n_mels"])
        self.extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)
        lines = (self.folder / "whisper-tokens.txt").read_text(encoding="ascii").splitlines()
        rows = (line.split() for line in lines)
        self.table = {int(number): base64.b64decode(token) for token, number in rows}

    def window(self, pcm: np.ndarray) -> list[int]:
        step = self._steps(pcm)
        rules = replace(self.rules, prompt=tuple(self.prompt))
        rules = replace(rules, suppress_tokens=(), begin_suppress_tokens=(), timestamp_begin=None)
        return greedy(step, rules, stop_loops=False)

    def text(self, tokens: list[int]) -> str:
        joined = b"".join(self.table.get(token, b"") for token in tokens)
        return joined.decode("utf-8", errors="replace").strip()

    def mel(self, pcm: np.ndarray) -> np.ndarray:
        """Frames that hear any of the clip, and zeros behind them."""
        whole = log_mel(self.extractor, pcm)
        heard = min(-(-(len(pcm) + self.extractor.n_fft // 2) // self.extractor.hop_length), 3000)
        tail = np.zeros((1, whole.shape[1], self.TAIL), np.float32)
        return np.concatenate([whole[..., :heard], tail], axis=2)

    def _steps(self, pcm: np.ndarray) -> Callable[[Sequence[int]], Logits]:
        cross = self.encoder.run(None, {"mel": self.mel(pcm)})
        own, fed = [self.no_past, self.no_past], 0
        names = [spec.name for spec in self.decoder.get_inputs()]

        def step(ids: Sequence[int]) -> Logits:
            nonlocal own, fed
            values = [np.array([ids], np.int64), *own, *cross, np.array([fed], np.int64)]
            logits, *own = self.decoder.run(None, dict(zip(names, values, strict=True)))
            fed += len(ids)
            return logits[0, -1]

        return step


class Single(_Files):
    """One call a window."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        super().__init__(folder, manifest, threads)
        (self.session,) = self.sessions
        self.table = read_tokens(self.folder / "tokens.json")

    def window(self, pcm: np.ndarray) -> list[int]:
        feed = {
            "pcm": pcm[None].astype(np.float32),
            "prompt": np.array([self.rules.prompt], np.int64),
            "max_new_tokens": np.array(self.rules.max_new_tokens, np.int64),
        }
        found: list[int] = self.session.run(None, feed)[0].tolist()
        return found

    def text(self, tokens: list[int]) -> str:
        return to_text(tokens, self.table)


def log_mel(extractor: Any, pcm: np.ndarray) -> np.ndarray:
    """(1, n_mels, frames) of a whole window."""
    found = extractor(pcm, sampling_rate=extractor.sampling_rate, return_tensors="np")
    return found.input_features.astype(np.float32)


LAYOUTS: dict[str, Callable[..., Hearing]] = {
    "transformers": Transformers,
    "sherpa": Sherpa,
    "single": Single,
}
