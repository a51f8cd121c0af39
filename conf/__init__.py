"""What ships as configuration: the example meshes and the Rego library that evaluates Istio's AuthorizationPolicies (`istio/authz.rego`).

Data only; `tollhouse up` runs `conf/examples/shop` unless told otherwise.
"""
