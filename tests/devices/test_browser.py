"""A browser as a device: the server, the checks of a page's answers, and a real Chromium."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import socket
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from waiting import wait_until

from benchmarks.bench import BenchOptions, Candidate, bench
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from devices.browser import job, ort_web, site
from devices.browser.device import BrowserDevice, qr_code
from devices.browser.site import Site
from devices.device import DeviceProblem, Place, in_browser, open_device, places, run_runner
from devices.local import LocalDevice
from devices.runner.recognizer import Recognizer

HERE = "127.0.0.1"
AGENT = "Mozilla/5.0 (iPhone; CPU iPhone OS 19_1 like Mac OS X) Safari/604.1"
HELLO = {
    "user_agent": AGENT,
    "cores": 6,
    "cross_origin_isolated": False,
    "simd": True,
    "clock_resolution_s": 0.001,
}


@pytest.fixture
def served() -> Iterator[Site]:
    one = Site(HERE)
    one.table |= {"page.html": b"<p>page", "deep/x.bin": b"x" * 3}
    yield one
    one.close()


def request(
    to: Site, name: str = "", method: str = "GET", path: str | None = None, **how: Any
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, content and headers of the response for a name or a raw path."""
    connection = http.client.HTTPConnection(*to.server_address, timeout=20)
    connection.request(method, path or f"/{to.token}/{name}", **how)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def post(to: Site, name: str, said: Any) -> tuple[int, Any]:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    status, content, _ = request(to, name, "POST", body=body)
    return status, json.loads(content) if content else None


# ---------------------------------------------------------------------------------- who is let in


def test_clients_with_the_url_get_the_page_and_the_files_of_the_table(served):
    assert request(served)[:2] == (200, b"<p>page")
    assert request(served, "deep/x.bin")[:2] == (200, b"xxx")
    assert len(served.token) == 24  # of 144 random bits
    other = Site(HERE)
    assert other.token != served.token
    other.close()


def test_without_the_token_every_request_gets_the_same_answer(served):
    token = served.token
    other = token[:-1] + ("A" if token[-1] != "A" else "B")
    wrong = ["/", "/page.html", f"/{other}/", f"/{token[:-1]}/", f"/{token}", f"/x/{token}/"]
    answers = [request(served, path=path) for path in wrong]
    answers += [request(served, method=m, path=f"/{other}/hello") for m in ("POST", "PUT", "HEAD")]
    for status, content, headers in answers:
        headers.pop("Date")
        assert (status, content) == (404, b"")
        assert headers == {**answers[0][2], "Content-Length": "0"}
    assert served.page is None


@pytest.mark.parametrize("host", ["evil.example", "localhost:1", "", "127.0.0.1"])
def test_another_host_header_gets_nothing(served, host):
    """DNS rebinding: a foreign page may point its own host name at this machine."""
    assert request(served, headers={"Host": host})[0] == 404
    assert request(served, headers={"Host": served.authority})[0] == 200


def test_two_host_headers_get_nothing(served):
    with socket.create_connection(served.server_address, timeout=20) as line:
        hosts = f"Host: {served.authority}\r\nHost: evil.example\r\n"
        line.sendall(f"GET /{served.token}/ HTTP/1.1\r\n{hosts}\r\n".encode())
        assert b" 404 " in line.recv(1000).splitlines()[0]


@pytest.mark.parametrize(
    "name",
    ["../site.py", "deep/../page.html", "%2e%2e/x", "/etc/passwd", "deep/", "deep", "page.html?x"],
)
def test_only_names_of_the_table_are_served(served, name):
    assert request(served, name)[:2] == (404, b"")


def test_the_server_listens_on_one_address_only(served):
    assert served.server_address[0] == HERE
    with (
        pytest.raises(OSError),
        socket.create_connection(("127.0.0.2", served.server_address[1]), timeout=5),
    ):
        pass


