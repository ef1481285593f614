// The worker of transcribe.html: transcribes recordings of any length with the rules of
// devices/runner/decode/listen.py (greedy decoding). It receives {pcm, language, timestamps} and
// sends {segments, language, at_s} for each window, then {done}.

import { SAMPLING_RATE, findCut, isHum, isSilent, soundSeconds, split } from "./pauses.js";
import { Recognizer, bytes, chooser, fetchGraph, loopPeriod, startRuntime } from "./recognizer.js";
import { isSteady } from "./steady.js";
import { STEP_SAMPLES, forbid, isTimestamp, logSumExp, parts } from "./timestamps.js";

const MOST_NO_SPEECH = 0.6;
// The limits of devices/runner/decode/fallback.py: a text is invented above a probability of no speech
// and below a mean log-probability.
const LIMITS = [[MOST_NO_SPEECH, -1], [0.25, -1.5]];
const SHORT_LIMIT = [0.8, -0.5]; // for texts with few tokens for each second
const SHORT_PER_S = 1.5;
const LEAST_LOOP_SILENCE = 0.25; // for texts that end in a loop
const LEAST_LOOP_LOGPROB = -0.7;
const SPARSE_LIMITS = [[0.25, -0.8], [0, -1.1]]; // for texts with few tokens for a long window
const SPARSE_WINDOW_S = 8;
const SPARSE_PER_S = 0.5;
const SEGMENT_LIMIT = [0.25, -1]; // for the words of one segment of timestamps
const LEAST_SOUND_S = 5;
const LEAST_TOKENS_PER_S = 1.5;
const LEAST_STEPS = 50;

const text = new TextDecoder("utf-8", { ignoreBOM: true });

// Returns the text up to the first loop, with its phrase once.
function withoutLoop(tokens) {
  for (let length = 1; length <= tokens.length; ++length) {
    const period = loopPeriod(tokens.slice(0, length));
    if (!period) continue;
    let start = length - period;
    while (start > 0 && tokens[start - 1] === tokens[start - 1 + period]) --start;
    return tokens.slice(0, start + period);
  }
  return tokens;
}

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / Math.max(1, values.length);

const isUnlikely = (logprob, silence, limits) =>
  limits.some(([silent, likely]) => silence > silent && logprob < likely);

const isSparse = (words, window_s) => window_s > SPARSE_WINDOW_S && words < SPARSE_PER_S * window_s;

const isDots = (text) => text !== "" && !/[^ .…]/.test(text);

// Returns whether a text was probably invented for a window without speech.
function isInvented({ looped, logprob }, words, silence, window_s) {
  const sparse = isSparse(words, window_s);
  if (looped) return sparse || logprob < LEAST_LOOP_LOGPROB || silence > LEAST_LOOP_SILENCE;
  const short = words < SHORT_PER_S * window_s ? [SHORT_LIMIT] : [];
  return isUnlikely(logprob, silence, [...LIMITS, ...short, ...(sparse ? SPARSE_LIMITS : [])]);
}

// Transcribes one recording.
class Listener {
  constructor(recognizer, table, { language, timestamps }) {
    const { rules, vocabulary } = recognizer.job;
    Object.assign(this, { recognizer, table, rules, timestamps });
    this.detects = language === "auto";
    this.language = this.detects ? null : language;
    const { suppress_tokens, begin_suppress_tokens, timestamp_begin, timestamp_end } = rules;
    const ids = [...Array(vocabulary).keys()];
    const times = timestamp_begin === null ? [] : ids.slice(timestamp_begin, timestamp_end ?? vocabulary);
    const never = [...suppress_tokens, ...(timestamps ? [timestamp_begin - 1] : times)];
    const refine = timestamps ? (scores, tokens) => forbid(scores, tokens, rules) : null;
    this.choose = chooser(vocabulary, never, begin_suppress_tokens, refine);
  }

