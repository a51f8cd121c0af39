"""What is asked about a request before it may go on, and what comes back.

`route` makes questions, the driver gets them answered (from the decision cache and the leases when it can), and `settle`
turns the answers into a `Permit` or a `Refusal`. Nothing here does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from mesh.http import Header, RequestHead
from mesh.model import DecisionPolicy, QuotaLimit
from mesh.peer import Caller, Peer
from mesh.policy import Revision


class Asking:
    """Everything about one request that a question may depend on. One is made for a request and shared by its questions."""

    __slots__ = (
        "body",
        "body_complete",
        "caller",
        "client",
        "gateway",
        "head",
        "listener",
        "peer",
        "received",
        "route",
        "service",
        "template",
    )

    def __init__(
        self,
        head: RequestHead,
        peer: Peer,
        caller: Caller,
        gateway: str,
        listener: str,
        route: str,
        template: str,
        service: str,
        received: float,
    ) -> None:
        self.head = head
        self.peer = peer
        self.caller = caller
        self.gateway = gateway
        """`namespace/name` of the gateway."""
        self.listener = listener
        """The listener's section name."""
        self.route = route
        """The matched rule (`shop/orders#0`: the route's namespace, name and the rule's index or name)."""
        self.template = template
        """The path of the match, as configured (`/orders/**` for a prefix)."""
        self.service = service
        """`namespace/name` of the backend's service, empty if the route answers by itself."""
        self.received = received
        """When the head was complete: wall clock, seconds since the epoch."""
        self.client = ""
        """The client's address as trusted proxies or gateways tell it; empty when it is the peer's."""
        self.body: bytes | None = None
        """The bytes that a policy with `withBody` is shown; None when none asks for it."""
        self.body_complete = True
        """False when the body was longer than what a policy may see."""


class Verdict(enum.Enum):
    """The three answers to a decision. They are never mixed up: an error is not a denial, and neither is an allow."""

    ALLOW = "allow"
    DENY = "deny"
    ERROR = "error"


class DecisionQuestion(msgspec.Struct, frozen=True, gc=False):
    """May this request pass, by this policy in this revision?"""

    policy: DecisionPolicy
    asking: Asking
    revision: Revision | None
    """The revision that the asking snapshot holds; None for a policy of another provider, which has none."""


class FieldChange(msgspec.Struct, frozen=True):
    """One change of a head, as an ext_authz server asks for it (Envoy's `HeaderValueOption`)."""

    name: bytes
    """In lower case."""
    value: bytes
    action: Literal["set", "add", "append", "if_absent", "if_present"] = "set"
    """`set` replaces what is there; `add` is one field more; `append` is put behind what the first field of the name says, and does nothing
    where there is none (Envoy's `append: true`); `if_absent` adds where there is none, `if_present` replaces where there is one."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a `DecisionQuestion`."""

    verdict: Verdict
    status: int = 0
    """HTTP status for the client on a denial or an error; 0 lets the gateway choose (403, or 503 on an error)."""
    headers: tuple[Header, ...] = ()
    """Set on the request to the upstream (allow) or added to the answer to the client (deny, error)."""
    changes: tuple[FieldChange, ...] = ()
    """More changes of the request to the upstream (allow), made in this order after `headers` are set."""
    headers_to_remove: tuple[bytes, ...] = ()
    """Removed from the request to the upstream (allow)."""
    response_headers: tuple[Header, ...] = ()
    """Added to the upstream's answer (allow)."""
    response_changes: tuple[FieldChange, ...] = ()
    """Changes of the upstream's answer (allow), made in this order before `response_headers` are added."""
    body: bytes = b""
    """The denial's body, or the error's."""
    reason: str = ""
    """One sentence for people: why it was denied, or what went wrong."""
    rule: str = ""
    """Which rule decided, if the policy says so."""
    revision: str = ""
    """Digest of the revision that answered."""
    kept: bool = False
    """True when it came out of the decision cache."""
    metadata: bytes = b""
    """Dynamic metadata of the answer, as JSON; empty when there is none."""
    query_set: tuple[tuple[str, str], ...] = ()
    """Query parameters set on the request (allow): names, and values that go into the query as they are where a query may have them."""
    query_remove: tuple[str, ...] = ()
    """Query parameters removed from the request (allow), after `query_set`."""
    cause: str = ""
    """With an error, what kind it is, in one stable word for metrics (`timeout`, `unavailable`, ...)."""
    seconds: float = 0.0
    """How long it took to get; 0 when it was in hand."""


