// Runs an artifact in onnxruntime-web, round by round, and sends back token ids and times.
//
// The page and its worker share this module. The page talks to its server and shows the progress.
// For every round it starts a new worker, which loads the graphs, transcribes each clip once and
// ends, like a process of the runner on other devices. devices/browser/job.py builds the jobs; the
// decode loop is the same as in devices/runner/decode/greedy.py.

const LOOP_TOKENS = 30; // a loop is a phrase repeated over at least 30 tokens
const LOOP_COPIES = 5; // and at least 5 times in a row
const ALIVE_MS = 5000;
const MEMORY_MS = 20000;
const RETRY_MS = 50000; // less than the server's timeout for a silent page
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

// Fetching is not timed: on other devices the files are local.
async function fetchGraph({ file, external, place }) {
  const externalData = [];
  for (const path of external) externalData.push({ path, data: new Uint8Array(await bytes(place + path)) });
  return { graph: new Uint8Array(await bytes(file)), externalData };
}

// Clips are fetched one at a time: a phone has no memory for hours of speech.
async function fetchClip(clip) {
  const windows = [];
  for (const name of clip.windows) windows.push(new Float32Array(await bytes(name)));
  return { ...clip, windows };
}

// Returns the length of the phrase that the end of the text repeats, or 0.
function loopPeriod(tokens) {
  for (let period = 1; period * LOOP_COPIES <= tokens.length; ++period) {
    const length = period * Math.max(LOOP_COPIES, Math.ceil(LOOP_TOKENS / period));
    if (length > tokens.length) continue;
    const tail = tokens.slice(-length);
    if (tail.slice(period).every((token, i) => token === tail[i])) return period;
  }
  return 0;
}

// Returns the most probable allowed token; of equals the lower id.
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
    // not the outputs `heard.*`, copies of the cross caches for runtimes that bind in place
    this.outputs = ["logits", ...Object.keys(job.caches)];
  }

  async open(decoder, encoder) {
    for (const [name, { graph, externalData }] of Object.entries({ decoder, encoder })) {
      this.at = `${name}.onnx`;
      const options = { executionProviders: ["wasm"], externalData, logSeverityLevel: 4 };
      this[name] = await this.ort.InferenceSession.create(graph, options);
    }
  }

  // Returns tokens and times of one window. In JavaScript all inputs and outputs are copied, so the
  // times include copying keys and values between steps, unlike on other devices.
  async window(pcm, { prompt, most }) {
    const { Tensor } = this.ort;
    const { windows, caches, eos, most_ids } = this.job;
    this.at = "encoder.onnx";
    const samples = new Float32Array(windows.find((n) => n >= pcm.length));
    samples.set(pcm);
    let started = performance.now();
    const sound = { pcm: new Tensor("float32", samples, [1, samples.length]) };
    const cross = await this.encoder.run(sound);
    const result = { encoder_s: seconds(started), prompt_s: [], per_token_s: [], tokens: [] };
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
      const outputs = await this.decoder.run(state, this.outputs);
      for (const name of Object.keys(caches)) state[name.replace("present.", "past.")] = outputs[name];
      fed += ids.length;
      clock.push(seconds(started));
      return outputs.logits.data;
    };
    let ids = prompt;
    const { tokens } = result;
    while (tokens.length < most) {
      const clock = tokens.length ? result.per_token_s : result.prompt_s;
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
    return result;
  }

  async clip(clip) {
    const started = performance.now();
    const windows = [];
    for (const pcm of clip.windows) windows.push(await this.window(pcm, clip));
    return { wall_s: seconds(started), windows };
  }
}

async function run(job) {
  const recognizer = new Recognizer(null, job);
  const report = (state, share) => self.postMessage({ state, share });
  try {
    recognizer.at = "loading";
    report("loading", 0);
    const ort = (recognizer.ort = await import("./ort.wasm.min.mjs"));
    ort.env.wasm.numThreads = job.threads;
    ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
    // The runtime starts with its first session, even one without a graph. Its start is not timed,
    // like the import of onnxruntime on other devices.
    await ort.InferenceSession.create(new Uint8Array(), { logSeverityLevel: 4 }).catch(() => {});
    const { clips } = job;
    const graphs = [await fetchGraph(job.decoder), await fetchGraph(job.encoder)];
    const started = performance.now();
    await recognizer.open(...graphs);
    const load_s = seconds(started);
    report("warming up", 0);
    for (const clip of clips.slice(0, job.warm_up)) await recognizer.clip(await fetchClip(clip));
    const results = [];
    for (const clip of clips) {
      results.push(await recognizer.clip(await fetchClip(clip)));
      report(`clip ${results.length} of ${clips.length}`, results.length / clips.length);
    }
    // onnxruntime-web sets numThreads to 1 if the browser provides no threads
    self.postMessage({ result: { load_s, clips: results, threads: ort.env.wasm.numThreads } });
  } catch (error) {
    self.postMessage({ error: { at: recognizer.at, reason: `${error?.message ?? error}` } });
  }
}

// -------------------------------------------------------------------------------------- the page

let page = null; // this page's id, from the server

// Posts a message and returns the answer; retries while the network is down.
async function post(name, message) {
  const request = { method: "POST", body: JSON.stringify({ page, ...message }), cache: "no-store" };
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

// A module with a function that returns a vector; it validates only if SIMD is supported.
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

// Returns the memory of this page and its worker in bytes, or null. The measurement can take long.
async function memory() {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const late = new Promise((resolve) => setTimeout(resolve, MEMORY_MS, null));
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

const measured = new Set(); // the artifacts whose memory was measured

// Runs a job in a new worker; resolves to its result or error.
function round(job, number) {
  return new Promise((resolve) => {
    const worker = new Worker("bench.js", { type: "module" });
    worker.onmessage = async ({ data }) => {
      if (data.state) return show(`round ${number}: ${data.state}`, data.share);
      // measured once: it takes many seconds and hardly changes between rounds
      if (data.result) {
        data.result.memory_bytes = measured.has(job.decoder.file) ? null : await memory();
        measured.add(job.decoder.file);
      }
      worker.terminate();
      resolve(data);
    };
    worker.onerror = (event) => {
      worker.terminate();
      resolve({ error: { at: "the worker", reason: event.message ?? "it could not be started" } });
    };
    worker.postMessage(job);
  });
}

// A reloaded page retries until the server treats the previous one as gone.
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
  log(`threads available: ${self.crossOriginIsolated ? navigator.hardwareConcurrency : 1}`);
  for (let number = 1; ; ) {
    show("waiting for the next round");
    const { id, work, end } = await post("next");
    if (end) return show("done; you can close this page", 1);
    if (!id) continue;
    const timer = setInterval(() => post("alive").catch(() => {}), ALIVE_MS);
    const answer = await round(work, number);
    clearInterval(timer);
    await post("answer", { job: id, ...answer });
    log(`round ${number}: ${answer.error ? answer.error.reason : summary(answer)}`);
    ++number;
  }
}

function summary({ result }) {
  const walls = result.clips.map((clip) => clip.wall_s).sort((a, b) => a - b);
  const median = walls[walls.length >> 1];
  return `${walls.length} clips, median ${(1000 * median).toFixed(0)} ms`;
}

if (typeof document === "undefined") {
  self.onmessage = ({ data }) => run(data);
} else {
  serve().catch((error) => show(`stopped: ${error.message}`));
}
