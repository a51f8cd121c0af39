//go:build tools

// Package tools names the OPA command that the tests build.
package tools

import _ "github.com/open-policy-agent/opa"