class TokenQuestion(msgspec.Struct, frozen=True, gc=False):
    """May this request spend `cost` tokens of this bucket? Or, of a concurrency limit: is there a slot?"""

    limit: QuotaLimit
    key: tuple[str, ...]
    """The values of the limit's descriptors, in their order: they name the bucket together with the limit's name."""
    cost: int = 1
    """In tokens."""


class SlotQuestion(TokenQuestion, frozen=True, gc=False):
    """Is there a slot, of a limit whose slots are shared among callers (`QuotaLimit.shares`)?"""

    caller: str = ""
    """Whose share it is of; empty where nobody has one of his own."""
    weight: int = 1
    reserve: int = 0
    """How many slots are held back from this caller; 0 from one for whom they are."""


class Grant(msgspec.Struct, frozen=True, gc=False):
    """The answer to a `TokenQuestion`."""

    admitted: bool
    remaining: int = 0
    """Tokens left in the bucket as far as is known here: a lower bound."""
    reset: float = 0.0
    """Seconds until the bucket is full again."""
    retry_after: float = 0.0
    """Seconds until enough tokens can have come back; 0 when admitted."""
    error: str = ""
    """Why the question could not be answered; `admitted` then follows the policy's failure mode."""
    headers: tuple[Header, ...] = ()
    """What a rate-limit service wants to be told to the client, in the place of our own `RateLimit` and `Retry-After`."""
    limited: bool = True
    """Whether a limit was found. A service that knows none admits."""


class Slot(Protocol):
    """A place among the requests in progress that a concurrency limit counts."""

    def release(self) -> None:
        """The request has ended, or never began. Does nothing when it was called before."""
        ...

    def on_cut(self, cut: Callable[[], object]) -> None:
        """`cut` is to end the request: called once, when the slot's lease ends and the limit is `strict`; at once, when it has."""
        ...


class SlotGrant(Grant, frozen=True, gc=False, kw_only=True):
    """The answer to the question about a concurrency limit that admits a request."""

    slot: Slot


class Decider(Protocol):
    """Answers decision questions: `pdp` provides it, the gateway's driver calls it."""

    def recall(self, question: DecisionQuestion, now: float) -> Decision | None:
        """The decision that is in hand for `question`, or None. `now` is monotonic, in seconds. Never does I/O."""
        ...

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        """Gets an answer and gives it to `done`, exactly once, within the policy's time budget; never raises."""
        ...

    def renewed(self, question: DecisionQuestion) -> DecisionQuestion:
        """`question` itself while an answer to it may be used; else, when a policy has come in force that may say otherwise, the question
        to ask in its place."""
        ...


class Lessee(Protocol):
    """Answers token questions: `quota` provides it, the gateway's driver calls it."""

    def take(self, question: TokenQuestion, now: float) -> Grant | None:
        """Spends tokens that are in hand (or refuses, when it is known that there are none), or None. Never does I/O."""
        ...

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """Gets an answer and gives it to `done`, exactly once, within the limit's time budget; never raises."""
        ...

    def give_back(self, question: TokenQuestion) -> None:
        """Returns the tokens of an admitted question whose request was refused by a later check and spent nothing. A slot is released
        instead (`SlotGrant.slot`)."""
        ...

    def charge(self, question: TokenQuestion, tokens: int) -> None:
        """Charges what the answer to an admitted request has cost beyond what it has paid: `tokens`, at least 1, which may leave its bucket
        in debt."""
        ...

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """What `ask` would answer, without spending anything (`tollhouse explain`)."""
        ...
