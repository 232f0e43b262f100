"""A package index on the loopback interface, with as many faults as real ones have; it ends when its stdin is closed.

python serve_index.py WHEEL [TARBALL] [DEB] prints its port. The first part of an address chooses how it behaves, so
that http://127.0.0.1:PORT/cut/simple is an index whose downloads break off. /cut/npm is a registry of npm with the
tarball, /cut/debian a mirror of Debian with the Debian package. /log gives the requests since it was last asked.
"""

import base64
import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

WHEEL = Path(sys.argv[1])
ARCHIVES = {Path(name).name: Path(name).read_bytes() for name in sys.argv[1:]}
SHA256 = hashlib.sha256(ARCHIVES[WHEEL.name]).hexdigest()
PIECE = 100_000
LOG: list[dict] = []
BUSY = {"busy-once": 1, "busy-file-once": 1}
SECRETS = {"Basic " + base64.b64encode(b"ada:lovelace").decode(), "Bearer a-token"}
PUBLIC = "https://registry.npmjs.org"


class Index(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        kind, _, path = self.path.lstrip("/").partition("/")
        if kind == "log":
            said = json.dumps(LOG).encode()
            LOG.clear()
            return self.reply(200, said, "application/json")
        LOG.append({"path": self.path, "range": self.headers.get("Range"), "auth": self.headers.get("Authorization")})
        try:
            if kind == "silent":
                time.sleep(20)
            if kind == "auth" and self.headers.get("Authorization") not in SECRETS:
                return self.reply(401, b"who are you?", "text/plain")
            if kind == "missing":
                return self.reply(404, b"not here", "text/plain")
            data = ARCHIVES.get(unquote(path.rpartition("/")[2]))
            if data is not None:
                return self.file(kind, data)
            return self.registry(kind, path) if path.startswith("npm/") else self.page(kind, path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def registry(self, kind, path):
        if kind == "busy" or (kind == "busy-once" and BUSY.pop(kind, 0)):
            return self.reply(503, b"busy", "text/plain")
        if kind == "garbage":
            return self.reply(200, b"[[[", "application/json")
        name = unquote(path.removeprefix("npm/"))
        base = PUBLIC if kind == "mirror" else f"http://{self.headers['Host']}/{kind}/npm"
        tarball = f"{base}/{name}/-/{name.rpartition('/')[2]}-1.2.tgz"
        versions = {"1.3" if kind == "newer" else "1.2": {"dist": {"tarball": tarball}}}
        self.reply(200, json.dumps({"name": name, "versions": versions}).encode(), "application/json")

    def page(self, kind, path):
        if kind == "busy" or (kind == "busy-once" and BUSY.pop(kind, 0)):
            return self.reply(503, b"busy", "text/plain")
        if kind == "garbage":
            return self.reply(200, b"[[[", "application/vnd.pypi.simple.v1+json")
        address = f"/{kind}/files/{WHEEL.name}"
        other = "0" * 64
        if kind == "html" or path.startswith("links"):
            page = f'<a href="{address}#sha256={SHA256}">{WHEEL.name}</a><a href="/x/tiny-9.tar.gz">tiny-9.tar.gz</a>'
            return self.reply(200, page.encode(), "text/html; charset=utf-8")
        files = [{"filename": WHEEL.name, "url": address, "hashes": {"sha256": other if kind == "other" else SHA256}}]
        if kind == "unhashed":
            files[0]["hashes"] = {}
        page = {"meta": {"api-version": "1.0"}, "name": "tiny", "files": files}
        self.reply(200, json.dumps(page).encode(), "application/vnd.pypi.simple.v1+json")

    def file(self, kind, data):
        whole = len(data)
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "/plain/" + self.path.split("/", 2)[2])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if kind == "gone" or (kind == "busy-file-once" and BUSY.pop(kind, 0)):
            return self.reply(404 if kind == "gone" else 503, b"no", "text/plain")
        first = 0
        if (asked := self.headers.get("Range")) and kind not in ("norange", "stuck"):
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= whole:
                return self.reply(416, b"", "text/plain")
        rest = (bytes(whole) if kind == "wrong" else data)[first:]
        if kind == "always-a-piece":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 1000-{whole - 1}/{whole}")
        elif first and kind == "other-range":
            rest, first = data, 0
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{whole - 1}/{whole}")
        elif first:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{whole - 1}/{whole}")
        else:
            self.send_response(200)
        if kind == "endless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if kind in ("cut", "stuck"):
            self.wfile.write(rest[:PIECE])
            self.close_connection = len(rest) > PIECE
        elif kind == "slow":
            for at in range(0, len(rest), 10_000):
                self.wfile.write(rest[at : at + 10_000])
                time.sleep(0.25)
        elif kind == "endless":
            for _ in range(1000):
                self.wfile.write(rest[:PIECE])
            self.close_connection = True
        else:
            self.wfile.write(rest)

    def reply(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until whoever started it is gone