@pytest.mark.parametrize(
    "listen", ["0.0.0.0", "phone.local", "::1", "127.0.0.1:x", "127.0.0.1:65536"]
)
def test_listen_must_be_one_address(listen):
    with pytest.raises(DeviceProblem, match="is not an IPv4 address") as error:
        Site(listen)
    assert "192.168" in error.value.hint


def test_an_address_of_another_machine_gets_an_error_message(served):
    with pytest.raises(DeviceProblem, match=r"cannot serve on 192\.0\.2\.7 port 0"):
        Site("192.0.2.7")
    with pytest.raises(DeviceProblem, match="Address already in use"):
        Site(served.authority)


def test_the_headers_enable_threads_and_forbid_other_origins(served):
    headers = request(served)[2]
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    rules = headers["Content-Security-Policy"]
    assert rules.startswith("default-src 'none'; ")
    assert not {"http:", "https:", "*", "data:", "blob:"} & set(rules.replace(";", " ").split())
    assert "python" not in headers["Server"].lower()


def test_bodies_need_a_length_below_the_limit(served):
    for length, status in (
        (site.MOST_BODY_BYTES + 1, 413),
        ("x", 411),
        ("-1", 411),
        ("9" * 20, 411),
    ):
        with socket.create_connection(served.server_address, timeout=20) as line:
            head = f"POST /{served.token}/hello HTTP/1.1\r\nHost: {served.authority}\r\n"
            line.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert f" {status} " in line.recv(1000).decode().splitlines()[0]
    assert served.page is None


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_body_that_is_not_a_json_object_is_refused(served, body):
    assert post(served, "hello", body) == (400, {})


def has_room(served: Site) -> bool:
    """Return whether another connection would be served."""
    room = served.free.acquire(blocking=False)
    if room:
        served.free.release()
    return room


def test_the_number_of_idle_connections_is_limited(served):
    lines = []
    for _ in range(site.MOST_CONNECTIONS):
        lines.append(socket.create_connection(served.server_address, timeout=20))
    wait_until(lambda: not has_room(served))
    more = socket.create_connection(served.server_address, timeout=20)
    assert more.recv(10) == b""  # closed at once
    for line in (*lines, more):
        line.close()
    wait_until(lambda: has_room(served))
    assert request(served)[0] == 200


# ------------------------------------------------------------------------------- page and job


def asked(to: Site, work: dict[str, Any]) -> tuple[list[Any], threading.Thread]:
    """Collect the results and errors of ask() in a thread."""
    found: list[Any] = []

    def wait() -> None:
        try:
            found.append(to.ask(work, 60))
        except DeviceProblem as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    return found, thread


def test_the_page_gets_the_job_and_one_answer_is_accepted(served):
    page = post(served, "hello", HELLO)[1]["page"]
    assert served.visitor(1) == HELLO
    found, thread = asked(served, {"n": 1})
    given = post(served, "next", {"page": page})[1]
    assert given["work"] == {"n": 1}
    answer = {"page": page, "job": given["id"], "result": 7}
    assert post(served, "answer", answer | {"job": "other"})[0] == 409
    assert post(served, "answer", answer | {"page": "other"})[0] == 409
    assert post(served, "answer", answer) == (200, {})
    # a repeated answer, whose response was lost, is acknowledged but ignored
    assert post(served, "answer", answer | {"result": 8}) == (200, {})
    thread.join(20)
    assert found == [answer]


def test_a_later_page_takes_over_but_not_during_a_job(served):
    first = post(served, "hello", HELLO)[1]["page"]
    second = post(served, "hello", HELLO)[1]["page"]
    assert post(served, "alive", {"page": first})[0] == 409
    found, thread = asked(served, {})
    given = post(served, "next", {"page": second})[1]
    assert post(served, "hello", HELLO) == (409, {"problem": "another page is running"})
    post(served, "answer", {"page": second, "job": given["id"]})
    thread.join(20)
    assert found


