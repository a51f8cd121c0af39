// Command tool is the two ends of a measurement: `tool upstream` answers, `tool load` asks.
//
// Both are the same for every contender, and neither is counted in a contender's CPU.
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "upstream":
			upstream(os.Args[2:])
			return
		case "load":
			load(os.Args[2:])
			return
		}
	}
	fmt.Fprintln(os.Stderr, "usage: tool upstream|load [flags]")
	os.Exit(2)
}
