package lib.request_test

import data.lib.request

asked := {
	"attributes": {"request": {"http": {
		"method": "GET",
		"host": "shop.example",
		"headers": {"x-tenant": "a"},
	}}},
	"parsed_path": ["orders", "1"],
}

with_claims(claims) := {"attributes": {"metadataContext": {"filterMetadata": {"envoy.filters.http.jwt_authn": {"payload": claims}}}}}

test_a_request_has_parts if {
	request.method == "GET" with input as asked
	request.host == "shop.example" with input as asked
	request.area == "orders" with input as asked
}

test_a_header_is_found_in_any_case if {
	request.header("X-Tenant") == "a" with input as asked
	not request.header("x-other") with input as asked
}

test_claims_of_a_verified_token if {
	request.claims.sub == "alice" with input as with_claims({"sub": "alice"})
}

test_no_claims_without_one if {
	not request.claims with input as asked
}
