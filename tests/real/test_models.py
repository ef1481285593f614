"""OpenAI's weights in every form give the same text on the 80 test clips."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest_real import SPEECH

sys.path.insert(0, str(Path(__file__).parent.parent))
from other_forms import ctranslate2_arrays, model_bin, write_pt

from benchmarks.speech import read_manifest
from edgewhisper import decoding
from edgewhisper.whisper import load, load_processor

pytestmark = pytest.mark.real
