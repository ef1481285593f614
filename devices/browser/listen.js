// The worker of transcribe.html: transcribes recordings of any length with the rules of
// devices/runner/decode/listen.py (greedy decoding). It receives {pcm, language, timestamps} and
// sends {segments, language, at_s} for each window, then {done}.

import { SAMPLING_RATE, findCut, isHum, isSilent } from "./pauses.js";
import { Recognizer, bytes, chooser, fetchGraph, loopPeriod, startRuntime } from "./recognizer.js";
import { STEP_SAMPLES, forbid, parts } from "./timestamps.js";

const MOST_NO_SPEECH = 0.6;
const LEAST_STEPS = 50;

const text = new TextDecoder("utf-8", { ignoreBOM: true });

// Returns the text up to the first loop, with its phrase once.
function withoutLoop(tokens) {
  const period = loopPeriod(tokens); // decoding stops at the first one
  let start = tokens.length - period;
  while (period && start > 0 && tokens[start - 1] === tokens[start - 1 + period]) --start;
  return tokens.slice(0, start + period);
}

function probability(logits, token) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  return Math.exp(logits[token] - most) / logits.reduce((sum, x) => sum + Math.exp(x - most), 0);
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

  // Detects the language, unless that of an earlier window with speech is known.
  async detect(window, pcm) {
    const { prompt, languages, no_speech } = this.rules;
    const logits = await this.recognizer.feed(window, prompt.slice(0, 1), []);
    const codes = Object.keys(languages);
    this.language = codes.reduce((a, b) => (logits[languages[b]] > logits[languages[a]] ? b : a));
    const silence = no_speech === null ? 0 : probability(logits, no_speech);
    this.detects = silence > MOST_NO_SPEECH || isHum(pcm);
    window.fed = 0;
  }

  // Returns the tokens of a window.
  async window(pcm) {
    if (isSilent(pcm)) return [];
    const window = await this.recognizer.encode(pcm);
    if (this.detects) await this.detect(window, pcm);
    const { prompt: given, max_new_tokens, eos } = this.rules;
    const prompt = this.prompt();
    const most = given.length + max_new_tokens - prompt.length;
    const { tokens } = await this.recognizer.greedy(window, { prompt, most, eos }, this.choose);
    return withoutLoop(tokens);
  }

  // Yields the segments of each window, as [begin, end, tokens] in samples, and the window's end.
  async *windows(pcm) {
    const { window_samples } = this.recognizer.job;
    for (let start = 0, next; start < pcm.length; start = next) {
      const rest = pcm.subarray(start);
      const full = rest.subarray(0, window_samples);
      const window = rest.length > window_samples ? full.subarray(0, findCut(full)) : full;
      const stop = start + window.length;
      const tokens = await this.window(window);
      next = stop;
      if (!this.timestamps || !tokens.length) {
        yield [[[start, stop, tokens]], next];
        continue;
      }
      const length = Math.floor(window.length / STEP_SAMPLES);
      let [timed, steps] = parts(tokens, this.rules, length);
      if (steps < Math.min(length, LEAST_STEPS)) {
        const used = timed.reduce((sum, [, , part]) => sum + part.length, 0);
        timed = [...timed, [steps, length, tokens.slice(used)]];
        steps = length;
      }
      const at = (step) => Math.min(start + step * STEP_SAMPLES, stop);
      if (steps < length) next = at(steps);
      yield [timed.map(([begin, end, part]) => [at(begin), at(end), part]), next];
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
