//go:build tools

// Package tools names the peer that is built for the comparison.
package tools

import _ "github.com/envoyproxy/ratelimit/src/service_cmd"