def test_after_a_round_only_the_same_browser_may_return(served):
    first = post(served, "hello", HELLO)[1]["page"]
    found, thread = asked(served, {})
    given = post(served, "next", {"page": first})[1]
    said = {"page": first, "job": given["id"]}
    assert post(served, "answer", said)[0] == 200
    thread.join(20)
    assert found
    assert post(served, "answer", said) == (200, {})  # the response was lost
    other = HELLO | {"user_agent": "another"}
    assert post(served, "hello", other) == (409, {"problem": "another browser is being measured"})
    assert post(served, "hello", HELLO)[0] == 200


def test_unsupported_options_are_refused_before_the_page_is_opened(monkeypatch, exported, clips):
    from benchmarks.bench import BenchOptions, bench
    from export.problem import Problem

    with browser(monkeypatch) as device:
        for options in (
            BenchOptions(minutes=1),
            BenchOptions(pin="big"),
            BenchOptions(governor="performance"),
        ):
            with pytest.raises(Problem, match="is not supported on browser"):
                bench(exported, device, read_manifest(clips)[:1], options)


def test_an_error_while_opening_leaves_nothing_running(monkeypatch):
    def fail(text):
        raise UnicodeEncodeError("latin-1", text, 0, 1, "no such letter")

    before = threading.active_count()
    with pytest.raises(UnicodeEncodeError), browser(monkeypatch, say=fail):
        pass
    assert threading.active_count() == before


def test_a_silent_page_gets_an_error_message(served, monkeypatch):
    monkeypatch.setattr(site, "SILENT_S", 0.2)
    post(served, "hello", HELLO)
    with pytest.raises(DeviceProblem, match="sent no answer") as error:
        served.ask({}, 60)
    assert "keep it in the foreground" in error.value.hint


def test_if_no_page_is_opened_the_error_repeats_the_url(served):
    with pytest.raises(DeviceProblem, match="was not opened") as error:
        served.visitor(0.1)
    assert served.url in str(error.value)


def test_closing_ends_waiting_calls_and_tells_the_page(served):
    page = post(served, "hello", HELLO)[1]["page"]
    _, thread = asked(served, {})
    told: list[Any] = []
    assert post(served, "next", {"page": page})[1]["work"] == {}
    served.answer = {}  # so that the page waits for another job
    polling = threading.Thread(target=lambda: told.append(post(served, "next", {"page": page})))
    before = served.last_seen_s
    polling.start()
    wait_until(lambda: served.last_seen_s > before)
    served.close()
    polling.join(20)
    thread.join(20)
    assert told == [(200, {"end": True})]
    with pytest.raises(OSError):
        request(served)


# -------------------------------------------------------------------------------- hostile answers


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory, exported, clips) -> Path:
    """A folder with an artifact and two clips, as on a device."""
    root = tmp_path_factory.mktemp("device")
    (root / "clips").mkdir()
    write_clips(read_manifest(clips)[:2], root / "clips")
    (root / "artifact").symlink_to(exported)
    return root


@pytest.fixture
def made(work_folder) -> job.Job:
    return job.make(work_folder, "artifact", work_folder / "clips/clips.json", 1)


def good_answer(made: job.Job, token: int) -> dict[str, Any]:
    """A valid result of a page: one token in every window."""
    window = {"encoder_s": 0.03, "prompt_s": [0.01], "per_token_s": [0.002], "tokens": [token]}
    clips = [
        {"wall_s": 0.05, "windows": [{**window} for _ in clip["windows"]]}
        for clip in made.work["clips"]
    ]
    return {"load_s": 0.2, "threads": 1, "memory_bytes": None, "clips": clips}


def allowed(made: job.Job, rng: np.random.Generator) -> int:
    """Return a token that is not forbidden."""
    never = {*made.work["never"], made.work["eos"]}
    return int(rng.choice([i for i in range(made.work["vocabulary"]) if i not in never]))


