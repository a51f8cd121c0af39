# METADATA
# description: Who asks, by the certificate.
# schemas:
#   - input: schema.input
package lib.caller

# METADATA
# description: The SPIFFE ID; undefined for a caller without a certificate.
id := input.attributes.source.principal

# METADATA
# description: The trust domain, as in spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME.
trust_domain := split(id, "/")[2]

# METADATA
# description: The namespace, as in spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME.
namespace := split(id, "/")[4] if split(id, "/")[3] == "ns"

# METADATA
# description: The service account, as in spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME.
service_account := split(id, "/")[6] if split(id, "/")[5] == "sa"
