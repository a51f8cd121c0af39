"""Every way that a request can end without its upstream's answer: one small class each.

Status, response flag and sentence are read from here by the access log, the metrics, the trace and `explain`. Flags are
Envoy's own letters (envoyproxy.io, "Access logging", RESPONSE_FLAGS) where it has one.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from mesh.http import Header


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request got no further, and what its client is told."""

    status: ClassVar[int] = 500
    flag: ClassVar[str] = "-"
    """Response flag."""
    details: ClassVar[str] = "refused"
    """Envoy's response code details: a stable snake_case word for logs and metrics."""
    sentence: ClassVar[str] = "The request was refused."
    """What the client reads."""
    close: ClassVar[bool] = False
    """Whether the connection can't go on after it (its framing is in doubt)."""

    reason: str = ""
    """More than the sentence, for the log and `explain`; not shown to the client."""
    told: str = ""
    """What the client reads in place of the sentence; empty for the sentence."""
    code: int = 0
    """Status to answer with in place of the class's own; 0 for the class's own."""
    headers: tuple[Header, ...] = ()
    """More headers for the answer."""
    body: bytes | None = None
    """Body in place of the sentence."""
    parts: tuple[bytes, ...] = ()
    """Body in place of the sentence, with the request's id to come between each two of these."""

    @property
    def answer_status(self) -> int:
        """The HTTP status that the client gets."""
        return self.code or self.status


class BadRequest(Refusal, frozen=True, kw_only=True):
    """Framing or syntax that cannot be trusted (request smuggling included): the connection ends."""

    status: ClassVar[int] = 400
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "downstream_protocol_error"
    sentence: ClassVar[str] = "The request is not valid HTTP."
    close: ClassVar[bool] = True


class BadPath(Refusal, frozen=True, kw_only=True):
    """Escaped slashes, backslashes, NULs and the like."""

    status: ClassVar[int] = 400
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "path_ambiguous"
    sentence: ClassVar[str] = "The path is not one that can be understood in only one way."


class BadHeader(Refusal, frozen=True, kw_only=True):
    """A header name with an underscore at the edge, for one."""

    status: ClassVar[int] = 400
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "header_not_allowed"
    sentence: ClassVar[str] = "A header of the request is not allowed here."


class HeadTooLarge(Refusal, frozen=True, kw_only=True):
    """The request's headers are too large."""

    status: ClassVar[int] = 431
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "request_headers_too_large"
    sentence: ClassVar[str] = "The request's headers are too large."
    close: ClassVar[bool] = True


class TargetTooLong(Refusal, frozen=True, kw_only=True):
    """The request target is too long."""

    status: ClassVar[int] = 414
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "request_target_too_long"
    sentence: ClassVar[str] = "The request target is too long."
    close: ClassVar[bool] = True


class HeadTimeout(Refusal, frozen=True, kw_only=True):
    """The request's headers did not arrive in time."""

    status: ClassVar[int] = 408
    flag: ClassVar[str] = "DT"
    details: ClassVar[str] = "request_header_timeout"
    sentence: ClassVar[str] = "The request's headers did not arrive in time."
    close: ClassVar[bool] = True


class IdleTimeout(Refusal, frozen=True, kw_only=True):
    """Nothing arrived for too long."""

    status: ClassVar[int] = 408
    flag: ClassVar[str] = "SI"
    details: ClassVar[str] = "stream_idle_timeout"
    sentence: ClassVar[str] = "Nothing arrived for too long."
    close: ClassVar[bool] = True


class VersionNotSupported(Refusal, frozen=True, kw_only=True):
    """This HTTP version is not served here."""

    status: ClassVar[int] = 505
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "http_version_not_supported"
    sentence: ClassVar[str] = "This HTTP version is not served here."
    close: ClassVar[bool] = True


class ExpectationFailed(Refusal, frozen=True, kw_only=True):
    """The expectation cannot be met."""

    status: ClassVar[int] = 417
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "expectation_failed"
    sentence: ClassVar[str] = "The expectation cannot be met."