def test_an_answer_gets_the_form_of_the_runners(made, exported, rng):
    token = allowed(made, rng)
    found = job.answered(made, {"result": good_answer(made, token)})
    assert found["tokens"] == [[token], [token]]
    assert found["texts"] == [Recognizer(exported).text([token])] * 2
    assert found["encoder_s"] == [0.03] * 2
    assert found["peak_rss_bytes"] == "unavailable"
    assert found["versions"] == {"onnxruntime-web": ort_web.VERSION}


def put(answer: Any, path: tuple, value: Any) -> None:
    for step in path[:-1]:
        answer = answer[step]
    answer[path[-1]] = value


WINDOW = ("clips", 0, "windows", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("load_s",), -1),
        (("load_s",), math.nan),
        (("load_s",), math.inf),
        (("load_s",), True),
        (("load_s",), "0.1"),
        (("threads",), 1.0),
        (("memory_bytes",), 2**60),
        (("memory_bytes",), "much"),
        (("clips",), []),
        (("clips",), {}),
        (("clips", 0), None),
        (("clips", 0, "wall_s"), 1e9),
        (("clips", 1, "windows"), [{}] * 3),
        ((*WINDOW, "tokens"), "12"),
        ((*WINDOW, "tokens"), [-1]),
        ((*WINDOW, "tokens"), [10**30]),
        ((*WINDOW, "tokens"), [True]),
        ((*WINDOW, "tokens"), [1.0]),
        ((*WINDOW, "tokens"), [5] * 1000),
        ((*WINDOW, "tokens"), [[5]]),
        ((*WINDOW, "per_token_s"), [0.1] * 3),
        ((*WINDOW, "per_token_s"), [None]),
        ((*WINDOW, "prompt_s"), []),
        ((*WINDOW, "encoder_s"), [0.1]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_answers_that_do_not_fit_the_job_are_refused(made, rng, path, value):
    answer = good_answer(made, allowed(made, rng))
    put(answer, path, value)
    with pytest.raises(DeviceProblem, match="answer has no usable"):
        job.answered(made, {"result": answer})


@pytest.mark.parametrize("said", [{}, {"result": None}, {"result": []}, {"result": {"load_s": 1}}])
def test_an_answer_without_a_result_is_refused(made, said):
    with pytest.raises(DeviceProblem, match="answer has no usable"):
        job.answered(made, said)


def test_a_forbidden_token_is_refused(made, rng):
    for token in (made.work["eos"], int(rng.choice(made.work["never"]))):
        with pytest.raises(DeviceProblem, match="no usable tokens"):
            job.answered(made, {"result": good_answer(made, token)})


def test_fewer_threads_than_requested_are_refused(made, rng):
    made.work["threads"] = 4
    with pytest.raises(DeviceProblem, match="--threads 4, but the browser provides 1") as error:
        job.answered(made, {"result": good_answer(made, allowed(made, rng))})
    assert "leave --threads out" in error.value.hint


@pytest.mark.parametrize("error", [{"at": "decoder.onnx", "reason": "\x1b[2Jno\n" * 999}, 7, None])
def test_errors_of_the_page_are_shown_without_control_characters(made, error):
    with pytest.raises(DeviceProblem, match=r"onnxruntime-web .* failed at") as error:
        job.answered(made, {"error": error})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cores", 0),
        ("cores", 1e9),
        ("cores", True),
        ("user_agent", None),
        ("cross_origin_isolated", 1),
        ("clock_resolution_s", -1),
        ("simd", "yes"),
    ],
)
def test_a_malformed_description_of_a_browser_is_refused(name, value):
    with pytest.raises(DeviceProblem, match="sent no usable"):
        job.about(HELLO | {name: value})
    with pytest.raises(DeviceProblem, match="sent no usable"):
        job.about({key: told for key, told in HELLO.items() if key != name})