  // The prompt with the language, and without the token that turns timestamps off.
  prompt() {
    const { prompt, languages, timestamp_begin } = this.rules;
    const known = Object.values(languages);
    const swapped = prompt.map((id) => (this.language && known.includes(id) ? languages[this.language] : id));
    return this.timestamps ? swapped.filter((id) => id !== timestamp_begin - 1) : swapped;
  }

  // Returns the probability that a window has no speech, and detects the language unless that of an
  // earlier window with speech is known.
  async begin(window, pcm) {
    const { prompt, languages, no_speech } = this.rules;
    const logits = await this.recognizer.feed(window, prompt.slice(0, 1), []);
    const silence = no_speech === null ? 0 : Math.exp(logits[no_speech] - logSumExp(logits));
    if (this.detects) {
      const codes = Object.keys(languages);
      this.language = codes.reduce((a, b) => (logits[languages[b]] > logits[languages[a]] ? b : a));
      this.detects = silence > MOST_NO_SPEECH || isHum(pcm);
    }
    return silence;
  }

  // Returns tokens and log-probabilities of a window, the number of words, and whether the text ends in
  // a loop. A likely text has no log-probabilities, which takes less time.
  async decode(window, likely) {
    window.fed = 0;
    const { prompt: given, max_new_tokens, eos } = this.rules;
    const prompt = this.prompt();
    const most = given.length + max_new_tokens - prompt.length;
    const logprobs = [];
    const record = (scores, token) => logprobs.push(scores[token] - logSumExp(scores));
    const choose = (logits, tokens) => this.choose(logits, tokens, likely ? null : record);
    const { tokens } = await this.recognizer.greedy(window, { prompt, most, eos }, choose);
    const words = withoutLoop(tokens.filter((token) => !isTimestamp(token, this.rules))).length;
    return { tokens, words, logprobs, logprob: mean(logprobs), looped: loopPeriod(tokens) > 0 };
  }

  // Returns the tokens of a window.
  async window(pcm) {
    this.silent = isSilent(pcm) || isSteady(pcm);
    if (this.silent) return [];
    const window = await this.recognizer.encode(pcm);
    const silence = await this.begin(window, pcm);
    const window_s = pcm.length / SAMPLING_RATE;
    const likely = silence <= SPARSE_LIMITS[0][0];
    let found = await this.decode(window, likely);
    if (likely && (found.looped || isSparse(found.words, window_s))) {
      found = await this.decode(window, false);
    }
    Object.assign(this, { silence, logprobs: found.logprobs });
    const invented = isInvented(found, found.words, silence, window_s) || isDots(this.text(found.tokens));
    const tokens = invented ? [] : found.tokens;
    this.silent = silence > MOST_NO_SPEECH || (!tokens.length && !found.looped);
    return withoutLoop(tokens);
  }

  // Returns whether the last window's tokens are too few for the sound of this part of it.
  leavesOut(pcm, tokens) {
    const most_s = pcm.length / SAMPLING_RATE; // of sound, which takes longer to compute
    const enough = most_s <= LEAST_SOUND_S || tokens >= LEAST_TOKENS_PER_S * most_s;
    if (this.silent || enough) return false;
    const sound_s = soundSeconds(pcm);
    return sound_s > LEAST_SOUND_S && tokens < LEAST_TOKENS_PER_S * sound_s;
  }

  // Returns the segments of a window, as [begin, end, tokens] in samples: one, or two if the model
  // left out some of its speech and the text of the two is longer.
  async complete(pcm) {
    const whole = await this.window(pcm);
    const one = [[0, pcm.length, whole]];
    if (!this.leavesOut(pcm, whole.length)) return one;
    const two = [];
    for (const [begin, end] of split(pcm, Math.floor((2 * pcm.length) / 3))) {
      two.push([begin, end, await this.window(pcm.subarray(begin, end))]);
    }
    return two.flatMap(([, , tokens]) => tokens).length > whole.length ? two : one;
  }

