"""The agent on a device: python3 there reads this text from standard input, and then requests.

A request is a line of JSON on standard input. Its answer is a line of JSON after MARK on standard
output; other output, such as a login shell's, is ignored. Files follow their request as raw bytes,
in the order and of the sizes agreed on. When standard input ends, the running command is killed and
the work folder removed.

    ~/.cache/edgewhisper/   mode 700, owned by this user; EDGEWHISPER_HOME sets another folder
        store/SHA256        every file once; work folders have links to them
        runtime/NAME/       unpacked wheels of numpy and onnxruntime, or of another program
        work/ID/            a connection's folder; ID.lock is locked while it is open

Standard library only, and no syntax newer than Python 3.7, so that an older Python can report its
version. Runs on Linux and macOS; features of only one of them are optional.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from typing import Any

MARK = "@@edgewhisper@@ "
CHUNK = 1 << 20
MOST_STDERR = 1 << 16
KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
"""Environment variables that a command inherits; thread settings would change the result."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = "make room there; `edgewhisper devices clean` removes copied files"


class Trouble(Exception):
    """An error message for the user; `hint` is what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Gone(Exception):
    """Raised when the other end has closed the connection."""


class Place:
    """The agent's private folder, and this connection's work folder in it."""

    def __init__(self, root: str) -> None:
        self.root = private(root)
        self.store, self.runtimes, self.works = (
            private(os.path.join(root, name)) for name in ("store", "runtime", "work")
        )
        for name in os.listdir(self.works):
            self.sweep(name)
        self.id, self.lock = self.claim()
        self.work = private(os.path.join(self.works, self.id))

    def sweep(self, lock: str) -> None:
        """Remove a work folder whose lock is free: its connection ended without cleanup."""
        path = os.path.join(self.works, lock)
        locked = lock_file(path) if lock.endswith(".lock") else None
        if locked is not None:
            self.drop(lock[: -len(".lock")], locked)

    def claim(self) -> tuple[str, int]:
        """Return a new name and its locked file."""
        for _ in range(100):
            name = uuid.uuid4().hex[:12]
            locked = lock_file(os.path.join(self.works, name + ".lock"))
            if locked is not None:
                return name, locked
        raise Trouble(f"no file can be locked in {self.works}", "put the home on a local disk")

    def drop(self, name: str, locked: int) -> None:
        """Remove a work folder, then its lock."""
        remove(os.path.join(self.works, name))
        remove(os.path.join(self.works, name + ".lock"))
        os.close(locked)

    def close(self) -> None:
        """Remove this connection's work folder, and all folders that are then empty."""
        self.drop(self.id, self.lock)
        with suppress(OSError):
            for folder in (self.works, self.store, self.runtimes, self.root):
                os.rmdir(folder)

    def stored(self, digest: str) -> str:
        """Return the path of a file in the store."""
        return os.path.join(self.store, digest)

    def has(self, digest: str, size: int) -> bool:
        """Return whether a complete file is in the store; a power cut may have truncated it."""
        try:
            return os.stat(self.stored(digest)).st_size == size
        except OSError:
            return False


def private(path: str) -> str:
    """Create a folder that only this user can enter; refuse another user's folder."""
    with suppress(FileExistsError):
        os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise Trouble(f"{path} is not a folder", "remove it there")
    if status.st_uid != os.getuid():
        raise Trouble(
            f"{path} belongs to user {status.st_uid}, and this is user {os.getuid()}",
            "remove it there, or log in as its owner",
        )
    os.chmod(path, 0o700)
    return path


def lock_file(path: str) -> int | None:
    """Open and lock a file; return None if another process has locked or just removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:
            return file
    os.close(file)
    return None


def remove(path: str) -> None:
    """Remove a file or a folder if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)


# ---------------------------------------------------------------------------------- the requests


