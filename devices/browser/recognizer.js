// Runs the two graphs of an artifact in onnxruntime-web and decodes greedily, as
// devices/runner/decode/greedy.py does. The workers of bench.js and listen.js share this module.

const LOOP_TOKENS = 30; // a loop is a phrase repeated over at least 30 tokens
const LOOP_COPIES = 5; // and at least 5 times in a row

export const seconds = (since) => Math.max(0, performance.now() - since) / 1000;

// Returns the content of a file; calls `received` with the size of each piece of it.
export async function bytes(name, received = () => {}) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  const content = new Uint8Array(Number(response.headers.get("Content-Length")));
  const reader = response.body.getReader();
  for (let at = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return content;
    content.set(value, at);
    at += value.length;
    received(value.length);
  }
}

// Fetching is not timed: on other devices the files are local.
export async function fetchGraph({ file, external, place }, received) {
  const externalData = [];
  for (const path of external) externalData.push({ path, data: await bytes(place + path, received) });
  return { graph: await bytes(file, received), externalData };
}

// Returns onnxruntime-web, started. It starts with its first session, even one without a graph.
export async function startRuntime(threads) {
  const ort = await import("./ort.wasm.min.mjs");
  if (threads) ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  await ort.InferenceSession.create(new Uint8Array(), { logSeverityLevel: 4 }).catch(() => {});
  return ort;
}

// Returns the length of the phrase that the end of the text repeats, or 0.
export function loopPeriod(tokens) {
  for (let period = 1; period * LOOP_COPIES <= tokens.length; ++period) {
    const length = period * Math.max(LOOP_COPIES, Math.ceil(LOOP_TOKENS / period));
    if (length > tokens.length) continue;
    const tail = tokens.slice(-length);
    if (tail.slice(period).every((token, i) => token === tail[i])) return period;
  }
  return 0;
}

// Returns the most probable token; of equals the lower id. Ids with a nonzero flag are forbidden.
function likeliest(logits, forbidden) {
  let best = -1;
  for (let id = 0; id < logits.length; ++id) {
    if (!forbidden[id] && (best < 0 || logits[id] > logits[best])) best = id;
  }
  return best;
}

// Returns a function that chooses the most probable token for logits and the tokens before. `refine`
// may set the scores of further tokens to -Infinity; `record` gets the scores and the token.
export function chooser(vocabulary, never, notFirst, refine = null) {
  const always = new Uint8Array(vocabulary);
  for (const id of never) always[id] = 1;
  const first = always.slice();
  for (const id of notFirst) first[id] = 1;
  return (logits, tokens, record = null) => {
    const forbidden = tokens.length ? always : first;
    if (!refine && !record) return likeliest(logits, forbidden);
    const scores = logits.map((score, id) => (forbidden[id] ? -Infinity : score));
    refine?.(scores, tokens);
    const token = likeliest(scores, forbidden);
    record?.(scores, token);
    return token;
  };
}

export class Recognizer {
  constructor(job) {
    this.job = job;
    this.at = "loading"; // what runs, for error messages
    // not the outputs `heard.*`, copies of the cross caches for runtimes that bind in place
    this.outputs = ["logits", ...Object.keys(job.caches)];
  }

  async open(ort, decoder, encoder) {
    this.ort = ort;
    for (const [name, { graph, externalData }] of Object.entries({ decoder, encoder })) {
      this.at = `${name}.onnx`;
      const options = { executionProviders: ["wasm"], externalData, logSeverityLevel: 4 };
      this[name] = await ort.InferenceSession.create(graph, options);
    }
  }

  // Encodes a window and returns it with empty caches.
  async encode(pcm) {
    const { Tensor } = this.ort;
    const { windows, caches } = this.job;
    this.at = "encoder.onnx";
    const samples = new Float32Array(windows.find((n) => n >= pcm.length));
    samples.set(pcm);
    const started = performance.now();
    const sound = { pcm: new Tensor("float32", samples, [1, samples.length]) };
    const cross = await this.encoder.run(sound);
    const encoder_s = seconds(started);
    const state = { ...cross };
    for (const [name, shape] of Object.entries(caches)) {
      const empty = new Float32Array(shape.reduce((a, b) => a * b, 1));
      state[name.replace("present.", "past.")] = new Tensor("float32", empty, shape);
    }
    return { state, fed: 0, encoder_s };
  }

  // Feeds tokens after those already fed; returns the logits after the last. In JavaScript all
  // inputs and outputs are copied, so the times include copying keys and values between steps,
  // unlike on other devices.
  async feed(window, ids, clock) {
    const { Tensor } = this.ort;
    const { caches, most_ids } = this.job;
    const { state } = window;
    this.at = "decoder.onnx";
    let logits;
    for (let at = 0; at < ids.length; at += most_ids) {
      const some = ids.slice(at, at + most_ids);
      const started = performance.now();
      state.input_ids = new Tensor("int64", BigInt64Array.from(some, BigInt), [1, some.length]);
      state.past_length = new Tensor("int32", Int32Array.of(window.fed), [1]);
      const outputs = await this.decoder.run(state, this.outputs);
      for (const name of Object.keys(caches)) state[name.replace("present.", "past.")] = outputs[name];
      window.fed += some.length;
      clock.push(seconds(started));
      logits = outputs.logits.data;
    }
    return logits;
  }

  // Returns the tokens up to the end token or a loop, and the times of the steps.
  async greedy(window, { prompt, most, eos }, choose) {
    const result = { tokens: [], prompt_s: [], per_token_s: [] };
    const { tokens } = result;
    for (let ids = prompt; tokens.length < most; ids = tokens.slice(-1)) {
      const clock = tokens.length ? result.per_token_s : result.prompt_s;
      const token = choose(await this.feed(window, ids, clock), tokens);
      if (token === eos) break;
      tokens.push(token);
      if (loopPeriod(tokens)) break;
    }
    return result;
  }
}
