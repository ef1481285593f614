// The page of `edgewhisper serve`: takes a recording or a file, and shows the segments that its
// worker, listen.js, transcribes. Audio is decoded by the browser and is not sent anywhere.

import { readAudio } from "./audio.js";

const SAMPLING_RATE = 16000;
const LARGE_BYTES = 1e8;
const MICROPHONE = {
  NotAllowedError:
    "The browser does not allow this page to use the microphone. Allow it in the settings of the " +
    "browser for this page, or choose a file.",
  NotFoundError: "There is no microphone on this device. Connect one, or choose a file.",
  NotReadableError: "Another program uses the microphone. Close it, or choose a file.",
};

const element = (id) => document.getElementById(id);
const [input, record, file, state, done] = ["input", "record", "file", "state", "done"].map(element);

let job = null;
let worker = null;
let recorder = null;
let ready = false;
let shown = null; // the transcript: its name, its length in seconds, its segments

// ------------------------------------------------------------------------------------ what is shown

function show(text, share = null) {
  state.textContent = text;
  state.classList.remove("bad");
  done.hidden = share === null;
  done.value = share ?? 0;
}

function fail(text) {
  show(text);
  state.classList.add("bad");
}

// Lets the user give audio, or not.
function setFree(free) {
  input.disabled = !free;
  element("language").disabled = element("timestamps").disabled = !free;
  element("cancel").hidden = free || !ready;
}

const two = (number) => String(number).padStart(2, "0");

// Returns a time like 00:01:02,345.
function clock(time_s) {
  const ms = Math.round(time_s * 1000);
  const [s, m, h] = [Math.floor(ms / 1000), Math.floor(ms / 60000), Math.floor(ms / 3600000)];
  return `${two(h)}:${two(m % 60)}:${two(s % 60)},${String(ms % 1000).padStart(3, "0")}`;
}

// Returns a time like 1:02.3, or 1:01:02.3.
function short(time_s) {
  const tenths = Math.round(time_s * 10);
  const [m, h] = [Math.floor(tenths / 600), Math.floor(tenths / 36000)];
  const s = `${two(Math.floor(tenths / 10) % 60)}.${tenths % 10}`;
  return h ? `${h}:${two(m % 60)}:${s}` : `${m}:${s}`;
}

function addSegment({ start_s, end_s, text }) {
  const row = element("segments").appendChild(document.createElement("li"));
  for (const [name, content] of [["time", `${short(start_s)} to ${short(end_s)}`], ["text", text]]) {
    const part = row.appendChild(document.createElement("span"));
    part.className = name;
    part.textContent = content;
    if (name === "text" && shown.language) part.lang = shown.language;
  }
}

const languageName = (code) => new Intl.DisplayNames(["en"], { type: "language" }).of(code) ?? code;

// ---------------------------------------------------------------------------------------- the model

function start() {
  ready = false;
  setFree(false);
  worker = new Worker("listen.js", { type: "module" });
  worker.onmessage = ({ data }) => receive(data);
  worker.onerror = (event) => failedAt({ at: "the worker", reason: event.message ?? "it did not start" });
  worker.postMessage(job);
}

function receive({ loaded, ready: opened, segments, language, at_s, done: finished, error }) {
  if (error) return failedAt(error);
  if (loaded) show("Loading the model", loaded);
  if (opened) {
    ready = true;
    setFree(true);
    if (!state.classList.contains("bad")) show("Ready");
  }
  if (segments) {
    shown.language = language;
    shown.segments.push(...segments);
    for (const segment of segments) addSegment(segment);
    element("name").textContent = language ? `${shown.name} (${languageName(language)})` : shown.name;
    element("result").hidden = false;
    show(`Transcribed ${short(at_s)} of ${short(shown.length_s)}`, at_s / shown.length_s);
  }
  if (finished) {
    const took = `in ${((performance.now() - shown.started) / 1000).toFixed(1)} s`;
    show(shown.segments.length ? `Done ${took}` : `Done ${took}: there is no speech in it`);
    setFree(true);
  }
}

function failedAt({ at, reason }) {
  worker.terminate();
  fail(
    `The model failed at ${at}: ${reason}. Reload the page. If that does not help, close other ` +
      "programs, update the browser, or serve a smaller model.",
  );
  input.disabled = true;
}

