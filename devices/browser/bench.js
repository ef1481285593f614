// Runs an artifact in onnxruntime-web, round by round, and sends back token ids and times.
//
// The page and its worker share this module. The page talks to its server and shows the progress.
// For every round it starts a new worker, which loads the graphs, transcribes each clip once and
// ends, like a process of the runner on other devices. devices/browser/job.py builds the jobs, and
// recognizer.js decodes.

import { Recognizer, bytes, chooser, fetchGraph, seconds, startRuntime } from "./recognizer.js";

const ALIVE_MS = 5000;
const MEMORY_MS = 20000;
const RETRY_MS = 50000; // less than the server's timeout for a silent page
const AGAIN_MS = 5000;
const HELLOS = 4;

const pause = (ms) => new Promise((over) => setTimeout(over, ms));

// ------------------------------------------------------------------------------------ the worker

// Clips are fetched one at a time: a phone has no memory for hours of speech.
async function fetchClip(clip) {
  const windows = [];
  for (const name of clip.windows) windows.push(new Float32Array((await bytes(name)).buffer));
  return { ...clip, windows };
}

async function transcribe(recognizer, choose, { windows, prompt, most }) {
  const { eos } = recognizer.job;
  const started = performance.now();
  const results = [];
  for (const pcm of windows) {
    const window = await recognizer.encode(pcm);
    const decoded = await recognizer.greedy(window, { prompt, most, eos }, choose);
    results.push({ encoder_s: window.encoder_s, ...decoded });
  }
  return { wall_s: seconds(started), windows: results };
}

async function run(job) {
  const recognizer = new Recognizer(job);
  const report = (state, share) => self.postMessage({ state, share });
  try {
    report("loading", 0);
    // the start of the runtime is not timed, like the import of onnxruntime on other devices
    const ort = await startRuntime(job.threads);
    const { clips } = job;
    const graphs = [await fetchGraph(job.decoder), await fetchGraph(job.encoder)];
    const started = performance.now();
    await recognizer.open(ort, ...graphs);
    const load_s = seconds(started);
    const choose = chooser(job.vocabulary, job.never, job.not_first);
    const clip = async (asked) => transcribe(recognizer, choose, await fetchClip(asked));
    report("warming up", 0);
    for (const asked of clips.slice(0, job.warm_up)) await clip(asked);
    const results = [];
    for (const asked of clips) {
      results.push(await clip(asked));
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
