"""The page of `edgewhisper serve`: its server, and a real Chromium that transcribes."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import chromium
import numpy as np
import pytest
import soundfile
from transcribe_page import BAD, DONE, READY, STATE, downloaded, transcribed, write_wav

from benchmarks.speech.clips import read_manifest
from devices.browser import ort_web, site
from devices.browser.transcribe import open_site
from devices.device import DeviceProblem
from devices.runner import writers
from devices.runner.audio import SAMPLING_RATE, split
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer

HERE = "127.0.0.1"
BROWSER = Path(site.__file__).parent


def get(
    to: site.Site, name: str, method: str = "GET", body: bytes | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*to.server_address, timeout=20)
    connection.request(method, f"/{to.token}/{name}", body)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


@pytest.fixture
def without_runtime(monkeypatch):
    monkeypatch.setattr(ort_web, "files", lambda folder, say: dict.fromkeys(ort_web.FILES, b""))


# ------------------------------------------------------------------------------------- the server


def test_the_page_gets_the_graphs_the_rules_and_the_tokens(without_runtime, exported):
    rules = Recognizer(exported).rules
    served = open_site(exported, HERE)
    try:
        job = json.loads(get(served, "job.json")[1])
        assert job["rules"]["prompt"] == list(rules.prompt)
        assert job["rules"]["languages"] == rules.languages
        assert get(served, job["tokens"])[1] == (exported / "tokens.json").read_bytes()
        assert get(served, job["encoder"]["file"])[1] == (exported / "encoder.onnx").read_bytes()
        assert job["bytes"] == sum(path.stat().st_size for path in exported.glob("??coder.*"))
    finally:
        served.close()


def test_every_file_that_the_page_refers_to_is_served(without_runtime, exported):
    served = open_site(exported, HERE)
    try:
        page = get(served, "")[1].decode()
        assert 'src="transcribe.js"' in page
        for name in (path.name for path in BROWSER.glob("*.js") if path.name != "bench.js"):
            assert get(served, name) == (200, (BROWSER / name).read_bytes())
        assert "http:" not in page
        assert "https:" not in page
    finally:
        served.close()


@pytest.mark.parametrize("name", [*site.MESSAGES, "audio"])
def test_nothing_can_be_uploaded(without_runtime, exported, name):
    served = open_site(exported, HERE)
    try:
        assert get(served, name, "POST", b"{}") == (404, b"")
        assert served.page is None
    finally:
        served.close()


def test_a_folder_that_is_no_artifact_gets_an_error(tmp_path, digits):
    with pytest.raises(RunnerProblem, match=r"no manifest\.json there") as error:
        open_site(digits)
    assert "edgewhisper export" in error.value.hint


def certificate(folder: Path) -> Path:
    """A self-signed certificate with its key, written as docs/run.md describes."""
    if which("openssl") is None:
        pytest.skip("there is no openssl")
    made = folder / "page.pem"
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=edgewhisper"]
    words = ["openssl", "req", *words, "-addext", f"subjectAltName=IP:{HERE}"]
    subprocess.run([*words, "-keyout", made, "-out", made], check=True, capture_output=True)
    return made


def test_with_a_certificate_the_page_is_served_over_https(without_runtime, exported, tmp_path):
    made = certificate(tmp_path)
    served = open_site(exported, HERE, made)
    try:
        assert served.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=made)
        with socket.create_connection(served.server_address, timeout=20):  # without a handshake
            line = http.client.HTTPSConnection(*served.server_address, timeout=20, context=trusted)
            line.request("GET", f"/{served.token}/job.json")
            assert json.loads(line.getresponse().read())["most_ids"] == 32
            line.close()
    finally:
        served.close()


def test_a_bad_certificate_gets_an_error(without_runtime, exported, tmp_path):
    (tmp_path / "bad.pem").write_text("no")
    for name in ("bad.pem", "missing.pem"):
        with pytest.raises(DeviceProblem, match=f"{name}: not a PEM file") as error:
            open_site(exported, HERE, tmp_path / name)
        assert "docs/run.md" in error.value.hint


# ------------------------------------------------------------------------------------- in Chromium

ITEMS = "[...document.querySelectorAll('#segments li')]"
ROWS = f"{ITEMS}.map((li) => [...li.children].map((part) => part.textContent))"
FAKE_MICROPHONE = "--use-fake-device-for-media-stream"


@pytest.fixture(scope="module")
def served(exported) -> Iterator[site.Site]:
    """onnxruntime-web is downloaded if it is not in the cache."""
    one = open_site(exported, HERE)
    yield one
    one.close()


@pytest.fixture
def page(served, tmp_path) -> Iterator[chromium.Tab]:
    with chromium.driven(served.url, tmp_path / "profile") as tab:
        tab.wait(READY)
        yield tab


@pytest.fixture(scope="module")
def long(tmp_path_factory, clips) -> Path:
    """Clips joined to 20 s: the embedded model's window is 6 s."""
    pcm = np.concatenate([clip.pcm() for clip in read_manifest(clips)])[: 20 * SAMPLING_RATE]
    return write_wav(tmp_path_factory.mktemp("audio") / "long.wav", pcm)


