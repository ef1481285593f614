"""The log-mel that sherpa-onnx feeds a Whisper, by the library that it has it from.

Usage: kaldi_mel.py OUT.npz WAV... (16 kHz mono, 16 bits): an array (1, n_mels, frames) for each
file, under its number. Frames are kaldi's, centred at 10 t + 5 ms, 5 ms later than Whisper's.
"""

import sys

import kaldi_native_fbank as knf
import numpy as np
from run_sherpa import read

N_MELS = 80


def log_mel(pcm):
    options = knf.WhisperFeatureOptions()
    options.frame_opts.samp_freq = 16000
    options.dim = N_MELS
    bank = knf.OnlineWhisperFbank(options)
    bank.accept_waveform(16000, pcm.tolist())
    bank.input_finished()
    power = np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])
    mel = np.log10(np.maximum(power, 1e-10))
    return ((np.maximum(mel, mel.max() - 8) + 4) / 4).T[None].astype(np.float32)


if __name__ == "__main__":
    out, *paths = sys.argv[1:]
    np.savez(out, **{str(number): log_mel(read(path)) for number, path in enumerate(paths)})
