// Detects noise that stays the same, by the rule of devices/runner/audio/steady.py.

import { SAMPLING_RATE } from "./pauses.js";

const FRAME = 320;
const BANDS_HZ = [80, 300, 600, 1200, 2400, 4800, 8000];
const SMOOTH_FRAMES = 5;
const STEADY_RISE = 3;
const LEAST_S = 1;

// Returns whether no 0.1 s is 4.8 dB louder than the median in any of six bands of frequencies.
export function isSteady(pcm) {
  const count = Math.floor(pcm.length / FRAME);
  if (count * FRAME < LEAST_S * SAMPLING_RATE) return false;
  const edges = BANDS_HZ.map((hz) => Math.round((hz * FRAME) / SAMPLING_RATE));
  edges[edges.length - 1] += 1;
  const angle = (2 * Math.PI) / FRAME;
  const cos = Float64Array.from({ length: FRAME }, (_, i) => Math.cos(angle * i));
  const hanning = Float64Array.from({ length: FRAME }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / (FRAME - 1)));
  const powers = (frame) => {
    const samples = pcm.subarray(frame * FRAME, (frame + 1) * FRAME).map((x, i) => x * hanning[i]);
    const power = (bin) => {
      let [re, im] = [0, 0];
      for (let i = 0; i < FRAME; ++i) {
        re += samples[i] * cos[(bin * i) % FRAME];
        im += samples[i] * cos[(bin * i + (3 * FRAME) / 4) % FRAME];
      }
      return re * re + im * im;
    };
    return edges.slice(1).map((end, band) => {
      let sum = 0;
      for (let bin = edges[band]; bin < end; ++bin) sum += power(bin);
      return sum;
    });
  };
  const frames = Array.from({ length: count }, (_, frame) => powers(frame));
  return edges.slice(1).every((_, band) => {
    const levels = frames.map((bands) => bands[band]);
    const smooth = levels.slice(SMOOTH_FRAMES).map((_, i) => levels.slice(i + 1, i + 1 + SMOOTH_FRAMES).reduce((a, b) => a + b));
    const sorted = smooth.toSorted((a, b) => a - b);
    const median = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
    return sorted.at(-1) <= STEADY_RISE * median;
  });
}
