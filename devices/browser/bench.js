// Runs an artifact on onnxruntime-web, round by round, and sends ids of tokens and times back.
//
// One module for both sides. The page talks with the server that it came from and shows how far
// it is. For every round it starts a worker, which loads the graphs anew, transcribes each clip
// once and ends, as a process of the runner does elsewhere. devices/browser/job.py says what a job
// is and settles all that can be settled beforehand; the loop here is that of runner/decode.py.

const LOOP_TOKENS = 30; // a loop is at least 30 tokens which are
const LOOP_COPIES = 5; // at least 5 copies of one phrase, in a row
const ALIVE_MS = 5000;
const MEMORY_MS = 20000;
const RETRY_MS = 50000; // the server waits a little longer for a page that is silent
const AGAIN_MS = 5000;
const HELLOS = 4;

const pause = (ms) => new Promise((over) => setTimeout(over, ms));
const seconds = (since) => Math.max(0, performance.now() - since) / 1000;

// ------------------------------------------------------------------------------------ the worker

async function bytes(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response.arrayBuffer();
}

// What is fetched is not timed: elsewhere it lies on the device.
async function fetchGraph({ file, beside, place }) {
  const externalData = [];
  for (const path of beside) externalData.push({ path, data: new Uint8Array(await bytes(place + path)) });
  return { graph: new Uint8Array(await bytes(file)), externalData };
}

// One at a time: a phone has no room for hours of speech.
async function fetchClip(clip) {
  const windows = [];
  for (const name of clip.windows) windows.push(new Float32Array(await bytes(name)));
  return { ...clip, windows };
}

// The length of the phrase that the text has fallen into repeating, or 0.
function loopPeriod(tokens) {
  for (let period = 1; period * LOOP_COPIES <= tokens.length; ++period) {
    const length = period * Math.max(LOOP_COPIES, Math.ceil(LOOP_TOKENS / period));
    if (length > tokens.length) continue;
    const tail = tokens.slice(-length);
    if (tail.slice(period).every((token, i) => token === tail[i])) return period;
  }
  return 0;
}

// The likeliest of the tokens that are allowed; the lower id of equals.
function likeliest(logits, forbidden) {
  let best = -1;
  for (let id = 0; id < logits.length; ++id) {
    if (!forbidden[id] && (best < 0 || logits[id] > logits[best])) best = id;
  }
  return best;
}

class Recognizer {
  constructor(ort, job) {
    this.ort = ort;
    this.job = job;
    this.always = new Uint8Array(job.vocabulary);
    for (const id of job.never) this.always[id] = 1;
    this.first = this.always.slice();
    for (const id of job.not_first) this.first[id] = 1;
    // `heard.*` are the encoder's keys and values again, for who binds them in place
    this.fetched = ["logits", ...Object.keys(job.caches)];
  }

  async open(decoder, encoder) {
    for (const [name, { graph, externalData }] of Object.entries({ decoder, encoder })) {
      this.at = `${name}.onnx`;
      const options = { executionProviders: ["wasm"], externalData, logSeverityLevel: 4 };
      this[name] = await this.ort.InferenceSession.create(graph, options);
    }
  }

  // Tokens and times of one window. JavaScript hands every input over and gets every output back:
  // unlike elsewhere, keys and values are copied between steps, and that is in the times.
  async window(pcm, { prompt, most }) {
    const { Tensor } = this.ort;
    const { windows, caches, eos, most_ids } = this.job;
    this.at = "encoder.onnx";
    const samples = new Float32Array(windows.find((n) => n >= pcm.length));
    samples.set(pcm);
    let started = performance.now();
    const sound = { pcm: new Tensor("float32", samples, [1, samples.length]) };
    const cross = await this.encoder.run(sound);
    const found = { encoder_s: seconds(started), prompt_s: [], per_token_s: [], tokens: [] };
    this.at = "decoder.onnx";
    const state = { ...cross };
    for (const [name, shape] of Object.entries(caches)) {
      const empty = new Float32Array(shape.reduce((a, b) => a * b, 1));
      state[name.replace("present.", "past.")] = new Tensor("float32", empty, shape);
    }
    let fed = 0;
    const step = async (ids, clock) => {
      started = performance.now();
      state.input_ids = new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
      state.past_length = new Tensor("int32", Int32Array.of(fed), [1]);
      const given = await this.decoder.run(state, this.fetched);
      for (const name of Object.keys(caches)) state[name.replace("present.", "past.")] = given[name];
      fed += ids.length;
      clock.push(seconds(started));
      return given.logits.data;
    };
    let ids = prompt;
    const { tokens } = found;
    while (tokens.length < most) {
      const clock = tokens.length ? found.per_token_s : found.prompt_s;
      let logits;
      for (let at = 0; at < ids.length; at += most_ids) {
        logits = await step(ids.slice(at, at + most_ids), clock);
      }
      const token = likeliest(logits, tokens.length ? this.always : this.first);
      if (token === eos) break;
      tokens.push(token);
      ids = [token];
      if (loopPeriod(tokens)) break;
    }
    return found;
  }

  async clip(clip) {
    const started = performance.now();
    const windows = [];
    for (const pcm of clip.windows) windows.push(await this.window(pcm, clip));
    return { wall_s: seconds(started), windows };
  }
}