async function transcribe(blob, name) {
  setFree(false);
  show(`Reading ${name}`, 0);
  let pcm;
  try {
    pcm = await readAudio(await blob.arrayBuffer());
  } catch {
    fail(
      `This browser cannot read audio from ${name} (${blob.size} bytes). Choose another file, ` +
        `such as WAV, MP3 or M4A.${blob.size > LARGE_BYTES ? " It may be too large for the memory." : ""}`,
    );
    return setFree(true);
  }
  shown = { name, length_s: pcm.length / SAMPLING_RATE, segments: [], started: performance.now() };
  element("segments").replaceChildren();
  element("result").hidden = true;
  show(`Transcribing ${name}, ${short(shown.length_s)}`, 0);
  const language = element("language").value || null;
  worker.postMessage({ pcm, language, timestamps: element("timestamps").checked }, [pcm.buffer]);
}

// ------------------------------------------------------------------------------------ the microphone

async function startRecording() {
  let stream;
  try {
    const audio = { channelCount: 1, echoCancellation: false };
    stream = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    return fail(MICROPHONE[error.name] ?? `The microphone cannot be used: ${error.message}`);
  }
  const pieces = [];
  const started = performance.now();
  const tick = () => show(`Recording: ${short((performance.now() - started) / 1000)}`);
  const timer = setInterval(tick, 1000); // not more often: a screen reader reads it out
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = ({ data }) => pieces.push(data);
  recorder.onstop = () => {
    clearInterval(timer);
    for (const track of stream.getTracks()) track.stop();
    recorder = null;
    setRecording(false);
    transcribe(new Blob(pieces, { type: pieces[0]?.type }), "Recording");
  };
  recorder.start();
  setRecording(true);
  tick();
}

function setRecording(active) {
  record.textContent = active ? "Stop" : "Record";
  file.disabled = active;
}

// ----------------------------------------------------------------------------------------- results

// The formats are those of devices/runner/writers.py.
const fullText = () => `${shown.segments.map(({ text }) => text).join("\n")}\n`;

function subtitles() {
  const cues = shown.segments.map(({ start_s, end_s, text }, i) => {
    const times = `${clock(start_s)} --> ${clock(end_s)}`;
    return `${i + 1}\n${times}\n${text.replaceAll("-->", "->")}\n\n`;
  });
  return cues.join("");
}

function download(ending, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "text/plain" }));
  link.download = shown.name.replace(/\.[^.]*$/, "") + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Copies by selection where the page has no clipboard, because it is not served over https.
async function copy() {
  if (navigator.clipboard) await navigator.clipboard.writeText(fullText());
  else {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = fullText();
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  show("The text is copied");
}

// ----------------------------------------------------------------------------------------- the page

function setChoices({ rules }) {
  const codes = Object.keys(rules.languages);
  const own = codes.find((code) => rules.prompt.includes(rules.languages[code]));
  const names = codes.map((code) => [code, languageName(code)]);
  names.sort(([, a], [, b]) => a.localeCompare(b));
  const choices = codes.length ? [["auto", "Detect"], ...names] : [];
  for (const [code, name] of choices) element("language").add(new Option(name, code));
  element("languages").hidden = !codes.length;
  if (codes.length) element("language").value = rules.auto ? "auto" : (own ?? "auto");
  element("times").hidden = rules.timestamp_begin === null;
  if (rules.timestamp_begin === null) element("timestamps").checked = false;
}

function takeDrops() {
  const over = (event) => {
    event.preventDefault();
    input.classList.toggle("over", event.type === "dragover" && !input.disabled);
  };
  for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, over);
  document.addEventListener("drop", ({ dataTransfer }) => {
    const [dropped] = dataTransfer.files;
    if (dropped && !input.disabled && !recorder) transcribe(dropped, dropped.name);
  });
}

function explainInsecure() {
  record.hidden = true;
  element("insecure").hidden = false;
  element("insecure").textContent =
    `Browsers give the microphone only to pages over https, and this one is ${location.protocol}//` +
    `${location.host}. Record with another app of this device and choose its file here, or serve ` +
    "the page with the option --certificate.";
}

async function open() {
  takeDrops();
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) explainInsecure();
  record.onclick = () => (recorder ? recorder.stop() : startRecording());
  file.onchange = () => {
    const [chosen] = file.files;
    if (chosen) transcribe(chosen, chosen.name);
    file.value = ""; // so that the same file can be chosen again
  };
  element("cancel").onclick = () => {
    worker.terminate();
    start();
  };
  element("copy").onclick = () => copy().catch(() => fail("The browser does not allow copying."));
  element("txt").onclick = () => download(".txt", fullText());
  element("srt").onclick = () => download(".srt", subtitles());
  const response = await fetch("job.json");
  job = await response.json();
  setChoices(job);
  start();
}

open().catch(() => fail("The server does not answer. Start `edgewhisper serve` again, and open its new URL."));
