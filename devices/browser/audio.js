// Reads audio files into 16 kHz mono samples; full scale is 1.

const SAMPLING_RATE = 16000;

// Returns the samples of a file. The browser decodes and resamples, except for the WAV files that
// need neither: Chromium divides positive 16-bit samples by 32767, and the runner by 32768.
export async function readAudio(content) {
  const exact = readWav(new DataView(content));
  if (exact) return exact;
  const audio = await new OfflineAudioContext(1, 1, SAMPLING_RATE).decodeAudioData(content);
  const channels = Array.from({ length: audio.numberOfChannels }, (_, i) => audio.getChannelData(i));
  const pcm = channels[0].slice();
  for (const other of channels.slice(1)) other.forEach((sample, i) => (pcm[i] += sample));
  return pcm.map((sample) => sample / channels.length);
}

// Returns the samples of a WAV file with 16 kHz, 16 bits and one channel, or null for other files.
function readWav(view) {
  const text = (at) => String.fromCharCode(...[0, 1, 2, 3].map((i) => view.getUint8(at + i)));
  if (view.byteLength < 44 || text(0) !== "RIFF" || text(8) !== "WAVE") return null;
  for (let at = 12, known = false; at + 8 <= view.byteLength; ) {
    const size = Math.min(view.getUint32(at + 4, true), view.byteLength - at - 8);
    if (text(at) === "fmt " && size >= 16) {
      const [format, channels, bits] = [8, 10, 22].map((offset) => view.getUint16(at + offset, true));
      known = format === 1 && channels === 1 && bits === 16;
      known &&= view.getUint32(at + 12, true) === SAMPLING_RATE;
    }
    if (text(at) === "data") {
      if (!known || size < 2) return null;
      const sample = (_, i) => view.getInt16(at + 8 + 2 * i, true) / 32768;
      return Float32Array.from({ length: size >> 1 }, sample);
    }
    at += 8 + size + (size % 2);
  }
  return null;
}
