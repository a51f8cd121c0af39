"""The connections of one cluster, and the requests that wait for one.

A cluster has a place for each endpoint, and a place a lane for each protocol. What is decided is decided elsewhere: who may be chosen and
who is in `gateway.balance`, who is left out in `gateway.outlier`, who gets which connection in `gateway.assign`; this module
keeps the state and does what they say.
"""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

from gateway import outlier
from gateway.assign import assign, casualties
from gateway.balance import Balancer, elsewhere, make, usable
from gateway.connect import Connected, Failed, Result
from gateway.lane import Key, Lane, Place, Shared, Waiter, Way, alpn_of, codec_of, target_of
from gateway.retry import Failure
from gateway.upstream import GatheringUpstreamWire, Upstream, UpstreamWire
from mesh.model import Cluster
from mesh.refusals import Overflow, Refusal

H2_SLOTS = 64
"""Requests that a new HTTP/2 connection is expected to take before it has said how many it takes."""


class Pool:
    """Owns the places, lanes and connections of one cluster."""

    __slots__ = (
        "_balancer",
        "_departed",
        "_next_return",
        "_usable",
        "cluster",
        "connections",
        "ejected",
        "generation",
        "loop",
        "places",
        "rng",
        "shared",
        "sweeper",
        "waiting",
    )

    def __init__(self, shared: Shared, cluster: Cluster) -> None:
        self.shared = shared
        self.loop = shared.loop
        self.sweeper = shared.sweeper
        self.rng = shared.rng
        self.cluster = cluster
        self.places: dict[Key, Place] = {(endpoint.address, endpoint.port): Place(endpoint) for endpoint in cluster.endpoints}
        self.ejected: set[Place] = set()
        self.connections = 0
        """Open or being made."""
        self.waiting = 0
        """Requests that wait for a connection, in all lanes."""
        self.generation = 0
        """Which settings a connection made now has; those of an earlier one are not kept."""
        self._departed: list[Place] = []
        """Not in the configuration any more, but with requests in progress."""
        self._usable: list[Place] = []
        self._balancer: Balancer[Place] | None = None
        self._next_return = math.inf
        self._refresh()

    # Choosing

    def choose(self, tried: tuple[Place, ...]) -> Place | None:
        """The endpoint for the next try, if possible one that has not been tried; None when there is none at all."""
        if self._next_return is not math.inf and self.loop.time() >= self._next_return:
            self._refresh()
        if tried:
            other = elsewhere(self._usable, tried, self.rng)
            if other is not None:
                return other
        balancer = self._balancer
        return None if balancer is None else balancer.pick()

    def has_other(self, tried: tuple[Place, ...]) -> bool:
        """Whether there is an endpoint to go to that has not been tried."""
        return any(place not in tried for place in self._usable)

    def observe(self, place: Place, result: outlier.Result) -> None:
        """Takes the result of a try into account."""
        now = self.loop.time()
        if now >= self._next_return:
            self._refresh()
        ejection = outlier.observe(place.health, result, self.cluster.outlier, now, len(self.ejected), len(self.places))
        if ejection is not None:
            self.shared.ejections[self.cluster.name, ejection.reason.value] += 1
            self._refresh()

    def count_retry(self, failure: Failure) -> None:
        """A request is tried again."""
        self.shared.retries[self.cluster.name, failure.value] += 1

    def _refresh(self) -> None:
        """Works out anew who may be chosen: after an ejection, the end of one, or a change of the endpoints."""
        now = self.loop.time()
        ejected = {place for place in self.places.values() if place.health.ejected(now)}
        for back in self.ejected - ejected:
            back.health.errors = back.health.gateway_errors = 0
        self.ejected = ejected
        self._next_return = min((place.health.until for place in ejected), default=math.inf)
        chosen = usable(list(self.places.values()), ejected)
        self._usable = chosen
        if not chosen:
            self._balancer = None
        elif self._balancer is None:
            self._balancer = make(self.cluster.balancer, chosen, self.rng)
        else:
            self._balancer.replace(chosen)

    # Taking and giving back

    def acquire(self, waiter: Waiter, place: Place, way: Way, fresh: bool) -> Upstream | Refusal | None:
        """A connection that is at hand (not when a `fresh` one is wanted); else None, and `waiter` will be called."""
        lane = place.lanes.get(way)
        if lane is None:
            lane = place.lanes[way] = Lane(place, way, alpn_of(way[0], self.cluster))
        if not fresh:
            connection = lane.take()
            if connection is not None:
                return connection
        if self.waiting >= self.cluster.max_pending:
            lane.forget()
            return Overflow(reason=f"{self.waiting} requests wait for {self.cluster.name}")
        lane.waiting[waiter] = None
        self.waiting += 1
        self._dial_for(lane) if fresh else self._settle(lane)
        return None

    def leave(self, waiter: Waiter, place: Place, way: Way) -> None:
        """`waiter` waits no longer."""
        lane = place.lanes.get(way)
        if lane is not None and waiter in lane.waiting:
            del lane.waiting[waiter]
            self.waiting -= 1
            lane.forget()

    def released(self, connection: Upstream) -> None:
        """As `gateway.upstream.Keeper.released`."""
        if connection.spent or connection.generation != self.generation:
            if not connection.streams:
                self.gone(connection)
            return
        lane = connection.lane
        if connection not in lane.opened:
            return
        if not connection.streams:
            connection.deadline = monotonic() + self.shared.limits.idle_upstream
        if not connection.listed and connection.codec.available:
            connection.listed = True
            lane.free.append(connection)
        if self.waiting:
            self._settle_all(lane)

    def gone(self, connection: Upstream) -> None:
        """As `gateway.upstream.Keeper.gone`."""
        self._close(connection)
        if self.waiting:
            self._settle_all(None)

    def turned_away(self, connection: Upstream) -> None:
        """As `gateway.upstream.Keeper.turned_away`."""
        self.shared.connects[self.cluster.name, "our_certificate_refused"] += 1
        self.observe(connection.lane.place, outlier.Result.GATEWAY_ERROR)

    def freed(self) -> None:
        """A connection that is not the pool's own has ended: there is room for one more."""
        if self.waiting:
            self._settle_all(None)

    def _close(self, connection: Upstream) -> None:
        """Closes a connection, in good order when nothing was going on."""
        lane = self._lane_of(connection)
        if lane is None:
            return
        lane.opened.discard(connection)
        if connection.listed:
            connection.listed = False
            lane.free.remove(connection)
        lane.forget()
        connection.retired = True
        self.sweeper.watched.discard(connection)
        self.connections -= 1
        connection.flush()
        wire = connection.wire
        if connection.streams or connection.spoiled or wire.backlog:
            wire.abort()
        else:
            wire.end(self.shared.limits.linger)

    # Doing what was decided

    def _settle_all(self, first: Lane | None) -> None:
        if first is not None and first.waiting:
            self._settle(first)
        for place in tuple(self.places.values()):
            for lane in tuple(place.lanes.values()):
                if lane.waiting:
                    self._settle(lane)

    def _settle(self, lane: Lane) -> None:
        free = lane.free
        slots = H2_SLOTS if lane.http2 else 1
        room = self.cluster.max_connections - self.connections
        idle = self._idle(lane) if room < len(lane.waiting) else []
        available = [0 if connection.spent else connection.codec.available for connection in free]
        decision = assign(len(lane.waiting), available, len(lane.dials), slots, room, len(idle))
        given: list[tuple[Waiter, Upstream]] = []
        for connection, slots_of_one, granted in zip(tuple(free), available, decision.grants, strict=True):
            for _ in range(granted):
                waiter = next(iter(lane.waiting))
                del lane.waiting[waiter]
                self.waiting -= 1
                given.append((waiter, connection))
            if granted >= slots_of_one:
                free.remove(connection)
                connection.listed = False
        for connection in idle[: decision.evictions]:
            self._close(connection)
        for _ in range(decision.dials):
            self._dial(lane)
        for waiter, connection in given:
            waiter.connected(connection)

    def _dial_for(self, lane: Lane) -> None:
        """A new connection for the one that waits last, if there is room; a kept one that proves alive meanwhile will do as well."""
        if self.connections < self.cluster.max_connections:
            self._dial(lane)
        else:
            self._settle(lane)

    def _idle(self, but: Lane) -> list[Upstream]:
        """Idle connections of other lanes, the one that has been idle for longest first."""
        found = [
            connection
            for place in self.places.values()
            for lane in place.lanes.values()
            if lane is not but
            for connection in lane.free
            if not connection.streams
        ]
        found.sort(key=lambda connection: connection.deadline)
        return found

    def _dial(self, lane: Lane) -> None:
        generation = self.generation
        target = target_of(lane, self.cluster, self.shared.plaintext)

        def done(result: Result) -> None:
            lane.dials.discard(dial)
            if isinstance(result, Connected):
                self._opened(lane, result, generation)
            else:
                self._not_opened(lane, result)

        self.connections += 1
        dial = self.shared.dialer.dial(target, done)
        lane.dials.add(dial)

    def _opened(self, lane: Lane, made: Connected, generation: int) -> None:
        shared = self.shared
        shared.connects[self.cluster.name, "ok"] += 1
        http2 = made.alpn == "h2" or (lane.http2 and self.cluster.tls is None)
        connection = Upstream(
            self,
            codec_of(lane, http2, shared),
            shared.poller,
            multiplexed=http2,
            principal=made.principal,
            buffer=shared.limits.buffer,
            generation=generation,
        )
        connection.lane = lane
        connection.wire = (GatheringUpstreamWire if http2 else UpstreamWire)(shared.poller, made.sock, connection)
        connection.deadline = self.loop.time() + shared.limits.idle_upstream
        lane.opened.add(connection)
        self.sweeper.watched.add(connection)
        connection.wire.start()
        if http2:
            connection.mark()
        connection.listed = True
        lane.free.append(connection)
        # Whoever has waited for this connection may use it, once, also when it was made with settings that have changed since.
        self._settle(lane)
        if generation != self.generation and not connection.streams:
            self.gone(connection)
        elif self.waiting:
            # Who asked for it may have gone meanwhile, and it makes way for whoever waits for another endpoint.
            self._settle_all(None)

    def _not_opened(self, lane: Lane, failed: Failed) -> None:
        self.connections -= 1
        self.shared.connects[self.cluster.name, failed.reason] += 1
        if failed.blame:
            self.observe(lane.place, outlier.Result.GATEWAY_ERROR)
        count = casualties(len(lane.waiting), len(lane.dials), H2_SLOTS if lane.http2 else 1, len(lane.opened))
        for waiter in tuple(lane.waiting)[:count]:
            if waiter not in lane.waiting:
                continue  # what the one before it did next has got it a connection
            self.leave(waiter, lane.place, lane.way)
            waiter.not_connected(failed.refusal)
        if self.waiting:
            self._settle_all(lane)

    def _lane_of(self, connection: Upstream) -> Lane | None:
        """The lane that the connection is open in; None when it has been closed."""
        lane = connection.lane
        return lane if connection in lane.opened else None

    # Changes

    def apply(self, cluster: Cluster) -> None:
        """Goes by `cluster` from now on. What did not change is kept: places, connections, ejections, whose turn it is."""
        before, self.cluster = self.cluster, cluster
        generation = self.generation
        if before.tls != cluster.tls or before.http2 != cluster.http2 or before.proxy_protocol != cluster.proxy_protocol:
            self.generation += 1
        places: dict[Key, Place] = {}
        stale: list[Place] = []
        for endpoint in cluster.endpoints:
            key = (endpoint.address, endpoint.port)
            place = self.places.pop(key, None) or places.get(key) or Place(endpoint)
            if place.endpoint.identities != endpoint.identities:
                stale.append(place)  # it was somebody else when the connections were made
            place.endpoint = endpoint
            place.weight = endpoint.weight
            places[key] = place
        stale.extend(self.places.values())
        self._departed = [place for place in (*self._departed, *self.places.values()) if place.busy]
        self.places = places
        if before.balancer != cluster.balancer:
            self._balancer = None
        self._refresh()
        for place in stale:
            self._retire(place)
            self._move(place)
        if self.generation != generation:
            self._renew()
        if self.waiting:
            self._settle_all(None)

    def renew(self) -> None:
        """The identity has changed, or what may be plaintext: idle connections are closed, busy ones end with their last stream."""
        self.generation += 1
        self._renew()

    def _renew(self) -> None:
        for place in tuple(self.places.values()):
            for lane in place.lanes.values():
                lane.alpn = alpn_of(lane.speech, self.cluster)
            self._retire(place)

    def _move(self, place: Place) -> None:
        """Gives up the connections to `place` that are being made; who waits for them chooses anew."""
        for lane in tuple(place.lanes.values()):
            self._hang_up(lane)
            for waiter in tuple(lane.waiting):
                self.leave(waiter, place, lane.way)
                waiter.moved()

    def _hang_up(self, lane: Lane) -> None:
        for dial in lane.dials:
            dial.cancel()
        self.connections -= len(lane.dials)
        lane.dials.clear()

    def _retire(self, place: Place) -> None:
        for lane in tuple(place.lanes.values()):
            for connection in tuple(lane.opened):
                self._retire_one(connection)

    def _retire_one(self, connection: Upstream) -> None:
        connection.retired = True
        if not connection.streams:
            self.gone(connection)

    def close(self) -> None:
        """Begins no more connections, and closes those that are idle."""
        for place in tuple(self.places.values()):
            self._retire(place)

    def abort(self) -> None:
        """Ends everything now; whoever still waits is told."""
        self._usable = []
        self._balancer = None
        self._next_return = math.inf
        for place in (*self.places.values(), *self._departed):
            for lane in tuple(place.lanes.values()):
                self._hang_up(lane)
                for connection in tuple(lane.opened):
                    connection.lost("the gateway ends")
                    connection.wire.abort()
                for waiter in tuple(lane.waiting):
                    self.leave(waiter, place, lane.way)
                    waiter.not_connected(Overflow(reason="the gateway ends"))

    @property
    def active(self) -> int:
        """Requests in progress."""
        return sum(place.active for place in (*self.places.values(), *self._departed))

    def state(self) -> dict[str, Any]:
        """For people: what `status` and the admin page show."""
        now = self.loop.time()
        endpoints = []
        for place in self.places.values():
            lanes = place.lanes.values()
            endpoints.append(
                {
                    "address": place.name,
                    "name": place.endpoint.name,
                    "weight": place.weight,
                    "active": place.active,
                    "connections": sum(len(lane.opened) for lane in lanes),
                    "idle": sum(1 for lane in lanes for connection in lane.opened if not connection.streams),
                    "connecting": sum(len(lane.dials) for lane in lanes),
                    "waiting": sum(len(lane.waiting) for lane in lanes),
                    "ejected": max(0.0, place.health.until - now),
                    "ejections": place.health.times,
                    "errors": place.health.errors,
                }
            )
        return {"connections": self.connections, "waiting": self.waiting, "endpoints": endpoints}