class MethodNotAllowed(Refusal, frozen=True, kw_only=True):
    """CONNECT and TRACE, where nothing serves them."""

    status: ClassVar[int] = 405
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "method_not_allowed"
    sentence: ClassVar[str] = "This method is not served here."


class Misdirected(Refusal, frozen=True, kw_only=True):
    """The connection's SNI chose other TLS settings than the authority's listener has."""

    status: ClassVar[int] = 421
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "misdirected_request"
    sentence: ClassVar[str] = "This connection does not serve the host that was asked for."


class UnidentifiedPeer(Refusal, frozen=True, kw_only=True):
    """A client certificate is needed here."""

    status: ClassVar[int] = 401
    flag: ClassVar[str] = "UAEX"
    details: ClassVar[str] = "peer_without_identity"
    sentence: ClassVar[str] = "A client certificate is needed here."


class BodyTooLarge(Refusal, frozen=True, kw_only=True):
    """Longer than what a policy with withBody may be shown."""

    status: ClassVar[int] = 413
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "payload_too_large"
    sentence: ClassVar[str] = "The request's body is too large."
    close: ClassVar[bool] = True


class NoRoute(Refusal, frozen=True, kw_only=True):
    """No route leads there."""

    status: ClassVar[int] = 404
    flag: ClassVar[str] = "NR"
    details: ClassVar[str] = "route_not_found"
    sentence: ClassVar[str] = "No route leads there."


class NoHost(Refusal, frozen=True, kw_only=True):
    """This host is not served here."""

    status: ClassVar[int] = 404
    flag: ClassVar[str] = "NR"
    details: ClassVar[str] = "virtual_host_not_found"
    sentence: ClassVar[str] = "This host is not served here."


class PlaintextTunnel(Refusal, frozen=True, kw_only=True):
    """Something else than TLS through a tunnel to a service that is to be spoken to in TLS only."""

    status: ClassVar[int] = 400
    flag: ClassVar[str] = "DPE"
    details: ClassVar[str] = "tunnel_not_tls"
    sentence: ClassVar[str] = "Only TLS may go through this tunnel."


class BrokenBackend(Refusal, frozen=True, kw_only=True):
    """A backendRef that is missing, forbidden or unknown (Gateway API: 500)."""

    status: ClassVar[int] = 500
    flag: ClassVar[str] = "NC"
    details: ClassVar[str] = "cluster_not_found"
    sentence: ClassVar[str] = "The route's backend is not there."


class InvalidToken(Refusal, frozen=True, kw_only=True):
    """The request's token is not believed (401), or is for somebody else (403)."""

    status: ClassVar[int] = 401
    flag: ClassVar[str] = "UAEX"
    details: ClassVar[str] = "jwt_authn_access_denied"
    sentence: ClassVar[str] = "The token is not valid."


class Denied(Refusal, frozen=True, kw_only=True):
    """The policy said no."""

    status: ClassVar[int] = 403
    flag: ClassVar[str] = "UAEX"
    details: ClassVar[str] = "ext_authz_denied"
    sentence: ClassVar[str] = "Policy does not allow this request."


class PolicyError(Refusal, frozen=True, kw_only=True):
    """The question got no answer: not a denial."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "UAEE"
    details: ClassVar[str] = "ext_authz_error"
    sentence: ClassVar[str] = "The policy could not be asked."


class PolicyStale(Refusal, frozen=True, kw_only=True):
    """Mesh.policy.maxStaleness has passed since the last contact with the configuration source."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "UAEE"
    details: ClassVar[str] = "policy_stale"
    sentence: ClassVar[str] = "The policy in force is older than it may be."


class QuotaRefusal(Refusal, frozen=True, kw_only=True):
    """A limit has refused the request."""

    limit: str = ""
    """`namespace/policy/limit`."""