  // Returns successive segments of the last window's tokens, without the text of those that were
  // probably invented.
  spoken(segments) {
    const invented = [];
    let place = 0;
    return segments.map(([begin, end, tokens]) => {
      const logprobs = this.logprobs.slice(place, (place += tokens.length));
      const words = logprobs.filter((_, i) => !isTimestamp(tokens[i], this.rules));
      const said = this.text(tokens);
      const kept = !invented.includes(said) && !isUnlikely(mean(words), this.silence, [SEGMENT_LIMIT]);
      if (!kept) invented.push(said);
      return [begin, end, kept ? tokens : []];
    });
  }

  // Returns the segments of a window by timestamps, and the sample at which the next one begins.
  async timed(pcm) {
    const tokens = await this.window(pcm);
    const length = Math.floor(pcm.length / STEP_SAMPLES);
    let [timed, steps] = tokens.length ? parts(tokens, this.rules, length) : [[], length];
    const last = timed.at(-1)?.[1];
    if (timed.length && this.leavesOut(pcm.subarray(last * STEP_SAMPLES), 0)) steps = last;
    if (steps < Math.min(length, LEAST_STEPS)) {
      const used = timed.reduce((sum, [, , part]) => sum + part.length, 0);
      timed = [...timed, [steps, length, tokens.slice(used)]];
      steps = length;
    }
    const at = (step) => Math.min(step * STEP_SAMPLES, pcm.length);
    const segments = this.spoken(timed).map(([begin, end, part]) => [at(begin), at(end), part]);
    return [segments, steps < length ? at(steps) : pcm.length];
  }

  // Yields the segments of each window, and the sample at which the next one begins.
  async *windows(pcm) {
    const { window_samples } = this.recognizer.job;
    for (let start = 0, next; start < pcm.length; start = next) {
      const rest = pcm.subarray(start);
      const full = rest.subarray(0, window_samples);
      const window = rest.length > window_samples ? full.subarray(0, findCut(full)) : full;
      const [segments, length] = this.timestamps
        ? await this.timed(window)
        : [await this.complete(window), window.length];
      next = start + length;
      yield [segments.map(([begin, end, tokens]) => [start + begin, start + end, tokens]), next];
    }
  }

  text(tokens) {
    const joined = tokens.map((token) => atob(this.table[token] ?? "")).join("");
    return text.decode(Uint8Array.from(joined, (byte) => byte.charCodeAt(0))).trim();
  }

  async listen(pcm) {
    for await (const [segments, end] of this.windows(pcm)) {
      const timed = segments.map(([start, stop, tokens]) => ({
        start_s: start / SAMPLING_RATE,
        end_s: stop / SAMPLING_RATE,
        text: this.text(tokens),
      }));
      self.postMessage({
        segments: timed.filter((segment) => segment.text),
        language: this.language,
        at_s: end / SAMPLING_RATE,
      });
    }
  }
}

// Returns the opened artifact and its token table.
async function open(recognizer) {
  const { job } = recognizer;
  let received = 0;
  const report = (size) => self.postMessage({ loaded: (received += size) / job.bytes });
  const graphs = [await fetchGraph(job.decoder, report), await fetchGraph(job.encoder, report)];
  const table = JSON.parse(new TextDecoder().decode(await bytes(job.tokens))).bytes;
  await recognizer.open(await startRuntime(), ...graphs);
  return table;
}

self.onmessage = ({ data: job }) => {
  const recognizer = new Recognizer(job);
  const failed = (error) =>
    self.postMessage({ error: { at: recognizer.at, reason: `${error?.message ?? error}` } });
  const opened = open(recognizer);
  opened.then(() => self.postMessage({ ready: true }), failed);
  self.onmessage = async ({ data }) => {
    try {
      await new Listener(recognizer, await opened, data).listen(data.pcm);
      self.postMessage({ done: true });
    } catch (error) {
      failed(error);
    }
  };
};
