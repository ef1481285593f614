// An artifact of layout `transformers` in transformers.js, on onnxruntime-web's WebAssembly backend.
//
// Usage: node run_transformers_js.mjs PACKAGE ARTIFACT WAV... (16 kHz mono, 16 bits), PACKAGE the
// folder of transformers.js in node_modules. Needs nothing of EdgeWhisper's. The last line of stdout
// is JSON: the runtime's versions, and a text for each file.
//
// The package has one build for Node, on native onnxruntime, and one for browsers. This takes the
// browser's, so it looks like one (a window, no process.release) and is served its files by HTTP.
// Of onnxruntime's builds it takes the plain one: with version 4's default, which can wait for a GPU
// (asyncify), the texts are the same and a clip took some twenty times as long.

import { createReadStream, existsSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [home, artifact, ...paths] = process.argv.slice(2);

function read(path) {
  const bytes = readFileSync(path);
  const start = bytes.indexOf("data") + 8;
  const samples = new Float32Array((bytes.length - start) >> 1);
  for (let i = 0; i < samples.length; ++i) samples[i] = bytes.readInt16LE(start + 2 * i) / 32768;
  return samples;
}

function serve(folder) {
  const server = createServer((request, response) => {
    const path = join(folder, decodeURIComponent(request.url.split("?")[0]));
    if (!existsSync(path) || !statSync(path).isFile()) {
      response.writeHead(404).end();
      return;
    }
    response.writeHead(200, { "content-length": statSync(path).size });
    createReadStream(path).pipe(response);
  });
  return new Promise((ready) => server.listen(0, "127.0.0.1", () => ready(server)));
}

function packageFolder(name) {
  for (let folder = resolve(home); ; folder = join(folder, "..")) {
    const found = join(folder, "node_modules", name);
    if (existsSync(found)) return found;
    if (folder === join(folder, "..")) throw new Error(`there is no ${name} for ${home}`);
  }
}

const version = (folder) => JSON.parse(readFileSync(join(folder, "package.json"))).version;

Object.defineProperty(process, "release", { value: {} });
globalThis.window = { document: {} };
globalThis.self = globalThis;
const { env, pipeline } = await import(pathToFileURL(resolve(home, "dist/transformers.web.js")));
const ort = packageFolder("onnxruntime-web");
const wasm = (ending) => pathToFileURL(join(ort, `dist/ort-wasm-simd-threaded.${ending}`)).href;

const server = await serve(resolve(artifact));
env.allowLocalModels = false;
env.useBrowserCache = false;
env.useWasmCache = false;
env.remoteHost = `http://127.0.0.1:${server.address().port}/`;
env.remotePathTemplate = "";
env.backends.onnx.wasm.wasmPaths = { mjs: wasm("mjs"), wasm: wasm("wasm") };
env.backends.onnx.wasm.numThreads = 1;

const options = { device: "wasm" };
const transcribe = await pipeline("automatic-speech-recognition", "edgewhisper/artifact", options);
const texts = [];
for (const path of paths) {
  const { text } = await transcribe(read(path), { num_beams: 1, do_sample: false });
  texts.push(text.trim());
}
const runtime = `transformers.js ${version(home)}, onnxruntime-web ${version(ort)}, WebAssembly`;
console.log(JSON.stringify({ runtime, texts }));
server.close();
process.exit(0);
