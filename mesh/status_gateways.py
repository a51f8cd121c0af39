"""The status of Gateways and ListenerSets, and of each of their listeners."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from mesh.compile_attach import covers
from mesh.compile_listeners import GatewayPart, ListenerPart
from mesh.compile_tls import Fault
from mesh.conditions import Conditions
from mesh.documents import Key
from mesh.kinds_gateway import GATEWAY_GROUP
from mesh.material import ends, names

Attached = Mapping[tuple[Key, str], int]
"""How many routes a listener of a Gateway or ListenerSet has, by its owner and name."""


def gateway_status(conditions: Conditions, part: GatewayPart, attached: Attached) -> dict[str, Any]:
    """The status of a Gateway of ours. `conditions` are empty, and about the Gateway."""
    key = Key(GATEWAY_GROUP, "Gateway", part.namespace, part.name)
    own = [each for each in part.listeners if each.owner == key]
    wrong = next((fault for fault in part.faults if fault.condition == "Accepted"), None)
    _summary(conditions, own, wrong, "Invalid")
    unresolved = next((fault for fault in part.faults if fault.condition == "ResolvedRefs"), None)
    lost = [
        each.section
        for each in own
        if any(fault.condition == "ResolvedRefs" for fault in each.faults) or _expired(each, conditions.now)[0] is not None
    ]
    if unresolved is not None:
        conditions.add("ResolvedRefs", False, unresolved.reason, unresolved.message)
    elif lost:
        conditions.add("ResolvedRefs", False, "ListenersNotResolved", f"References of these listeners lead nowhere: {', '.join(lost)}.")
    else:
        conditions.add("ResolvedRefs", True, "ResolvedRefs", "All references lead to something that can be used.")
    if part.default:
        conditions.add("DefaultGateway", True, "DefaultGateway", "It takes routes that ask for a default Gateway (scope All).")
    if part.insecure:
        message = "A listener lets in clients whose certificates nobody could verify (AllowInsecureFallback)."
        conditions.add("InsecureFrontendValidationMode", True, "ConfigurationChanged", message)
    status: dict[str, Any] = {}
    if part.addresses:
        status["addresses"] = [{"type": "IPAddress", "value": address} for address in part.addresses]
    sets = [each for each in part.sets if any(not other.broken for other in part.listeners if other.owner == each)]
    status["conditions"] = conditions.found
    status["listeners"] = [_listener(conditions.beside(), each, part.listeners, attached) for each in own]
    status["attachedListenerSets"] = len(sets)
    return status


def set_status(conditions: Conditions, key: Key, part: GatewayPart, attached: Attached) -> dict[str, Any]:
    """The status of the ListenerSet `key`, which the Gateway `part` has let in."""
    own = [each for each in part.listeners if each.owner == key]
    wrong = None
    if any(fault.condition == "Accepted" for fault in part.faults):
        wrong = Fault("Accepted", "ParentNotAccepted", f"Gateway {part.namespace}/{part.name} is not accepted.")
    _summary(conditions, own, wrong, "ListenersNotValid")
    return {
        "conditions": conditions.found,
        "listeners": [_listener(conditions.beside(), each, part.listeners, attached) for each in own],
    }


def with_unserved(status: dict[str, Any], unserved: Mapping[str, str]) -> dict[str, Any]:
    """The status of a Gateway whose process can't serve some of its listeners right now: `unserved` says why, by their names."""
    if not unserved:
        return status
    listeners = []
    served = 0
    for listener in status.get("listeners", ()):
        why = unserved.get(listener["name"])
        conditions = [_unprogrammed(each, "Pending", why) for each in listener["conditions"]] if why else listener["conditions"]
        served += any(each["type"] == "Programmed" and each["status"] == "True" for each in conditions)
        listeners.append({**listener, "conditions": conditions})
    whole = status["conditions"]
    if not served:
        whole = [_unprogrammed(each, "AddressNotUsable", "; ".join(unserved.values())) for each in whole]
    return {**status, "conditions": whole, "listeners": listeners}


def _unprogrammed(condition: dict[str, Any], reason: str, why: str) -> dict[str, Any]:
    if condition["type"] != "Programmed" or condition["status"] != "True":
        return condition
    return {**condition, "status": "False", "reason": reason, "message": why}


def _summary(conditions: Conditions, own: Sequence[ListenerPart], wrong: Fault | None, programmed: str) -> None:
    """Accepted and Programmed of what has the listeners `own`."""
    refused = [each.section for each in own if _refusal(each) is not None]
    served = [each for each in own if not each.broken and not _expired(each, conditions.now)[1]]
    names = f"These listeners are not accepted: {', '.join(refused)}."
    # A ListenerSet none of whose listeners can be served adds nothing to its Gateway, and is not accepted (conformance of v1.6).
    nothing = not served if programmed == "ListenersNotValid" else len(refused) == len(own)
    if wrong is not None:
        conditions.add("Accepted", False, wrong.reason, wrong.message)
    elif nothing:
        conditions.add("Accepted", False, "ListenersNotValid", names if refused else "None of the listeners can be served.")
    elif refused:
        conditions.add("Accepted", True, "ListenersNotValid", names)
    else:
        conditions.add("Accepted", True, "Accepted", "It is in force.")
    if wrong is None and served:
        conditions.add("Programmed", True, "Programmed", f"{len(served)} of {len(own)} listeners are served.")
    else:
        reason = programmed if wrong is None or programmed == "Invalid" else wrong.reason
        conditions.add("Programmed", False, reason, wrong.message if wrong is not None else "None of the listeners is served.")


