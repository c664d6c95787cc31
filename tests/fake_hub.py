"""As much of the Hugging Face Hub as it takes to upload an agent and to download it again, on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

#: The only one who can create and change repositories
USER, TOKEN = "somebody", "hf_fake"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        match unquote(urlsplit(self.path).path).split("/")[1:]:
            case ["api", "models", user, name, *what] | [user, name, *what]:
                repo = f"{user}/{name}"
        if repo not in self.server.commits:
            return self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files, sha = self.server.files(repo), f"{len(self.server.commits[repo]):040x}"
        match what:
            case [] | ["revision", _]:
                self.reply({"id": repo, "sha": sha})
            case ["tree", _]:
                self.reply([{"type": "file", "path": path, "size": len(f), "oid": oid(f)} for path, f in files.items()])
            case ["resolve", _, *parts] if "/".join(parts) in files:
                content = files["/".join(parts)]
                self.reply(content, headers={"ETag": f'"{oid(content)}"', "X-Repo-Commit": sha})
            case _:
                self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        # Always read what was sent: the connection is used again
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        match urlsplit(self.path).path.split("/")[1:]:
            case ["api", "repos", "create"]:
                repo = f"{lines[0]['organization']}/{lines[0]['name']}"
                if lines[0]["organization"] != USER:
                    return self.reply({"error": "You don't have the rights to create a model here"}, 403)
                known = repo in self.server.commits
                self.server.commits.setdefault(repo, [{".gitattributes": b"*.zip filter=lfs diff=lfs merge=lfs -text\n"}])
                self.reply({"url": f"{self.server.url}/{repo}"}, 409 if known else 200)
            case ["api", "validate-yaml"]:
                self.reply({"warnings": [], "errors": []})
            case ["api", "models", _, _, "preupload", _]:
                mode = {"uploadMode": "regular", "shouldIgnore": False}  # Not through large file storage
                self.reply({"files": [{"path": file["path"], **mode} for file in lines[0]["files"]]})
            case ["api", "models", user, name, "commit", _]:
                files = [line["value"] for line in lines if line["key"] != "header"]
                commit = {file["path"]: base64.b64decode(file["content"]) for file in files}
                self.server.commits[f"{user}/{name}"].append(commit)
                self.reply({"commitUrl": f"{self.server.url}/{user}/{name}/commit/main", "commitOid": "main"})
            case _:
                self.reply({"error": "Not a part of the fake"}, 404)

    def reply(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Say nothing."""


def oid(content):
    """The name that git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Runs within a ``with`` statement. Has a list of commits per repository, each the files that it has added."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits = {}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.05]).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def files(self, repo):
        return {path: content for commit in self.commits[repo] for path, content in commit.items()}
