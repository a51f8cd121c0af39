//go:build tools

// Package tools names the HTTP/2 conformance tester that the tests build.
package tools

import _ "github.com/summerwind/h2spec/cmd/h2spec"
