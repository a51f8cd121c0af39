"""The logs that a process writes, and what is said about them on its command line."""

from __future__ import annotations

import ipaddress
import logging
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from mesh.model import DecisionPolicy
from mesh.questions import Asking
from telemetry.access_log import AccessLog
from telemetry.decision_log import DecisionLog, Sink, line_sink
from telemetry.log_upload import UPLOAD_LIMIT, LogUpload, UploadOptions, check_url
from telemetry.record import Telemetry
from tollhouse.output import Complaint
from tollhouse.runtime import Runtime

log = logging.getLogger("tollhouse.decisions")

OFF: Final = "off"
SMALLEST_UPLOAD: Final = 1024
SMALLEST_BUFFER: Final = 65536


class DecisionLogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `--decision-log` and `--decision-log-set` say."""

    to: tuple[str, ...] = ()
    """Files, `-` for standard output, URLs; none for no log."""
    which: Literal["all", "refused"] = "all"
    input: Literal["masked", "full"] = "masked"
    token: str = ""
    ca: str = ""
    upload_limit: int = UPLOAD_LIMIT
    buffer_limit: int = 16 << 20

    def arguments(self) -> list[str]:
        """The same as words of a command line."""
        words = [word for each in self.to or (OFF,) for word in ("--decision-log", each)]
        for name in SETTINGS:
            said = getattr(self, name)
            if said != getattr(DecisionLogOptions(), name):
                words += ["--decision-log-set", f"{name}={said}"]
        return words


SETTINGS: Final = ("which", "input", "token", "ca", "upload_limit", "buffer_limit")
_WORDS: Final = {"which": ("all", "refused"), "input": ("masked", "full")}
_LEAST: Final = {"upload_limit": SMALLEST_UPLOAD, "buffer_limit": SMALLEST_BUFFER}


def decision_log_options(to: tuple[str, ...], settings: tuple[str, ...]) -> DecisionLogOptions:
    """Reads the two options. Raises `Complaint`."""
    wanted = tuple(dict.fromkeys(each for each in to if each != OFF))
    if len(wanted) != len([each for each in to if each != OFF]) or (wanted and OFF in to):
        raise Complaint("--decision-log: off goes with nothing else, and no place may be named twice", 2)
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in SETTINGS:
            raise Complaint(f"--decision-log-set: {setting!r} is not NAME=VALUE with a name of {', '.join(SETTINGS)}", 2)
        if name in _WORDS and value not in _WORDS[name]:
            raise Complaint(f"--decision-log-set: {name} is {' or '.join(_WORDS[name])}, not {value!r}", 2)
        if name in _LEAST:
            if not value.isdecimal() or not _LEAST[name] <= int(value) <= 1 << 30:
                raise Complaint(f"--decision-log-set: {name} is a number of bytes from {_LEAST[name]} to {1 << 30}, not {value!r}", 2)
            found[name] = int(value)
        else:
            found[name] = value
    made = DecisionLogOptions(to=wanted, **found)
    urls = [each for each in wanted if is_url(each)]
    for url in urls:
        try:
            check_url(url)
        except ValueError as problem:
            raise Complaint(f"--decision-log: {problem}", 2) from None
        _check_secrecy(url, made)
    uploads = [name for name in ("token", "ca", "upload_limit", "buffer_limit") if name in found]
    if uploads and not urls:
        raise Complaint(f"--decision-log-set {uploads[0]} is about uploads: name an http:// or https:// URL as --decision-log", 2)
    if settings and not wanted:
        raise Complaint("--decision-log-set: there is no --decision-log to set anything of", 2)
    return made


def _check_secrecy(url: str, options: DecisionLogOptions) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or _loopback(parts.hostname or ""):
        return
    if options.token:
        raise Complaint(f"--decision-log: {url} would get the token in plaintext, off this machine: use https://", 2)
    log.warning("decisions go to %s in plaintext, and off this machine", url)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_url(where: str) -> bool:
    """Whether a place for a decision log is a server's."""
    return "://" in where


def open_telemetry(access_log: str, decisions: DecisionLogOptions, runtime: Runtime) -> Telemetry:
    """Metrics and logs; the access log is a file, `-` for standard output, or `off`. Raises `Complaint`."""
    try:
        telemetry = Telemetry(AccessLog(access_log) if access_log != OFF else None, open_decision_log(decisions) if decisions.to else None)
    except OSError as problem:
        raise Complaint(f"the log {problem.filename} cannot be written: {problem.strerror}; name another file, or off") from None
    runtime.on_reload(telemetry.reopen)
    return telemetry


def open_decision_log(options: DecisionLogOptions) -> DecisionLog:
    """The decision log that `options` ask for. Raises OSError, `Complaint`."""
    labels = {"id": str(uuid.uuid4()), "version": own_version()}
    sinks = [_upload(each, options) if is_url(each) else line_sink(each) for each in options.to]
    return DecisionLog(sinks, input_of, options.which, full=options.input == "full", labels=labels)


def _upload(url: str, options: DecisionLogOptions) -> Sink:
    made = UploadOptions(url=url, token=options.token, ca=options.ca, upload_limit=options.upload_limit, buffer_limit=options.buffer_limit)
    try:
        return Sink(LogUpload(made))
    except OSError as problem:
        named = problem.filename or options.ca
        raise Complaint(f"--decision-log-set: {named} cannot be used: {problem.strerror or problem}", 2) from None


def own_version() -> str:
    """The version of this program."""
    try:
        return version("tollhouse")
    except PackageNotFoundError:
        return "unknown"


def input_of(asking: Asking, policy: DecisionPolicy) -> dict[str, Any]:
    """The document that a policy saw; where there is none (a body that is not what it says it is), its attributes alone."""
    from pdp.input import attributes_tree, document_tree

    try:
        return document_tree(asking, policy)
    except ValueError:
        return {"attributes": attributes_tree(asking, policy)}
