"""Check whether an audio file is complete, from what its container declares.

    WAV, AIFF, W64, RF64, CAF   length of the chunk of samples
    AU, NIST                    length in the header
    FLAC                        number of samples in the header (compared after decoding)
    Ogg (Vorbis, Opus)          an end-of-stream page per stream, page numbers without a gap
    MP3                         number of frames, if the first frame has it; a complete last frame
    MP4                         length of every box
    AAC (ADTS)                  a complete last frame
    Matroska, WebM              length of the segment, if the header has it

Decoders do not report missing data. WAV is checked in devices/runner/audio/wav.py, because devices
read it too. Sources: RFC 3533 (Ogg), RFC 9639 (FLAC), EBU Tech 3306 (RF64), Apple's CAF
specification, ISO 11172-3 (MP3), the Xing header that LAME writes, ISO 14496-12 (MP4), ISO 13818-7
(ADTS), RFC 8794 (EBML).
"""

from __future__ import annotations

import re
import struct

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3")
"""The supported formats, by libsndfile's names: those whose end can be checked."""

UNKNOWN_32, UNKNOWN = 2**32 - 1, 2**62
"""Placeholder lengths of streamed files: this 32-bit number, and 64-bit numbers from this on."""
MP3_RATES = (44100, 48000, 32000)
MP3_KBITS = {
    # (is MPEG version 1, layer) -> bit rates by index; the header has 3, 2, 1 for layers I, II, III
    (True, 3): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def missing(content: memoryview, kind: str) -> str | None:
    """Return a description of what is missing at the end of a file, or None.

    `kind` is libsndfile's name of its format, or a key of compressed.CONTAINERS.
    """
    if kind == "MP4":
        return _mp4(content)
    if kind == "AAC":
        return _adts(content)
    if kind == "Matroska":
        return _matroska(content)
    if kind == "MP3":
        return _mp3(content)
    if kind == "OGG":
        return _ogg(content)
    end = _declared_end(content, kind)
    if end is None or end <= len(content):
        return None
    return f"its header declares sound up to byte {end}, but the file has {len(content)} bytes"


def with_true_length(content: memoryview) -> memoryview:
    """Return a CAF file whose header has the true length; libsndfile opens no other."""
    first, _ = _chunk(content, ">4sQ", b"data", start=8, align=1)
    if not first:
        return content
    head = bytearray(content[:first])
    struct.pack_into(">Q", head, first - 8, len(content) - first)
    return memoryview(bytes(head) + bytes(content[first:]))


def _declared_end(content: memoryview, kind: str) -> int | None:
    """Return the byte after the last sample according to the header; None if it has no length."""
    magic = bytes(content[:4])
    if kind == "NIST":
        return _nist_end(bytes(content[:1024]))
    if kind == "AU" and len(content) >= 12:
        first, size = struct.unpack_from(">II" if magic == b".snd" else "<II", content, 4)
    elif magic == b"RIFX":
        first, size = _chunk(content, ">4sI", b"data")
    elif kind == "AIFF":
        first, size = _chunk(content, ">4sI", b"SSND")
    elif kind == "CAF":
        first, size = _chunk(content, ">4sQ", b"data", start=8, align=1)
    elif kind == "W64":
        first, size = _chunk(content, "<4s12xQ", b"data", start=40, included=24, align=8)
    elif kind == "RF64" and len(content) >= 36:
        first, size = _chunk(content, "<4sI", b"data")
        if size == UNKNOWN_32:  # the size is in the chunk ds64, which comes first
            (size,) = struct.unpack_from("<Q", content, 28)
    else:
        return None
    return None if size in (0, UNKNOWN_32) or size >= UNKNOWN else first + size


def _chunk(
    content: memoryview,
    layout: str,
    chunk: bytes,
    start: int = 12,
    included: int = 0,
    align: int = 2,
) -> tuple[int, int]:
    """Return the first byte and the length of a chunk, (0, 0) if it is missing.

    `included` bytes of a chunk's header are part of its length.
    """
    header = struct.calcsize(layout)
    while start + header <= len(content):
        name, size = struct.unpack_from(layout, content, start)
        size = max(size - included, 0)
        if name == chunk:
            return start + header, size
        start += header + size
        start += -start % align
    return 0, 0


def _nist_end(header: bytes) -> int | None:
    """Return the end from a text header, which has lines such as `sample_count -i 16000`."""
    numbers = dict(re.findall(rb"(\w+) -i (\d+)", header))
    names = (b"sample_count", b"sample_n_bytes", b"channel_count")
    if not all(name in numbers for name in names[:2]):
        return None
    length = re.match(rb"NIST_1A\s+(\d+)", header)
    count, width, channels = (int(numbers.get(name, 1)) for name in names)
    return (int(length[1]) if length else 1024) + count * width * channels


def _ogg(content: memoryview) -> str | None:
    """Walk the Ogg pages; they must be complete, numbered without a gap, and end each stream."""
    place, streams = 0, dict[int, tuple[int, bool]]()
    while place < len(content):
        head = content[place : place + 27]
        if len(head) < 27 or head[:4] != b"OggS":
            return f"no complete Ogg page at byte {place} of {len(content)}"
        flags, serial, number, segments = head[5], *struct.unpack_from("<II", head, 14), head[26]
        lengths = content[place + 27 : place + 27 + segments]
        size = 27 + segments + sum(lengths)
        if len(lengths) < segments or place + size > len(content):
            return f"the Ogg page at byte {place} of {len(content)} is cut short"
        before = streams.get(serial)
        if before and number != before[0] + 1:
            return f"Ogg pages {before[0] + 1} to {number - 1} are missing"
        streams[serial] = number, bool(flags & 4)
        place += size
    if not all(ended for _, ended in streams.values()):
        return "the Ogg page that ends the stream is missing"
    return None


def _mp3(content: memoryview) -> str | None:
    """Walk the MP3 frames; the last must be complete, and their number as declared."""
    place, frames, declared = _after_id3(content), 0, None
    while (size := _mp3_frame(content, place)) is not None:
        if place + size > len(content):
            return f"the last MP3 frame, at byte {place} of {len(content)}, is cut short"
        if not frames:
            declared = _mp3_count(content[place : place + size])
        frames += 1
        place += size
        if _mp3_frame(content, place) is None and not _is_tag(content, place):
            if len(content) - place in (1, 2, 3):
                return f"the last MP3 frame, at byte {place} of {len(content)}, is cut short"
            place = _next_frame(content, place)
    # the frame with the count is not counted itself
    if declared is not None and frames - 1 < declared:
        return f"the file has {frames - 1} of {declared} MP3 frames"
    return None


def _mp4(content: memoryview) -> str | None:
    """Walk the boxes of an MP4 file; the last must be complete."""
    place = 0
    while place + 8 <= len(content):
        (size,) = struct.unpack_from(">I", content, place)
        if size == 1 and place + 16 <= len(content):  # a 64-bit size follows
            (size,) = struct.unpack_from(">Q", content, place + 8)
        if size == 0:  # to the end of the file
            return None
        if size < 8 or place + size > len(content):
            return f"the MP4 box at byte {place} of {len(content)} is cut short or damaged"
        place += size
    return None


def _adts(content: memoryview) -> str | None:
    """Walk the ADTS frames of an AAC file; the last must be complete."""
    place = 0
    while place < len(content) and content[place] == 0xFF:
        head = content[place : place + 6]
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5 if len(head) == 6 else 0
        if size < 7 or place + size > len(content):
            return f"the AAC frame at byte {place} of {len(content)} is cut short or damaged"
        place += size
    return None


def _matroska(content: memoryview) -> str | None:
    """Compare the end of the Matroska segment with the end of the file."""
    end = 0
    for _ in range(2):  # the EBML header and the segment; both identifiers have four bytes
        size, known, width = _ebml_size(content, end + 4)
        if not known:
            return None
        end += 4 + width + size
    if end <= len(content):
        return None
    return f"its header declares sound up to byte {end}, but the file has {len(content)} bytes"


def _ebml_size(content: memoryview, place: int) -> tuple[int, bool, int]:
    """Return the size of an EBML element, whether it is known, and how many bytes it is stored in.
    The number of leading zero bits of the first byte is that of the bytes after it."""
    if place >= len(content) or not content[place]:
        return 0, False, 1
    width = 9 - content[place].bit_length()
    size = int.from_bytes(content[place : place + width], "big") & ~(1 << 7 * width)
    return size, size != (1 << 7 * width) - 1, width


def _after_id3(content: memoryview) -> int:
    if content[:3] != b"ID3" or len(content) < 10:
        return 0
    size = 0
    for byte in content[6:10]:  # seven bits per byte
        size = size << 7 | byte & 127
    return 10 + size + (10 if content[5] & 16 else 0)


def _mp3_frame(content: memoryview, place: int) -> int | None:
    """Return the length in bytes of the frame that begins at a byte; None if none does."""
    if place + 4 > len(content):
        return None
    (head,) = struct.unpack_from(">I", content, place)
    version, layer, bits, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 2047 or version == 1 or not layer or bits in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = MP3_RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    padding = head >> 9 & 1
    kbits = MP3_KBITS[first, layer][bits]
    if layer == 3:
        return (12_000 * kbits // hertz + padding) * 4
    samples = 576 if layer == 1 and not first else 1152
    return samples // 8 * 1000 * kbits // hertz + padding


def _mp3_count(frame: memoryview) -> int | None:
    """Return the number of frames in a Xing or VBRI header, or None."""
    held = bytes(frame[:200])
    for tag in (b"Xing", b"Info"):
        at = held.find(tag)
        if at > 0 and len(held) >= at + 12:
            flags, count = struct.unpack_from(">II", held, at + 4)
            return count if flags & 1 else None
    at = held.find(b"VBRI")
    return struct.unpack_from(">I", held, at + 14)[0] if 0 < at <= len(held) - 18 else None


def _is_tag(content: memoryview, place: int) -> bool:
    rest = bytes(content[place : place + 8])
    return rest[:3] == b"TAG" or rest == b"APETAGEX" or not any(content[place : place + 65536])


def _next_frame(content: memoryview, place: int) -> int:
    """Return the byte where the next frame begins after other data, or the end."""
    for start in range(place, min(place + 65536, len(content))):
        size = _mp3_frame(content, start)
        if size is not None and _mp3_frame(content, start + size) is not None:
            return start
    return len(content)