def _refusal(part: ListenerPart) -> Fault | None:
    """Why a listener is not accepted."""
    return next((fault for fault in part.faults if fault.condition in ("Conflicted", "Accepted")), None)


def _listener(conditions: Conditions, part: ListenerPart, all_parts: Sequence[ListenerPart], attached: Attached) -> dict[str, Any]:
    refused = _refusal(part)
    conflict = next((fault for fault in part.faults if fault.condition == "Conflicted"), None)
    unresolved = next((fault for fault in part.faults if fault.condition == "ResolvedRefs"), None)
    _positive(conditions, "Accepted", refused, "Accepted", "It is in force.")
    expired, none_left = _expired(part, conditions.now)
    unresolved = unresolved or expired
    if part.broken or none_left:
        first = conflict or refused or unresolved
        reason = conflict.reason if conflict else "Invalid"
        conditions.add("Programmed", False, reason, first.message if first else "Its Gateway is not accepted.")
    else:
        conditions.add("Programmed", True, "Programmed", "It is served.")
    _positive(conditions, "ResolvedRefs", unresolved, "ResolvedRefs", "All references lead to something that can be used.")
    if conflict is not None:
        conditions.add("Conflicted", True, conflict.reason, conflict.message)
    else:
        conditions.add("Conflicted", False, "NoConflicts", "No other listener is in its way.")
    _overlap(conditions, part, all_parts)
    return {
        "name": part.section,
        "supportedKinds": [{"group": GATEWAY_GROUP, "kind": kind} for kind in part.kinds],
        "attachedRoutes": attached.get((part.owner, part.section), 0),
        "conditions": conditions.found,
    }


def _expired(part: ListenerPart, now: str) -> tuple[Fault | None, bool]:
    """What is to be said of certificates that have ended at `now`, and whether the listener has no other left to show."""
    tls = part.listener.tls
    if tls is None or not tls.certificates:
        return None, False
    moment = datetime.datetime.fromisoformat(now)
    found = [end for chain, _ in tls.certificates if (end := ends(chain)) is not None and end < moment]
    if not found:
        return None, False
    message = f"{len(found)} of its {len(tls.certificates)} certificates expired, the last on {max(found):%Y-%m-%d}; renew it in its Secret"
    return Fault("ResolvedRefs", "InvalidCertificateRef", message), len(found) == len(tls.certificates) and not tls.svid


def _positive(conditions: Conditions, condition: str, fault: Fault | None, reason: str, message: str) -> None:
    conditions.add(condition, fault is None, fault.reason if fault else reason, fault.message if fault else message)


def _overlap(conditions: Conditions, part: ListenerPart, others: Sequence[ListenerPart]) -> None:
    """Says which listeners of the same port end TLS for names that this one is for, too, so that a client may use a connection to the one
    for the other (GEP-3567). Listeners of other resources are not named."""
    if part.listener.tls is None or part.broken:
        return
    host = part.listener.hostname
    beside = [
        other
        for other in others
        if other is not part and other.listener.tls is not None and not other.broken and other.listener.port == part.listener.port
    ]
    hosts = [each for each in beside if covers(host, each.listener.hostname) or covers(each.listener.hostname, host)]
    certificates = [each for each in beside if _shared(part, each)]

    def named(found: list[ListenerPart]) -> str:
        return ", ".join(dict.fromkeys(each.section if each.owner == part.owner else "another resource" for each in found))

    text = [f"The hostname {host} overlaps with that of {named(hosts)}."] if hosts else []
    if certificates:
        text.append(f"Its certificates are for names that those of {named(certificates)} are for, too.")
    if text:
        reason = "OverlappingCertificates" if certificates else "OverlappingHostnames"
        conditions.add("OverlappingTLSConfig", True, reason, " ".join(text))


def _shared(one: ListenerPart, other: ListenerPart) -> bool:
    """Whether a client may take a connection to the one listener for one to the other: a certificate of each is for the same name."""
    mine, theirs = (
        frozenset(name for chain, _ in each.listener.tls.certificates for name in names(chain)) if each.listener.tls else frozenset()
        for each in (one, other)
    )
    # A certificate's wildcard stands for one label (RFC 9525, section 6.3).
    return bool(mine & theirs) or any(
        f"*.{name.partition('.')[2]}" in wild for few, wild in ((mine, theirs), (theirs, mine)) for name in few if name[:2] != "*."
    )
