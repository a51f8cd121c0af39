"""What a Kubernetes API server keeps: objects by kind, namespace and name, with versions, generations and a CRD's defaults."""

from __future__ import annotations

import base64
import copy
import datetime
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Body = dict[str, Any]


class Kind:
    """One resource of the API."""

    def __init__(self, group: str, version: str, kind: str, plural: str, *, namespaced: bool = True, schema: Body | None = None) -> None:
        self.group = group
        self.version = version
        self.kind = kind
        self.plural = plural
        self.namespaced = namespaced
        self.schema = schema or {}

    @property
    def api_version(self) -> str:
        """As in an object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version


CORE = [
    Kind("", "v1", "Namespace", "namespaces", namespaced=False),
    Kind("", "v1", "Service", "services"),
    Kind("", "v1", "Secret", "secrets"),
    Kind("", "v1", "ConfigMap", "configmaps"),
    Kind("", "v1", "Pod", "pods"),
    Kind("", "v1", "ServiceAccount", "serviceaccounts"),
    Kind("", "v1", "Endpoints", "endpoints"),
    Kind("apps", "v1", "Deployment", "deployments"),
    Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    Kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False),
]


def gateway_api_kinds(folder: Path) -> tuple[list[Kind], list[Body]]:
    """The kinds that the CRDs in `folder` define, and the CRDs themselves."""
    kinds, definitions = [], []
    for path in sorted(folder.glob("*.yaml")):
        for body in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            if not body or body.get("kind") != "CustomResourceDefinition":
                continue
            definitions.append(body)
            spec = body["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    names, schema = spec["names"], version["schema"]["openAPIV3Schema"]
                    namespaced = spec["scope"] == "Namespaced"
                    kinds.append(Kind(spec["group"], version["name"], names["kind"], names["plural"], namespaced=namespaced, schema=schema))
    return kinds, definitions


def with_defaults(value: Any, schema: Body) -> Any:
    """Fills in what a CRD's schema has as defaults, as an API server does."""
    if isinstance(value, dict):
        for name, part in (schema.get("properties") or {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                value[name] = with_defaults(value[name], part)
    elif isinstance(value, list):
        return [with_defaults(item, schema.get("items") or {}) for item in value]
    return value


Place = tuple[str, str, str]
"""Plural with its group (`httproutes.gateway.networking.k8s.io`), namespace and name."""


class Conflict(Exception):
    """The object is there already, or another version of it."""


class Store:
    """Owns the objects. Any thread may call; `changed` is called (under the lock) after each change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[Place, Body] = {}
        self.version = 1
        self.changed: Callable[[str], None] = lambda plural: None

    @staticmethod
    def family(kind: Kind) -> str:
        """What objects of all versions of a kind are kept under."""
        return f"{kind.plural}.{kind.group}"

    def get(self, kind: Kind, namespace: str, name: str) -> Body | None:
        """One object, in the version of `kind`."""
        with self.lock:
            found = self.objects.get((self.family(kind), namespace, name))
            return None if found is None else {**copy.deepcopy(found), "apiVersion": kind.api_version}

    def all(self, kind: Kind, namespace: str = "") -> list[Body]:
        """The objects of a kind, in one namespace or in all."""
        with self.lock:
            wanted = self.family(kind)
            return [
                {**copy.deepcopy(body), "apiVersion": kind.api_version}
                for (family, space, _), body in sorted(self.objects.items())
                if family == wanted and namespace in ("", space)
            ]

    def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """Adds an object. Raises `Conflict`."""
        with self.lock:
            body = with_defaults(copy.deepcopy(body), kind.schema)
            meta = body.setdefault("metadata", {})
            if not meta.get("name") and meta.get("generateName"):
                meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
            place = (self.family(kind), namespace, meta["name"])
            if place in self.objects:
                raise Conflict(f"{kind.kind} {namespace}/{meta['name']} already exists")
            if kind.namespaced:
                meta["namespace"] = namespace
            now = datetime.datetime.now(datetime.UTC)
            meta |= {"uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ")}
            if kind.kind == "Secret":
                data = body.setdefault("data", {})
                data |= {name: base64.b64encode(text.encode()).decode() for name, text in (body.pop("stringData", None) or {}).items()}
            body |= {"kind": kind.kind, "apiVersion": kind.api_version}
            self._put(place, body)
            return copy.deepcopy(body)

    def replace(self, kind: Kind, namespace: str, name: str, body: Body, *, status: bool = False) -> Body | None:
        """Replaces an object, or only its status; None when there is none. Raises `Conflict`."""
        with self.lock:
            place = (self.family(kind), namespace, name)
            before = self.objects.get(place)
            if before is None:
                return None
            body = with_defaults(copy.deepcopy(body), kind.schema)
            wanted = (body.get("metadata") or {}).get("resourceVersion")
            if wanted and wanted != before["metadata"]["resourceVersion"]:
                raise Conflict(f"{kind.kind} {namespace}/{name} has been modified")
            if status:
                after = {**before, "status": body.get("status") or {}}
            else:
                kept = {key: before["metadata"][key] for key in ("uid", "generation", "creationTimestamp")}
                after = {**body, "metadata": {**body["metadata"], **kept}}
                if "status" in before and kind.group:
                    after["status"] = before["status"]
                if after.get("spec") != before.get("spec"):
                    after["metadata"]["generation"] += 1
            after |= {"kind": kind.kind, "apiVersion": kind.api_version}
            if after != before:
                after["metadata"] = {**after["metadata"]}
                self._put(place, after)
            return copy.deepcopy(after)

    def delete(self, kind: Kind, namespace: str, name: str) -> bool:
        """Removes an object; a namespace with everything in it. False when there is none."""
        with self.lock:
            if self.objects.pop((self.family(kind), namespace, name), None) is None:
                return False
            self.changed(self.family(kind))
            if kind.kind == "Namespace":
                for place in [place for place in self.objects if place[1] == name]:
                    del self.objects[place]
                    self.changed(place[0])
            return True

    def _put(self, place: Place, body: Body) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.objects[place] = body
        self.changed(place[0])

    def every(self) -> Iterator[tuple[Place, Body]]:
        """Everything there is, copied."""
        with self.lock:
            yield from copy.deepcopy(sorted(self.objects.items()))


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
