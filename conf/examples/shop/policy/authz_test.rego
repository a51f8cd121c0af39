package shop.authz_test

import data.shop.authz

asked(caller, method, path, gateway) := decision if {
	decision := authz.decision with input as {
		"attributes": {
			"source": {"principal": concat("", ["spiffe://shop.example/ns/shop/sa/", caller])},
			"request": {"http": {"method": method}},
			"contextExtensions": {"gateway": gateway},
		},
		"parsed_path": split(trim_prefix(path, "/"), "/"),
	}
}

test_web_reads_the_catalog if asked("web", "GET", "/catalog/1", "edge/ingress").allowed

test_web_may_not_write_the_catalog if not asked("web", "POST", "/catalog/1", "edge/ingress").allowed

test_web_places_orders if asked("web", "POST", "/orders/1", "edge/ingress").allowed

test_web_may_not_pay if not asked("web", "POST", "/payments/1", "edge/ingress").allowed

test_orders_pays if asked("orders", "POST", "/payments/1", "edge/eastwest").allowed

test_orders_may_not_read_payments if not asked("orders", "GET", "/payments/1", "edge/eastwest").allowed

test_batch_reads_the_catalog_only if {
	asked("batch", "GET", "/catalog/1", "edge/ingress").allowed
	not asked("batch", "GET", "/orders/1", "edge/ingress").allowed
}

test_only_payments_leaves if {
	asked("payments", "POST", "/transfers", "edge/egress").allowed
	not asked("web", "GET", "/catalog/1", "edge/egress").allowed
}
