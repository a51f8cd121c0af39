package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// boundMemory ends the process when it uses more than limit bytes.
//
// Three bounds, each for what the others can't see: the collector works harder from four fifths on; a watchdog ends the
// process with a message when its resident set passes the limit; and a single huge allocation, which the watchdog would
// see too late, fails at once on the address space (the runtime then ends the process).
func boundMemory(limit int64) error {
	debug.SetGCPercent(400) // what is alive is small; collecting at every doubling of it costs an eighth of each evaluation
	debug.SetMemoryLimit(limit / 5 * 4)
	pages := int64(os.Getpagesize())
	space, _, err := statm()
	if err != nil {
		return err
	}
	// The runtime reserves address space in large pieces that it does not use: leave it room for some.
	most := uint64(space*pages + 2*limit + 256<<20)
	if err := unix.Setrlimit(unix.RLIMIT_AS, &unix.Rlimit{Cur: most, Max: most}); err != nil {
		return err
	}
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			if _, resident, err := statm(); err == nil && resident*pages > limit {
				fmt.Fprintf(os.Stderr, "opa-worker: %d MiB in use, %d MiB allowed: ending\n", resident*pages>>20, limit>>20)
				os.Exit(exitMemory)
			}
		}
	}()
	return nil
}

// statm returns the process's address space and resident set, in pages.
func statm() (space, resident int64, err error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(text))
	if len(fields) < 2 {
		return 0, 0, fmt.Errorf("/proc/self/statm reads %q", text)
	}
	if space, err = strconv.ParseInt(fields[0], 10, 64); err != nil {
		return 0, 0, err
	}
	resident, err = strconv.ParseInt(fields[1], 10, 64)
	return space, resident, err
}
