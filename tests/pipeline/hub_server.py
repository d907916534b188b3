"""As much of a Hub as its client needs to make, fill and read a repository, on 127.0.0.1; it stops with its block."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
from urllib.parse import unquote, urlsplit

from deltaclip.tests.features.file_server import running


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def answer(self, content=b"", *, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, status=404):
        self.answer({"error": code}, status=status, X_Error_Code=code)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):  # noqa: PLR0911 - an answer for each address
        path, body, hub = unquote(urlsplit(self.path).path), self.body(), self.server
        if not (self.headers.get("Authorization") or "").endswith(hub.token):
            return self.refuse("Unauthorized", 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, [("0" * 40, {".gitattributes": b"* text\n"})])
            return self.answer({"url": f"{hub.url}/{name}"}, status=status)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": one["path"], "uploadMode": modes[one["path"].endswith(".safetensors")], "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"objects": objects, "transfer": "basic"})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self.answer(self.commit(match[1], [json.loads(line) for line in body.splitlines()]))
        return self.refuse("NotThere")

    def commit(self, name, lines):
        files = dict(self.server.repos[name][-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{name}{len(self.server.repos[name])}".encode(), usedforsecurity=False).hexdigest()
        self.server.repos[name].append((oid, files))
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}

    def do_PUT(self):
        content = self.body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        patterns = [r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?"]
        patterns += [r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?"]
        patterns += [r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"]
        match = next((found for pattern in reversed(patterns) if (found := re.fullmatch(pattern, path))), None)
        if match is None or match["name"] not in self.server.repos:
            return self.refuse("RepoNotFound")
        commits = self.server.repos[match["name"]]
        revision = match["revision"] or "main"
        known = dict(commits) | {"main": commits[-1][1]} | ({"first": commits[1][1]} if len(commits) > 1 else {})
        if revision not in known:
            return self.refuse("RevisionNotFound")
        files = known[revision]
        oid = next(oid for oid, found in commits if found is files)
        if "file" in match.groupdict():
            return self.resolve(files, match["file"], oid)
        blobs = {name: hashlib.sha1(content, usedforsecurity=False).hexdigest() for name, content in files.items()}
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": blobs[name]}
                for name, content in files.items()
            ]
            return self.answer(entries)
        sizes = {name: self.server.sizes.get(name, len(content)) for name, content in files.items()}
        siblings = [{"rfilename": name, "size": sizes[name], "blobId": blobs[name]} for name in files]
        about = {"id": match["name"], "sha": oid, "private": False, "siblings": siblings}
        return self.answer({**about, "tags": [], "downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def resolve(self, files, name, oid):
        if name not in files:
            return self.refuse("EntryNotFound")
        self.server.fetched.append(name)
        etag = hashlib.sha1(files[name], usedforsecurity=False).hexdigest()
        return self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit=oid)


class HubServer(http.server.ThreadingHTTPServer):
    """`repos` are commits, oldest first, of files by name; `sizes` what it says of files in place of the truth."""

    daemon_threads = True
    token = "hub-token-of-the-test"  # noqa: S105 - of nothing

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.sizes, self.fetched = {}, {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_args):
        """Say nothing: a client that has ended hangs up."""


def hub():
    """Serve a Hub that is empty inside a `with` block."""
    return running(HubServer())
