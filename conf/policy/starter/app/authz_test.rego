package app.authz_test

import data.app.authz

grants := {"readers": {
	"callers": ["spiffe://shop.example/ns/shop/sa/web"],
	"methods": ["GET", "HEAD"],
	"areas": ["catalog"],
}}

asked(name, method, path) := decision if {
	decision := authz.decision with input as {
		"attributes": {
			"source": {"principal": concat("", ["spiffe://shop.example/ns/shop/sa/", name])},
			"request": {"http": {"method": method}},
		},
		"parsed_path": split(trim_prefix(path, "/"), "/"),
	}
		with data.app.grants as grants
}

by_nobody(method, path) := decision if {
	decision := authz.decision with input as {
		"attributes": {"request": {"http": {"method": method}}},
		"parsed_path": split(trim_prefix(path, "/"), "/"),
	}
		with data.app.grants as grants
}

test_a_grant_allows if {
	asked("web", "GET", "/catalog/1") == {"allowed": true, "rule": "readers"}
}

test_another_method_is_denied if {
	not asked("web", "POST", "/catalog/1").allowed
}

test_another_area_is_denied if {
	not asked("web", "GET", "/orders/1").allowed
}

test_another_caller_is_denied if {
	asked("batch", "GET", "/catalog/1").http_status == 403
}

test_nobody_is_asked_who_they_are if {
	by_nobody("GET", "/catalog/1").http_status == 401
}

test_anybody_may_ask_whether_it_is_alive if {
	by_nobody("GET", "/healthz").allowed
}
