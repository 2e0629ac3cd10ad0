"""Files that try to reach others: ``python tests/faults/media.py`` crafts them, decodes each, and watches.

Playlists, scripts, references in containers, names that are addresses, companions. A file may be refused or read;
but while it is decoded, nothing else in its folder may be opened, nothing in a folder beside it, no address may be
asked for, and 10 s must be enough. The watcher (Linux's inotify, and a listening socket) is tried first, with ffmpeg
as it is without our options: what it does not see then, it would never see.

Exit status 1 if anything was reached.
"""

import argparse
import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 10  # seconds for a file
DECODE = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import audio
from utils import UsageError
with tempfile.TemporaryDirectory() as folder:
    try:
        print("read:", audio.decode(Path(sys.argv[2]), 8000, Path(folder))[2], "samples")
    except UsageError as error:
        print("refused:", error)
"""


# ---------------------------------------------------------------------------------------- watching


class Watcher:
    """What is opened in folders, and how many connections are made to `port`, within the block."""

    def __init__(self, *folders):
        libc = ctypes.CDLL(None, use_errno=True)
        self.number = libc.inotify_init1(os.O_NONBLOCK)
        self.folders = {}
        for folder in folders:
            watch = libc.inotify_add_watch(self.number, os.fsencode(folder), 0x20)  # IN_OPEN
            if watch < 0:
                raise OSError(ctypes.get_errno(), f"cannot watch {folder}")
            self.folders[watch] = folder
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.number)
        self.socket.close()

    def seen(self):
        """Names of files, and "a connection", since the last call; of folders that are listed, none."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.number, 65536):
                while data:
                    watch, mask, _, length = struct.unpack_from("iIII", data)
                    name = data[16 : 16 + length].rstrip(b"\0")
                    if name and not mask & 0x40000000:  # IN_ISDIR
                        found.append(str(Path(self.folders[watch], os.fsdecode(name))))
                    data = data[16 + length :]
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.accept()[0].close()
            found.append("a connection")
        return found


# ---------------------------------------------------------------------------------------- crafting


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-nostdin", *map(str, arguments)], check=True)


def atom(kind, *parts):
    data = b"".join(parts)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def with_reference(mp4, reference):
    """An .mp4 whose index comes last, with another entry for where its samples are."""
    entry = mp4.index(atom(b"url ", b"\0\0\0\1"))
    grown = mp4[:entry] + reference + mp4[entry + 12 :]
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = mp4.index(kind) - 4
        size = int.from_bytes(mp4[place : place + 4], "big") + len(reference) - 12
        grown = grown[:place] + size.to_bytes(4, "big") + grown[place + 4 :]
    return grown


def alias(path, levels=0):
    """A reference as QuickTime on a Macintosh made it: a path, or so many levels up and down its last parts."""
    name = os.path.basename(path).encode()
    head = bytes(10) + b"\4disk".ljust(28, b"\0") + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
    data = path.encode()
    record = struct.pack(">hH", 2, len(data)) + data + b"\0" * (len(data) % 2) + struct.pack(">hH", -1, 0)
    return atom(b"alis", bytes(4), head, struct.pack(">HH", levels, levels), bytes(16), record.ljust(100, b"\0"))


def element(number, data):
    return bytes.fromhex(number) + (0x10000000 | len(data)).to_bytes(4, "big") + data


