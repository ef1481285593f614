"""Drives the page of `edgewhisper serve` in Chromium."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import chromium
import numpy as np

from devices.runner.audio import SAMPLING_RATE

STATE = "document.getElementById('state')"
READY = f"{STATE}?.textContent === 'Ready'"
DONE = f"{STATE}.textContent.startsWith('Done')"
BAD = f"{STATE}.classList.contains('bad') && {STATE}.textContent"


def write_wav(path: Path, pcm: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))
        file.writeframes((pcm * 32767).astype("<i2").tobytes())
    return path


def transcribed(tab: chromium.Tab, path: Path) -> str:
    """Give the page a file; return the text of its .txt download."""
    tab.js(f"{STATE}.textContent = ''")  # it may show that an earlier file is done
    tab.choose_file("#file", path)
    tab.wait(DONE, 600)
    return str(downloaded(tab, "txt"))


def downloaded(tab: chromium.Tab, button: str) -> Any:
    """Return what a button offers as a download."""
    return tab.js(
        f"""new Promise((resolve) => {{
          const create = URL.createObjectURL;
          URL.createObjectURL = (blob) => {{
            URL.createObjectURL = create;
            blob.text().then(resolve);
            return create.call(URL, blob);
          }};
          document.getElementById("{button}").click();
        }})"""
    )