def test_a_browser_is_described_as_a_machine():
    found = job.about(HELLO | {"user_agent": f"{AGENT}\x1b[31m"})
    assert found["model"] == "iPhone; CPU iPhone OS 19_1 like Mac OS X"
    assert found["cores"] == 1  # it gives no threads to a page that is not isolated
    assert found["user_agent"].isprintable()
    assert job.about(HELLO | {"cross_origin_isolated": True})["cores"] == 6
    with pytest.raises(DeviceProblem, match="lacks WebAssembly SIMD"):
        job.about(HELLO | {"simd": False})


# ------------------------------------------------------------------------------------- the job


def test_the_job_equals_what_the_runner_would_do(made, work_folder, exported):
    recognizer = Recognizer(exported)
    for clip, path in zip(
        made.work["clips"], sorted((work_folder / "clips").glob("*.wav")), strict=True
    ):
        assert clip["prompt"] == list(recognizer.rules.prompt)
        assert clip["most"] == recognizer.rules.max_new_tokens
        (place,) = clip["windows"]
        sound = np.frombuffer(made.files[place], "<f4")
        assert (sound == job.read_wav(path)).all()
    assert made.work["windows"] == recognizer.windows
    assert made.files["artifact/encoder.onnx"] == work_folder / "artifact/encoder.onnx"


def test_long_audio_is_split_and_silence_left_out(rng):
    speech = rng.normal(0, 0.1, 48_000).astype(np.float32)
    quiet = np.zeros(80_000, np.float32)
    found = job.sounding(np.concatenate([speech, quiet, speech]), 64_000)
    assert len(found) == 2
    assert sum(np.count_nonzero(piece) for piece in found.values()) == 96_000


def test_an_artifact_of_another_layout_gets_the_runners_error(tmp_path, exported, monkeypatch):
    manifest = json.loads((exported / "manifest.json").read_text()) | {"layout": "transformers"}
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/manifest.json").write_text(json.dumps(manifest))
    with browser(monkeypatch) as device:
        device.push(tmp_path / "artifact", "artifacts/0")
        with pytest.raises(DeviceProblem, match="this runner reads 'native'") as error:
            run_runner(device, ["bench", "artifacts/0", "clips/clips.json", "--threads", "1"])
    assert "--layout native" in error.value.hint


# --------------------------------------------------------------------------------- the whole device


def browser(monkeypatch, say: Callable[[str], None] = lambda _: None) -> BrowserDevice:
    """A device with a simulated page, so that onnxruntime-web is not needed."""
    monkeypatch.setattr(ort_web, "files", lambda folder, say: dict.fromkeys(ort_web.FILES, b""))
    device = open_device("browser", HERE, say)
    assert isinstance(device, BrowserDevice)
    return device


def play(device: BrowserDevice, token: Callable[[dict], int]) -> threading.Thread:
    """Simulate a page that answers one token for every window, until there are no more jobs."""

    def talk() -> None:
        page = post(device.site, "hello", HELLO)[1]["page"]
        while not (given := post(device.site, "next", {"page": page})[1]).get("end"):
            if "id" in given:
                told = job.Job(given["work"], {}, Path())
                said = {"page": page, "job": given["id"]}
                result = good_answer(told, token(given["work"]))
                assert request(device.site, given["work"]["encoder"]["file"])[0] == 200
                post(device.site, "answer", said | {"result": result})

    thread = threading.Thread(target=talk)
    thread.start()
    return thread


def test_a_bench_goes_through_a_page(monkeypatch, exported, clips, rng):
    heard: list[str] = []
    spoken = read_manifest(clips)[:3]
    with browser(monkeypatch, heard.append) as device:
        place, folder = device.site.url, device.work
        page = play(device, lambda work: work["eos"] - 1)
        ids = Recognizer(exported)
        result = bench(exported, device, spoken, BenchOptions(repeats=2))
    page.join(20)
    assert result["device"]["name"] == "browser"
    assert result["device"]["user_agent"] == AGENT
    assert (result["threads"], result["rounds"]) == (1, 2)
    assert result["end_to_end_s"] == [0.05] * 6
    assert result["texts"] == [ids.text([ids.rules.eos - 1])] * 3
    assert result["peak_rss_bytes"] == "unavailable"
    assert not folder.exists()
    assert place in heard[0]
    assert qr_code(place) in heard[1]


