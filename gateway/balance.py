"""Which endpoint gets the next request: round robin or least request. Pure: state and random numbers in, a choice out.

Who may be chosen at all (weights, ejections) is decided before, in `usable`. Both algorithms are Envoy's (envoyproxy.io, "Supported load
balancers"): round robin is the smooth weighted one of nginx, so that a weight of 5 does not mean five in a row; least request takes two at
random and of them the one with less to do.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Collection, Sequence
from typing import Generic, Literal, Protocol, TypeVar


class Weighted(Protocol):
    """An endpoint, as far as a balancer looks."""

    weight: int
    """Its share; 0 for none."""
    active: int
    """Requests in progress."""


P = TypeVar("P", bound=Weighted)


class Balancer(Protocol[P]):
    """Chooses among the endpoints that it was last given."""

    def replace(self, places: Sequence[P]) -> None:
        """Chooses among `places` (at least one, each of weight 1 or more) from now on; what it knows of those that stay is kept."""
        ...

    def pick(self) -> P:
        """The endpoint for the next request."""
        ...


class RoundRobin(Generic[P]):
    """In turn, and with weights smoothly: of {a: 5, b: 1, c: 1} come a a b a c a a."""

    __slots__ = ("_credit", "_next", "_places", "_total")

    def __init__(self, places: Sequence[P], rng: random.Random) -> None:
        self._places: Sequence[P] = ()
        self._credit: dict[P, int] | None = None
        self._total = 0
        # The workers of a fleet do not all begin with the same endpoint.
        self._next = rng.randrange(len(places))
        self.replace(places)

    def replace(self, places: Sequence[P]) -> None:
        """As `Balancer.replace`."""
        self._places = places
        self._total = sum(place.weight for place in places)
        if all(place.weight == places[0].weight for place in places):
            self._credit = None
        else:
            before = self._credit or {}
            self._credit = {place: before.get(place, 0) for place in places}

    def pick(self) -> P:
        """As `Balancer.pick`. Constant time when all weights are equal, else a walk over the endpoints."""
        credit = self._credit
        if credit is None:
            at = self._next
            if at >= len(self._places):
                at = 0
            self._next = at + 1
            return self._places[at]
        best = self._places[0]
        most = -self._total * len(self._places) - 1
        for place in self._places:
            have = credit[place] = credit[place] + place.weight
            if have > most:
                most, best = have, place
        credit[best] -= self._total
        return best


class LeastRequest(Generic[P]):
    """The power of two choices: two are drawn by weight, and the one with fewer requests for its weight is taken."""

    __slots__ = ("_places", "_rng", "_sums")

    def __init__(self, places: Sequence[P], rng: random.Random) -> None:
        self._rng = rng
        self.replace(places)

    def replace(self, places: Sequence[P]) -> None:
        """As `Balancer.replace`."""
        self._places = places
        self._sums = list(itertools.accumulate(place.weight for place in places))

    def pick(self) -> P:
        """As `Balancer.pick`."""
        places = self._places
        if len(places) == 1:
            return places[0]
        at = self._draw(self._sums[-1], -1)
        first = places[at]
        # The second is drawn from what is left without the first.
        second = places[self._draw(self._sums[-1] - first.weight, at)]
        return second if second.active * first.weight < first.active * second.weight else first

    def _draw(self, total: int, without: int) -> int:
        """The index of one, by weight; `without` is the index of the one that is out (-1: nobody), whose weight `total` lacks."""
        point = self._rng.randrange(total)
        sums = self._sums
        if without >= 0 and point >= sums[without] - self._places[without].weight:
            point += self._places[without].weight
        return bisect.bisect_right(sums, point)


def make(policy: Literal["round_robin", "least_request"], places: Sequence[P], rng: random.Random) -> Balancer[P]:
    """The balancer that `Cluster.balancer` names."""
    return LeastRequest(places, rng) if policy == "least_request" else RoundRobin(places, rng)


def usable(places: Sequence[P], ejected: Collection[P]) -> list[P]:
    """Those that may be chosen: with a weight, and not ejected unless all are. When every endpoint is ejected the detection is more likely
    wrong than right, and failing every request would be worse than trying (Envoy's panic mode)."""
    able = [place for place in places if place.weight > 0]
    return [place for place in able if place not in ejected] or able


def elsewhere(places: Sequence[P], tried: Collection[P], rng: random.Random) -> P | None:
    """For a retry: one that has not been tried yet, by weight; None when all have been."""
    rest = [place for place in places if place not in tried]
    if not rest:
        return None
    return rng.choices(rest, [place.weight for place in rest])[0]
