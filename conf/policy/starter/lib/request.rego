# METADATA
# description: What is asked for. Each rule reads as little of the request as it needs, so that answers can be kept.
# schemas:
#   - input: schema.input
package lib.request

# METADATA
# description: GET, POST, ...
method := input.attributes.request.http.method

# METADATA
# description: The first segment of the path; empty for /.
area := input.parsed_path[0]

# METADATA
# description: The authority that the request is for.
host := input.attributes.request.http.host

# METADATA
# description: A header by its name in any case; undefined when the request has none. Name it by a constant, or all headers are read.
header(name) := input.attributes.request.http.headers[lower(name)]

# METADATA
# description: What the request's token says, once the gateway has verified it (RequestAuthentication); undefined for a request without one.
claims := input.attributes.metadataContext.filterMetadata["envoy.filters.http.jwt_authn"].payload
