// Splits long audio into windows in pauses, by the rule of devices/runner/audio/pauses.py.

export const SAMPLING_RATE = 16000;
export const SILENT_PEAK = 1e-4;
const LOWEST_HZ = 80;
const FRAME = 160;
const PAUSE_FRAMES = 20;
const SMOOTH_FRAMES = 5;
const FLOOR_PERCENT = 3;
const PAUSE_RISE = 4;
const SOUND_RISE = 10;
const SAME_RISE = 1.5;

const least = (values) => values.reduce((a, b) => Math.min(a, b));

export const isSilent = (pcm) => pcm.every((sample) => Math.abs(sample) < SILENT_PEAK);

// Returns whether a window holds only silence, an offset or mains hum.
export const isHum = (pcm) => pcm.every((x, i) => !i || Math.abs(x - pcm[i - 1]) < SILENT_PEAK);

// Returns start and end of the pieces of at most `most` samples, which end in pauses.
export function split(pcm, most) {
  const pieces = [];
  let start = 0;
  while (pcm.length - start > most) {
    const stop = start + findCut(pcm.subarray(start, start + most));
    pieces.push([start, stop]);
    start = stop;
  }
  return [...pieces, [start, pcm.length]];
}

// Returns the sample of a full window at which to end the piece.
export function findCut(window) {
  const count = Math.floor(window.length / FRAME);
  if (count < 8) return window.length;
  const levels = frameLevels(window.subarray(0, count * FRAME));
  const late = Math.floor((2 * count) / 3);
  let begin, width, means;
  for (begin of [late, Math.floor(count / 2), Math.floor(count / 8), late]) {
    width = Math.min(PAUSE_FRAMES, count - begin);
    means = movingAverage(levels.subarray(begin), width);
    if (least(means) <= Math.log(PAUSE_RISE)) break;
  }
  const limit = least(means) + Math.log(SAME_RISE);
  const middle = middleOfLongest(Array.from(means, (level) => level <= limit));
  return Math.round((begin + middle + (width - 1) / 2) * FRAME);
}

// Returns the logarithm of each frame's power over the noise floor; 0 for silent frames.
function frameLevels(pcm) {
  const audible = withoutHum(pcm);
  const power = Float64Array.from({ length: pcm.length / FRAME }, (_, frame) => {
    const samples = audible.subarray(frame * FRAME, (frame + 1) * FRAME);
    return samples.reduce((sum, x) => sum + x * x, 0) / FRAME;
  });
  const sorted = movingAverage(power, SMOOTH_FRAMES).sort();
  const rank = ((sorted.length - 1) * FLOOR_PERCENT) / 100;
  const below = sorted[Math.floor(rank)];
  const percentile = below + (sorted[Math.ceil(rank)] - below) * (rank % 1);
  const floor = Math.max(percentile, SILENT_PEAK ** 2);
  return power.map((level, frame) => {
    const silent = isSilent(pcm.subarray(frame * FRAME, (frame + 1) * FRAME));
    return silent ? 0 : Math.log(Math.max(level, floor) / floor);
  });
}

// Returns how long the sound is at least 10 dB above the noise floor, in seconds.
export function soundSeconds(pcm) {
  const count = Math.floor(pcm.length / FRAME);
  if (count < SMOOTH_FRAMES) return 0;
  const levels = frameLevels(pcm.subarray(0, count * FRAME));
  return (levels.filter((level) => level > Math.log(SOUND_RISE)).length * FRAME) / SAMPLING_RATE;
}

// Returns the mean of every `width` neighbours.
function movingAverage(values, width) {
  return Float64Array.from({ length: values.length - width + 1 }, (_, i) =>
    values.subarray(i, i + width).reduce((sum, x) => sum + x / width, 0),
  );
}

// Returns the middle of the longest run of true flags, the last one if equal.
function middleOfLongest(flags) {
  let [longest, middle] = [0, 0];
  for (let begin = 0, at = 0; at < flags.length; ++at) {
    if (!flags[at]) begin = at + 1;
    else if (at + 1 - begin >= longest) {
      longest = at + 1 - begin;
      middle = (begin + at + 1) / 2;
    }
  }
  return middle;
}

// Returns the samples without frequencies below LOWEST_HZ. They are removed as if the samples were
// one period: by a circular convolution with the sum of these frequencies, in a longer FFT.
function withoutHum(pcm) {
  const n = pcm.length;
  const highest = Math.ceil((LOWEST_HZ * n) / SAMPLING_RATE) - 1;
  const size = 2 ** Math.ceil(Math.log2(2 * n));
  const re = new Float64Array(size);
  const im = new Float64Array(size);
  re.set(pcm);
  for (let i = 0; i < n; ++i) {
    const half = (Math.PI * i) / n;
    im[i] = i ? Math.sin((2 * highest + 1) * half) / (n * Math.sin(half)) : (2 * highest + 1) / n;
  }
  fft(re, im);
  // both inputs are real, so their spectra A and B are in the even and odd parts of A + iB
  const [productRe, productIm] = [new Float64Array(size), new Float64Array(size)];
  for (let k = 0; k < size; ++k) {
    const j = (size - k) % size;
    const [a, b] = [(re[k] + re[j]) / 2, (im[k] - im[j]) / 2];
    const [c, d] = [(im[k] + im[j]) / 2, (re[j] - re[k]) / 2];
    productRe[k] = a * c - b * d;
    productIm[k] = -(a * d + b * c); // conjugated, so that another FFT is the inverse
  }
  fft(productRe, productIm);
  return pcm.map((x, i) => x - (productRe[i] + productRe[i + n]) / size);
}

// Replaces complex values by their discrete Fourier transform; their number is a power of two.
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; ++i) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  const cos = Float64Array.from({ length: n / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / n));
  const sin = Float64Array.from({ length: n / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / n));
  for (let half = 1; half < n; half *= 2) {
    const stride = n / (2 * half);
    for (let start = 0; start < n; start += 2 * half) {
      for (let k = 0; k < half; ++k) {
        const [a, b] = [start + k, start + k + half];
        const [c, s] = [cos[k * stride], sin[k * stride]];
        const x = re[b] * c - im[b] * s;
        const y = re[b] * s + im[b] * c;
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
}
