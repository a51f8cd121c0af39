# METADATA
# description: Who may call what in the shop. Everything that no rule names is denied.
package shop.authz

web := "spiffe://shop.example/ns/shop/sa/web"

orders := "spiffe://shop.example/ns/shop/sa/orders"

payments := "spiffe://shop.example/ns/shop/sa/payments"

batch := "spiffe://shop.example/ns/shop/sa/batch"

caller := input.attributes.source.principal

method := input.attributes.request.http.method

gateway := input.attributes.contextExtensions.gateway

area := input.parsed_path[0]

# METADATA
# entrypoint: true
decision := {"allowed": true, "rule": min(allowing)} if count(allowing) > 0

else := {
	"allowed": false,
	"http_status": 403,
	"reason": "no rule lets this caller do that here",
	"body": "Denied: no rule lets this caller do that here.\n",
}

allowing contains "web reads the catalog" if {
	gateway != "edge/egress"
	caller == web
	method == "GET"
	area == "catalog"
}

allowing contains "web reads and places orders" if {
	gateway != "edge/egress"
	caller == web
	method in {"GET", "POST"}
	area == "orders"
}

allowing contains "orders takes payments" if {
	gateway != "edge/egress"
	caller == orders
	method == "POST"
	area == "payments"
}

allowing contains "batch reads the catalog" if {
	gateway != "edge/egress"
	caller == batch
	method == "GET"
	area == "catalog"
}

allowing contains "payments talks to the bank" if {
	gateway == "edge/egress"
	caller == payments
}