def short(time_s: float) -> str:
    tenths = int(time_s * 10 + 0.5)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


@pytest.mark.devices
@pytest.mark.skipif(chromium.PROGRAM is None, reason=chromium.MISSING)
class TestInChromium:
    @pytest.mark.parametrize("timestamps", [True, False])
    def test_a_long_file_gets_the_runners_segments(self, page, exported, long, timestamps):
        page.js(f"document.getElementById('timestamps').checked = {str(timestamps).lower()}")
        expected = Recognizer(exported).transcribe(long, timestamps=timestamps)
        assert transcribed(page, long) == writers.txt(expected.as_dict())
        assert len(expected.segments) > 3
        assert page.js(ROWS) == [
            [f"{short(one.start_s)} to {short(one.end_s)}", one.text] for one in expected.segments
        ]
        assert downloaded(page, "srt") == writers.srt(expected.as_dict())

    def test_compressed_audio_is_read_by_the_browser(self, page, exported, clips):
        clip = read_manifest(clips)[0]
        assert clip.audio.suffix == ".ogg"
        assert transcribed(page, clip.audio) == f"{clip.text}\n"
        assert page.js("document.getElementById('name').textContent").startswith(clip.audio.name)

    def test_a_named_language_is_used(self, page, exported, clips, tmp_path):
        clip = read_manifest(clips)[0]
        page.js("document.getElementById('language').value = 'de'")
        path = write_wav(tmp_path / "clip.wav", clip.pcm())
        expected = Recognizer(exported).transcribe(path, language="de", timestamps=True)
        assert transcribed(page, path).strip() == expected.text
        assert page.js("document.getElementById('name').textContent").endswith("(German)")

    def test_what_is_no_audio_gets_an_error_and_the_page_stays_usable(self, page, tmp_path, long):
        for name, content in (
            ("empty.wav", b""),
            ("text.wav", b"hello " * 99),
            ("x.mp3", b"\0" * 9999),
        ):
            (tmp_path / name).write_bytes(content)
            page.choose_file("#file", tmp_path / name)
            assert page.wait(BAD).startswith(f"This browser cannot read audio from {name} (")
        assert transcribed(page, long).strip()

    def test_silence_has_no_text(self, page, tmp_path):
        assert transcribed(page, write_wav(tmp_path / "quiet.wav", np.zeros(16000))) == "\n"
        assert "there is no speech" in page.js(f"{STATE}.textContent")

    def test_cancel_ends_a_transcription(self, page, long):
        page.choose_file("#file", long)
        page.wait("!document.getElementById('cancel').hidden")
        page.js("document.getElementById('cancel').click()")
        page.wait(READY)
        assert transcribed(page, long).strip()

    @pytest.mark.parametrize("width", [320, 390, 1280])
    def test_the_page_fits_its_window(self, page, long, tmp_path, width):
        transcribed(page, long)
        page.screenshot(tmp_path / "page.png", width, 800)
        assert page.js("document.documentElement.scrollWidth") <= width

    def test_controls_have_names_and_the_state_is_announced(self, page):
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = {(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if "role" in n}
        assert ("button", "Record") in named
        assert "status" in {role for role, _ in named}
        controls = ("button", "combobox", "checkbox", "progressbar", "Pop up button")
        assert all(name for role, name in named if role in controls)

    def test_a_missing_microphone_is_explained(self, page):
        page.js("document.getElementById('record').click()")
        assert page.wait(BAD).startswith("There is no microphone on this device.")

    def test_a_denied_microphone_is_explained(self, served, tmp_path):
        with chromium.driven(served.url, tmp_path / "profile", FAKE_MICROPHONE) as tab:
            tab.wait(READY)
            permission = {"permission": {"name": "microphone"}, "setting": "denied"}
            tab.call("Browser.setPermission", **permission)
            tab.js("document.getElementById('record').click()")
            assert "does not allow this page to use the microphone" in tab.wait(BAD)

    def test_an_insecure_page_says_why_it_cannot_record(self, exported, tmp_path, clips):
        try:
            address, _ = site.where(None)
        except DeviceProblem:
            pytest.skip("this machine has no network")
        one = open_site(exported, address)
        hosts = f"MAP * ~NOTFOUND , EXCLUDE {address}"
        try:
            with chromium.driven(one.url, tmp_path / "profile", hosts=hosts) as tab:
                tab.wait(READY)
                assert tab.js("document.getElementById('record').hidden")
                note = tab.js("document.getElementById('insecure').textContent")
                assert f"this one is http://{one.authority}. " in note
                clip = read_manifest(clips)[0]
                assert transcribed(tab, clip.audio) == f"{clip.text}\n"
        finally:
            one.close()

    def test_a_certificate_enables_microphone_and_threads(self, exported, tmp_path):
        one = open_site(exported, HERE, certificate(tmp_path))
        try:
            with chromium.driven(
                one.url, tmp_path / "profile", "--ignore-certificate-errors"
            ) as tab:
                tab.wait(READY)
                assert tab.js("isSecureContext && crossOriginIsolated")
                assert not tab.js("document.getElementById('record').hidden")
        finally:
            one.close()

    def test_a_recording_is_transcribed(self, served, tmp_path, clips):
        clip = read_manifest(clips)[0]
        spoken = write_wav(tmp_path / "spoken.wav", np.concatenate([np.zeros(8000), clip.pcm()]))
        flags = (
            FAKE_MICROPHONE,
            "--use-fake-ui-for-media-stream",
            f"--use-file-for-fake-audio-capture={spoken}%noloop",
        )
        with chromium.driven(served.url, tmp_path / "profile", *flags) as tab:
            tab.wait(READY)
            tab.js("document.getElementById('record').click()")
            tab.wait(f"{STATE}.textContent >= 'Recording: 0:04'")
            tab.js("document.getElementById('record').click()")
            tab.wait(DONE)
            assert downloaded(tab, "txt") == f"{clip.text}\n"

    def test_ctrl_c_ends_the_command(self, exported):
        program = "from edgewhisper.cli import main; main()"
        command = [sys.executable, "-uc", program, "serve", str(exported), "--listen", HERE]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout.readline().startswith("open this")
            url = process.stdout.readline()
            assert url.startswith(f"http://{HERE}:")
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
        assert rest.endswith("ended\n")


@pytest.mark.devices
@pytest.mark.skipif(which("node") is None, reason="there is no node; it is installed with npm")
def test_the_page_splits_recordings_where_the_runner_does(tmp_path, long, rng):
    program = """
      import { findCut } from "%s";
      import { readFileSync } from "node:fs";
      const pcm = new Float32Array(readFileSync(process.argv[2]).buffer);
      for (const n of process.argv.slice(3).map(Number)) {
        for (let at = 0; pcm.length - at > n; console.log(at)) {
          at += findCut(pcm.subarray(at, at + n));
        }
      }
    """
    (tmp_path / "cuts.mjs").write_text(program % (BROWSER / "pauses.js"))
    pcm, _ = soundfile.read(long, dtype="float32")
    hum = 0.1 * np.sin(2 * np.pi * 50 / SAMPLING_RATE * np.arange(len(pcm)))
    pcm = np.concatenate([pcm, pcm + hum, pcm + rng.normal(0, 0.01, len(pcm))]).astype("<f4")
    (tmp_path / "x.f32").write_bytes(pcm.tobytes())
    sizes = [96_000, 65_120, 127_360]
    words = ["node", tmp_path / "cuts.mjs", tmp_path / "x.f32", *map(str, sizes)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    expected = [piece.stop for size in sizes for piece in split(pcm, size)[:-1]]
    assert [int(word) for word in found] == expected
