"""Audio in: reading WAV files, checking samples, splitting long recordings in pauses."""

from ..interfaces import Pcm
from .pauses import FRAME, find_cut, quiet_power, runs, sound_seconds, split
from .samples import SAMPLING_RATE, checked_samples, is_hum, is_silent, shortest
from .steady import is_steady
from .wav import STDIN, check_whole, parse_riff, read_wav

__all__ = [
    "FRAME",
    "SAMPLING_RATE",
    "STDIN",
    "Pcm",
    "check_whole",
    "checked_samples",
    "find_cut",
    "is_hum",
    "is_silent",
    "is_steady",
    "parse_riff",
    "quiet_power",
    "read_wav",
    "runs",
    "shortest",
    "sound_seconds",
    "split",
]