def test_the_served_folder_is_private(monkeypatch):
    with browser(monkeypatch) as device:
        assert stat.S_IMODE(device.work.stat().st_mode) == 0o700


def test_a_page_runs_only_bench(monkeypatch):
    with browser(monkeypatch) as device:
        with pytest.raises(DeviceProblem, match="a page cannot run"):
            run_runner(device, ["describe"])
        for option in ("--compute-units", "--pin", "--governor"):
            with pytest.raises(DeviceProblem, match=f"{option} all: not supported in a browser"):
                run_runner(device, ["bench", "a", "c", "--threads", "1", option, "all"])


def test_a_rival_does_not_run_in_a_page(monkeypatch, digits, clips):
    from benchmarks.bench import bench_all
    from export.problem import Problem

    with browser(monkeypatch) as device:
        page = play(device, lambda work: 0)
        with pytest.raises(Problem, match="runs on this machine only, not on browser"):
            bench_all([Candidate(digits, "transformers")], device, read_manifest(clips)[:1])
    page.join(20)


def test_browser_replaces_the_phone_by_its_browser():
    assert places(in_browser(["local", "mobile"]), []) == [Place("local"), Place("browser")]
    assert in_browser(["pixel"]) == in_browser(["browser"]) == ["browser"]
    with pytest.raises(DeviceProblem, match=r"no phone is among the devices \(local, rpi4\)"):
        in_browser(["local", "rpi4"])


def test_the_qr_code_encodes_the_url():
    """The code is twice as wide as high, and fits into a terminal."""
    lines = qr_code("http://192.168.100.100:65535/" + "x" * 24 + "/").splitlines()
    assert 15 < len(lines) < 24


# ------------------------------------------------------------------------------- onnxruntime-web


def test_the_files_are_in_the_cache_folder_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ort_web.cache_folder().parent == tmp_path / "edgewhisper"


@pytest.fixture
def package(tmp_path, monkeypatch, rng) -> Path:
    """The files of the package, and an npm on the PATH that delivers them."""
    made = {name: rng.bytes(100) for name in ort_web.FILES}
    hashes = {name: hashlib.sha512(content).hexdigest() for name, content in made.items()}
    monkeypatch.setattr(ort_web, "FILES", hashes)
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name, content in made.items():
            (tmp_path / name).write_bytes(content)
            file.add(tmp_path / name, f"package/dist/{name}")
    npm = tmp_path / "bin/npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncp {archive} .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_the_runtime_is_downloaded_once(package):
    first = ort_web.files(package / "cache")
    assert ort_web.files(package / "cache") == first
    calls = (package / "calls").read_text().splitlines()
    assert calls == [f"pack onnxruntime-web@{ort_web.VERSION} --ignore-scripts --silent"]


def test_a_changed_file_is_downloaded_again(package):
    first = ort_web.files(package / "cache")
    (package / "cache" / ort_web.MODULE).write_bytes(b"changed")
    assert ort_web.files(package / "cache") == first
    assert len((package / "calls").read_text().splitlines()) == 2


def test_downloaded_files_are_verified_by_their_hashes(package, monkeypatch):
    monkeypatch.setattr(ort_web, "FILES", dict.fromkeys(ort_web.FILES, "0" * 128))
    with pytest.raises(DeviceProblem, match=r"something else than the published onnxruntime-web"):
        ort_web.files(package / "cache")
    assert not (package / "cache").exists()


def test_without_npm_the_error_explains_how_to_fill_the_folder(package, monkeypatch):
    monkeypatch.setenv("PATH", str(package))
    with pytest.raises(DeviceProblem, match="npm is not installed to download it") as error:
        ort_web.files(package / "cache")
    assert f"npm pack onnxruntime-web@{ort_web.VERSION}" in error.value.hint
    assert str(package / "cache") in error.value.hint


