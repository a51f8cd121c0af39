# Istio's AuthorizationPolicy (istio.io, "Authorization Policy" and "Authorization Policy Conditions"), as a library.
#
# `decide` takes a table of rules and the facts of one request. The table is data: it is made of AuthorizationPolicies when the
# configuration is read. The facts are what the rules of that table look at, and nothing else: whoever calls `decide` picks them from the
# rules below, so that an answer depends on no more of the input than its policies do.
#
# A fact is an array of the values that the request has for an attribute; it is empty when there is none. But for request principals they
# are text.
package istio.authz

# The order of evaluation: DENY, then ALLOW; with no ALLOW policy at all, what is not denied passes. AUDIT changes nothing. (CUSTOM comes
# before, and is a question of its own: see `applies`.)
decide(table, facts) := object.union(_verdict(table, facts), _noted(table, facts))

_verdict(table, facts) := {"allowed": false, "rule": _name("DENY", rule), "reason": reason} if {
	rule := _first(table.deny, facts)
	reason := sprintf("AuthorizationPolicy %s denies it by its rule %d", [rule.policy, rule.index])
} else := {"allowed": true, "rule": "no ALLOW policy is there"} if {
	not table.restricted
} else := {"allowed": true, "rule": _name("ALLOW", rule)} if {
	rule := _first(table.allow, facts)
} else := {
	"allowed": false,
	"rule": "no ALLOW policy matches",
	"reason": sprintf("no rule of an ALLOW policy matches (AuthorizationPolicy %s)", [concat(", ", table.restricting)]),
}

# Policies with the action AUDIT that match, for the decision log.
_noted(table, facts) := {"dynamic_metadata": {"audit": names}} if {
	rules := table.audit.rules
	names := sort({rules[number].policy | some number in _candidates(table.audit, facts); _fits(rules[number], facts)})
	count(names) > 0
} else := {}

# Whether one of the rules of a CUSTOM policy's table matches, so that its provider is to be asked: not allowed by this question alone.
applies(table, facts) := {"allowed": false, "rule": _name("CUSTOM", rule), "reason": reason} if {
	rule := _first(table.custom, facts)
	reason := sprintf("AuthorizationPolicy %s has %s asked by its rule %d", [rule.policy, table.provider, rule.index])
} else := {"allowed": true, "rule": "no CUSTOM policy matches"}

_name(action, rule) := sprintf("%s %s rules[%d]", [action, rule.policy, rule.index])

# The first rule of a table that matches, in the order of the policies.
_first(table, facts) := [rule |
	some number in sort(_candidates(table, facts))
	rule := table.rules[number]
	_fits(rule, facts)
][0]

# The rules that may match: those that are found by a value which they demand, and those that are not to be found so.
_candidates(table, facts) := array.concat(table.rest, [number |
	some fact, by_value in table.keys
	some value in facts[fact]
	some number in by_value[value]
])

# All conditions, and one group of each list of them.
_fits(rule, facts) if {
	_all_of(rule.all, facts)
	every groups in rule.any {
		some conditions in groups
		_all_of(conditions, facts)
	}
}

_all_of(conditions, facts) if {
	every condition in conditions {
		_holds(condition, facts[condition.fact])
	}
}

# `in`: one of the matchers must match one of the values, if there are any; `out`: none may.
_holds(condition, values) if {
	_wanted(condition, values)
	not _unwanted(condition, values)
}

_wanted(condition, _) if not condition["in"]

_wanted(condition, values) if _any(condition["in"], values)

_unwanted(condition, values) if _any(condition.out, values)

# Whether one of the values is matched. Matchers are by kind; those of a kind are asked together.
_any(matchers, values) if _any_text(matchers, values)

_any(matchers, values) if {
	some pair in matchers.pairs
	some value in values
	_any_text(pair.issuer, [value.issuer])
	_any_text(pair.subject, [value.subject])
}

_any_text(matchers, values) if {
	some value in values
	matchers.exact[value]
}

_any_text(matchers, values) if strings.any_prefix_match(values, matchers.prefix)

_any_text(matchers, values) if strings.any_suffix_match(values, matchers.suffix)

_any_text(matchers, values) if {
	some pattern in matchers.regex
	some value in values
	regex.match(pattern, value)
}

_any_text(matchers, values) if {
	some network in matchers.network
	some value in values
	net.cidr_contains(network, value)
}

_any_text(matchers, values) if {
	matchers.present
	some value in values
	value != ""
}

# Facts about the connection.

principal := [value | value := input.attributes.source.principal; value != ""]

# The namespace in a SPIFFE ID (spiffe://<trust domain>/ns/<namespace>/sa/<service account>).
namespace := [parts[at + 1] |
	some text in principal
	parts := split(text, "/")
	some at, part in parts
	part == "ns"
	at > 2
	at < count(parts) - 2
]

service_account := [sprintf("%s/%s", [parts[4], parts[6]]) |
	some text in principal
	parts := split(text, "/")
	count(parts) == 7
	parts[3] == "ns"
	parts[5] == "sa"
]

source_ip := [value | value := input.attributes.source.address.socketAddress.address]

# The client's address as trusted proxies and gateways tell it; that of the connection where none does.
remote_ip := [value] if {
	value := input.attributes.contextExtensions.client
} else := source_ip

destination_ip := [value | value := input.attributes.destination.address.socketAddress.address]

destination_port := [format_int(value, 10) | value := input.attributes.destination.address.socketAddress.portValue]

# Names of hosts are not case-sensitive; the values that they are compared with are in lower case.
sni := [lower(value) | value := input.attributes.tlsSession.sni; value != ""]

# Facts about the request.

method := [value | value := input.attributes.request.http.method]

host := [lower(value) | value := input.attributes.request.http.host]

# The path without its query.
path := [split(split(value, "?")[0], "#")[0] | value := input.attributes.request.http.path]

header(name) := [value | value := input.attributes.request.http.headers[name]]

# A header that is there several times is one value with commas in the input: the whole of it, and each part.
header_parts(name) := array.concat(header(name), [part |
	some value in header(name)
	contains(value, ",")
	some piece in split(value, ",")
	part := trim_space(piece)
])

# Facts about a verified token. Callers read the claims, each by its whole path, so that an answer depends on no other; `found` has the
# claim's value, if there is one.

request_principal(issuers, subjects) := [{"issuer": issuer, "subject": subject} |
	some issuer in issuers
	some subject in subjects
	is_string(issuer)
	is_string(subject)
]

# A claim that is text or a list of texts.
claim(found) := array.concat(
	[value | some value in found; is_string(value)],
	[value | some values in found; is_array(values); some value in values; is_string(value)],
)

# A claim of words with spaces between them (`scope`, `permission`), or a list of them.
words(found) := [word |
	some value in claim(found)
	some word in split(value, " ")
	word != ""
]
