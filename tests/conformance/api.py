"""The part of the Kubernetes API over HTTP that the conformance suite uses: discovery, objects, their status, and pods' logs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.conformance.store import Body, Conflict, Kind, Store, merged

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status|log))?$"
)
_NAMESPACE = re.compile(r"/api/v1/namespaces(?:/(?P<name>[^/]+))?(?:/(?P<sub>status))?$")


def selects(selector: str, labels: dict[str, str]) -> bool:
    """Whether a label selector (equality only) fits."""
    for term in filter(None, selector.split(",")):
        name, _, value = term.replace("==", "=").partition("=")
        if labels.get(name.strip()) != value.strip():
            return False
    return True


class Api:
    """Serves a store on a loopback port."""

    def __init__(self, store: Store, kinds: list[Kind], logs: Callable[[str, str, str], str]) -> None:
        """`logs` gives what the pod `namespace`, `name` printed since a time (RFC 3339, or empty)."""
        self.store = store
        self.kinds = kinds
        self.logs = logs
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Nothing."""

            def _answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length)
                try:
                    status, said = api.answer(self.command, self.path, body)
                except Conflict as problem:
                    status, said = 409, failure(409, "AlreadyExists" if self.command == "POST" else "Conflict", str(problem))
                text = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("content-type", "text/plain" if isinstance(said, str) else "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, target: str, raw: bytes) -> tuple[int, Body | str]:
        """The answer to one request."""
        parts = urlsplit(target)
        path, query = parts.path.rstrip("/"), parse_qs(parts.query)
        if method == "GET" and (found := self._discovery(path)) is not None:
            return 200, found
        match = _NAMESPACE.match(path)
        if match is not None:
            kind, namespace, name, sub = self._kind("", "v1", "namespaces"), "", match["name"], match["sub"]
        else:
            match = _PATH.match(path)
            if match is None:
                return 404, failure(404, "NotFound", f"no path {path}")
            kind = self._kind(match["group"] or "", match["core"] or match["version"], match["plural"])
            namespace, name, sub = match["namespace"] or "", match["name"], match["sub"]
        if kind is None:
            return 404, failure(404, "NotFound", f"no resource at {path}")
        return self._object(method, kind, namespace, name, sub, query, raw)

    def _object(
        self, method: str, kind: Kind, namespace: str, name: str | None, sub: str | None, query: dict[str, list[str]], raw: bytes
    ) -> tuple[int, Body | str]:
        store = self.store
        if name is None:
            if method == "POST":
                return 201, store.create(kind, namespace, json.loads(raw))
            selector = query.get("labelSelector", [""])[0]
            items = [item for item in store.all(kind, namespace) if selects(selector, item["metadata"].get("labels") or {})]
            meta = {"resourceVersion": str(store.version)}
            return 200, {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": meta, "items": items}
        if sub == "log":
            return 200, self.logs(namespace, name, query.get("sinceTime", [""])[0])
        found = store.get(kind, namespace, name)
        if found is None:
            return 404, failure(404, "NotFound", f'{kind.plural} "{name}" not found')
        if method == "DELETE":
            store.delete(kind, namespace, name)
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if method in {"PUT", "PATCH"}:
            body = json.loads(raw)
            replaced = store.replace(kind, namespace, name, merged(found, body) if method == "PATCH" else body, status=sub == "status")
            assert replaced is not None
            return 200, replaced
        return 200, found

    def _kind(self, group: str, version: str, plural: str) -> Kind | None:
        return next((kind for kind in self.kinds if (kind.group, kind.version, kind.plural) == (group, version, plural)), None)

    def _discovery(self, path: str) -> Body | None:
        groups: dict[str, dict[str, None]] = {}
        for kind in self.kinds:
            groups.setdefault(kind.group, {})[kind.version] = None
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            listed = [_group(group, list(versions)) for group, versions in groups.items() if group]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        if path == "/api/v1":
            return self._resources("", "v1")
        found = re.fullmatch(r"/apis/([^/]+)(?:/([^/]+))?", path)
        if found is None or found[1] not in groups:
            return None
        return self._resources(found[1], found[2]) if found[2] else _group(found[1], list(groups[found[1]])) | {"kind": "APIGroup"}

    def _resources(self, group: str, version: str) -> Body:
        verbs = ["create", "delete", "get", "list", "patch", "update"]
        resources = [
            {"name": kind.plural + sub, "singularName": "", "namespaced": kind.namespaced, "kind": kind.kind, "verbs": verbs}
            for kind in self.kinds
            if (kind.group, kind.version) == (group, version)
            for sub in ("", "/status")
        ]
        named = f"{group}/{version}" if group else version
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": named, "resources": resources}


def _group(group: str, versions: list[str]) -> Body:
    known = [{"groupVersion": f"{group}/{version}", "version": version} for version in versions]
    return {"name": group, "versions": known, "preferredVersion": known[0]}


def failure(code: int, reason: str, message: str) -> Body:
    """The API's answer when it can't."""
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code}