async function work(job) {
  const recognizer = new Recognizer(null, job);
  const tell = (state, share) => self.postMessage({ state, share });
  try {
    recognizer.at = "loading";
    tell("loading", 0);
    const ort = (recognizer.ort = await import("./ort.wasm.min.mjs"));
    ort.env.wasm.numThreads = job.threads;
    ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
    // The runtime starts with its first session, even one without a graph. Elsewhere importing
    // it is no part of the time to load an artifact either.
    await ort.InferenceSession.create(new Uint8Array(), { logSeverityLevel: 4 }).catch(() => {});
    const { clips } = job;
    const graphs = [await fetchGraph(job.decoder), await fetchGraph(job.encoder)];
    const started = performance.now();
    await recognizer.open(...graphs);
    const load_s = seconds(started);
    tell("warming up", 0);
    for (const clip of clips.slice(0, job.warm_up)) await recognizer.clip(await fetchClip(clip));
    const found = [];
    for (const clip of clips) {
      found.push(await recognizer.clip(await fetchClip(clip)));
      tell(`clip ${found.length} of ${clips.length}`, found.length / clips.length);
    }
    // onnxruntime-web puts 1 there where the browser gives no threads
    self.postMessage({ result: { load_s, clips: found, threads: ort.env.wasm.numThreads } });
  } catch (error) {
    self.postMessage({ error: { at: recognizer.at, reason: `${error?.message ?? error}` } });
  }
}

// -------------------------------------------------------------------------------------- the page

let page = null; // the number that the server gave this page

// A network that is gone for a moment ends nothing.
async function post(name, said) {
  const request = { method: "POST", body: JSON.stringify({ page, ...said }), cache: "no-store" };
  const until = performance.now() + RETRY_MS;
  let response = null;
  while (response === null) {
    try {
      response = await fetch(name, request);
    } catch (error) {
      if (performance.now() > until) throw error;
      await pause(1000);
    }
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.problem ?? `${name}: ${response.status}`);
  return answer;
}

// A function that returns a vector: WebAssembly.validate is false where SIMD is not known.
const SIMD = Uint8Array.of(
  ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // magic, version
  ...[1, 5, 1, 0x60, 0, 1, 0x7b], // types: () -> v128
  ...[3, 2, 1, 0], // one function of that type
  ...[10, 8, 1, 6, 0, 0x41, 0, 0xfd, 15, 0x0b], // its code: i32.const 0, i8x16.splat
);

function clockResolution() {
  let least = Infinity;
  const until = performance.now() + 50;
  for (let last = performance.now(); last < until; ) {
    const now = performance.now();
    if (now > last) least = Math.min(least, now - last);
    last = now;
  }
  return Number.isFinite(least) ? least / 1000 : 1;
}

function describe() {
  return {
    user_agent: navigator.userAgent,
    cores: navigator.hardwareConcurrency ?? 1,
    cross_origin_isolated: self.crossOriginIsolated === true,
    simd: WebAssembly.validate(SIMD),
    clock_resolution_s: clockResolution(),
  };
}

// What the browser counts for this page and its worker, where it tells. It is in no hurry with it.
async function memory() {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const late = new Promise((tell) => setTimeout(tell, MEMORY_MS, null));
  const measured = performance.measureUserAgentSpecificMemory().then(({ bytes }) => bytes);
  return Promise.race([measured.catch(() => null), late]);
}

function show(state, share) {
  document.getElementById("state").textContent = state;
  document.getElementById("done").value = share ?? 0;
}

function log(line) {
  document.getElementById("log").textContent += `${line}\n`;
}

const weighed = new Set(); // the artifacts whose memory is known

// What one worker says of a job: a result or an error.
function round(job, number) {
  return new Promise((tell) => {
    const worker = new Worker("bench.js", { type: "module" });
    worker.onmessage = async ({ data }) => {
      if (data.state) return show(`round ${number}: ${data.state}`, data.share);
      // once: it takes many seconds, and what it counts hardly changes between rounds
      if (data.result) {
        data.result.memory_bytes = weighed.has(job.decoder.file) ? null : await memory();
        weighed.add(job.decoder.file);
      }
      worker.terminate();
      tell(data);
    };
    worker.onerror = (event) => {
      worker.terminate();
      tell({ error: { at: "the worker", reason: event.message ?? "it could not be started" } });
    };
    worker.postMessage(job);
  });
}

// A page that is loaded anew waits until the one before it counts as gone.
async function hello() {
  for (let tries = 1; ; ++tries) {
    try {
      return await post("hello", describe());
    } catch (error) {
      if (tries === HELLOS) throw error;
      show(`waiting: ${error.message}`);
      await pause(AGAIN_MS);
    }
  }
}

async function serve() {
  page = (await hello()).page;
  log(`${self.crossOriginIsolated ? navigator.hardwareConcurrency : 1} threads can be had`);
  for (let number = 1; ; ) {
    show("waiting for the next round");
    const { id, work, end } = await post("next");
    if (end) return show("done: this page can be closed", 1);
    if (!id) continue;
    const beat = setInterval(() => post("alive").catch(() => {}), ALIVE_MS);
    const said = await round(work, number);
    clearInterval(beat);
    await post("answer", { job: id, ...said });
    log(said.error ? `round ${number}: ${said.error.reason}` : `round ${number}: ${summary(said)}`);
    ++number;
  }
}

function summary({ result }) {
  const walls = result.clips.map((clip) => clip.wall_s).sort((a, b) => a - b);
  const median = walls[walls.length >> 1];
  return `${walls.length} clips, ${(1000 * median).toFixed(0)} ms the middle one`;
}

if (typeof document === "undefined") {
  self.onmessage = ({ data }) => work(data);
} else {
  serve().catch((error) => show(`ended: ${error.message}`));
}