class OverQuota(QuotaRefusal, frozen=True, kw_only=True):
    """Too many requests: slow down."""

    status: ClassVar[int] = 429
    flag: ClassVar[str] = "RL"
    details: ClassVar[str] = "rate_limited"
    sentence: ClassVar[str] = "Too many requests: slow down."

    retry_after: float = 0.0
    """Seconds until it may be tried again; 0 where nothing is said of it."""


class QuotaError(QuotaRefusal, frozen=True, kw_only=True):
    """The question got no answer, and the policy says Deny then."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "RLSE"
    details: ClassVar[str] = "rate_limiter_error"
    sentence: ClassVar[str] = "The quota could not be asked."


class NoEndpoint(Refusal, frozen=True, kw_only=True):
    """No endpoint of the service is there to answer."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "UH"
    details: ClassVar[str] = "no_healthy_upstream"
    sentence: ClassVar[str] = "No endpoint of the service is there to answer."


class ConnectFailed(Refusal, frozen=True, kw_only=True):
    """The service could not be reached."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "UF"
    details: ClassVar[str] = "upstream_connection_failure"
    sentence: ClassVar[str] = "The service could not be reached."


class UpstreamIdentity(Refusal, frozen=True, kw_only=True):
    """TLS to the endpoint failed, or its certificate is not one of those expected."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "UF"
    details: ClassVar[str] = "upstream_identity_mismatch"
    sentence: ClassVar[str] = "The service could not prove who it is."


class UpstreamReset(Refusal, frozen=True, kw_only=True):
    """The service ended the connection before it answered."""

    status: ClassVar[int] = 502
    flag: ClassVar[str] = "UC"
    details: ClassVar[str] = "upstream_reset_before_response"
    sentence: ClassVar[str] = "The service ended the connection before it answered."

    reset: int = -1
    """The code of the RST_STREAM that it sent (RFC 9113 section 7); negative when the whole connection ended."""


class UpstreamProtocol(Refusal, frozen=True, kw_only=True):
    """The service's answer is not valid HTTP."""

    status: ClassVar[int] = 502
    flag: ClassVar[str] = "UPE"
    details: ClassVar[str] = "upstream_protocol_error"
    sentence: ClassVar[str] = "The service's answer is not valid HTTP."


class UpstreamTimeout(Refusal, frozen=True, kw_only=True):
    """The service did not answer in time."""

    status: ClassVar[int] = 504
    flag: ClassVar[str] = "UT"
    details: ClassVar[str] = "upstream_response_timeout"
    sentence: ClassVar[str] = "The service did not answer in time."


class Overflow(Refusal, frozen=True, kw_only=True):
    """Too many requests wait for the service."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "UO"
    details: ClassVar[str] = "upstream_overflow"
    sentence: ClassVar[str] = "Too many requests wait for the service."


class Overloaded(Refusal, frozen=True, kw_only=True):
    """The gateway has no room for this request."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "OM"
    details: ClassVar[str] = "overload"
    sentence: ClassVar[str] = "The gateway has no room for this request."
    close: ClassVar[bool] = True


class LocalReset(Refusal, frozen=True, kw_only=True):
    """The gateway ended a connection that was still in use: it stops, or the listener has gone. Nobody reads it; it is recorded."""

    status: ClassVar[int] = 503
    flag: ClassVar[str] = "LR"
    details: ClassVar[str] = "local_reset"
    sentence: ClassVar[str] = "The gateway ended the connection."
    close: ClassVar[bool] = True


class InternalError(Refusal, frozen=True, kw_only=True):
    """A defect of the gateway's own: this request alone ends, and the log has the trace."""

    status: ClassVar[int] = 500
    flag: ClassVar[str] = "IE"
    details: ClassVar[str] = "internal_error"
    sentence: ClassVar[str] = "The gateway could not carry the request out."
    close: ClassVar[bool] = True


class ClientGone(Refusal, frozen=True, kw_only=True):
    """Nobody reads this one; it is recorded."""

    status: ClassVar[int] = 499
    flag: ClassVar[str] = "DC"
    details: ClassVar[str] = "downstream_disconnect"
    sentence: ClassVar[str] = "The client went away."
    close: ClassVar[bool] = True
