"""Is there a token left. What goes in: token questions; what comes out: grants that never add up to more than `burst + rate x time`.

* `quota.bucket`  -- the token bucket, pure; `quota.script` is the same in Lua, for Redis
* `quota.calendar` -- the windows of limits by the calendar
* `quota.store`   -- `Store`, with `quota.memory` and `quota.redis_store` (over `quota.redis_link`, with a `quota.breaker` for each server)
* `quota.lessee`  -- `QuotaLessee`, a `mesh.questions.Lessee`: leases tokens by the batch (`quota.lease`) and spends them locally
* `quota.slots`   -- concurrency limits, pure; `quota.slots_script` in Lua; `quota.slot_lessee` leases slots (`quota.slot_lease`)
* `quota.service` -- the rate-limit service v3 (RLS) for Envoy and others; `quota.descriptors` says which limit a descriptor means
* `quota.headers` -- `RateLimit`, `RateLimit-Policy` and `Retry-After`
"""
