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

token := io.jwt.encode_sign({"alg": "HS256"}, {"sub": "alice"}, {"kty": "oct", "k": "c2VjcmV0"})

with_authorization(value) := {"attributes": {"request": {"http": {"headers": {"authorization": value}}}}}

test_a_request_has_parts if {
	request.method == "GET" with input as asked
	request.host == "shop.example" with input as asked
	request.area == "orders" with input as asked
}

test_a_header_is_found_in_any_case if {
	request.header("X-Tenant") == "a" with input as asked
	not request.header("x-other") with input as asked
}

test_claims_of_a_bearer_token if {
	request.claims.sub == "alice" with input as with_authorization(concat(" ", ["Bearer", token]))
}

test_no_claims_without_one if {
	not request.claims with input as with_authorization("Basic YTpi")
	not request.claims with input as with_authorization("Bearer nonsense")
	not request.claims with input as asked
}
