"""Which of OPA's builtins are functions of their arguments: the audited list.

A kept decision is sound only if evaluating again would give the same answer. OPA marks some builtins as nondeterministic, but not
all (`crypto.x509.parse_and_verify_certificates` reads the clock and is not marked), so the list here is the other way round: what is
on it is known to look at its arguments only; what is not makes a policy volatile. A new builtin is volatile until somebody has read
its source (OPA's `v1/topdown`).

Left out with a reason:

* the clock: `time.now_ns`, `io.jwt.decode_verify` (checks `exp` and `nbf` against it), and
  `crypto.x509.parse_and_verify_certificates` with its sibling `..._with_options`
* chance: `rand.intn`, `uuid.rfc4122`, `io.jwt.encode_sign` and `io.jwt.encode_sign_raw` (some signatures are random)
* the world outside: `http.send`, `net.lookup_ip_addr`, `opa.runtime`, `json.match_schema` and `json.verify_schema` (they may fetch
  remote references)
* said to somebody: `trace`, `internal.print`, `internal.test_case`
* signing of requests: `providers.aws.sign_req`

The conversions of `time.*` take the instant as an argument. They read the time zone database, which is taken to be the same in a fleet.
"""

from __future__ import annotations

from typing import Final

KINDS: Final = frozenset(("is_array", "is_boolean", "is_null", "is_number", "is_object", "is_set", "is_string", "type_name"))
"""Builtins that look at their argument's JSON type and no further."""

LENGTHS: Final = frozenset(("count",))
"""Builtins that look at the number of elements (characters of a string) and no further."""

# fmt: off
_PURE: Final[dict[str, tuple[str, ...]]] = {
    "": (
        "abs", "all", "and", "any", "assign", "cast_array", "cast_boolean", "cast_null", "cast_object", "cast_set", "cast_string",
        "ceil", "concat", "contains", "div", "endswith", "eq", "equal", "floor", "format_int", "gt", "gte", "indexof", "indexof_n",
        "intersection", "lower", "lt", "lte", "max", "min", "minus", "mul", "neq", "or", "plus", "product", "re_match", "rem",
        "replace", "round", "set_diff", "sort", "split", "sprintf", "startswith", "substring", "sum", "to_number", "trim",
        "trim_left", "trim_prefix", "trim_right", "trim_space", "trim_suffix", "union", "upper", "walk",
    ),
    "array": ("concat", "flatten", "reverse", "slice",),
    "base64": ("decode", "encode", "is_valid",),
    "base64url": ("decode", "encode", "encode_no_pad",),
    "bits": ("and", "lsh", "negate", "or", "rsh", "xor",),
    "crypto": ("md5", "parse_private_keys", "sha1", "sha256",),
    "crypto.hmac": ("equal", "md5", "sha1", "sha256", "sha512",),
    "crypto.x509": ("parse_certificate_request", "parse_certificates", "parse_keypair", "parse_rsa_private_key",),
    "glob": ("match", "quote_meta",),
    "graph": ("reachable", "reachable_paths",),
    "graphql": ("is_valid", "parse", "parse_and_verify", "parse_query", "parse_schema", "schema_is_valid",),
    "hex": ("decode", "encode",),
    "internal": ("member_2", "member_3", "template_string",),
    "io.jwt": (
        "decode", "verify_eddsa", "verify_es256", "verify_es384", "verify_es512", "verify_hs256", "verify_hs384", "verify_hs512",
        "verify_ps256", "verify_ps384", "verify_ps512", "verify_rs256", "verify_rs384", "verify_rs512",
    ),
    "json": ("filter", "is_valid", "marshal", "marshal_with_options", "patch", "remove", "unmarshal",),
    "net": ("cidr_contains", "cidr_contains_matches", "cidr_expand", "cidr_intersects", "cidr_is_valid", "cidr_merge", "cidr_overlap",),
    "numbers": ("range", "range_step",),
    "object": ("filter", "get", "keys", "remove", "subset", "union", "union_n",),
    "regex": ("find_all_string_submatch_n", "find_n", "globs_match", "is_valid", "match", "replace", "split", "template_match",),
    "rego": ("parse_module",),
    "rego.metadata": ("chain", "rule",),
    "semver": ("compare", "is_valid",),
    "strings": ("any_prefix_match", "any_suffix_match", "count", "render_template", "replace_n", "reverse", "split_n",),
    "time": ("add_date", "clock", "date", "diff", "format", "parse_duration_ns", "parse_ns", "parse_rfc3339_ns", "weekday",),
    "units": ("parse", "parse_bytes",),
    "uri": ("is_valid", "parse",),
    "urlquery": ("decode", "decode_object", "encode", "encode_object",),
    "uuid": ("parse",),
    "yaml": ("is_valid", "marshal", "unmarshal",),
}
# fmt: on

PURE: Final = KINDS | LENGTHS | frozenset(f"{group}.{name}" if group else name for group, names in _PURE.items() for name in names)
"""Builtins whose answer is a function of their arguments."""
