# METADATA
# description: Who may call what. What no rule allows is denied.
# schemas:
#   - input: schema.input
package app.authz

import data.lib.caller
import data.lib.request

# METADATA
# description: The answer to a request; an AccessPolicy names it.
# entrypoint: true
decision := {"allowed": true, "rule": min(allowing)} if count(allowing) > 0

else := {
	"allowed": false,
	"http_status": 401,
	"reason": "this needs a certificate, and the caller has shown none",
	"body": "Denied: who are you?\n",
} if {
	not caller.id
}

else := {
	"allowed": false,
	"http_status": 403,
	"reason": "no rule lets this caller do that",
	"body": "Denied: no rule lets this caller do that.\n",
}

# METADATA
# description: The names of the rules that allow the request.
allowing contains "anybody may ask whether it is alive" if {
	request.method == "GET"
	request.area == "healthz"
}

allowing contains name if {
	some name, grant in data.app.grants
	caller.id in grant.callers
	request.method in grant.methods
	request.area in grant.areas
}