def craft(media, private, port):
    """Write the files into `media`; those that they try to reach are in `private`, and at `port`.

    Returns:
        the files to decode
    """
    secret = private / "secret.mp3"
    ffmpeg("-f", "lavfi", "-i", "sine=d=2", secret)
    ffmpeg("-i", secret, private / "secret.ts")
    ffmpeg("-f", "lavfi", "-i", "testsrc=d=0.1:s=16x16", "-frames:v", "1", private / "picture.png")
    os.mkfifo(private / "pipe")
    url, up = f"http://127.0.0.1:{port}/secret.mp3", os.path.relpath(secret, media)
    ts = private / "secret.ts"

    def hls(*places, end="#EXT-X-ENDLIST\n", extra=""):
        items = "".join(f"#EXTINF:2.0,\n{place}\n" for place in places)
        return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n{extra}{items}{end}"

    def concat(place):
        return f"ffconcat version 1.0\nfile '{place}'\nduration 2\n"

    def mpd(place):
        return f"""<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet
mimeType="audio/mp4"><Representation id="1" bandwidth="1"><BaseURL>{place}</BaseURL></Representation></AdaptationSet>
</Period></MPD>"""

    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 14\n"
    texts = {
        "absolute.m3u8": hls(ts),
        "relative.m3u8": hls(os.path.relpath(ts, media)),
        "address.m3u8": hls(url),
        "file address.m3u8": hls(f"file://{ts}"),
        "pipe.m3u8": hls(private / "pipe"),
        "endless.m3u8": hls(ts, end=""),
        "key.m3u8": hls(ts, extra=f'#EXT-X-KEY:METHOD=AES-128,URI="{private / "pipe"}"\n'),
        "start.m3u8": hls(ts, extra=f'#EXT-X-MAP:URI="{secret}"\n'),
        "variant.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{media / 'absolute.m3u8'}\n",
        "rendition.m3u8": f'#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="a",URI="{media / "absolute.m3u8"}"\n'
        f'#EXT-X-STREAM-INF:BANDWIDTH=1,AUDIO="a"\n{media / "endless.m3u8"}\n',
        "song of hls.mp3": hls(ts),
        "song of hls.wav": hls(ts),
        "song of hls.flac": hls(url),
        "song of hls.m4a": hls(ts, end=""),
        "song of hls.ogg": hls(ts),
        "absolute.ffconcat": concat(secret),
        "relative.ffconcat": concat(up),
        "song of concat.mp3": concat(secret),
        "address.ffconcat": concat(url),
        "nested.ffconcat": concat(f"subfile,,start,0,end,0,,:{secret}"),
        "song.mpd": mpd(secret),
        "address.mpd": mpd(url),
        "song of dash.wav": mpd(secret),
        "song.sdp": sdp.format(port=port),
        "song of sdp.mp3": sdp.format(port=port),
        "song.m3u": f"#EXTM3U\n#EXTINF:2,song\n{secret}\n",
        "song.pls": f"[playlist]\nFile1={secret}\nNumberOfEntries=1\n",
        "song.asx": f'<asx version="3.0"><entry><ref href="{secret}"/></entry></asx>',
        "song of asf.wma": f"[Reference]\nRef1={url}\nRef2={secret}\n",
        "song.xspf": f'<playlist version="1"><trackList><track><location>file://{secret}</location></track></trackList></playlist>',
        "song.smil": f'<smil><body><seq><audio src="{secret}"/></seq></body></smil>',
        "song.rtsp": f"RTSPtext\nrtsp://127.0.0.1:{port}/secret\n",
        "song.cue": f'FILE "{secret}" MP3\n  TRACK 01 AUDIO\n    INDEX 01 00:00:00\n',
        "song.idx": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:01:000, filepos: 000000000\n",
        "song.ffmetadata": f";FFMETADATA1\ntitle={secret}\n",
        "song.imf": f'<AssetMap xmlns="http://www.smpte-ra.org/schemas/429-9/2007/AM"><Path>{secret}</Path></AssetMap>',
        "song.lavfi": f"amovie={secret}",
        "song.sbg": f"-SE\n-m {secret}\n",
        "song.svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{private / "picture.png"}"/></svg>',
    }
    files = []
    for name, text in texts.items():
        (media / name).write_text(text)
        files.append(media / name)
    os.symlink(private / "picture.png", media / "companion.sub")
    for name in ("song.sub", "._song.sd2", "frame001.png"):  # companions, which only names lead to
        (media / name).write_bytes(b"companion")
    names = ["song.sd2", "frame%03d.png", "frame*.png"]
    names += ["-i", "concat:song.sub|song.sd2", "subfile,,start,0,end,9,,:song.sub", "data:audio,x", "crypto:song.sub"]
    names += ["file:song.sub", "pipe:0", "cache:song.sub", "async:song.sub", "song.m3u8|song.sub", "tee:song.sub"]
    wav = private / "whole.wav"
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", wav)
    ffmpeg("-i", secret, private / "plain.m4a")
    mp4 = (private / "plain.m4a").read_bytes()  # which ffmpeg reads, not libsndfile
    for name in names:
        (media / name).write_bytes(b"no audio at all" if name.startswith(("frame", "song")) else mp4)
        files.append(media / name)

    binaries = {
        "alias.m4a": with_reference(mp4, alias(str(secret))),
        "alias relative.m4a": with_reference(mp4, alias(str(secret), 2)),
        "url.m4a": with_reference(mp4, atom(b"url ", bytes(4), str(secret).encode() + b"\0")),
        "url address.m4a": with_reference(mp4, atom(b"url ", bytes(4), url.encode() + b"\0")),
        "movie.mov": atom(b"ftyp", b"qt  ", bytes(4))
        + atom(
            b"moov",
            atom(b"rmra", atom(b"rmda", atom(b"rdrf", bytes(4), b"url ", struct.pack(">I", len(url)), url.encode()))),
        ),
    }
    links = element("3e83bb", str(secret).encode()) + element("3c83ab", str(secret).encode())
    links += element("3eb923", bytes(16)) + element("2ad7b1", (10**6).to_bytes(4, "big"))
    head = element("1a45dfa3", element("4282", b"matroska"))
    binaries["linked.mka"] = head + element("18538067", element("1549a966", links))
    chapter = element("6e67", bytes(16)) + element("91", b"\0") + element("73c4", b"\1")
    chapters = element("1043a770", element("45b9", element("b6", chapter)))
    binaries["chapters of others.mka"] = head + element("18538067", element("1549a966", links) + chapters)
    info = b"ISMP" + struct.pack("<I", len(str(secret))) + str(secret).encode()
    data = wav.read_bytes()
    binaries["names in it.wav"] = data + b"LIST" + struct.pack("<I", 4 + len(info)) + b"INFO" + info
    script = b"".join(struct.pack("<I", len(part)) + part for part in (b"URL", url.encode()))
    asf = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + struct.pack("<QI", 30 + 24 + len(script), 1) + b"\1\2"
    binaries["redirection.asf"] = asf + bytes(16) + struct.pack("<Q", 24 + len(script)) + script
    for name, data in binaries.items():
        (media / name).write_bytes(data)
        files.append(media / name)
    ffmpeg("-i", secret, "-attach", private / "picture.png", "-metadata:s:1", "mimetype=font/ttf", media / "font.mka")
    files.append(media / "font.mka")
    os.mkfifo(media / "pipe.wav")
    files.append(media / "pipe.wav")
    return files


