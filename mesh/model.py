"""The compiled configuration: listener, virtual host, route, cluster, endpoint.

Everything downstream of `mesh.compile` works on this and on nothing else. All of it is immutable and compared by value: a new `Snapshot`
shares every part that did not change with the one before it. Routing data is prepared for look-up here (dictionaries, sorted prefixes);
what it means is Gateway API's (HTTPRoute, "Precedence"), what the parts are called is Envoy's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mesh.documents import Problem
from mesh.filters import Cors, ExternalAuth, HeaderChange, Mirror, Redirect, RetryPolicy, Rewrite, Session
from mesh.policy import Revision, Share
from mesh.policy_data import DataRevision
from mesh.quota_answers import QuotaAnswer
from mesh.quota_changes import LimitChange
from mesh.quota_cost import Usage
from mesh.quota_exempt import Exempt
from mesh.quota_services import RateLimitService
from mesh.quota_shares import Shares
from mesh.quota_tables import Table
from mesh.quota_windows import Calendar
from mesh.tokens import NOT_AUTHENTICATED, Authentication

Level = Literal["mesh", "gateway", "listener", "route", "rule", "service"]
LEVELS: tuple[Level, ...] = ("mesh", "gateway", "listener", "route", "rule", "service")
"""The order in which policies are asked."""


class DecisionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled `AccessPolicy`, at one place where it is attached."""

    name: str
    """`namespace/name` of the AccessPolicy, or `mesh` for the mesh's default."""
    level: Level
    decision: str = ""
    """Rego path of the entry point (`shop.authz.decision`); empty with a provider."""
    provider: str = ""
    """`host:port` of another ext_authz server, or the cluster of `auth`; empty for our own PDP."""
    auth: ExternalAuth | None = None
    """How the provider is asked, when it is a route's filter that names it."""
    place: Literal["Central", "Local"] = "Central"
    failure_mode: Literal["Deny", "Allow"] = "Deny"
    timeout: float = 0.5
    """Seconds that one question may take."""
    body_limit: int = 0
    """Bytes of the body that the policy is shown; 0 for none."""
    body_partial: bool = False
    """Whether a longer body is cut (True) or refused with 413 (False)."""
    shadow: bool = False
    """Asked and recorded, but never enforced."""
    trial: Literal["", "shadow", "active"] = ""
    """With `shadow`: asked for the sake of a comparison, in the shadow revision, or (where a canary decides) in the active one."""
    show_reason: bool = False
    """Whether a client that is denied reads the policy's reason."""
    authorization: bool = False
    """Made of AuthorizationPolicies: asked in `Snapshot.authorization`, of a worker of the gateway's own."""
    gate: DecisionPolicy | None = None
    """With a provider, a question of `authorization` that comes first: if it allows, the provider is not asked, and that is the answer."""
    error_status: int = 0
    """What a client gets instead of 503 when a question behind a `gate` has no answer; 0 for 503."""


class Descriptor(msgspec.Struct, frozen=True):
    """One part of a bucket's name."""

    kind: Literal[
        "identity", "namespace", "route", "template", "service", "gateway", "method", "header", "cookie", "claim", "address", "constant"
    ]
    argument: str = ""
    """The name of the header, the cookie or the claim, or the constant; of an address, how many bits of it count, `24/64` (IPv4/IPv6)."""