def test_an_npm_failure_is_reported(package):
    (package / "bin/npm").write_text("#!/bin/sh\necho 'npm ERR! ENOTFOUND' >&2; exit 7\n")
    with pytest.raises(DeviceProblem, match=r"exit code 7: npm ERR! ENOTFOUND"):
        ort_web.files(package / "cache")


# -------------------------------------------------------------------------------- a real browser

CLIPS = 6


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, digits, exported, processor) -> dict[str, Path]:
    """The embedded model, small."""
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    found = {"fp32": exported}
    for precision in ("int8", "int4", "fp16"):
        found[precision] = tmp_path_factory.mktemp("artifacts") / precision
        export_onnx(load(digits), processor, found[precision], precision)
    return found


def both(root: Path, artifact: Path, clips: Path, *threads: int) -> list[tuple[dict, dict]]:
    """Return the results of a page in Chromium and of the runner, for each number of threads."""
    found = []
    root.mkdir(exist_ok=True)
    write_clips(read_manifest(clips)[:CLIPS], root)
    with BrowserDevice(HERE) as page, LocalDevice() as local:
        local.describe()  # pushes the runner
        for device in (page, local):
            device.push(artifact, "artifacts/0")
            device.push(root, "clips")
        with chromium.opened(page.site.url, root / "profile"):
            assert page.describe()["cross_origin_isolated"] is True
            for count in threads:
                words = ["bench", "artifacts/0", "clips/clips.json", "--threads", str(count)]
                found.append((run_runner(page, words), run_runner(local, words)))
    return found


@pytest.mark.devices
@pytest.mark.skipif(chromium.PROGRAM is None, reason=chromium.MISSING)
class TestInChromium:
    """onnxruntime-web is downloaded if it is not in the cache."""

    def test_int8_gives_the_runners_tokens_on_one_thread_and_two(self, tmp_path, artifacts, clips):
        for page, local in both(tmp_path, artifacts["int8"], clips, 1, 2):
            assert page["tokens"] == local["tokens"]
            assert page["texts"] == local["texts"]
            assert any(page["texts"])
            for stage in ("encoder_s", "prompt_s", "per_token_s", "end_to_end_s"):
                assert len(page[stage]) == len(local[stage])
                assert min(page[stage]) > 0

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
    def test_other_precisions_give_the_runners_tokens(self, tmp_path, artifacts, clips, precision):
        ((page, local),) = both(tmp_path, artifacts[precision], clips, 1)
        assert page["tokens"] == local["tokens"]

    def test_weights_in_separate_files_are_loaded(
        self, tmp_path, digits, processor, clips, monkeypatch
    ):
        from edgewhisper.whisper import load
        from export.onnx import save, to_onnx

        monkeypatch.setattr(save, "LARGE", 10_000)
        to_onnx.export_onnx(load(digits), processor, tmp_path / "artifact", "fp32")
        for name in ("encoder", "decoder"):
            assert (tmp_path / f"artifact/{name}.weights").stat().st_size > 10_000
        ((page, local),) = both(tmp_path / "work", tmp_path / "artifact", clips, 1)
        assert page["tokens"] == local["tokens"]

    def test_another_name_of_this_machine_gets_nothing(self, tmp_path, monkeypatch, served):
        refused: list[str] = []
        reply = site.Handler.reply

        def noted(self: site.Handler, status: int, *rest: Any) -> None:
            refused.append(f"{status} {self.headers['Host']}")
            reply(self, status, *rest)

        monkeypatch.setattr(site.Handler, "reply", noted)
        port = served.server_address[1]
        address = f"http://phone.test:{port}/{served.token}/"
        with chromium.opened(address, tmp_path, "MAP phone.test 127.0.0.1"):
            wait_until(lambda: refused)
        assert refused[0] == f"404 phone.test:{port}"
        assert not [line for line in refused if not line.startswith("404 ")]