# --------------------------------------------------------------------------------------- the program


def control(watcher, media, private):
    """What ffmpeg does not reach with these files when it is let to, though it should, and the watcher see it."""
    free = ["-protocol_whitelist", "file,crypto,data,http,tcp"]
    tries = {
        "absolute.ffconcat": (["-safe", "0"], str(private / "secret.mp3")),
        "absolute.m3u8": ([], str(private / "secret.ts")),
        "address.m3u8": (free, "a connection"),
        "alias.m4a": (["-enable_drefs", "1", "-use_absolute_path", "1"], str(private / "secret.mp3")),
        "song.sdp": (["-protocol_whitelist", "file,rtp,udp"], str(media / "song.sdp")),
    }
    missed = []
    for name, (options, what) in tries.items():
        command = ["ffmpeg", "-v", "quiet", "-nostdin", *options, "-i", media / name, "-t", "1", "-f", "null", "-"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=2, check=False)
        if what not in watcher.seen():
            missed.append(f"the watcher is blind: it did not see ffmpeg reach {what} with {name}")
    return missed


def run(selection=None, show=print):
    """Decode the crafted files, all or those whose names hold one of `selection`; returns a list of what went wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        media, private = Path(folder, "media"), Path(folder, "private")
        media.mkdir()
        private.mkdir()
        with Watcher(media, private) as watcher:
            found = craft(media, private, watcher.port)
            watcher.seen()
            wrong += control(watcher, media, private)
            wrong += [f"no file is named {part}" for part in selection or () if not any(part in p.name for p in found)]
            for path in found:
                if selection and not any(part in path.name for part in selection):
                    continue
                start = time.monotonic()
                command = [sys.executable, "-c", DECODE, ROOT, path.name]
                try:
                    result = subprocess.run(command, cwd=media, capture_output=True, timeout=6 * LONGEST, check=False)
                    said = (result.stdout + result.stderr).decode(errors="replace").strip()
                    if result.returncode:
                        wrong.append(f"{path.name}: {said.splitlines()[-1]}")
                except subprocess.TimeoutExpired:
                    said = "no end"
                seconds = time.monotonic() - start
                if seconds > LONGEST:
                    wrong.append(f"{path.name}: {seconds:.0f} s")
                others = sorted({name for name in watcher.seen() if name != str(path)})
                if others:
                    wrong.append(f"{path.name} reached {', '.join(others)}")
                show(f"{path.name:32} {seconds:4.1f} s  {said.splitlines()[-1] if said else ''}"[:150])
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only files whose names hold one of these")
    wrong = run(parser.parse_args().names)
    print("\n".join(wrong) or "nothing was reached")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