def hello(place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Describe this interpreter, for the choice of wheels."""
    return {
        "python": list(sys.version_info[:3]),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "machine": platform.machine(),
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "libc": libc(),
        "macos": platform.mac_ver()[0],
        "command": sys.argv[1],
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "coremltools")},
        "runtimes": sorted(os.listdir(place.runtimes)),
    }


def libc() -> str:
    """Return the C library and its version, such as "glibc 2.36", or an empty string."""
    with suppress(ValueError, OSError, AttributeError):
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ""


def version(name: str) -> str | None:
    """Return an installed package's version without importing it, or None."""
    try:
        from importlib import metadata

        return metadata.version(name)
    except ImportError:  # not installed, or a Python without importlib.metadata
        return None


def push(place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Receive the files that are not in the store yet, then link all into the work folder."""
    files = request["files"]
    missing = {digest: size for _, digest, size in files if not place.has(digest, size)}
    space, needed = os.statvfs(place.root), sum(missing.values())
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise Trouble(
            f"{-(-needed // 10**6)} MB have to be copied, and {free // 10**6} MB are free there",
            MAKE_ROOM,
        )
    same = same_names(place, [name for name, _, _ in files])
    if same:
        raise Trouble(f"on the disk there, {same[0]} and {same[1]} are the same name")
    answer({"missing": list(missing)})
    trouble: Trouble | None = None
    for digest, size in missing.items():
        trouble = receive(place, digest, size, trouble)
    if trouble is not None:
        raise trouble
    for name, digest, _ in files:
        link(place.stored(digest), os.path.join(place.work, name))
    return {}


def same_names(place: Place, names: list[str]) -> list[str]:
    """Return two names that differ only in case, if the disk ignores case (most Macs' do)."""
    folder, own = os.path.split(place.root)
    if not os.path.exists(os.path.join(folder, own.swapcase())):
        return []
    first: dict[str, str] = {}
    pairs = ([first.setdefault(name.lower(), name), name] for name in names)
    return next((pair for pair in pairs if pair[0] != pair[1]), [])


def receive(place: Place, digest: str, left: int, trouble: Trouble | None) -> Trouble | None:
    """Receive one file into the store; after an error, only read and discard its bytes. Returns the
    error, if any. A file gets its name once it is completely on disk."""
    partial, checksum = os.path.join(place.work, ".partial"), hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            while left:
                block = read(min(left, CHUNK))
                left -= len(block)
                if trouble is None:
                    checksum.update(block)
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if trouble is None and checksum.hexdigest() != digest:
            trouble = Trouble("a file was damaged in transfer", "start again")
        if trouble is None:
            os.chmod(partial, 0o400)
            os.replace(partial, place.stored(digest))
    except OSError as error:
        trouble = trouble or unwritten(error)
        while left:
            left -= len(read(min(left, CHUNK)))
    remove(partial)
    return trouble


def link(source: str, target: str) -> None:
    """Link a file to a new name, or copy it if the file system has no links."""
    os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
    remove(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def pull(place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Send a file, or all files of a folder."""
    top = os.path.join(place.work, request["name"])
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]
    paths = [top] if os.path.isfile(top) else [path for path in paths if os.path.isfile(path)]
    if not os.path.exists(top):
        raise Trouble(f"there is no file {request['name']}")
    sizes = [os.path.getsize(path) for path in paths]
    names = [os.path.relpath(path, top) for path in paths]
    answer({"files": list(zip(names, sizes, strict=True)), "folder": os.path.isdir(top)})
    for path, left in zip(paths, sizes, strict=True):
        with open(path, "rb") as file:
            while left:
                block = file.read(min(left, CHUNK)) or bytes(min(left, CHUNK))
                sys.stdout.buffer.write(block)
                left -= len(block)
    return {}


def run(place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Run a command in the work folder until it ends, times out or the connection ends."""
    own = request["env"]
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    env.update({"ORT_DISABLE_TELEMETRY": "1"}, **own)
    if request["runtime"]:
        paths = (os.path.join(place.runtimes, request["runtime"]), own.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    pipe = subprocess.PIPE
    ends: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
    try:
        child = subprocess.Popen(
            request["argv"], cwd=place.work, env=env, start_new_session=True, **ends
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Trouble(f"{request['argv'][0]} cannot be started: {reason}") from None
    try:
        prefer_to_kill(child.pid)
        keep_awake(child.pid)
        stdout, stderr, ended = watch(child, request["timeout_s"], request["most"])
    finally:
        stop(child)
    return {
        "exit_code": child.returncode,
        "ended": ended,
        "stdout": stdout.decode("utf-8", "replace"),
        "stderr": stderr.decode("utf-8", "replace"),
    }


def prefer_to_kill(pid: int) -> None:
    """Have Linux kill the command, not the agent, when memory runs out."""
    with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write("500")


def keep_awake(pid: int) -> None:
    """Keep a Mac awake while a process runs; it does not count ssh sessions as activity."""
    if sys.platform == "darwin":
        null = subprocess.DEVNULL
        with suppress(OSError):
            words = ["caffeinate", "-i", "-w", str(pid)]
            subprocess.Popen(words, stdin=null, stdout=null, stderr=null)


def watch(child: subprocess.Popen, timeout_s: float | None, most: int) -> tuple[bytes, bytes, str]:
    """Collect a command's output; return stdout, stderr and how it ended. It ended by "itself", by
    a "timeout", or because it printed "too much"."""
    assert child.stdout is not None and child.stderr is not None
    out, err = child.stdout.fileno(), child.stderr.fileno()
    output, pipes = {out: bytearray(), err: bytearray()}, [out, err]
    ends = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    ended = "itself"
    while ended == "itself" and (pipes or child.poll() is None):
        # once a command has closed both pipes, it is polled for its end
        left = min(ends - time.monotonic(), 3600 if pipes else 0.05)
        ready = select.select([0, *pipes], [], [], max(0, left))[0]
        if 0 in ready:
            raise Gone
        for pipe in ready:
            block = os.read(pipe, CHUNK)
            output[pipe] += block
            if not block:
                pipes.remove(pipe)
        del output[err][:-MOST_STDERR]
        if len(output[out]) > most:
            ended = "too much"
        elif time.monotonic() >= ends:
            ended = "timeout"
    return bytes(output[out][:most]), bytes(output[err]), ended


def stop(child: subprocess.Popen) -> None:
    """Kill a command and all its children."""
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def keep(place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Move an unpacked and tested runtime to its name, and remove its wheels."""
    target = os.path.join(place.runtimes, request["name"])
    if not os.path.isdir(target):
        os.replace(os.path.join(place.work, request["folder"]), target)
    for digest in request["drop"]:
        remove(place.stored(digest))
    return {}


def clean(place: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Remove all copied files, unless another connection is open."""
    others = sum(name.endswith(".lock") for name in os.listdir(place.works)) - 1
    if others:
        raise Trouble(f"{place.root} is in use by {others} others", "wait until they have ended")
    kept = (place.store, place.runtimes)
    walks = [walk for folder in kept for walk in os.walk(folder)]
    freed = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in walks for name in names)
    for folder in kept:
        for name in os.listdir(folder):
            remove(os.path.join(folder, name))
    return {"folder": place.root, "bytes": freed}


REQUESTS = {f.__name__: f for f in (hello, push, pull, run, keep, clean)}


# -------------------------------------------------------------------------------- the connection


def read(count: int) -> bytes:
    """Return at least one and at most `count` bytes of standard input."""
    pipe: Any = sys.stdin.buffer
    block: bytes = pipe.read1(count)
    if not block:
        raise Gone
    return block


def answer(value: dict[str, Any]) -> None:
    """Write an answer."""
    sys.stdout.buffer.write((MARK + json.dumps(value) + "\n").encode())
    sys.stdout.buffer.flush()


def failed(error: Trouble | OSError) -> dict[str, str]:
    """Return the answer for an error."""
    trouble = unwritten(error) if isinstance(error, OSError) else error
    return {"error": str(trouble), "hint": trouble.hint}


def unwritten(error: OSError) -> Trouble:
    """Return the error for a file that cannot be written."""
    if error.errno in FULL:
        return Trouble(f"the disk there is full ({error.strerror})", MAKE_ROOM)
    return Trouble(f"{error.filename or 'a file'} cannot be written there: {error.strerror}")


def serve(place: Place) -> None:
    """Answer requests until there are no more."""
    while True:
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            return
        request = json.loads(line.decode())
        try:
            answer(REQUESTS[request["do"]](place, request))
        except BrokenPipeError:
            raise
        except (Trouble, OSError) as error:
            answer(failed(error))


def main() -> None:
    """Serve one connection, then remove its work folder."""
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        usual = os.path.join(os.path.expanduser("~"), ".cache", "edgewhisper")
        place = Place(os.environ.get("EDGEWHISPER_HOME", usual))
    except (Trouble, OSError) as error:
        answer(failed(error))
        return
    try:
        serve(place)
    except (Gone, BrokenPipeError):
        pass
    finally:
        place.close()


if __name__ == "__main__":
    main()
