package lib.caller_test

import data.lib.caller

web := {"attributes": {"source": {"principal": "spiffe://shop.example/ns/shop/sa/web"}}}

test_a_caller_has_parts if {
	caller.id == "spiffe://shop.example/ns/shop/sa/web" with input as web
	caller.trust_domain == "shop.example" with input as web
	caller.namespace == "shop" with input as web
	caller.service_account == "web" with input as web
}

test_nobody_has_none if {
	not caller.id with input as {"attributes": {}}
	not caller.namespace with input as {"attributes": {}}
}

test_another_form_of_id_has_no_namespace if {
	not caller.namespace with input as {"attributes": {"source": {"principal": "spiffe://shop.example/web"}}}
}