class QuotaLimit(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled limit of a `QuotaPolicy`: a token bucket, or slots for requests in progress, for each combination of its descriptors."""

    name: str
    """`namespace/policy/limit`."""
    level: Level
    per: tuple[Descriptor, ...]
    tokens: int
    """Tokens refilled each `interval` (seconds)."""
    interval: float = 1.0
    burst: int = 1
    calendar: Calendar | None = None
    """With it, `tokens` are there in each of its windows and none are refilled; `interval` is about how long one is."""
    concurrency: int = 0
    """Requests that may be in progress at once. Above 0 it is a concurrency limit: then there are no tokens."""
    shares: Shares | None = None
    cost: int = 1
    """Tokens that a request takes."""
    failure_mode: Literal["Deny", "Allow", "Local"] = "Deny"
    strict: bool = False
    timeout: float = 0.25
    """Seconds that a request waits for the store. A QuotaPolicy says, and 20 ms if it does not."""
    shadow: bool = False
    cost_header: bytes = b""
    """A request header (lower case) that says what the request takes, `most_cost` at most; empty for none."""
    most_cost: int = 1
    exempt: tuple[Exempt, ...] = ()
    overrides: tuple[tuple[tuple[str, ...], QuotaLimit], ...] = ()
    """The same limit with other numbers, by the values of its descriptors."""
    table: str = ""
    """`namespace/name` of the QuotaOverrides that has more of them, in `Snapshot.quota_tables`; what `overrides` say comes first."""
    answer: QuotaAnswer | None = None
    """How a refusal is told; None for the answer that goes without saying."""
    changes: tuple[LimitChange, ...] = ()
    """What was changed by hand."""
    resets: tuple[tuple[tuple[str, ...], float], ...] = ()
    """When buckets were reset by hand, in seconds since the epoch, by the values of their descriptors as `shown_key` has them."""
    reset: float = 0.0
    """When this bucket was: what was known of it before counts no more."""
    service: RateLimitService | None = None
    """Who is asked instead of our own buckets; then `tokens` and `burst` may be 0."""
    usage: Usage | None = None
    most_debt: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second that are refilled."""
        return 0.0 if self.calendar is not None else self.tokens / self.interval


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One place where a cluster can be reached."""

    address: str
    """IP address in text, or a DNS name for a selector-less external service."""
    port: int
    identities: tuple[str, ...] = ()
    """SPIFFE IDs of which the endpoint must show one; empty when it is not a workload of the mesh."""
    zone: str = ""
    weight: int = 1
    name: str = ""
    """The instance's name, for people."""


class UpstreamTls(msgspec.Struct, frozen=True, kw_only=True):
    """How to speak TLS to a cluster."""

    mode: Literal["mesh", "validate"]
    """`mesh`: mutual, with the gateway's own SVID, and the peer must be one of the endpoint's `identities`.
    `validate`: BackendTLSPolicy: the peer's certificate must be for `hostname` (or one of `sans`), by `roots`."""
    sni: str = ""
    hostname: str = ""
    sans: tuple[tuple[Literal["DNS", "URI"], str], ...] = ()
    roots: bytes = b""
    """PEM of the trusted CAs; empty with `mesh` (the trust bundle) or for the system's."""
    present_svid: bool = False
    """Whether the gateway shows its own certificate under `validate`."""


class OutlierDetection(msgspec.Struct, frozen=True, kw_only=True):
    """Passive ejection, in Envoy's words."""

    consecutive_5xx: int = 5
    consecutive_gateway_errors: int = 5
    base_ejection: float = 30.0
    """Seconds; multiplied by how often the endpoint has been ejected."""
    max_ejection_percent: int = 50
    """Of the cluster's endpoints; one may always be ejected if there are at least two."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A service's port, and how to reach it."""

    name: str
    """`namespace/service:port`."""
    namespace: str
    service: str
    port: int
    endpoints: tuple[Endpoint, ...] = ()
    balancer: Literal["round_robin", "least_request"] = "round_robin"
    tls: UpstreamTls | None = None
    http2: Literal["auto", "always", "never"] = "auto"
    """`auto`: by ALPN under TLS, HTTP/1.1 in plaintext; `always`: prior knowledge in plaintext (`kubernetes.io/h2c`)."""
    within_tls: bool = False
    """Its port is for TLS (`kubernetes.io/wss`) and `tls` is None: what has been taken out of TLS is never sent there."""
    gateway: bool = False
    """True when its endpoints are other gateways of the mesh (all identities in `Mesh.trustedGateways`)."""
    external: bool = False
    """True for a service outside the mesh: internal headers are stripped before it."""
    connect_timeout: float = 5.0
    max_connections: int = 1024
    """Per worker and cluster."""
    max_pending: int = 1024
    """Requests that may wait for a connection."""
    outlier: OutlierDetection = OutlierDetection()
    proxy_protocol: Literal["", "v1", "v2"] = ""
    """The version of the PROXY protocol header that connections begin with; empty for none."""


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """One of a rule's weighted backends."""

    weight: int
    cluster: str = ""
    """Name of a cluster of the snapshot; empty when the reference is missing, forbidden or unknown: answered with 500."""
    service: str = ""
    """`namespace/name`."""
    request_headers: HeaderChange | None = None
    response_headers: HeaderChange | None = None
    rewrite: Rewrite | None = None
    """Takes the place of the rule's, for the host and for the path each."""
    redirect: Redirect | None = None
    """Whoever draws this backend is sent elsewhere."""
    mirrors: tuple[Mirror, ...] = ()
    decisions: tuple[DecisionPolicy, ...] = ()
    """Attached to the service; empty when the backend is another gateway, which will ask itself."""
    limits: tuple[QuotaLimit, ...] = ()
    authentication: Authentication = NOT_AUTHENTICATED
    """Of the service; nothing when the backend is another gateway."""


class Exemption(msgspec.Struct, frozen=True):
    """A policy above a route that is not asked about its requests."""

    policy: str
    """`namespace/name` of the AccessPolicy."""
    by: str
    """`namespace/name` of the PolicyExemption."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule of a route: what is done with the requests that match it."""

    name: str
    """`namespace/route#index` or `namespace/route#name`."""
    route: str
    """`HTTPRoute namespace/name` or `GRPCRoute namespace/name`."""
    namespace: str
    backends: tuple[Backend, ...] = ()
    request_headers: HeaderChange | None = None
    response_headers: HeaderChange | None = None
    rewrite: Rewrite | None = None
    redirect: Redirect | None = None
    cors: Cors | None = None
    mirrors: tuple[Mirror, ...] = ()
    timeout: float | None = 15.0
    """Seconds for the whole request; None for no limit."""
    timeout_unsaid: bool = False
    """Nobody has written the timeout: it does not hold for answers that stream (Server-Sent Events, gRPC)."""
    backend_timeout: float | None = None
    """Seconds for one try."""
    retry: RetryPolicy = RetryPolicy()
    session: Session | None = None
    decisions: tuple[DecisionPolicy, ...] = ()
    """In the order asked: mesh, gateway, listener, route, rule."""
    exempt: tuple[Exemption, ...] = ()
    """Policies that would be among `decisions`, had their owners not let the route out."""
    limits: tuple[QuotaLimit, ...] = ()
    grpc: bool = False
    """Whether it is a GRPCRoute's: its backends are spoken to by HTTP/2."""
    origin: str = ""
    """`routes.yaml:14`, for `explain`."""


PATH = b":path"
"""In a `HeaderMatch`: the path is meant, in its one form."""


class HeaderMatch(msgspec.Struct, frozen=True):
    """A header that must be there, with this value; `regex` is RE2 source that must match all of it."""

    name: bytes
    value: bytes = b""
    regex: str = ""


class QueryMatch(msgspec.Struct, frozen=True):
    """A query parameter (percent-decoded; the first one of its name) that must have this value."""

    name: str
    value: str = ""
    regex: str = ""


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """One way into a rule. The path has been looked at by the index that holds it."""

    rule: Rule
    path_kind: Literal["exact", "prefix", "regex"]
    path: bytes
    """Exact path, prefix without its trailing slash (empty for `/`), or RE2 source."""
    template: str
    """For people and policies: `/orders`, `/orders/**`, or the expression."""
    method: bytes = b""
    headers: tuple[HeaderMatch, ...] = ()
    queries: tuple[QueryMatch, ...] = ()


class VirtualHost(msgspec.Struct, frozen=True, kw_only=True):
    """The routes of one hostname on one listener, ready for look-up. In each tuple the first match that fits wins."""

    hostname: str
    """`shop.example`, `*.shop.example`, or `*`."""
    exact: dict[bytes, tuple[Match, ...]] = {}
    prefix: dict[bytes, tuple[Match, ...]] = {}
    """By prefix without its trailing slash; tried from the longest that the path has down to the empty one."""
    regex: tuple[Match, ...] = ()
    """Tried after exact and before prefix matches, in order."""


class ClientValidation(msgspec.Struct, frozen=True, kw_only=True):
    """What a listener demands of its clients' certificates."""

    mode: Literal["require", "optional", "insecure_fallback"] = "require"
    source: Literal["trust_bundle", "roots"] = "trust_bundle"
    """`trust_bundle`: X.509-SVIDs of the mesh (exactly one URI SAN); `roots`: any certificate signed by `roots`."""
    roots: bytes = b""


class ListenerTls(msgspec.Struct, frozen=True, kw_only=True):
    """How a listener terminates TLS."""

    svid: bool = False
    """Serve the gateway's own SVID."""
    certificates: tuple[tuple[bytes, bytes], ...] = ()
    """PEM pairs (chain, key) of the `certificateRefs`, in order. Never printed."""
    client: ClientValidation | None = None
    min_version: Literal["1.2", "1.3"] = "1.2"
    alpn: tuple[str, ...] = ("h2", "http/1.1")


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """One section of a Gateway."""

    name: str
    """Section name."""
    port: int
    protocol: Literal["HTTP", "HTTPS", "TLS", "TCP", "UDP"]
    hostname: str = "*"
    tls: ListenerTls | None = None
    """None for protocols without TLS, and where TLS is passed through."""
    hosts: dict[str, VirtualHost] = {}
    """HTTP and HTTPS: by hostname pattern (`shop.example`, `*.shop.example`, `*`)."""
    rules: dict[str, Rule] = {}
    """TLS, TCP and UDP: where connections (or flows) go, by the pattern of the name that the client asks for (SNI); `*` where there is
    none to ask for. Of a rule only the names, backends, decisions and limits mean anything here."""

    @property
    def encrypted(self) -> bool:
        """Whether clients speak TLS on it, whoever they speak it with."""
        return self.protocol in {"HTTPS", "TLS"}

    @property
    def passthrough(self) -> bool:
        """Whether TLS is spoken with the backend, and only its ClientHello is looked at here."""
        return self.protocol == "TLS" and self.tls is None


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One Gateway."""

    namespace: str
    name: str
    listeners: tuple[Listener, ...] = ()
    addresses: tuple[str, ...] = ()
    """From `spec.addresses`; empty to bind where the command line says."""
    labels: dict[str, str] = {}
    """From `spec.infrastructure`, shown and otherwise without a meaning here."""
    annotations: dict[str, str] = {}
    client_certificate: tuple[bytes, bytes] | None = None
    """PEM of the chain and key that are shown to upstreams with a BackendTLSPolicy (`spec.tls.backend`). Never printed."""
    no_client_certificate: str = ""
    """Why there is none although the Gateway names one; then nothing is sent to those upstreams. Empty otherwise."""
    authentication: Authentication = NOT_AUTHENTICATED
    """How the tokens of requests are verified, before they are routed."""
    proxy_ports: tuple[int, ...] = ()
    """Where connections from `MeshSettings.trusted_proxies` begin with a PROXY protocol header."""

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    def hosts(self, default: str) -> tuple[str, ...]:
        """The addresses to bind: the Gateway's own, else `default` (which may be empty, for all)."""
        return self.addresses or (default,)


class MeshSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The compiled `Mesh`."""

    standalone: bool = False
    """There is none: the gateway is on its own, and services get the usual headers of a proxy as if they were in the mesh."""

    trust_domain: str = "cluster.local"
    aliases: tuple[str, ...] = ()
    trusted_gateways: frozenset[str] = frozenset()
    default_policy: str = ""
    """`namespace/name` of the default AccessPolicy; empty for none."""
    default_quota: str = ""
    """The same, of the default QuotaPolicy."""
    outbound: Literal["REGISTRY_ONLY", "ALLOW_ANY"] = "REGISTRY_ONLY"
    upstream: Literal["Strict", "Permissive"] = "Permissive"
    trusted_proxies: tuple[str, ...] = ()
    """CIDRs whose x-forwarded-for is believed, and whose PROXY protocol headers at `GatewayConfig.proxy_ports`."""
    root_namespace: str = "istio-system"
    """Where policies of Istio hold for the whole mesh."""
    max_staleness: float | None = None
    """Seconds; None: the last good policy serves for as long as it must."""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """The AuthorizationPolicies in force, to be compiled together with the library that evaluates them (`conf/istio/authz.rego`)."""

    modules: dict[str, str]
    """File name to Rego source: one for each question, which picks what its rules look at."""
    data: bytes
    """The rules, JSON."""
    decisions: tuple[str, ...]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One whole configuration, in force from one instant to the next."""

    version: str
    """Digest of everything in it."""
    mesh: MeshSettings = MeshSettings()
    gateways: dict[str, GatewayConfig] = {}
    """By `namespace/name`; only those of our GatewayClass."""
    clusters: dict[str, Cluster] = {}
    policy: Revision | None = None
    """The active revision."""
    data: tuple[DataRevision, ...] = ()
    """Data with revisions of their own, for each of the three revisions."""
    shadow: Revision | None = None
    """Asked beside the one that decides, for `shadow_share`, and never enforced."""
    shadow_share: Share = Share()
    canary: Revision | None = None
    """Decides in the place of the active one, for `canary_share`."""
    canary_share: Share = Share()
    problems: tuple[Problem, ...] = ()
    program: Program | None = None
    """What `authorization` is made of; None when no AuthorizationPolicy holds anywhere."""
    authorization: Revision | None = None
    """The compiled `program`: whoever gives the snapshot out has it made, before it is in force."""
    service_authentications: tuple[Authentication, ...] = ()
    """Those that stand before Services, wherever their backends are."""
    policies: dict[str, DecisionPolicy] = {}
    """Every AccessPolicy that compiled, by `namespace/name`."""
    quota_tables: dict[str, Table] = {}
    """Every QuotaOverrides, by `namespace/name`."""


EMPTY = Snapshot(version="", mesh=MeshSettings(standalone=True))
